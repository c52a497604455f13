"""The checkpoints of a run: which one it goes on from, and whether it may."""

from pathlib import Path
from typing import Any

from torch import Tensor
from typing_extensions import TypedDict

import engine.checkpoint
from common.formats import Count
from common.step_files import find_resumable
from engine.checkpoint import Checkpoint
from mae.config import PretrainConfig
from mae.listing import Listing


class TrainedImages(TypedDict):
    """How many images a run trains on, and the digest of their list."""

    count: Count
    digest: str


class WholeCheckpoint(Checkpoint):
    """What is needed to continue, and to draw without the dataset."""

    images: TrainedImages
    fixed_set: dict[str, Tensor]


def load_checkpoint(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """Read a checkpoint of pretraining onto the CPU. Raises ValueError if the file is none."""
    return engine.checkpoint.load_checkpoint(
        path, program="python -m mae pretrain", shape=WholeCheckpoint, lazily=lazily
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
