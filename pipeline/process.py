"""One child process of a step: start it, watch it, stop it, and leave nothing of it behind.

The child gets its own session, so that a signal reaches it exactly once, through `stop`. Its output
goes straight into console.log and is shown by reading that file: it neither blocks nor breaks when
this process dies. On Linux the kernel then sends the child SIGTERM, so it saves and ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

MARK = "SEGMAE_STEP"  # environment variable, inherited by every descendant: which step it works for
GRACE_SECONDS = 120.0  # between SIGTERM and SIGKILL: time to finish a step and save
REPO_ROOT = Path(__file__).resolve().parents[1]  # python -m mae is run from here
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


class Child:
    """A running step."""

    def __init__(
        self, command: list[str], console_log: Path, mark: str, environment: Mapping[str, str]
    ):
        """Starts `command` in the repository root, appending its output to `console_log`.

        `mark` names the step for `end_orphans`; `environment` is added to this process's own.
        SIGTERM, not SIGKILL, follows this process's death, because torchrun can end its workers
        only if it is asked to.
        """
        console_log.parent.mkdir(parents=True, exist_ok=True)
        self.mark = mark
        self.console_log = console_log
        self.shown_bytes = console_log.stat().st_size if console_log.exists() else 0
        with console_log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=REPO_ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment, MARK: self.mark},
                start_new_session=True,
                preexec_fn=_in_child,
            )
        self.pid = self._process.pid
        self._is_torchrun = "torch.distributed.run" in command
        self._stop_asked: float | None = None

    def exit_code(self) -> int | None:
        """None while it runs; then its code, negative for a signal."""
        return self._process.poll()

    def new_output(self) -> bytes:
        """What it printed since the last call."""
        with self.console_log.open("rb") as stream:
            stream.seek(self.shown_bytes)
            output = stream.read()
        self.shown_bytes += len(output)
        return output

    def stop(self, grace_seconds: float = GRACE_SECONDS) -> None:
        """Asks it (once) to save and end; after `grace_seconds` of further calls, ends it.

        torchrun would end its workers 30 s after a SIGTERM of its own (fixed in its code), in the
        middle of a long save. So the workers are asked; torchrun ends when they have ended.
        """
        if self._stop_asked is None:
            self._stop_asked = time.monotonic()
            workers = _torchrun_workers(self.pid, self.mark) if self._is_torchrun else []
            for pid in workers:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGTERM)
            if not workers:
                _signal_group(self.pid, signal.SIGTERM)
        elif time.monotonic() - self._stop_asked > grace_seconds:
            self.kill()

    def kill(self) -> None:
        """Ends it and all its descendants at once."""
        _signal_group(self.pid, signal.SIGKILL)
        self._process.wait()
        end_marked(self.mark)


def _in_child() -> None:
    """In the new child: have the kernel send SIGTERM when benchmark.py dies (Linux).

    SIGUSR2 is how submitit tells a Slurm job that its end is near. Slurm sends it to all processes
    of the job; it is meant for the wrapper alone, which then asks the step to save.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def end_marked(mark: str) -> None:
    """Ends every process that inherited `mark` (torchrun's workers have sessions of their own)."""
    for pid in marked_pids(mark):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def marked_pids(mark: str) -> list[int]:
    """Processes with that mark in their environment (Linux; elsewhere none are found)."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_zombie = not (entry / "cmdline").read_bytes()
            if not is_zombie and wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def _torchrun_workers(torchrun: int, mark: str) -> list[int]:
    """torchrun's own children among the marked; their loaders and compilers are left alone.

    LOCAL_RANK tells a worker from a fork of torchrun that is not yet one.
    """
    found = []
    for pid in marked_pids(mark):
        with contextlib.suppress(OSError):
            names = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if any(name.startswith(b"LOCAL_RANK=") for name in names):
                found.append(pid)
    return [pid for pid in found if _stat(pid)[1:2] == [str(torchrun)]]


def start_ticks(pid: int) -> int | None:
    """A process's start in clock ticks since boot, None if it is gone (or not on Linux)."""
    fields = _stat(pid)
    is_gone = not fields or fields[0] == "Z"
    return None if is_gone else int(fields[19])


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from its third field on (state, parent, ...), empty if there is none.

    The second field, the name, may hold blanks and brackets (proc(5)).
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def is_alive(pid: int, pid_started: int) -> bool:
    """Whether exactly that process still lives, not another that got its number."""
    if sys.platform != "linux":
        with contextlib.suppress(OSError):
            os.kill(pid, 0)
            return True
        return False
    return start_ticks(pid) == pid_started


def end_orphans(mark: str, grace_seconds: float = GRACE_SECONDS) -> None:
    """Waits for the processes of a step whose benchmark.py died; after the grace, ends them.

    The kernel asked them to end when benchmark.py died, so they are saving if they still live.
    """
    deadline = time.monotonic() + grace_seconds
    while marked_pids(mark):
        if time.monotonic() > deadline:
            end_marked(mark)
        time.sleep(0.1)
