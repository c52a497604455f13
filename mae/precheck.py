"""`pretrain --check`: everything that can be known before the work starts. Writes nothing."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from mae.config import PretrainConfig, make_method
from mae.listing import make_listing
from mae.paths import find_resumable
from mae.schedule import make_batch_plan


def check_pretraining(config: PretrainConfig) -> None:
    """Raise ValueError for whatever would stop the run at once. Says nothing else."""
    logger = logging.getLogger("mae")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        _check(config)
    finally:
        logger.setLevel(level)


def _check(config: PretrainConfig) -> None:
    listing = make_listing(config.data, make_method(config.method, config.model))
    make_batch_plan(
        config.optimisation,
        num_images=len(listing.train),
        processes=int(os.environ.get("WORLD_SIZE", "1")),
        batch_size=config.run.batch_size,
    )
    _check_writable(config.run.output_dir)
    if find_resumable(config.run.output_dir) is not None or config.run.resume == "required":
        from mae.build import check_same_images, open_own_checkpoint

        checkpoint = open_own_checkpoint(config, lazily=True)
        if checkpoint is not None:
            check_same_images(checkpoint, listing)
    elif config.run.init is not None:
        _check_init(config, config.run.init)


def _check_writable(output_dir: Path) -> None:
    nearest = output_dir.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"--output-dir {output_dir}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"--output-dir {output_dir}: {nearest} cannot be written to")


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
