"""`train --dry-run check`: all that can be known before the work starts. Writes nothing.

`benchmark.py` calls `check_training` and `check_probe` in its own process, which never loads torch:
what takes torch to look into is judged apart, by `look_inside`.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import check_output_folder
from common.formats import ProbeResult, Result, read_json
from common.images import find_images
from common.options import check_same, older_values
from common.step_files import CHECKPOINT, RESULT
from engine.logbook import check_trackers, unusual
from engine.schedule import BatchPlan
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
class Dataset:
    """The dataset: description, number of classes, and the pairs of both splits."""

    description: DatasetDescription
    num_classes: int
    train: Sequence[Pair]
    val: Sequence[Pair]


@dataclass(frozen=True, kw_only=True)
class ScoringFacts:
    """What a run will be. train, val: images; checkpoint_bytes: about, 0 where none is kept."""

    train: int
    val: int
    checkpoint_bytes: int = 0


def read_dataset(path: Path) -> Dataset:
    """What there is to train on and to score. Raises ValueError for a dataset that is not whole."""
    description = read_description(path)
    return Dataset(
        description=description,
        num_classes=count_classes(description),
        train=description.pairs(TRAIN),
        val=description.pairs(VAL),
    )


def check_training(config: TrainConfig, dataset: Dataset, *, processes: int) -> ScoringFacts:
    """What the run will be. Raises ValueError for what would stop it at once."""
    plan = plan_batches(config, dataset, processes)
    _check_start(config, dataset)
    _refuse_lone_images(config, plan)
    size = _checkpoint_bytes(config, dataset.num_classes)  # for the disk, before there is a model
    return ScoringFacts(train=len(dataset.train), val=len(dataset.val), checkpoint_bytes=size)


def check_probe(config: ProbeConfig, dataset: Dataset) -> ScoringFacts:
    """The same for `probe`."""
    folder = config.run.image_folder
    if folder is not None:
        find_images(folder)
        check_output_folder(config.run.output_dir, reads=[folder])
    _check_start(config, dataset)
    return ScoringFacts(train=len(dataset.train), val=len(dataset.val))


def _check_start(config: TrainConfig | ProbeConfig, dataset: Dataset) -> None:
    check_output_folder(config.run.output_dir, reads=dataset.description.reads)
    if config.init != RANDOM and not config.init.is_file():
        flag = "--init" if isinstance(config, TrainConfig) else "CHECKPOINT"
        raise ValueError(f"{flag} {config.init} does not exist; give a checkpoint, or {RANDOM}")


def plan_batches(config: TrainConfig, dataset: Dataset, processes: int) -> BatchPlan:
    """How the run's batches are split; a dataset smaller than a batch makes one step of an epoch.

    Raises ValueError if a process would have nothing to do.
    """
    effective = min(config.optimisation.batch_size, len(dataset.train))
    if effective < processes:
        raise ValueError(
            f"a batch of {effective} images cannot be spread over {processes} processes; raise "
            "--batch-size or use fewer processes"
        )
    share = -(-effective // processes)  # rounded up: of the process that has most
    return BatchPlan(
        num_images=len(dataset.train),
        effective_batch_size=effective,
        processes=processes,
        micro_batch_size=min(share, config.run.most_at_once or share),
        seed=config.optimisation.seed,
    )


def _refuse_lone_images(config: TrainConfig, plan: BatchPlan) -> None:
    """UPerNet's norms take the mean over a part of a batch, pooled to a pixel per image."""
    if config.model.decoder != "upernet":
        return  # the other decoders normalise each token by itself
    if config.run.device_batch_size == "auto":
        raise ValueError(
            "--device-batch-size auto would let the GPU decide what --decoder upernet learns: its "
            "norms are over the images at once; give a number"
        )
    most = plan.micro_batch_size
    if plan.processes == 1 and 1 in (most, plan.effective_batch_size % most):
        raise ValueError(
            f"a batch of {plan.effective_batch_size} in parts of {most} leaves an image alone, "
            "which --decoder upernet cannot train on: change --batch-size or --device-batch-size"
        )


def needs_torch(config: TrainConfig | ProbeConfig) -> bool:
    """Whether there is something that only `look_inside`, or reading a checkpoint, can judge."""
    trackers = isinstance(config, TrainConfig) and unusual(config.run.log_with)
    # result.json, where it is there, is read first and takes no torch.
    return bool(config.init != RANDOM or trackers or _found(config, CHECKPOINT) is not None)


def look_inside(config: TrainConfig | ProbeConfig) -> None:
    """Raise ValueError unless checkpoint and trackers are what the run needs; loads torch."""
    if config.init != RANDOM:
        from segmenter.encoder import check_encoder_file

        check_encoder_file(config.init, config.model)
    if isinstance(config, TrainConfig):
        check_trackers(config.run.log_with)


def all_settings(config: TrainConfig | ProbeConfig, dataset: Dataset) -> dict[str, Any]:
    """What has to stay the same: a checkpoint's `config`, result.json's `settings`."""
    return {
        **config.settings(),
        "dataset": dataset.description.name,
        "num_classes": dataset.num_classes,
        "num_train": len(dataset.train),
        "num_val": len(dataset.val),
    }


def earlier_output(config: TrainConfig | ProbeConfig, dataset: Dataset) -> Path | None:
    """What this call goes on from: result.json (all is done), checkpoint.pth, or nothing.

    Raises ValueError if it was made with other settings, or is not what --resume asks for.
    """
    # The result comes last: where it is there, all is done.
    found = _found(config, RESULT) or _found(config, CHECKPOINT)
    config.run.check_folder(config.leaves, is_run=found is not None)
    is_training = isinstance(config, TrainConfig)
    if isinstance(config, TrainConfig):
        config.run.check_resume(found)
    if found is None:
        return None
    if found.name == RESULT:
        stored = read_json(found, Result if is_training else ProbeResult)["settings"]
    else:
        from segmenter.loading import load_checkpoint

        stored = load_checkpoint(found, lazily=True)["config"]
    older = older_values(*(GROUPS if is_training else PROBE_GROUPS).values())
    check_same(stored, all_settings(config, dataset), older, what=str(found))
    return found


def _found(config: TrainConfig | ProbeConfig, name: str) -> Path | None:
    path = config.run.output_dir / name
    return path if os.path.lexists(path) else None  # a link to nothing is not nothing


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
    # SGD keeps a momentum of each weight, AdamW two means.
    moments = 1 if config.optimisation.optimizer == "sgd" else 2
    if model.decoder == "upernet":  # UPerHead 115 and pyramid 12 times the width's square
        parameters += 127 * size.width**2 + 9 * size.width * AUXILIARY_WIDTH
        parameters += size.depth * size.heads * 4 * patches  # relative positions
    return 4 * parameters * (1 + moments)
