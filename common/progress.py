"""How far long work is: a bar on a terminal, plain lines now and then in a file."""

import logging
import os
import sys
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from common.environment import PROGRESS_FILE, rank
from common.files import write_json

logger = logging.getLogger(__name__)

# How often a bar is drawn, a line written where there is no terminal, progress.json replaced.
SECONDS_PER_DRAWING, SECONDS_PER_LINE, SECONDS_PER_FILE = 0.1, 30.0, 2.0


class Display:
    """One line about one piece of work, and progress.json for whoever watches a step."""

    # Written by whoever calls, not by a thread: forks and threads do not mix.
    def __init__(self, total: float, path: Path | None) -> None:
        self.path, self.seconds_per_line = path, SECONDS_PER_LINE
        self._shown, self._written, self._stage = time.monotonic(), float("-inf"), ""
        self._bar: Any = None
        if sys.stderr.isatty() and total:  # not known yet: 0
            from rich.console import Console  # slow to import, and needed on a terminal only
            from rich.progress import BarColumn, Progress, TextColumn

            columns = BarColumn(), TextColumn("{task.fields[text]}")
            self._bar = Progress(*columns, console=Console(stderr=True), auto_refresh=False)
            self._bar.add_task("", total=total, text="")
            self._bar.start()

    def show(self, completed: float, text: str, stage: str, **numbers: Any) -> None:
        """Say where the work is, if it is time to; a new stage is written at once."""
        now = time.monotonic()
        if stage != self._stage or now - self._written >= SECONDS_PER_FILE:
            self._stage, self._written = stage, now
            self.write("running", stage, **numbers)
        if now - self._shown < (SECONDS_PER_DRAWING if self._bar else self.seconds_per_line):
            return
        self._shown = now
        if self._bar is None:
            logger.info("%s", text)
        else:
            self._bar.update(self._bar.task_ids[0], completed=completed, text=text, refresh=True)

    def write(self, state: str, stage: str, **numbers: Any) -> None:
        """Say it in the file, now. state: running, done, stopped or failed."""
        if self.path is not None:  # replaced whole, never half written
            told = {"state": state, "pid": os.getpid(), "stage": stage, **numbers}
            write_json(self.path, {**told, "updated": time.time()})

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._bar is not None:
            self._bar.stop()


class Counter(AbstractContextManager["Counter"]):
    """Counts `unit`s of work that come one after the other. Use as a context manager."""

    def __init__(
        self, what: str, *, total: int, done: int = 0, unit: str = "images", of_step: bool = True
    ) -> None:
        """of_step: whether it is what a plan's step is about, so that progress.json tells of it."""
        self.what, self.total, self.unit = what, total, unit
        self.done = self.begun_with = done
        self.started = time.monotonic()
        # Set by the launcher of a plan. Processes beside the first do the same kind of work.
        path = os.environ.get(PROGRESS_FILE)
        self.display = Display(total, Path(path) if path and of_step and not rank() else None)
        self.display.seconds_per_line = 10.0

    def __exit__(self, *_: object) -> None:
        self.display.close()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.reach(self.done + count)

    def reach(self, done: int, total: int | None = None) -> None:
        """So many are done by now; total: of all, if that is only known now."""
        self.done, self.total = done, total or self.total
        # What an earlier call did took no time of this one.
        rate = (self.done - self.begun_with) / max(time.monotonic() - self.started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        now: dict[str, Any] = {"stage": self.what, "done": self.done, "total": self.total}
        now |= {"unit": self.unit, "per_second": rate, "seconds_left": left}
        self.display.show(self.done, progress_text(now), **now)


def progress_text(now: Mapping[str, Any]) -> str:
    """What progress.json holds in words: epoch or count, rate and time left, if they are known."""
    parts = []
    if now.keys() >= {"stage", "done", "total", "unit", "per_second"}:
        parts = [f"{now['stage']}: {now['done']} of {now['total']} {now['unit']}"]
        parts.append(f"{now['per_second']:.1f}/s")
    elif "epoch" not in now:
        return "starting"
    elif now.get("stage") == "evaluate":
        parts = [f"scoring after epoch {now['epoch']:.1f}"]
    else:
        parts = [f"epoch {now['epoch']:.2f} of {now.get('epochs_total', '?')}"]
    if now.get("images_per_second"):
        parts.append(f"{now['images_per_second']:.1f} images/s")
    if now.get("seconds_left") is not None:
        parts.append(f"{duration(now['seconds_left'])} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Seconds in words: 48 s, 2 min 5 s, 12 min, 3 h 20 min, 2 d 4 h."""
    # Two digits say enough: nobody plans by the seconds of an hour.
    minutes, hours = round(seconds / 60), round(seconds / 60) // 60
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{round(seconds) // 60} min {round(seconds) % 60} s"
    if minutes < 90:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
