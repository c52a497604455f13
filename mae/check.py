"""`pretrain --check`: everything that can be known before the work starts. Writes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from common.environment import world_size
from common.files import check_output_folder
from common.step_files import OF_PRETRAINING, find_resumable
from common.yamlfile import plain
from engine.trackers import check_trackers
from mae.config import PretrainConfig, make_method
from mae.listing import make_listing
from mae.schedule import learning_rate, make_batch_plan


def check_pretraining(config: PretrainConfig, *, will_make: bool = False) -> dict[str, Any]:
    """What the run will be, in plain values. Raises ValueError for what would stop it at once."""
    listing = make_listing(config.data, config.method, will_make=will_make)
    plan = make_batch_plan(
        config.optimisation,
        num_images=len(listing.train),
        processes=world_size(),
        batch_size=config.run.most_at_once,
    )
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


def check_output(config: PretrainConfig) -> None:
    """Raise ValueError unless the run can write what it will, and only over what is its own."""
    run = config.run
    check_output_folder(run.output_dir, reads=config.data.reads)
    found = find_resumable(run.output_dir)
    run.check_folder(OF_PRETRAINING, is_run=found is not None)
    check_trackers(run.log_with)


def _rates(config: PretrainConfig) -> list[tuple[float, float, str]]:
    """The learning rate at the epochs that matter, ascending; what each of them is."""
    optimisation = config.optimisation
    names = {
        float(config.epochs_this_round): "end of this round",
        optimisation.epochs / 2: "middle",
        optimisation.warmup_fraction * optimisation.epochs: "end of warm-up",
        0.0: "start",
        float(optimisation.epochs): "end",
    }
    return [
        (epoch, learning_rate(optimisation, epoch / optimisation.epochs), name)
        for epoch, name in sorted(names.items())
    ]


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
