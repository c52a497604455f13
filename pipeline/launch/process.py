"""One child process of a step: start it, watch it, stop it, and leave nothing of it behind.

The child gets its own session, so that a signal reaches it exactly once, through `stop`. Its output
goes straight into console.log and is shown by reading that file: it neither blocks nor breaks when
this process dies. On Linux the kernel then sends the child SIGTERM, so it saves and ends.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import psutil

from pipeline.plan.machine import REPO_ROOT

MARK = "SEGMAE_STEP"  # environment variable, inherited by every descendant: which step it works for
GRACE_SECONDS = 120.0  # between SIGTERM and SIGKILL: time to finish a step and save
_PR_SET_PDEATHSIG = 1
# Loaded here: between fork and exec, another thread's lock on the loader would never be released.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Child(subprocess.Popen[bytes]):
    """A running step; `poll` gives its exit code, negative for a signal, or None while it runs."""

    def __init__(
        self, command: list[str], console_log: Path, mark: str, environment: Mapping[str, str]
    ):
        """Starts `command` in the repository root, appending its output to `console_log`.

        `mark` names the step for `end_orphans`; `environment` is added to this process's own.
        """
        console_log.parent.mkdir(parents=True, exist_ok=True)
        self.mark, self.console_log = mark, console_log
        self._stop_asked: float | None = None
        with console_log.open("ab") as output:
            self._shown_bytes = output.tell()
            super().__init__(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                cwd=REPO_ROOT, start_new_session=True, preexec_fn=_in_child,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment, MARK: mark},
            )  # fmt: skip

    def new_output(self) -> bytes:
        """What it printed since the last call."""
        with self.console_log.open("rb") as stream:
            stream.seek(self._shown_bytes)
            output = stream.read()
        self._shown_bytes += len(output)
        return output

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Asks it (once) to save and end; after `grace_seconds` of further calls, ends it."""
        if self._stop_asked is None:
            self._stop_asked = time.monotonic()
            self._signal_all(signal.SIGTERM)
        elif time.monotonic() - self._stop_asked > grace_seconds:
            self.kill()

    def kill(self) -> None:
        """Ends it and all its descendants at once."""
        self._signal_all(signal.SIGKILL)
        self.wait()
        end_marked(self.mark)

    def _signal_all(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):  # it has just ended (macOS: a zombie)
            os.killpg(self.pid, number)  # it leads its session's group


def _in_child() -> None:
    """In the new child, before its program begins."""
    # Submitit's way to tell a Slurm job that its end is near. Slurm sends it to all processes of
    # the job; it is meant for the wrapper alone, which then asks the step to save.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if _LIBC is not None:
        # The kernel's signal when benchmark.py dies: not SIGKILL, since torchrun can end its
        # workers only if it is asked to.
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def marked(mark: str) -> list[psutil.Process]:
    """Living processes with that mark in their environment."""
    found = []
    for process in psutil.process_iter():
        # Another user's process, one that has just ended, or a zombie.
        with suppress(psutil.Error, OSError):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end_marked(mark: str) -> None:
    """Ends every process that inherited `mark` (torchrun's workers have sessions of their own)."""
    for process in marked(mark):
        with suppress(psutil.Error):
            process.kill()


def end_orphans(mark: str, grace_seconds: float = GRACE_SECONDS) -> None:
    """Waits for the processes of a step whose benchmark.py died; after the grace, ends them."""
    # The kernel asked them to end when benchmark.py died: they are saving if they still live.
    deadline = time.monotonic() + grace_seconds
    while marked(mark):
        if time.monotonic() > deadline:
            end_marked(mark)
        time.sleep(0.1)
