"""Everything a pretraining call is built from, and where it continues."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from common.checkpoint import load_optimizer, load_weights
from common.devices import make_accelerator, refuse_disagreement
from common.interruption import leave_signals_to_the_main_process
from mae.checkpoint import open_own_checkpoint
from mae.config import PretrainConfig, make_method
from mae.controls import SegmentSource
from mae.data import Batch, FixedImages, MaskedImages, allow_many_files, collate
from mae.listing import Listing, make_listing
from mae.model import MaskedAutoencoder
from mae.official import read_official_weights, start_from_official
from mae.optimisation import GuardedUpdate, make_optimizer
from mae.reconstruct import FIXED_SET_SIZE, unpack_fixed_set
from mae.schedule import BatchPlan, make_batch_plan

logger = logging.getLogger(__name__)

# What is summed over an epoch, in this order; part of every checkpoint.
EPOCH_SUMS = ("loss", "coverage", "coverage_square", "unreadable")


@dataclass
class State:
    """Where a run stands.

    sums: [4] float64 on the device, see EPOCH_SUMS, over the steps and processes of this epoch.
    seconds, waited_seconds: spent on this epoch, and of that waiting for data.
    """

    sums: Tensor
    epochs_completed: int = 0
    steps_completed: int = 0
    seconds: float = 0.0
    waited_seconds: float = 0.0


@dataclass(kw_only=True)
class Run:
    """What stays the same during a call."""

    config: PretrainConfig
    accelerator: Accelerator
    plan: BatchPlan
    listing: Listing
    images: MaskedImages
    heldout: FixedImages
    fixed_set: Batch
    model: MaskedAutoencoder  # plain, for saving and evaluating
    prepared: nn.Module  # the same weights, wrapped for training
    update: GuardedUpdate

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


def build_run(config: PretrainConfig) -> tuple[Run, State]:
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
        batch_size=run.batch_size,
    )
    checkpoint = open_own_checkpoint(config, listing)
    segments = None
    if listing.source is not None:
        segments = SegmentSource(store=listing.source, donors=listing.train, options=config.method)
    images = MaskedImages(
        folder=config.data.in1k_dir / "train",
        paths=listing.train,
        segments=segments,
        method=method,
        seed=config.optimisation.seed,
    )
    torch.manual_seed(config.optimisation.seed)
    model = MaskedAutoencoder(config.model, method).to(accelerator.device)
    optimizer = make_optimizer(model, config.optimisation)
    state = State(sums=torch.zeros(len(EPOCH_SUMS), dtype=torch.float64, device=accelerator.device))
    if checkpoint is not None:
        _continue_from(checkpoint, run.output_dir, model, optimizer, state)
        fixed_set = unpack_fixed_set(checkpoint["fixed_set"])
    else:
        _start(config, model)
        fixed_set = _choose_fixed_set(images)
    refuse_disagreement(accelerator, state.epochs_completed, state.steps_completed)
    return Run(
        config=config,
        accelerator=accelerator,
        listing=listing,
        plan=plan,
        images=images,
        heldout=FixedImages(images, config.data.in1k_dir / "val", listing.val),
        fixed_set=fixed_set,
        model=model,
        prepared=accelerator.prepare_model(model),
        update=GuardedUpdate(optimizer, config.optimisation.clip_grad),
    ), state


def describe(run: Run, state: State) -> None:
    """Tell what is about to happen."""
    plan, optimisation, accelerator = run.plan, run.config.optimisation, run.accelerator
    logger.info(
        "%s, %s, %d images (%d without a segment left out), %d held out",
        run.config.model.model, run.config.method.mask_method,
        plan.num_images, run.listing.left_out, len(run.listing.val),
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


def _continue_from(
    checkpoint: dict[str, Any],
    folder: Path,
    model: MaskedAutoencoder,
    optimizer: torch.optim.Optimizer,
    state: State,
) -> None:
    load_weights(model, checkpoint["model"], folder)
    load_optimizer(optimizer, checkpoint["optimizer"], folder)
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
