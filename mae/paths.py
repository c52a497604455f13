"""Names of the files of a run's output directory; one function builds each, one parses it."""

from __future__ import annotations

import re
from pathlib import Path

LAST = "last.pth"
LOG = "log.txt"
PROGRESS = "progress.json"
BOARD = "tensorboard"


def checkpoint_path(output_dir: Path, epochs_completed: int) -> Path:
    """Where the checkpoint of the end of a round lies."""
    return output_dir / f"checkpoint-{epochs_completed}.pth"


def reconstructions_path(output_dir: Path, epochs_completed: int) -> Path:
    """The picture that belongs to it."""
    return output_dir / f"reconstructions-{epochs_completed}.png"


def epochs_of(path: Path) -> int | None:
    """Epochs completed, by the name of a round's checkpoint; None for other files."""
    match = re.fullmatch(r"checkpoint-(\d+)\.pth", path.name)
    return int(match[1]) if match else None


def find_resumable(output_dir: Path) -> Path | None:
    """The furthest checkpoint of a run: last.pth, or the newest round's if that is gone."""
    if (output_dir / LAST).exists():
        return output_dir / LAST
    rounds = [path for path in output_dir.glob("checkpoint-*.pth") if epochs_of(path) is not None]
    return max(rounds, key=lambda path: epochs_of(path) or 0, default=None)


def beside(path: Path) -> Path:
    """Where a file is written before it is renamed to its place."""
    return path.with_name(f".{path.name}.part")
