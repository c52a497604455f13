"""How far long work is: a bar on a terminal, plain lines now and then in a file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import click

SECONDS_PER_LINE = 10.0
SECONDS_PER_DRAWING = 0.1


class Progress:
    """Counts images. Use as a context manager.

    No thread draws the bar: work is forked into processes meanwhile.
    """

    def __init__(self, what: str, *, total: int, done: int = 0) -> None:
        self.what = what
        self.total = total
        self.done = self.begun_with = done
        self.started = self.shown = time.monotonic()
        self.bar = _Bar(what, total, done) if sys.stderr.isatty() and total else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.close(self.done)

    def advance(self, images: int = 1) -> None:
        """So many more are done."""
        self.done += images
        now = time.monotonic()
        if now - self.shown < (SECONDS_PER_DRAWING if self.bar else SECONDS_PER_LINE):
            return
        self.shown = now
        if self.bar:
            self.bar.draw(self.done)
        else:
            click.echo(self._line(now), err=True)

    def _line(self, now: float) -> str:
        rate = (self.done - self.begun_with) / max(now - self.started, 1e-9)
        left = int((self.total - self.done) / rate) if rate else 0
        clock = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
        return f"{self.what}: {self.done} of {self.total} images, {rate:.1f}/s, {clock} left"


class _Bar:
    """rich's progress bar, drawn when told."""

    def __init__(self, what: str, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.progress = RichProgress(
            "{task.description}",
            BarColumn(),
            MofNCompleteColumn(),
            "images,",
            "{task.fields[rate]}/s,",
            TimeRemainingColumn(),
            "left",
            console=Console(stderr=True),
            auto_refresh=False,
        )
        self.task = self.progress.add_task(what, total=total, completed=done, rate="?")
        self.progress.start()

    def draw(self, done: int) -> None:
        """Show a count."""
        speed = self.progress.tasks[0].speed
        rate = f"{speed:.1f}" if speed else "?"
        self.progress.update(self.task, completed=done, rate=rate, refresh=True)

    def close(self, done: int) -> None:
        """Leave the last state on the screen."""
        self.draw(done)
        self.progress.stop()
