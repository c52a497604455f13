"""`pretrain --check`: everything that can be known before the work starts. Writes nothing."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from common.environment import world_size
from common.files import check_output_folder
from common.step_files import OF_PRETRAINING, find_resumable
from common.yamlfile import plain
from engine.schedule import BatchPlan, named_epochs
from engine.trackers import check_trackers
from mae.config import PretrainConfig, make_method
from mae.listing import make_listing


def check_pretraining(config: PretrainConfig, *, will_make: bool = False) -> dict[str, Any]:
    """What the run will be, in plain values. Raises ValueError for what would stop it at once."""
    listing = make_listing(config.data, config.method, packed=not will_make)
    plan = plan_batches(config, len(listing.train), world_size())
    is_open = config.run.batch_size == "auto"  # until a GPU is measured
    check_output(config)
    if find_resumable(config.run.output_dir) is not None or config.run.resume == "required":
        from mae.checkpoint import open_own_checkpoint  # torch takes seconds to import

        open_own_checkpoint(config, listing, lazily=True)
    elif config.run.init is not None:
        _check_init(config, config.run.init)
    return {
        "images": {
            "train": len(listing.train), "left_out": listing.left_out,
            "val": len(listing.val), "val_left_out": listing.val_left_out,
        },
        "batch": {
            "effective": plan.effective_batch_size,
            "per_process": "auto" if is_open else plan.micro_batch_size,
            "processes": plan.processes,
            "accumulation_steps": "auto" if is_open else plan.accumulation_steps,
            "steps_per_epoch": plan.steps_per_epoch,
        },
        "learning_rate": {
            "peak": config.optimisation.learning_rate, "points": _rates(config),
        },
        "epochs": config.optimisation.epochs,
        "settings": plain(config.settings()),
        "checkpoint_bytes": config.model.checkpoint_bytes,
    }  # fmt: skip


def plan_batches(config: PretrainConfig, num_images: int, processes: int) -> BatchPlan:
    """Split the effective batch into equal parts of at most --batch-size images per process.

    Raises ValueError if that cannot be, or if there are fewer images than one batch.
    """
    effective = config.optimisation.effective_batch_size
    if num_images < effective:
        raise ValueError(
            f"--effective-batch-size {effective} is more than the {num_images} training images; "
            f"give at most {num_images}"
        )
    if effective % processes:
        raise ValueError(
            f"--effective-batch-size {effective} cannot be split over {processes} processes; "
            f"give a multiple of {processes}"
        )
    share = effective // processes
    accumulation = math.ceil(share / config.run.most_at_once)
    while share % accumulation:
        accumulation += 1
    return BatchPlan(
        num_images=num_images,
        effective_batch_size=effective,
        processes=processes,
        micro_batch_size=share // accumulation,
        seed=config.optimisation.seed,
    )


def check_output(config: PretrainConfig) -> None:
    """Raise ValueError unless the run can write what it will, and only over what is its own."""
    run = config.run
    check_output_folder(run.output_dir, reads=config.data.reads)
    found = find_resumable(run.output_dir)
    run.check_folder(OF_PRETRAINING, is_run=found is not None)
    check_trackers(run.log_with)


def _rates(config: PretrainConfig) -> list[tuple[float, float, str]]:
    """The learning rate at the epochs that matter, ascending; what each of them is."""
    run = config.optimisation
    named = named_epochs(
        run.epochs, run.warmup_fraction, end_of_this_round=config.epochs_this_round
    )
    return [(epoch, run.rate_at(epoch / run.epochs), name) for epoch, name in named.items()]


def _check_init(config: PretrainConfig, path: Path) -> None:
    """Whether an official checkpoint fits the model, by shapes alone."""
    import torch

    from mae.model import MaskedAutoencoder
    from mae.official import fit_official, read_official_weights

    weights = read_official_weights(path, lazily=True)
    with torch.device("meta"):
        model = MaskedAutoencoder(config.model, make_method(config.method, config.model))
    try:
        fit_official(model.state_dict(), weights)
    except ValueError as error:
        raise ValueError(f"--init {path}: {error}") from error
