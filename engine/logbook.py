"""What a run tells while it goes: log.txt, the trackers of --log-with, progress.json."""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

from common.files import write_text
from common.formats import read_log
from common.progress import Display, progress_text
from common.step_files import LOG, PROGRESS
from engine.config import TrainingConfig
from engine.trackers import Trackers

logger = logging.getLogger(__name__)


class Logbook:
    """Log, trackers and progress of one run, written by the first process only.

    The log is cut back to the checkpoint that the run continues from. A record reaches the trackers
    when its checkpoint is saved (`saved`), so that it reaches them once.
    """

    def __init__(
        self, config: TrainingConfig, settings: Mapping[str, Any], *, epochs_completed: int,
        epochs_total: int, images_per_epoch: int,
    ) -> None:  # fmt: skip
        """settings: what trackers show of the run."""
        self.path = config.output_dir / LOG
        # Epochs that are in no checkpoint are trained, and logged, again.
        self.records = [r for r in read_log(self.path) if r["epoch"] <= epochs_completed]
        write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.records))
        self.trackers = Trackers(config.output_dir, config.log_with, settings)
        self.trackers.send(self.records)
        # progress.json, and a bar on a terminal or a line now and then in a file.
        self.display = Display(epochs_total, config.output_dir / PROGRESS)
        self.epochs_total, self.images_per_epoch = epochs_total, images_per_epoch
        self.epoch = float(epochs_completed)
        self.images_done = 0  # by this call, as are the seconds
        self.seconds = 0.0  # of training; evaluations are not part of the rate

    def add_epoch(self, record: dict[str, Any]) -> None:
        """Append one epoch; on disk when this returns, for the checkpoint that follows."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.records.append(record)
        logger.info("%s", "  ".join(f"{name} {_short(value)}" for name, value in record.items()))

    def saved(self, epochs_completed: int) -> None:
        """So many epochs are in a checkpoint now."""
        self.trackers.send([r for r in self.records if r["epoch"] <= epochs_completed])

    def advance(self, epoch: float, images: int, seconds: float) -> None:
        """Report `images` more in `seconds`; epoch: completed ones, with the share of this one."""
        self.epoch = epoch
        self.images_done += images
        self.seconds += seconds
        now = self._progress()
        self.display.show(epoch, progress_text(now), "train", **now)

    def evaluating(self, done: int, total: int) -> None:
        """Report that `done` of `total` held-out images are scored."""
        text = f"evaluated {done} of {total} images"
        self.display.show(self.epoch, text, "evaluate", **self._progress())

    def close(self, outcome: str) -> None:
        """The end: done, stopped or failed."""
        self.trackers.close()
        self.display.close()
        self.display.write(outcome, "train", **self._progress())

    def _progress(self) -> dict[str, Any]:
        rate = self.images_done / max(self.seconds, 1e-9)  # mean of this call
        left = max(0.0, (self.epochs_total - self.epoch) * self.images_per_epoch)
        return {
            "epoch": round(self.epoch, 4),
            "epochs_total": self.epochs_total,
            "images_per_second": round(rate, 2),
            "seconds_left": round(left / rate, 1) if rate else None,  # nothing was trained yet
        }


def send_to_trackers(config: TrainingConfig, settings: Mapping[str, Any]) -> None:
    """Epochs of the log that no tracker has got: a kill came after their checkpoint was saved."""
    trackers = Trackers(config.output_dir, config.log_with, settings)
    trackers.send(read_log(config.output_dir / LOG))
    trackers.close()


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)
