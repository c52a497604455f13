"""`probe`: tokens of the training images once, then what a frozen encoder knows of the others."""

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.files import write_json
from common.interruption import Interruption
from common.progress import Counter
from common.step_files import PROBE_AREAS, RESULT
from engine.devices import working_in
from segmenter.check import Task, earlier_output
from segmenter.config import ProbeConfig
from segmenter.data import WholeImages
from segmenter.dataset import read_classes
from segmenter.evaluate import each_group, evaluate_model
from segmenter.finetune import check_some_labels, depends_on, start_model
from segmenter.frozen import ClassFolders, NearestNeighbours, Tokens, fit_linear, rankme
from segmenter.model import Segmenter

logger = logging.getLogger(__name__)


class _StoppedError(Exception):
    """A signal came."""


def probe(config: ProbeConfig, task: Task) -> bool:
    """Leave areas and, last, result.json. task: what `read_task` found.

    Returns False if stopped by a signal. Raises ValueError for what the user can fix, and
    RuntimeError when it fails.
    """
    check_some_labels(task)
    with Interruption() as interruption, working_in(config.run) as accelerator:
        found = earlier_output(config, task)
        if found is not None:
            logger.info("nothing to do: %s is there", found)
            return True
        torch.manual_seed(config.run.seed)  # as `train` does: the same random weights
        model = start_model(config.init, config.model, config.protocol, task.num_classes)
        run = _Run(config, task, accelerator, interruption, model.to(accelerator.device))
        try:
            answers = run.answers()
        except _StoppedError:
            logger.warning("stopped by a signal; run the same command again")
            return False
        if accelerator.is_main_process:
            about = {"seed": config.run.seed, "seconds": run.seconds}
            about |= depends_on(config, accelerator, task)
            write_json(config.run.output_dir / RESULT, {"format_version": 1, **answers, **about})
        accelerator.wait_for_everyone()
        return True


@dataclass
class _Run:
    config: ProbeConfig
    task: Task
    accelerator: Accelerator
    interruption: Interruption
    model: Segmenter
    seconds: dict[str, float] = field(default_factory=dict)  # of what was done, by its name

    def answers(self) -> dict[str, Any]:
        """What result.json says of each probe."""
        asked, task, answers = self.config.run, self.task, dict[str, Any]()
        protocol = dataclasses.replace(self.config.protocol, multi_scale=False)  # tokens of one
        images = WholeImages(task.description, task.train, protocol)
        found = self.tokens("tokens", images)
        for name, fit in (("linear", fit_linear), ("knn", NearestNeighbours)):
            if name in asked.probes:
                answers[name] = self.scores(name, partial(fit, *found, task.num_classes))
                logger.info("%s: mean IoU %.2f", name, answers[name]["mean_iou"])
        if "rankme" in asked.probes:
            answers["rankme"] = rankme(found[0])
            logger.info("RankMe %.1f of %d", answers["rankme"], found[0].shape[1])
        if asked.image_folder is not None:
            folders = ClassFolders(asked.image_folder, images)
            if len(folders.classes) > 1:
                answers["image_knn"] = self.image_knn(folders)
            else:
                logger.info("no image kNN: %s has no two class folders", asked.image_folder)
        return answers

    def tokens(self, name: str, images: WholeImages) -> tuple[Tensor, Tensor]:
        """Features and labels of images, the same on every process."""
        tokens = Tokens(self.model, images, self.config.run.seed)
        # Without a decoder, a model's logits are its tokens.
        self.over(name, images, each_group, tokens.add, decoder=nn.Identity)
        return tokens.total(self.accelerator)

    def scores(self, name: str, decoder: Callable[[], nn.Module]) -> dict[str, Any]:
        """Of the validation images, as `train` scores them; leaves their areas."""
        task = self.task
        images = WholeImages(task.description, task.val, self.config.protocol)
        areas = self.over(name, images, evaluate_model, decoder=decoder)
        if self.accelerator.is_main_process:
            path = self.config.run.output_dir / PROBE_AREAS[name]
            areas.save(path, [pair.name for pair in task.val])
        return areas.scores(read_classes(task.description).names)

    def image_knn(self, folders: ClassFolders) -> dict[str, Any]:
        """Each image by all but itself, so that one folder serves: no other images are needed."""
        means, labels = self.tokens("image_knn", folders)
        classes = len(folders.classes)
        predicted = NearestNeighbours(means, labels, classes).of_the_others().argmax(1)
        accuracy = 100 * (predicted == labels).double().mean().item()
        return {"accuracy": accuracy, "num_images": len(labels), "num_classes": classes}

    def over(
        self, name: str, images: WholeImages, work: Callable[..., Any], *more: Any,
        decoder: Callable[[], nn.Module],
    ) -> Any:  # fmt: skip
        """What `each_group` or `evaluate_model` finds with this decoder, told and timed."""
        began = time.monotonic()  # fitting the decoder counts, too
        self.model.decoder = decoder()
        with Counter(name, total=len(images)) as counter:
            found = work(
                self.accelerator, self.model, images, self.config.run, *more,
                on_progress=counter.reach if self.accelerator.is_main_process else None,
                interruption=self.interruption,
            )  # fmt: skip
        if found is None:
            raise _StoppedError
        self.seconds[name] = time.monotonic() - began
        return found
