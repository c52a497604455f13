"""How far long work is: a bar on a terminal, plain lines now and then in a file."""

from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SECONDS_PER_DRAWING = 0.1
SECONDS_PER_LINE = 30.0
COUNTED = re.compile(r"\w+: \d+ of \d+ \w+, [\d.]+/s, [\d:]+ left")  # a line of `Counter`
END_BYTES = 4096


class Display:
    """One line about one piece of work. No thread draws it: work is forked meanwhile."""

    def __init__(self, total: float, *, seconds_per_line: float = SECONDS_PER_LINE) -> None:
        self.seconds_per_line = seconds_per_line
        self.shown = time.monotonic()
        self.bar = _make_bar(total) if sys.stderr.isatty() and total else None

    def show(self, completed: float, text: str) -> None:
        """Say it if it is time to."""
        now = time.monotonic()
        if now - self.shown < (SECONDS_PER_DRAWING if self.bar else self.seconds_per_line):
            return
        self.shown = now
        if self.bar is None:
            logger.info("%s", text)
        else:
            self.bar.update(self.bar.task_ids[0], completed=completed, text=text, refresh=True)

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self.bar is not None:
            self.bar.stop()


class Counter:
    """Counts `unit`s of work that come one after the other. Use as a context manager."""

    def __init__(self, what: str, *, total: int, done: int = 0, unit: str = "images") -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self.begun_with = done
        self.started = time.monotonic()
        self.display = Display(total, seconds_per_line=10.0)

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self.display.close()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.reach(self.done + count)

    def reach(self, done: int, total: int | None = None) -> None:
        """So many are done by now; total: of all, if that is only known now."""
        self.done, self.total = done, total or self.total
        rate = (self.done - self.begun_with) / max(time.monotonic() - self.started, 1e-9)
        left = clock((self.total - self.done) / rate if rate else 0)
        self.display.show(
            self.done,
            f"{self.what}: {self.done} of {self.total} {self.unit}, {rate:.1f}/s, {left} left",
        )


def last_count(log: Path) -> str:
    """What a `Counter` last wrote into a file; empty if nothing."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - END_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line for line in reversed(lines) if COUNTED.fullmatch(line)), "")


def clock(seconds: float) -> str:
    """h:mm:ss."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _make_bar(total: float) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn(),
        console=Console(stderr=True), auto_refresh=False,
    )  # fmt: skip
    bar.add_task("", total=total, text="")
    bar.start()
    return bar
