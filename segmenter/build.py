"""Everything a finetuning call is built from, and what it leaves in its files."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from common.environment import versions
from common.interruption import Interruption
from common.lock import hold
from common.parsed import parsed_plain
from common.step_files import LOCK, RESULT
from engine.checkpoint import load_optimizer, load_weights
from engine.devices import device_name, make_accelerator, refuse_disagreement
from engine.layers import recompute_activations
from engine.memory import largest_micro_batch
from engine.trainer import MicroBatch, TrainingRun
from engine.update import GuardedUpdate
from engine.vit import IMAGE_CHANNELS
from segmenter import labels
from segmenter.check import Task, all_settings, earlier_output, plan_batches
from segmenter.config import (
    RANDOM,
    SCORES,
    EncoderConfig,
    ModelConfig,
    ProbeConfig,
    ProtocolConfig,
    TrainConfig,
)
from segmenter.data import (
    Batch,
    TrainingCrops,
    WholeImages,
    training_batches,
)
from segmenter.dataset import Classes, read_classes
from segmenter.encoder import EncoderShape, read_encoder_weights, shape_of, start_encoder
from segmenter.loading import load_checkpoint
from segmenter.model import Segmenter, SegmenterShape, TrainingLoss
from segmenter.optimisation import make_optimizer
from segmenter.schedule import BatchPlan, learning_rate, step_seed

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "timm", "accelerate", "onedl-mmsegmentation", "onedl-mmcv")


@contextmanager
def begin(
    config: TrainConfig | ProbeConfig, task: Task
) -> Iterator[tuple[Accelerator, Interruption, Path | None]]:
    """Devices, labels and the output directory of a run, and what it goes on from there.

    Raises ValueError for what the user can fix.
    """
    folder = config.run.output_dir
    with Interruption() as interruption:
        accelerator = make_accelerator(config.run)
        for pairs in (task.train, task.val):
            labels.check_labels(task.description, pairs, most=labels.MOST_CHECKED, forgiving=True)
        with hold(folder / LOCK, folder) if accelerator.is_main_process else nullcontext():
            accelerator.wait_for_everyone()  # from here on nobody else writes there
            found = earlier_output(config, task)
            if found is not None and found.name == RESULT:
                logger.info("nothing to do: %s is there", found)
            yield accelerator, interruption, found


@dataclass(kw_only=True)
class State:
    """Where a run stands.

    loss_sum, unreadable_images: over the steps of this epoch. seconds, waited_seconds: spent on
    this epoch's training, and of that waiting for data. total_seconds: of the epochs before and
    of all evaluations, over all restarts.
    scores: of the newest evaluation, plain; best_mean_iou: percent.
    """

    epochs_completed: int = 0
    steps_completed: int = 0
    loss_sum: float = 0.0
    unreadable_images: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0
    total_seconds: float = 0.0
    scores: dict[str, Any] | None = None
    best_mean_iou: float | None = None

    def add(self, sums: list[float]) -> None:
        """Loss and unreadable images of some steps."""
        loss, unreadable = sums
        self.loss_sum += loss
        self.unreadable_images += round(unreadable)


@dataclass(kw_only=True)
class Run(TrainingRun):
    """What stays the same during a call.

    model and prepared share their weights: plain for saving and evaluating, wrapped for training.
    """

    remedy: ClassVar[str] = (
        "the last checkpoint is from before. A lower --lr or --clip-grad 1 may help"
    )
    config: TrainConfig
    task: Task
    classes: Classes
    plan: BatchPlan
    crops: TrainingCrops
    images: WholeImages
    model: Segmenter

    @property
    def num_images(self) -> int:
        """Of the training set."""
        return len(self.task.train)

    @property
    def images_per_pass(self) -> int:
        """At most."""
        share = -(-self.plan.effective_batch_size // self.plan.processes)
        return min(share, self.config.run.most_at_once or share)

    @property
    def passes_per_step(self) -> int:
        """Micro-batches, on the process that has most."""
        return -(-self.plan.effective_batch_size // (self.plan.processes * self.images_per_pass))

    @property
    def values_per_pass(self) -> int:
        """Pixels, whether they count or not."""
        return self.images_per_pass * self.config.protocol.crop_size**2

    def micro_batches(self, state: State, batches: Iterator[Batch]) -> Iterator[MicroBatch]:
        """Those of a step: parts of one batch of the loader."""
        step = state.epochs_completed * self.plan.steps_per_epoch + state.steps_completed
        seed = step_seed(self.config.optimisation.seed, step, self.accelerator.process_index)
        torch.manual_seed(seed)  # of dropout and drop path
        batch = next(batches)
        self.unreadable.note(batch.unreadable)
        parts = batch.parts(self.images_per_pass)
        skipped = len(batch.unreadable)  # counted with the first part
        for number, (*inputs, valid_pixels) in enumerate(parts, start=1):
            yield MicroBatch(
                inputs=tuple(inputs),
                num_values=valid_pixels.sum().item(),
                counts=(skipped if number == 1 else 0,),
                is_last=number == len(parts),
            )

    def learning_rate(self, state: State) -> float:
        """The rate of the step that comes next."""
        done = state.epochs_completed + state.steps_completed / self.plan.steps_per_epoch
        return learning_rate(self.config.optimisation, done / self.config.optimisation.epochs)

    @property
    def output_dir(self) -> Path:
        """Where everything goes."""
        return self.config.run.output_dir

    def batches(self, state: State, epochs: int) -> Iterator[Batch]:
        """This process's batches from where the state stands until so many epochs are completed."""
        return training_batches(
            self.crops,
            self.plan,
            rank=self.accelerator.process_index,
            start=(state.epochs_completed, state.steps_completed),
            epochs=epochs,
            workers=self.config.run.loader_workers,
            pin_memory=self.accelerator.device.type == "cuda",
        )


def build_run(
    config: TrainConfig,
    accelerator: Accelerator,
    interruption: Interruption,
    task: Task,
    checkpoint_path: Path | None,
) -> tuple[Run, State]:
    """Build the run as the checkpoint has it, or anew. Writes nothing. Raises ValueError."""
    checkpoint = load_checkpoint(checkpoint_path) if checkpoint_path else {}
    torch.manual_seed(config.optimisation.seed)
    if checkpoint_path is None:
        model = start_model(config.init, config.model, config.protocol, task.num_classes)
        state = State()
    else:
        shape = SegmenterShape.from_plain(checkpoint["shape"], checkpoint_path)
        model = Segmenter(shape, config.model)
        load_weights(model, checkpoint["model"], checkpoint_path)
        state = parsed_plain(State, checkpoint["state"], f"{checkpoint_path}: state")
    refuse_disagreement(accelerator, state.epochs_completed, state.steps_completed)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        # UPerNet's means are over the batch of all GPUs; on CPUs torch has no such layer.
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(accelerator.device)
    optimizer = make_optimizer(model, config.optimisation)
    update = GuardedUpdate(
        optimizer, config.optimisation.clip_grad, scales_loss=accelerator.mixed_precision == "fp16"
    )
    if checkpoint_path is not None:
        load_optimizer(optimizer, checkpoint["optimizer"], checkpoint_path)
        update.continue_from(checkpoint, checkpoint_path)
    if config.run.activation_checkpointing:
        recompute_activations(model)
    description, plan = task.description, plan_batches(config, task, accelerator.num_processes)
    loss = TrainingLoss(model, description.ignore_index)
    config = _fitted(config, plan, accelerator, loss, optimizer)
    run = Run(
        config=config,
        accelerator=accelerator,
        interruption=interruption,
        task=task,
        classes=read_classes(description),
        plan=plan,
        crops=TrainingCrops(description, task.train, config.protocol, config.optimisation.seed),
        images=WholeImages(description, task.val, config.protocol),
        model=model,
        prepared=accelerator.prepare_model(loss),
        update=update,
    )
    _describe(run, state)
    return run, state


def _fitted(
    config: TrainConfig,
    plan: BatchPlan,
    accelerator: Accelerator,
    loss: TrainingLoss,
    optimizer: Optimizer,
) -> TrainConfig:
    """With a number for --device-batch-size auto, by passes over empty crops."""
    most, device, side = config.run.most_at_once, accelerator.device, config.protocol.crop_size

    def loss_of(images: int) -> Tensor:
        crops = torch.zeros(images, IMAGE_CHANNELS, side, side, dtype=torch.uint8, device=device)
        return loss(crops, crops[:, 0], torch.full((images, 2), side, device=device))

    if config.run.device_batch_size == "auto" and device.type == "cuda":
        share = -(-plan.effective_batch_size // plan.processes)
        most = largest_micro_batch(accelerator, loss, optimizer, loss_of, share=share)
    return replace(config, run=replace(config.run, device_batch_size=most))


def start_model(
    init: Path | Literal["random"],
    config: EncoderConfig,
    protocol: ProtocolConfig,
    num_classes: int,
) -> Segmenter:
    """A new model, its encoder from `init`; with a linear decoder if only the encoder is given."""
    patch, in_channels = config.patch_size or config.encoder.patch_size, IMAGE_CHANNELS
    if init != RANDOM:
        weights = read_encoder_weights(init)
        stored = shape_of(weights, config, init)
        patch, in_channels = stored.patch_size, stored.in_channels
    whole = config if isinstance(config, ModelConfig) else None
    shape = SegmenterShape(
        encoder=EncoderShape(
            model=config.model, patch_size=patch, in_channels=in_channels,
            grid=-(-protocol.crop_size // patch),
        ),
        decoder=whole.decoder if whole else "linear",
        decoder_layers=whole.decoder_layers if whole else 0,
        num_classes=num_classes,
        normalization=protocol.normalization,
    )  # fmt: skip
    model = Segmenter(shape, whole)
    if init == RANDOM:
        logger.info("the encoder starts from random weights")
    else:
        fresh = start_encoder(model.encoder, weights, init)
        logger.info(
            "the encoder starts from %s, %d input channels; fresh: %s",
            init, in_channels, ", ".join([*fresh, "the decoder"]),
        )  # fmt: skip
    return model


def _describe(run: Run, state: State) -> None:
    """Tell what is about to happen."""
    optimisation, accelerator, task = run.config.optimisation, run.accelerator, run.task
    logger.info(
        "%s with %s, %s: %d training and %d test images, %d classes",
        run.config.model.model, run.config.model.decoder, task.description.name,
        len(task.train), len(task.val), task.num_classes,
    )  # fmt: skip
    logger.info(
        "batch %d on %d process(es), %d steps per epoch; %s, rate %g; recipe %s",
        run.plan.batch_size, run.plan.processes, run.plan.steps_per_epoch,
        optimisation.optimizer, optimisation.lr, run.config.run.recipe,
    )  # fmt: skip
    logger.info(
        "%s, precision %s, %d loader workers per process; from epoch %d, step %d of %d epochs",
        accelerator.device, accelerator.mixed_precision.replace("no", "fp32"),
        run.config.run.loader_workers, state.epochs_completed + 1, state.steps_completed,
        optimisation.epochs,
    )  # fmt: skip


def checkpoint_content(run: Run, state: State) -> dict[str, Any]:
    """Everything needed to continue, and to evaluate and predict without the dataset."""
    return {
        **run.update.for_checkpoint(),
        "model": run.model.state_dict(),
        "optimizer": run.update.optimizer.state_dict(),
        "shape": dataclasses.asdict(run.model.shape),
        "classes": list(run.classes.names),
        "palette": run.classes.palette.tolist(),
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


def result_content(run: Run, state: State) -> dict[str, Any]:
    """result.json: the last epoch's scores (percent, 0 to 100) and all that they depend on.

    seeds, mean_iou_std: of the days when one result could hold several finetunings.
    """
    config = run.config
    assert state.scores is not None
    scores = {name: state.scores[name] for name in SCORES}
    return {
        "format_version": 1,
        "epochs": config.optimisation.epochs,
        "num_updates": config.optimisation.epochs * run.plan.steps_per_epoch,
        **scores,
        "best_mean_iou": state.best_mean_iou,
        "class_iou": state.scores["class_iou"],
        "unreadable_images": state.scores.get("unreadable_images", 0),
        "seed": config.optimisation.seed,
        "seeds": [{"seed": config.optimisation.seed, **scores}],
        "mean_iou_std": None,
        "minutes": state.total_seconds / 60,
        "recipe": config.recipe(),
        **depends_on(config, run.accelerator, run.task),
    }


def depends_on(
    config: TrainConfig | ProbeConfig, accelerator: Accelerator, task: Task
) -> dict[str, Any]:
    """What scores depend on, in every result.json."""
    return {
        "protocol": config.protocol.described(),
        "model": config.model.model,
        "init": str(config.init),
        "dataset": {
            "name": task.description.name,
            "num_classes": task.num_classes,
            "num_val": len(task.val),
        },
        "versions": versions(PACKAGES),
        "device": device_name(accelerator.device),
        "num_processes": accelerator.num_processes,
        "settings": all_settings(config, task),
    }
