"""Runs steps on this machine: starts them, shows their output, records how they end.

A step's process gets its own session, so that a signal reaches it exactly once, through `stop`. Its
output goes straight into console.log and is shown by reading that file: it neither blocks nor
breaks when this process dies. On Linux the kernel then sends the child SIGTERM, so it saves and
ends.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import psutil

from common.console import EXIT_STOPPED
from common.environment import PROCESSES_HERE, PROGRESS_FILE
from common.progress import progress_text
from common.step_files import PROGRESS
from pipeline.launch.time_left import time_left_text
from pipeline.plan import machine
from pipeline.plan.layout import Layout
from pipeline.plan.machine import GIB, REPO_ROOT
from pipeline.plan.records import Record, StepState, output_sizes, read_progress, read_record, write_record
from pipeline.plan.step import Step

MARK = "SEGMAE_STEP"  # environment variable, inherited by every descendant: which step it works for
GRACE_SECONDS = 120.0  # between SIGTERM and SIGKILL: time to finish a step and save
_DYING_SECONDS = 10.0  # after SIGKILL; what a driver or a dead file server holds longer runs no more code
_PR_SET_PDEATHSIG = 1
# Loaded here: between fork and exec, another thread's lock on the loader would never be released.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_TAIL_LINES, _SEARCHED_LINES = 12, 200  # of console.log, for the message of a failure
_LOGS_BYTES = 50 * 2**20  # what a step writes beside checkpoints, generously
_SECONDS_PER_LOOK = 5.0  # at the records of all steps
_CLEAR_LINE = b"\r\x1b[2K"  # back to its beginning, and erase it


# The launcher ------------------------------------------------------------------------------------


class LocalLauncher:
    """Steps on GPUs of their own beside each other; without, one step, or one in each lane."""

    def __init__(self, paths: Layout, *, overlaps: bool, output: BinaryIO | None = None):
        """overlaps: whether several run at once. output: where theirs is shown, else stdout."""
        self.paths = paths
        self.overlaps = overlaps
        self.output = output or sys.stdout.buffer
        self.running: list[Child] = []
        self._line_drawn = False  # of progress; the next output goes in its place
        self._shown = ""  # the step whose output was shown last
        self._place = _place(paths.root)
        self._time_left = float("-inf"), ""  # when it was looked up, and what it was
        self._beside = 1  # steps at once, at most

    def has_room_for(self, step: Step) -> bool:
        """Whether the step could start now."""
        if step.gpus is not None:  # one for each of its processes
            return len(self._free(step)) >= step.processes
        return all(self.overlaps and child.step.lane != step.lane for child in self.running)

    def _free(self, step: Step) -> list[int]:
        """The GPUs that it may use and no running step has."""
        taken = {gpu for child in self.running for gpu in child.gpus}
        return [gpu for gpu in step.gpus or () if gpu not in taken]

    def start(self, step: Step) -> Record:
        """Starts the step; an orphan of an earlier, killed run is waited for first.

        When the disk is nearly full nothing is started, and that failure is returned.
        """
        lacking = shortage(step)
        if self._place not in (None, _place(self.paths.root)):  # to begin anew there would look like success
            lacking = f"{self.paths.root} is not what it was when the run began: put it back and call again"
        if lacking:  # not written: the record of an earlier attempt says more
            return Record.of(step, "failed", None, message=lacking)
        mark = f"{self.paths.root}:{step.name}"
        # The kernel asked an orphan to end when its benchmark.py died: it is saving if it still lives.
        end_marked(mark, GRACE_SECONDS)
        for output in step.outputs:
            output.parent.mkdir(parents=True, exist_ok=True)
        # A rolling progress file of the round before would be taken for this one's.
        (step.folder / PROGRESS).unlink(missing_ok=True)
        gpus = self._free(step)[: step.processes]
        child = Child(step, mark, step.console_log, gpus)
        child.record = record = Record.of(
            step, "running", read_record(self.paths, step.name), started=time.time(),
            host=socket.gethostname(), pid=child.pid, job_id=os.environ.get("SLURM_JOB_ID", ""),
        )  # fmt: skip
        write_record(self.paths, record)
        self.running.append(child)
        self._beside = max(self._beside, len(self.running))
        self._shown = step.name  # benchmark.py has said so
        return record

    def poll(self) -> list[Record]:
        """Shows new output; returns the steps that ended since the last call, recorded."""
        finished = []
        for child in list(self.running):
            exit_code = child.poll()  # before its last output is read
            self._show(child.new_output(), child.step)
            if exit_code is not None:
                end_marked(child.mark)
                self.running.remove(child)
                finished.append(self._judge(child, exit_code))
        if finished and self._line_drawn:  # it is about what has ended
            self._write(_CLEAR_LINE)
            self._line_drawn = False
        if self.running and self.output.isatty():  # one line for what runs now, drawn over itself
            steps = [child.step for child in self.running]
            parts = [f"{step.name} {progress_text(read_progress(step.folder))}" for step in steps]
            parts[:0] = [f"[{left} in all]"] if (left := self.time_left()) else []
            line = "   ".join(parts)[: shutil.get_terminal_size().columns - 1]
            self._write(_CLEAR_LINE + line.encode())
            self._line_drawn = True
        return finished

    def time_left(self) -> str:
        """Of the whole plan, in words; looked up every few seconds."""
        if time.monotonic() - self._time_left[0] > _SECONDS_PER_LOOK:
            names = [child.step.name for child in self.running]
            self._time_left = time.monotonic(), time_left_text(self.paths, names, self._beside)
        return self._time_left[1]

    def stop(self, *, at_once: bool = False, grace_seconds: float = GRACE_SECONDS) -> None:
        """Asks all running steps to save and end, or ends them at once.

        Called again, it ends steps that have not ended `grace_seconds` after they were asked.
        """
        for child in self.running:
            if at_once:
                child.kill()
            else:
                child.stop(grace_seconds)

    def _judge(self, child: Child, exit_code: int) -> Record:
        """By exit code and by the files it had to leave."""
        step, before, what = child.step, child.record, ""
        outputs = output_sizes(step, self.paths)
        missing = [p for p in step.outputs if not outputs[os.path.relpath(p, self.paths.root)]]
        state: StepState = "done"
        if exit_code == EXIT_STOPPED or was_stopped(step):
            state = "stopped"
        elif exit_code != 0:
            state, what = "failed", f"ended with exit code {exit_code}"
        elif missing:
            what = f"ended with exit code 0 but did not leave {', '.join(map(str, missing))}"
            state = "failed"
        record = replace(
            before, state=state, outputs=outputs if state == "done" else {}, exit_code=exit_code,
            seconds=before.seconds + time.time() - before.started,
            message=failure_message(step, what) if what else "",
        )  # fmt: skip
        write_record(self.paths, record)
        return record

    def _show(self, output: bytes, step: Step) -> None:
        """Of several steps in turn, each part is headed by the step's name, as tail does it."""
        if output:
            head = b"" if self._shown == step.name else f"==> {step.name} <==\n".encode()
            self._write((_CLEAR_LINE if self._line_drawn else b"") + head + output)
            self._line_drawn, self._shown = False, step.name

    def _write(self, output: bytes) -> None:
        with suppress(OSError):  # nobody may be listening; it stands in console.log
            self.output.write(output)
            self.output.flush()


def _place(folder: Path) -> tuple[int, int] | None:
    """What a folder is, whatever it is called; None if it is not there."""
    with suppress(FileNotFoundError):
        return (found := folder.stat()).st_dev, found.st_ino
    return None


def shortage(step: Step) -> str:
    """Why the step cannot be started for lack of space; empty if there is enough."""
    # Where an earlier checkpoint is there, its real size counts.
    sizes = [path.stat().st_size for path in step.folder.glob("*.pth")]
    one = max(sizes, default=step.facts.checkpoint_bytes if step.facts else 0)
    # Pretraining: last.pth, the round's checkpoint and one aside. Evaluation: last, best, aside.
    needed, free = 3 * one + _LOGS_BYTES, machine.free_bytes(step.folder)
    if free >= needed:
        return ""
    return (
        f"the disk of {step.folder} has {free / GIB:.1f} GiB free and {step.name} needs about "
        f"{needed / GIB:.1f} GiB; make room, then run the same command again"
    )


def environment(step: Step, gpus: Sequence[int] = ()) -> dict[str, str]:
    """What the step's process needs beside this process's environment.

    gpus: those that it gets, by default the first of those that it may use.
    """
    added = {
        PROGRESS_FILE: str(step.folder / PROGRESS),
        # torchrun would end its workers 30 s after a SIGTERM, in the middle of a long save.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{GRACE_SECONDS:.0f}",
    }
    if step.device == "cpu" and "OMP_WAIT_POLICY" not in os.environ:
        # Threads that wait by spinning take the cores from those that work: on two busy cores
        # ten times slower than threads that sleep (measured with vit_tiny).
        added["OMP_WAIT_POLICY"] = "PASSIVE"
    if step.gpus is not None:
        visible, gpus = machine.visible_gpus(), gpus or step.gpus[: step.processes]
        added["CUDA_VISIBLE_DEVICES"] = ",".join(visible[gpu] for gpu in gpus)
        # One process for each GPU, of this step or beside it: they share the cores.
        added[PROCESSES_HERE] = str(len(step.gpus))
    return added


def was_stopped(step: Step) -> bool:
    """Whether it saved because it was told to: torchrun makes 1 of a worker's exit code 75."""
    return read_progress(step.folder).get("state") == "stopped"


def failure_message(step: Step, what: str) -> str:
    """Step, command, exit code, log path and the log's last lines."""
    lines = step.console_log.read_text(errors="replace").splitlines()
    tail = "".join(f"\n    {line}" for line in lines[-_TAIL_LINES:])
    # With several processes, torchrun's own lines come after what the part said.
    said = next((line for line in reversed(lines[-_SEARCHED_LINES:]) if "Error: " in line), "")
    reason = f"\n  reason: {said.strip()}" if said and said not in lines[-_TAIL_LINES:] else ""
    return (
        f"step {step.name} {what}{reason}\n  command: {shlex.join(step.command)}\n"
        f"  log: {step.console_log}, which ends:{tail or ' (empty)'}"
    )


# A step's process --------------------------------------------------------------------------------


class Child(subprocess.Popen[bytes]):
    """A running step; `poll` gives its exit code, negative for a signal, or None while it runs."""

    record: Record  # the launcher's, of this attempt

    def __init__(self, step: Step, mark: str, console_log: Path, gpus: Sequence[int] = ()):
        """Starts the step in the repository root, appending its output to `console_log`.

        mark: names it for `end_marked`. gpus: see `environment`.
        """
        console_log.parent.mkdir(parents=True, exist_ok=True)
        self.step, self.mark, self.console_log, self.gpus = step, mark, console_log, gpus
        self._stop_asked: float | None = None
        added = {"PYTHONUNBUFFERED": "1", **environment(step, gpus), MARK: mark}
        with console_log.open("ab") as output:
            self._shown_bytes = output.tell()
            super().__init__(
                step.command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                cwd=REPO_ROOT, start_new_session=True, preexec_fn=_in_child,
                env={**os.environ, **added},
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


def end_marked(mark: str, grace_seconds: float = 0.0) -> None:
    """Ends every process that inherited `mark` (torchrun's workers have sessions of their own).

    Those that end by themselves within the grace are waited for; the others are killed. Returns
    when they are gone, and what they held is free (locks, memory of GPUs), or cannot be ended.
    """
    deadline = time.monotonic() + grace_seconds
    while (found := marked(mark)) and time.monotonic() < deadline + _DYING_SECONDS:
        if time.monotonic() >= deadline:
            for process in found:
                with suppress(psutil.Error):
                    process.kill()
        time.sleep(0.1)
