"""The checkpoints of a run: which one it goes on from, and whether it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common.checkpoint
from common.layout import find_resumable
from mae.config import PretrainConfig
from mae.listing import Listing

REQUIRED = ("model", "optimizer", "epochs_completed", "steps_completed", "config")


def load_checkpoint(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """Read a checkpoint of pretraining onto the CPU. Raises ValueError if the file is none."""
    return common.checkpoint.load_checkpoint(
        path, program="python -m mae pretrain", required=REQUIRED, lazily=lazily
    )


def open_own_checkpoint(
    config: PretrainConfig, listing: Listing, *, lazily: bool = False
) -> dict[str, Any] | None:
    """The checkpoint that this run continues, if any.

    Raises ValueError if --resume does not allow what is there, if it cannot be read, or if it was
    made with other settings or another list of training images.
    """
    path = find_resumable(config.run.output_dir)
    config.run.check_resume(path)
    if path is None:
        return None
    checkpoint = load_checkpoint(path, lazily=lazily)
    config.check_same(checkpoint["config"], path)
    trained = checkpoint["images"]
    if trained["digest"] != listing.digest:
        raise ValueError(
            f"the training images are not those of the checkpoint ({trained['count']} then, "
            f"{len(listing.train)} now, or other names); use another --output-dir"
        )
    return checkpoint
