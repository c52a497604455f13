"""`probe`: tokens of the training images once, then what a frozen encoder knows of the others."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.files import write_json
from common.interruption import Interruption
from common.layout import PROBE_AREAS, RESULT
from common.progress import Counter
from segmenter.build import begin, depends_on, start_model
from segmenter.check import Task
from segmenter.classes import read_classes
from segmenter.config import ProbeConfig
from segmenter.data import WholeImages
from segmenter.evaluate import each_group, evaluate_model
from segmenter.frozen import NearestNeighbours, fit_linear, rankme
from segmenter.metrics import Areas
from segmenter.model import Segmenter
from segmenter.tokens import FolderImages, MeanTokens, TrainingTokens

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class _Run:
    """What stays the same, and the seconds of each stage."""

    config: ProbeConfig
    task: Task
    accelerator: Accelerator
    interruption: Interruption
    model: Segmenter
    seconds: dict[str, float] = field(default_factory=dict)
    areas: dict[str, Areas] = field(default_factory=dict)

    @contextlib.contextmanager
    def stage(self, name: str, images: WholeImages) -> Iterator[dict[str, Any]]:
        """Times it; yields how it is to be told and stopped."""
        began = time.monotonic()
        with Counter(name, total=len(images)) as counter:
            tell = counter.reach if self.accelerator.is_main_process else None
            yield {"on_progress": tell, "interruption": self.interruption}
        self.seconds[name] = time.monotonic() - began


def probe(config: ProbeConfig, task: Task) -> bool:
    """Leave result.json and areas. task: what `check_probe` made of the config.

    Returns False if stopped by a signal, with nothing written. Raises ValueError for what the
    user can fix, and RuntimeError when it fails.
    """
    with begin(config, task) as (accelerator, interruption, found):
        if found is not None:
            return True
        torch.manual_seed(config.run.seed)  # as `train` does: the same random weights
        model = start_model(config.init, config.model, config.protocol, task.num_classes)
        run = _Run(
            config=config, task=task, accelerator=accelerator, interruption=interruption,
            model=model.to(accelerator.device),
        )  # fmt: skip
        answers = _answers(run)
        if answers is None:
            logger.warning("stopped by a signal; nothing was written")
            return False
        if accelerator.is_main_process:
            folder = config.run.output_dir
            for name, areas in run.areas.items():
                areas.save(folder / PROBE_AREAS[name], [pair.name for pair in task.val])
            shared = depends_on(config, accelerator, task)
            about = {"seed": config.run.seed, "seconds": run.seconds, **shared}
            write_json(folder / RESULT, {"format_version": 1, **answers, **about})
        accelerator.wait_for_everyone()
        return True


def _answers(run: _Run) -> dict[str, Any] | None:
    """What result.json says of each probe; None if stopped."""
    config, task = run.config, run.task
    answers: dict[str, Any] = {}
    protocol = dataclasses.replace(config.protocol, multi_scale=False)
    images = WholeImages(task.description, task.train, protocol)
    found = _collect(run, "tokens", images, TrainingTokens(run.model, images, config.run.seed))
    if found is None:
        return None
    logger.info("%d training tokens of %d features", *found[0].shape)
    for name, make in (("linear", fit_linear), ("knn", NearestNeighbours)):
        if name not in config.run.probes:
            continue
        val = WholeImages(task.description, task.val, config.protocol)
        with run.stage(name, val) as told:
            run.model.decoder = make(*found, task.num_classes)
            areas = evaluate_model(run.accelerator, run.model, val, config.run, **told)
        if areas is None:
            return None
        run.areas[name] = areas
        answers[name] = areas.scores(read_classes(task.description).names)
        logger.info("%s: mean IoU %.2f", name, answers[name]["mean_iou"])
    if "rankme" in config.run.probes:
        with run.stage("rankme", images):
            answers["rankme"] = rankme(found[0])
        logger.info("RankMe %.1f", answers["rankme"])
    if config.run.image_folder is not None:
        return _with_image_knn(run, answers, FolderImages(config.run.image_folder, images))
    return answers


def _with_image_knn(
    run: _Run, answers: dict[str, Any], images: FolderImages
) -> dict[str, Any] | None:
    """Also the class of each image by the others, where there are classes."""
    classes = len(images.classes)
    if classes < 2:
        logger.info(
            "image kNN is left out: %s has no two class folders", run.config.run.image_folder
        )
        return answers
    found = _collect(run, "image_knn", images, MeanTokens(run.model, images))
    if found is None:
        return None
    voters = NearestNeighbours(*found, classes)
    right = voters.votes(voters.bank, without_self=True).argmax(1) == found[1]
    accuracy = 100 * right.double().mean().item()
    told = {"accuracy": accuracy, "num_images": len(right), "num_classes": classes}
    return {**answers, "image_knn": told}


def _collect(
    run: _Run, name: str, images: WholeImages, into: TrainingTokens | MeanTokens
) -> tuple[Tensor, Tensor] | None:
    """Features and labels of images, on every process; None if stopped."""
    run.model.decoder = nn.Identity()
    with run.stage(name, images) as told:
        unreadable = each_group(
            run.accelerator, run.model, images, run.config.run, into.add, **told
        )
    return None if unreadable is None else into.total(run.accelerator)
