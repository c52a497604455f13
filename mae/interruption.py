"""Signals that ask a run to stop: the step is finished and saved first."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: run the same command again to continue
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interruption:
    """While entered, stop signals only set `requested`."""

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
