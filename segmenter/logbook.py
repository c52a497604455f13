"""What a run tells while it goes: log.txt, TensorBoard, progress.json, a bar or plain lines."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from segmenter.layout import BOARD, LOG, PROGRESS, write_text

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_PROGRESS = 2.0
SECONDS_BETWEEN_LINES = 30.0
# Keys of log.txt that may differ between equal runs.
TIMING_KEYS = ("images_per_second", "data_wait_share", "epoch_seconds", "peak_memory_mib")


def read_log(output_dir: Path) -> list[dict[str, Any]]:
    """The epochs of a log.txt; none if there is no file. A last line cut by a kill is dropped."""
    path = output_dir / LOG
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class Logbook:
    """Log and TensorBoard of one run, written by the first process only."""

    def __init__(self, output_dir: Path, epochs_completed: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.path = output_dir / LOG
        kept = [record for record in read_log(output_dir) if record["epoch"] <= epochs_completed]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        self.board = SummaryWriter(output_dir / BOARD, purge_step=epochs_completed + 1)

    def add_epoch(self, record: dict[str, Any]) -> None:
        """Append one epoch; on disk when this returns, for the checkpoint that follows."""
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name, value in record.items():
            if name != "epoch" and value is not None:
                self.board.add_scalar(name, value, record["epoch"])
        self.board.flush()
        logger.info("%s", "  ".join(f"{name} {_short(value)}" for name, value in record.items()))

    def close(self) -> None:
        """Close TensorBoard's file."""
        self.board.close()


class Progress:
    """progress.json, and a bar on a terminal or a line now and then in a file."""

    def __init__(self, output_dir: Path, *, epochs_total: int, images_per_epoch: int) -> None:
        self.path = output_dir / PROGRESS
        self.epochs_total = epochs_total
        self.images_per_epoch = images_per_epoch
        self.images_done = 0
        self.epoch = 0.0
        self.seconds = 0.0  # of training; evaluations are not part of the rate
        self.written = float("-inf")
        self.told = time.monotonic()
        self.bar = _make_bar(epochs_total) if sys.stderr.isatty() else None

    def advance(self, epoch: float, images: int, seconds: float) -> None:
        """Report `images` more in `seconds`; epoch: completed ones, with the share of this one."""
        self.epoch = epoch
        self.images_done += images
        self.seconds += seconds
        self.tell("train", f"epoch {epoch:.2f} of {self.epochs_total}, {self._pace()}")

    def evaluating(self, done: int, total: int) -> None:
        """Report that `done` of `total` test images are scored."""
        self.tell("evaluate", f"evaluated {done} of {total} images")

    def tell(self, stage: str, text: str) -> None:
        """Write file, bar and lines if it is time to."""
        now = time.monotonic()
        if now - self.written >= SECONDS_BETWEEN_PROGRESS:
            self.write("running", stage)
            self.written = now
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.epoch, text=text)
        elif now - self.told >= SECONDS_BETWEEN_LINES:
            logger.info("%s", text)
            self.told = now

    def write(self, state: str, stage: str) -> None:
        """Write progress.json; state: running, stopped, done or failed."""
        content = {
            "state": state,
            "pid": os.getpid(),
            "stage": stage,
            "epoch": round(self.epoch, 4),
            "epochs_total": self.epochs_total,
            "images_per_second": round(self.images_per_second, 2),
            "seconds_left": self.seconds_left,
            "updated": time.time(),
        }
        write_text(self.path, json.dumps(content) + "\n")

    def close(self, state: str, stage: str = "train") -> None:
        """Report the end."""
        if self.bar is not None:
            self.bar.stop()
        self.write(state, stage)

    @property
    def images_per_second(self) -> float:
        """Mean training rate of this call."""
        return self.images_done / max(self.seconds, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Of training, at that rate."""
        if not self.images_done:
            return None
        left = (self.epochs_total - self.epoch) * self.images_per_epoch
        return round(max(left, 0.0) / self.images_per_second, 1)

    def _pace(self) -> str:
        whole = round(self.seconds_left or 0)
        clock = f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
        return f"{self.images_per_second:.1f} images/s, {clock} left"


def _make_bar(epochs_total: int) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn(),
        console=Console(stderr=True),
    )  # fmt: skip
    bar.add_task("finetune", total=epochs_total, text="")
    bar.start()
    return bar


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
