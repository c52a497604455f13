"""Signals that ask a run to stop: the step is finished and saved first; a second one ends it."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Self

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# torchrun, Slurm and a terminal pass one request on twice; a person takes longer.
SAME_REQUEST_SECONDS = 1.0


class Interruption:
    """As a context: the first stop signal sets `requested`; a second ends the process at once."""

    def __init__(
        self, *, signals: Collection[int] = STOP_SIGNALS, notice: str = "", ends_process: bool = True
    ) -> None:
        """notice: printed at the first signal. ends_process: else a second sets `repeated` only."""
        self.requested = self.repeated = False
        self._signals, self._notice, self._ends_process = signals, notice, ends_process

    def __enter__(self) -> Self:
        self._previous = {n: signal.signal(n, self._note) for n in self._signals}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler. It may come in the middle of a print, so that it writes by itself."""
        now = time.monotonic()
        if not self.requested:
            self.requested, self._requested_at = True, now
            _write(1, self._notice)
        elif now - self._requested_at > SAME_REQUEST_SECONDS:
            self.repeated = True
            if self._ends_process:
                _write(2, "Error: ended at once by a second signal, without saving\n")
                os._exit(1)  # whatever it is that waits

    @contextmanager
    def shielding_children(self) -> Iterator[None]:
        """What is started in this context never gets a stop signal; this process notes them."""
        # torchrun, Slurm and a terminal signal a whole process group: the processes that compile a
        # model would end, and its training fail instead of stopping.
        done = threading.Event()

        def receive() -> None:
            while not done.is_set():
                if signal.sigtimedwait(self._signals, 0.1) is not None:
                    self._note(0, None)

        # Blocked signals stay so in children, over fork and exec; ignored ones a program may undo.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        receiver = threading.Thread(target=receive, daemon=True)
        receiver.start()
        try:
            yield
        finally:
            done.set()
            receiver.join()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _write(stream: int, message: str) -> None:
    with suppress(OSError):  # nobody may be listening any more
        os.write(stream, message.encode())


def leave_signals_to_the_main_process(worker: int) -> None:
    """For loader processes: they end with their parent only, even one that is killed."""
    # A signal to the whole group must not end them before the step is done.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # torch's loader looks for its parent too, but not while a full pipe keeps it from writing.
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def end_children() -> None:
    """Kill the loader processes that an error has left, at the end of a program."""
    # Python ends them by SIGTERM and then waits for them; they ignore it, so it would for ever.
    if children := multiprocessing.active_children():
        previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would raise about each
        for child in children:
            child.kill()
            child.join()
        signal.signal(signal.SIGCHLD, previous)
