"""Everything a pretraining call is built from, and where it continues."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from common.interruption import Interruption, leave_signals_to_the_main_process
from engine.checkpoint import load_optimizer, load_weights
from engine.devices import make_accelerator, refuse_disagreement
from engine.layers import recompute_activations
from engine.memory import largest_micro_batch
from engine.trainer import MicroBatch, TrainingRun
from engine.update import GuardedUpdate
from engine.vit import IMAGE_CHANNELS
from mae.checkpoint import open_own_checkpoint
from mae.config import PretrainConfig, make_method
from mae.controls import SegmentSource
from mae.data import Batch, FixedImages, MaskedImages, allow_many_files, collate
from mae.listing import Listing, make_listing
from mae.model import MaskedAutoencoder
from mae.official import read_official_weights, start_from_official
from mae.optimisation import make_optimizer
from mae.reconstruct import FIXED_SET_SIZE, unpack_fixed_set
from mae.schedule import BatchPlan, learning_rate, make_batch_plan

logger = logging.getLogger(__name__)

# What is summed over an epoch, in this order; part of every checkpoint.
EPOCH_SUMS = ("loss", "coverage", "coverage_square", "unreadable")


@dataclass
class State:
    """Where a run stands.

    sums: [4] float64, see EPOCH_SUMS, over the steps and processes of this epoch.
    seconds, waited_seconds: spent on this epoch, and of that waiting for data.
    """

    sums: Tensor = field(default_factory=lambda: torch.zeros(len(EPOCH_SUMS), dtype=torch.float64))
    epochs_completed: int = 0
    steps_completed: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0

    @property
    def unreadable_images(self) -> float:
        """Of this epoch."""
        return self.sums[EPOCH_SUMS.index("unreadable")].item()

    def add(self, sums: list[float]) -> None:
        """Those of some steps."""
        self.sums += torch.tensor(sums, dtype=torch.float64)


@dataclass(kw_only=True)
class Run(TrainingRun):
    """What stays the same during a call."""

    remedy: ClassVar[str] = (
        "the last checkpoint is from before. A lower --base-lr or --clip-grad 1 may help"
    )
    config: PretrainConfig
    plan: BatchPlan
    listing: Listing
    images: MaskedImages
    heldout: FixedImages
    fixed_set: Batch
    model: MaskedAutoencoder  # plain, for saving and evaluating

    @property
    def num_images(self) -> int:
        """Of the training set."""
        return self.plan.num_images

    @property
    def passes_per_step(self) -> int:
        """Micro-batches."""
        return self.plan.accumulation_steps

    @property
    def values_per_pass(self) -> int:
        """Pixels and channels of a micro-batch, hidden or not."""
        return self.plan.micro_batch_size * self.config.model.image_size**2 * IMAGE_CHANNELS

    def micro_batches(self, state: State, batches: Iterator[Batch]) -> Iterator[MicroBatch]:
        """Those of a step, each fetched when its turn has come."""
        for number in range(1, self.plan.accumulation_steps + 1):
            batch = next(batches)
            self.unreadable.note(batch.unreadable)
            hidden = batch.hidden_pixels.double()
            coverage = hidden * (100 / self.config.model.image_size**2)
            yield MicroBatch(
                inputs=(batch.images, batch.pattern),
                num_values=hidden.sum().item() * IMAGE_CHANNELS,
                # as in EPOCH_SUMS
                counts=(
                    coverage.sum().item(), coverage.square().sum().item(), len(batch.unreadable)
                ),
                is_last=number == self.plan.accumulation_steps,
            )  # fmt: skip

    def learning_rate(self, state: State) -> float:
        """The rate of the step that comes next."""
        optimisation = self.config.optimisation
        done = state.epochs_completed + state.steps_completed / self.plan.steps_per_epoch
        return learning_rate(optimisation, done / optimisation.epochs)

    def batches(self, state: State, epochs: int) -> Iterator[Batch]:
        """This process's batches from where the state stands until so many epochs are completed.

        One loader for all of them: workers read on across the ends of epochs.
        """
        allow_many_files()
        workers = self.config.run.loader_workers
        start = state.epochs_completed, state.steps_completed
        keys = self.plan.micro_batches(self.accelerator.process_index, start, epochs)
        loader: Any = DataLoader(
            self.images,
            batch_sampler=keys,  # type: ignore[arg-type]  # is gone through once
            num_workers=workers,
            collate_fn=collate,
            pin_memory=self.accelerator.device.type == "cuda",
            worker_init_fn=leave_signals_to_the_main_process,
            prefetch_factor=4 if workers else None,
        )
        return iter(loader)


def build_run(config: PretrainConfig, interruption: Interruption) -> tuple[Run, State]:
    """Build the run; continue from its newest checkpoint if there is one. Writes nothing.

    Raises ValueError for what the user can fix.
    """
    run = config.run
    accelerator = make_accelerator(run)
    method = make_method(config.method, config.model)
    listing = make_listing(config.data, config.method)
    plan = make_batch_plan(
        config.optimisation,
        num_images=len(listing.train),
        processes=accelerator.num_processes,
        batch_size=run.most_at_once,
    )
    checkpoint = open_own_checkpoint(config, listing)
    images = MaskedImages(
        folder=config.data.in1k_dir / "train",
        paths=listing.train,
        segments=_segments(config, listing),
        method=method,
        seed=config.optimisation.seed,
    )
    torch.manual_seed(config.optimisation.seed)
    model = MaskedAutoencoder(config.model, method).to(accelerator.device)
    optimizer = make_optimizer(model, config.optimisation)
    update = GuardedUpdate(
        optimizer, config.optimisation.clip_grad, scales_loss=accelerator.mixed_precision == "fp16"
    )
    state = State()
    if checkpoint is not None:
        _continue_from(checkpoint, run.output_dir, model, update, state)
        fixed_set = unpack_fixed_set(checkpoint["fixed_set"])
    else:
        _start(config, model)
        fixed_set = _choose_fixed_set(images)
    refuse_disagreement(accelerator, state.epochs_completed, state.steps_completed)
    if run.activation_checkpointing:
        recompute_activations(model)
    if run.batch_size == "auto" and accelerator.device.type == "cuda":
        plan = _fitted(plan, accelerator, model, optimizer, fixed_set)
    return Run(
        config=config,
        accelerator=accelerator,
        interruption=interruption,
        listing=listing,
        plan=plan,
        images=images,
        heldout=FixedImages(images, listing.val_folder, listing.val),
        fixed_set=fixed_set,
        model=model,
        prepared=accelerator.prepare_model(model),
        update=update,
    ), state


def _segments(config: PretrainConfig, listing: Listing) -> SegmentSource | None:
    """Those that the method hides; None: it hides none."""
    if listing.source is None:
        return None
    return SegmentSource(store=listing.source, donors=listing.train, options=config.method)


def describe(run: Run, state: State) -> None:
    """Tell what is about to happen."""
    plan, optimisation, accelerator = run.plan, run.config.optimisation, run.accelerator
    logger.info(
        "%s, %s, %d images (%d without a segment left out), %d held out (%d left out)",
        run.config.model.model, run.config.method.mask_method,
        plan.num_images, run.listing.left_out, len(run.listing.val), run.listing.val_left_out,
    )  # fmt: skip
    logger.info(
        "effective batch %d = %d process(es) x %d step(s) x %d images; "
        "learning rate %g = %g x %d / 256; %d steps per epoch",
        plan.effective_batch_size, plan.processes, plan.accumulation_steps, plan.micro_batch_size,
        optimisation.learning_rate, optimisation.base_lr, plan.effective_batch_size,
        plan.steps_per_epoch,
    )  # fmt: skip
    logger.info(
        "%s, precision %s, %d loader workers per process; epochs %d to %d of %d, from step %d",
        accelerator.device, accelerator.mixed_precision.replace("no", "fp32"),
        run.config.run.loader_workers, state.epochs_completed + 1, run.config.epochs_this_round,
        optimisation.epochs, state.steps_completed,
    )  # fmt: skip


def _fitted(
    plan: BatchPlan,
    accelerator: Accelerator,
    model: MaskedAutoencoder,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
) -> BatchPlan:
    """The plan in as large parts as the GPUs hold, by passes over the first image of a batch."""

    def loss_of(images: int) -> Tensor:
        copies = batch.images[[0] * images], batch.pattern[[0] * images]
        return model(*(tensor.to(accelerator.device) for tensor in copies)).sum()

    share = plan.effective_batch_size // plan.processes
    size = largest_micro_batch(accelerator, model, optimizer, loss_of, share=share)
    return replace(plan, micro_batch_size=size)


def _continue_from(
    checkpoint: dict[str, Any],
    folder: Path,
    model: MaskedAutoencoder,
    update: GuardedUpdate,
    state: State,
) -> None:
    load_weights(model, checkpoint["model"], folder)
    load_optimizer(update.optimizer, checkpoint["optimizer"], folder)
    update.continue_from(checkpoint, folder)
    state.epochs_completed = checkpoint["epochs_completed"]
    state.steps_completed = checkpoint["steps_completed"]
    state.seconds = checkpoint["seconds"]
    state.waited_seconds = checkpoint["waited_seconds"]
    state.sums.copy_(checkpoint["sums"])


def _start(config: PretrainConfig, model: MaskedAutoencoder) -> None:
    if config.run.init is None:
        return
    try:
        fresh = start_from_official(model, read_official_weights(config.run.init))
    except ValueError as error:
        raise ValueError(f"--init {config.run.init}: {error}") from error
    logger.info("started from %s; fresh: %s", config.run.init, ", ".join(fresh) or "nothing")


def _choose_fixed_set(images: MaskedImages) -> Batch:
    """The training images that every round's picture shows: evenly spread, with their segments."""
    size = min(FIXED_SET_SIZE, len(images))
    chosen = images.paths[[index * len(images) // size for index in range(size)]]
    fixed = FixedImages(images, images.folder, chosen)
    return collate([fixed[index] for index in range(size)])
