"""The files of a step's folder: the names by which the parts and the plan meet."""

import os
import re
from pathlib import Path

LOG = "log.txt"  # one JSON object per epoch
PROGRESS = "progress.json"  # where the step is now
CONSOLE_LOG = "console.log"  # what it printed
LOCK = ".lock"  # who writes here
# What trackers got, and the folder of one.
TRACKERS, TENSORBOARD = ".trackers.json", "tensorboard"
# Pretraining's; see also `checkpoint_path` and `reconstructions_path`.
LAST = "last.pth"  # rolling, for resume
# Finetuning's.
CHECKPOINT, BEST = "checkpoint.pth", "best.pth"
PREDICTIONS = "predictions.png"
AREAS = "areas.npz"  # of each validation image: images [N], areas [N, 3, K] in pixels
RESULT = "result.json"  # the scores; written last
# A probe's, beside its result.json: the same areas.
PROBE_AREAS = {name: f"areas-{name}.npz" for name in (
    "linear", "knn", "knn_raw", "dinov2_linear", "dinov3_linear", "capi_knn", "capi_logreg", "hummingbird",
)}  # fmt: skip
# By which the folders of runs are told from each other, and from a stranger's.
OF_PRETRAINING = (LAST, "checkpoint-*.pth", "reconstructions-*.png")
OF_FINETUNING = (CHECKPOINT, BEST, AREAS, RESULT, PREDICTIONS)
FEATURES = "features.png"  # what its tokens look like
OF_PROBES = (*PROBE_AREAS.values(), RESULT, FEATURES)
OF_RUNS = (*OF_PRETRAINING, *OF_FINETUNING, *OF_PROBES)


def checkpoint_path(folder: Path, epochs_completed: int) -> Path:
    """The checkpoint that a round of pretraining leaves."""
    return folder / f"checkpoint-{epochs_completed}.pth"


def reconstructions_path(folder: Path, epochs_completed: int) -> Path:
    """The picture that belongs to it."""
    return folder / f"reconstructions-{epochs_completed}.png"


def shard_path(out: Path, index: int, count: int) -> Path:
    """The store that part `index` of `count`, from 0, of the making of segments leaves."""
    return out if count == 1 else out.with_name(f"{out.stem}-{index}-of-{count}{out.suffix}")


def shard_of(path: Path) -> tuple[int, int] | None:
    """Index and count by the name of such a part; None for other files."""
    match = re.search(r"-(\d+)-of-(\d+)$", path.stem)
    return (int(match[1]), int(match[2])) if match else None


def epochs_of(path: Path) -> int | None:
    """Epochs completed, by the name of a round's checkpoint or picture; None for other files."""
    match = re.fullmatch(r"(?:checkpoint-(\d+)\.pth)|(?:reconstructions-(\d+)\.png)", path.name)
    return int(match[1] or match[2]) if match else None


def round_checkpoints(folder: Path) -> dict[int, Path]:
    """The checkpoints of the rounds, by epochs completed, ascending."""
    found = {epochs_of(path): path for path in folder.glob("checkpoint-*.pth")}
    return {epochs: found[epochs] for epochs in sorted(e for e in found if e is not None)}


def find_resumable(folder: Path) -> Path | None:
    """The furthest checkpoint of a pretraining run: last.pth, or the newest round's."""
    if os.path.lexists(folder / LAST):
        return folder / LAST
    return next(reversed(round_checkpoints(folder).values()), None)
