"""Everything a finetuning call is built from, and where it continues."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from segmenter.checkpoint import check_same_settings, load_checkpoint
from segmenter.config import TrainConfig
from segmenter.data import Classes, TrainingCrops, WholeImages, default_workers, read_classes
from segmenter.dataset import TRAIN, VAL, DatasetDescription, Pair, read_description
from segmenter.encoder import EncoderShape
from segmenter.labels import check_labels
from segmenter.layout import CHECKPOINT
from segmenter.model import Segmenter, SegmenterShape
from segmenter.optimisation import make_optimizer
from segmenter.pretrained import read_encoder_weights, shape_of, start_encoder
from segmenter.schedule import BatchPlan, make_batch_plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The dataset: description, classes, and the pairs of both splits."""

    description: DatasetDescription
    classes: Classes
    train: Sequence[Pair]
    val: Sequence[Pair]

    def settings(self) -> dict[str, Any]:
        """What has to be the same for a run to continue."""
        return {
            "dataset": self.description.name,
            "num_classes": len(self.classes),
            "num_train": len(self.train),
            "num_val": len(self.val),
        }


@dataclass(kw_only=True)
class State:
    """Where a run stands.

    loss_sum: over the steps of this epoch. seconds, waited_seconds: spent on this epoch's
    training, and of that waiting for data. total_seconds: of the run, over all restarts.
    scores: of the newest evaluation, plain; best_mean_iou: percent.
    """

    epochs_completed: int = 0
    steps_completed: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    waited_seconds: float = 0.0
    total_seconds: float = 0.0
    scores: dict[str, Any] | None = None
    best_mean_iou: float | None = None


@dataclass(kw_only=True)
class Run:
    """What stays the same during a call.

    model and prepared share their weights: plain for saving and evaluating, wrapped for training.
    """

    config: TrainConfig
    accelerator: Accelerator
    task: Task
    plan: BatchPlan
    workers: int
    crops: TrainingCrops
    images: WholeImages
    model: Segmenter
    prepared: nn.Module
    optimizer: Optimizer

    @property
    def output_dir(self) -> Path:
        """Where everything goes."""
        return self.config.run.output_dir


def read_task(config: TrainConfig) -> Task:
    """The dataset, looked over. Raises ValueError for what does not fit."""
    description = read_description(config.run.dataset)
    classes = read_classes(description)
    task = Task(
        description=description,
        classes=classes,
        train=description.pairs(TRAIN),
        val=description.pairs(VAL),
    )
    for pairs in (task.train, task.val):
        check_labels(description, pairs, len(classes), everything=False)
    return task


def build_run(config: TrainConfig, accelerator: Accelerator, task: Task) -> tuple[Run, State]:
    """Build the run; continue from its checkpoint if there is one. Writes nothing.

    Raises ValueError for what the user can fix.
    """
    plan = make_batch_plan(
        len(task.train), config.optimisation.batch_size, accelerator.num_processes
    )
    checkpoint = _own_checkpoint(config, task)
    torch.manual_seed(config.optimisation.seed)
    if checkpoint is None:
        model, state = _start(config, task), State()
    else:
        model = Segmenter(SegmenterShape.from_plain(checkpoint["shape"]), config.model)
        model.load_state_dict(checkpoint["model"])
        state = State(**checkpoint["state"])
    model.to(accelerator.device)
    optimizer = make_optimizer(model, config.optimisation)
    if checkpoint is not None:
        optimizer.load_state_dict(checkpoint["optimizer"])
    workers = config.run.workers
    return Run(
        config=config,
        accelerator=accelerator,
        task=task,
        plan=plan,
        workers=default_workers() if workers is None else workers,
        crops=TrainingCrops(
            task.description, task.train, config.protocol, config.optimisation.seed
        ),
        images=WholeImages(task.description, task.val, config.protocol),
        model=model,
        prepared=accelerator.prepare_model(model),
        optimizer=optimizer,
    ), state


def all_settings(config: TrainConfig, task: Task) -> dict[str, Any]:
    """What a checkpoint's `config` and result.json's `settings` hold."""
    return {**config.settings(), **task.settings()}


def checkpoint_content(run: Run, state: State) -> dict[str, Any]:
    """Everything needed to continue, and to evaluate and predict without the dataset."""
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "shape": run.model.shape.plain(),
        "classes": list(run.task.classes.names),
        "palette": run.task.classes.palette.tolist(),
        "dataset": {
            "name": run.task.description.name,
            "reduce_zero_label": run.task.description.reduce_zero_label,
        },
        "protocol": run.config.protocol.described(),
        "epochs_completed": state.epochs_completed,
        "steps_completed": state.steps_completed,
        "state": dict(vars(state)),
        "config": all_settings(run.config, run.task),
    }


def describe(run: Run, state: State) -> None:
    """Tell what is about to happen."""
    optimisation, accelerator, task = run.config.optimisation, run.accelerator, run.task
    logger.info(
        "%s with %s, %s: %d training and %d test images, %d classes",
        run.config.model.model, run.config.model.decoder, task.description.name,
        len(task.train), len(task.val), len(task.classes),
    )  # fmt: skip
    logger.info(
        "batch %d on %d process(es), %d steps per epoch; %s, rate %g; recipe %s",
        run.plan.batch_size, run.plan.processes, run.plan.steps_per_epoch,
        optimisation.optimizer, optimisation.lr, run.config.run.recipe,
    )  # fmt: skip
    logger.info(
        "%s, precision %s, %d loader workers per process; from epoch %d, step %d of %d epochs",
        accelerator.device, accelerator.mixed_precision.replace("no", "fp32"), run.workers,
        state.epochs_completed + 1, state.steps_completed, optimisation.epochs,
    )  # fmt: skip


def _own_checkpoint(config: TrainConfig, task: Task) -> dict[str, Any] | None:
    """What an earlier call with the same settings left. Raises ValueError for anything else."""
    path = config.run.output_dir / CHECKPOINT
    if config.run.resume == "never" or not path.exists():
        if config.run.resume == "required":
            raise ValueError(f"--resume required: {path} does not exist")
        return None
    checkpoint = load_checkpoint(path)
    check_same_settings(checkpoint["config"], all_settings(config, task), path)
    return checkpoint


def _start(config: TrainConfig, task: Task) -> Segmenter:
    """A new model, its encoder from `--init`."""
    init, crop = config.run.init, config.protocol.crop_size
    if init is None:
        patch = config.model.patch_size or config.model.encoder.patch_size
        encoder = EncoderShape(
            model=config.model.model, patch_size=patch, in_channels=3, grid=-(-crop // patch)
        )
        logger.info("the encoder starts from random weights")
        return Segmenter(_shape(config, encoder, task), config.model)
    weights = read_encoder_weights(init)
    stored = shape_of(weights, config.model, init)
    encoder = EncoderShape(
        model=stored.model,
        patch_size=stored.patch_size,
        in_channels=stored.in_channels,
        grid=-(-crop // stored.patch_size),
    )
    model = Segmenter(_shape(config, encoder, task), config.model)
    fresh = start_encoder(model.encoder, weights, init)
    logger.info(
        "the encoder starts from %s, %d input channels; fresh: %s",
        init, encoder.in_channels, ", ".join([*fresh, "the decoder"]),
    )  # fmt: skip
    return model


def _shape(config: TrainConfig, encoder: EncoderShape, task: Task) -> SegmenterShape:
    return SegmenterShape(
        encoder=encoder,
        decoder="linear" if config.model.decoder == "linear" else "mask_transformer",
        decoder_layers=config.model.decoder_layers,
        num_classes=len(task.classes),
        normalization=config.protocol.normalization,
    )
