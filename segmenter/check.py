"""`train --check`: everything that can be known before the work starts. Writes nothing.

torch is loaded only to look into checkpoints.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.environment import world_size
from common.files import check_output_folder
from common.images import find_images
from common.made_alike import check_same
from common.options import older_values
from common.parsed import ProbeResult, Result, read_json
from common.step_files import CHECKPOINT, RESULT
from engine.schedule import BatchPlan, named_epochs
from engine.trackers import check_trackers
from engine.vit import IMAGE_CHANNELS, transformer_parameters
from segmenter.config import (
    AUXILIARY_WIDTH,
    GROUPS,
    PROBE_GROUPS,
    RANDOM,
    ProbeConfig,
    TrainConfig,
)
from segmenter.dataset import TRAIN, VAL, DatasetDescription, Pair, count_classes, read_description


@dataclass(frozen=True, kw_only=True)
class Task:
    """The dataset: description, number of classes, and the pairs of both splits."""

    description: DatasetDescription
    num_classes: int
    train: Sequence[Pair]
    val: Sequence[Pair]


def check_training(config: TrainConfig) -> Task:
    """The task, looked over. Raises ValueError for what would stop `train` from starting."""
    task = check_start(config)
    _refuse_lone_images(config, plan_batches(config, task, world_size()))
    check_trackers(config.run.log_with)
    return task


def check_start(config: TrainConfig | ProbeConfig) -> Task:
    """The same for what `train` and `probe` both start from."""
    description, init = read_description(config.run.dataset), config.init
    task = Task(
        description=description,
        num_classes=count_classes(description),
        train=description.pairs(TRAIN),
        val=description.pairs(VAL),
    )
    check_output_folder(config.run.output_dir, reads=description.reads)
    if init != RANDOM:
        if not init.is_file():
            flag = "--init" if isinstance(config, TrainConfig) else "CHECKPOINT"
            raise ValueError(f"{flag} {init} does not exist; give a checkpoint, or {RANDOM}")
        from segmenter.encoder import check_encoder_file

        check_encoder_file(init, config.model)
    return task


def check_probe(config: ProbeConfig) -> Task:
    """The same for `probe`."""
    folder = config.run.image_folder
    if folder is not None:
        find_images(folder)
        check_output_folder(config.run.output_dir, reads=[folder])
    return check_start(config)


def plan_batches(config: TrainConfig, task: Task, processes: int) -> BatchPlan:
    """How the run's batches are split; a dataset smaller than a batch makes one step of an epoch.

    Raises ValueError if a process would have nothing to do.
    """
    effective = min(config.optimisation.batch_size, len(task.train))
    if effective < processes:
        raise ValueError(
            f"a batch of {effective} images cannot be spread over {processes} processes; raise "
            "--batch-size or use fewer processes"
        )
    share = -(-effective // processes)
    return BatchPlan(
        num_images=len(task.train),
        effective_batch_size=effective,
        processes=processes,
        micro_batch_size=min(share, config.run.most_at_once or share),
        seed=config.optimisation.seed,
    )


def _refuse_lone_images(config: TrainConfig, plan: BatchPlan) -> None:
    """UPerNet's norms take the mean over a part of a batch, pooled to a pixel per image."""
    if config.model.decoder == "upernet" and config.run.device_batch_size == "auto":
        raise ValueError(
            "--device-batch-size auto would let the GPU decide what --decoder upernet learns: its "
            "norms are over the images at once; give a number"
        )
    most = plan.micro_batch_size
    alone = plan.processes == 1 and 1 in (most, plan.effective_batch_size % most)
    if config.model.decoder == "upernet" and alone:
        raise ValueError(
            f"a batch of {plan.effective_batch_size} in parts of {most} leaves an image alone, "
            "which --decoder upernet cannot train on: change --batch-size or --device-batch-size"
        )


def all_settings(config: TrainConfig | ProbeConfig, task: Task) -> dict[str, Any]:
    """What has to stay the same: a checkpoint's `config`, result.json's `settings`."""
    return {
        **config.settings(),
        "dataset": task.description.name,
        "num_classes": task.num_classes,
        "num_train": len(task.train),
        "num_val": len(task.val),
    }


def earlier_output(config: TrainConfig | ProbeConfig, task: Task) -> Path | None:
    """What this call goes on from: result.json (all is done), checkpoint.pth, or nothing.

    Raises ValueError if it was made with other settings, or is not what --resume asks for.
    """
    folder = config.run.output_dir
    there = (folder / name for name in (RESULT, CHECKPOINT) if os.path.lexists(folder / name))
    found = next(there, None)  # a link to nothing is not nothing
    config.run.check_folder(config.leaves, is_run=found is not None)
    if isinstance(config, TrainConfig):
        config.run.check_resume(found)
    if found is None:
        return None
    is_training = isinstance(config, TrainConfig)
    if found.name == RESULT:
        stored = read_json(found, Result if is_training else ProbeResult)["settings"]
    else:
        from segmenter.loading import load_checkpoint

        stored = load_checkpoint(found, lazily=True)["config"]
    groups = GROUPS if is_training else PROBE_GROUPS
    older = older_values(*groups.values())
    check_same(stored, all_settings(config, task), older, what=str(found))
    return found


def facts(config: TrainConfig | ProbeConfig, task: Task) -> dict[str, Any]:
    """What the run amounts to, in plain values, for `--check --json`."""
    known = {
        "images": {TRAIN: len(task.train), VAL: len(task.val)},
        "classes": task.num_classes,
        "settings": all_settings(config, task),
    }
    return {**known, **_training_facts(config, task)} if isinstance(config, TrainConfig) else known


def _training_facts(config: TrainConfig, task: Task) -> dict[str, Any]:
    optimisation, plan = config.optimisation, plan_batches(config, task, world_size())
    named = named_epochs(optimisation.epochs, optimisation.warmup_fraction)
    rates = [(e, optimisation.rate_at(e / optimisation.epochs), name) for e, name in named.items()]
    is_open = config.run.device_batch_size == "auto"  # until a GPU is measured
    return {
        "batch": {
            "effective": plan.effective_batch_size,
            "per_process": "auto" if is_open else plan.micro_batch_size,
            "processes": plan.processes,
            "accumulation_steps": "auto" if is_open else plan.accumulation_steps,
            "steps_per_epoch": plan.steps_per_epoch,
        },
        "learning_rate": {"peak": optimisation.lr, "points": rates},
        "epochs": optimisation.epochs,
        "evaluations": optimisation.evaluations,
        "checkpoint_bytes": _checkpoint_bytes(config, task.num_classes),
    }


def _checkpoint_bytes(config: TrainConfig, num_classes: int) -> int:
    """About the size of a checkpoint: fp32 weights, and what the optimizer keeps of each."""
    model, size = config.model, config.model.encoder
    patch = model.patch_size or size.patch_size
    patches = (config.protocol.crop_size // patch) ** 2
    parameters = (
        transformer_parameters(size.width, size.depth)
        + size.width * (IMAGE_CHANNELS * patch**2 + patches + num_classes)
    )  # fmt: skip
    if model.decoder == "mask_transformer":
        parameters += transformer_parameters(size.width, model.decoder_layers) + 3 * size.width**2
    moments = 1 if config.optimisation.optimizer == "sgd" else 2
    if model.decoder == "upernet":  # UPerHead 115 and pyramid 12 times the width's square
        parameters += 127 * size.width**2 + 9 * size.width * AUXILIARY_WIDTH
        parameters += size.depth * size.heads * 4 * patches  # relative positions
    return 4 * parameters * (1 + moments)
