"""Runs steps on this machine: starts them, shows their output, records how they end."""

import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import BinaryIO, NamedTuple

from common.console import EXIT_STOPPED
from common.environment import PROCESSES_HERE, PROGRESS_FILE
from common.progress import progress_text
from common.step_files import PROGRESS
from pipeline.launch import process
from pipeline.plan import machine
from pipeline.plan.layout import Layout
from pipeline.plan.machine import GIB
from pipeline.plan.records import (
    Record,
    StepState,
    output_sizes,
    read_progress,
    read_record,
    write_record,
)
from pipeline.plan.steps import Step

_TAIL_LINES, _SEARCHED_LINES = 12, 200  # of console.log, for the message of a failure
_LOGS_BYTES = 50 * 2**20  # what a step writes beside checkpoints, generously
_CLEAR_LINE = b"\r\x1b[2K"  # back to its beginning, and erase it


class _Running(NamedTuple):
    step: Step
    child: process.Child
    record: Record
    gpus: Sequence[int]


class LocalLauncher:
    """Steps on GPUs of their own beside each other; without, one step, or one in each lane."""

    def __init__(self, paths: Layout, *, overlaps: bool, output: BinaryIO | None = None):
        """overlaps: whether several run at once. output: where theirs is shown, else stdout."""
        self.paths = paths
        self.overlaps = overlaps
        self.output = output or sys.stdout.buffer
        self.running: list[_Running] = []
        self._line_drawn = False  # of progress; the next output goes in its place
        self._shown = ""  # the step whose output was shown last

    def has_room_for(self, step: Step) -> bool:
        """Whether the step could start now."""
        if step.gpus is not None:  # one for each of its processes
            return len(self._free(step)) >= step.processes
        return all(self.overlaps and r.step.lane != step.lane for r in self.running)

    def _free(self, step: Step) -> list[int]:
        """The GPUs that it may use and no running step has."""
        taken = {gpu for running in self.running for gpu in running.gpus}
        return [gpu for gpu in step.gpus or () if gpu not in taken]

    def start(self, step: Step) -> Record:
        """Starts the step; an orphan of an earlier, killed run is waited for first.

        When the disk is nearly full nothing is started, and that failure is returned.
        """
        if lacking := shortage(step):  # not written: the record of an earlier attempt says more
            return Record.of(step, "failed", None, message=lacking)
        mark = f"{self.paths.root}:{step.name}"
        process.end_orphans(mark)
        for output in step.outputs:
            output.parent.mkdir(parents=True, exist_ok=True)
        # A rolling progress file of the round before would be taken for this one's.
        (step.folder / PROGRESS).unlink(missing_ok=True)
        gpus = self._free(step)[: step.processes]
        child = process.Child(step.command, step.console_log, mark, environment(step, gpus))
        record = Record.of(
            step, "running", read_record(self.paths, step.name), started=time.time(),
            host=socket.gethostname(), pid=child.pid, job_id=os.environ.get("SLURM_JOB_ID", ""),
        )  # fmt: skip
        write_record(self.paths, record)
        self.running.append(_Running(step, child, record, gpus))
        self._shown = step.name  # benchmark.py has said so
        return record

    def poll(self) -> list[Record]:
        """Shows new output; returns the steps that ended since the last call, recorded."""
        finished = []
        for running in list(self.running):
            exit_code = running.child.poll()  # before its last output is read
            self._show(running.child.new_output(), running.step)
            if exit_code is not None:
                process.end_marked(running.child.mark)
                self.running.remove(running)
                finished.append(self._judge(running, exit_code))
        if self.running and self.output.isatty():  # one line for what runs now, drawn over itself
            steps = [running.step for running in self.running]
            parts = [f"{step.name} {progress_text(read_progress(step.folder))}" for step in steps]
            line = "   ".join(parts)[: shutil.get_terminal_size().columns - 1]
            self._write(_CLEAR_LINE + line.encode())
            self._line_drawn = True
        return finished

    def stop(self, *, at_once: bool = False, grace_seconds: float = process.GRACE_SECONDS) -> None:
        """Asks all running steps to save and end, or ends them at once.

        Called again, it ends steps that have not ended `grace_seconds` after they were asked.
        """
        for running in self.running:
            if at_once:
                running.child.kill()
            else:
                running.child.stop(grace_seconds)

    def _judge(self, running: _Running, exit_code: int) -> Record:
        """By exit code and by the files it had to leave."""
        step, what, outputs = running.step, "", dict[str, int]()
        state: StepState = "done"
        if exit_code == EXIT_STOPPED or was_stopped(step):
            state = "stopped"
        elif exit_code != 0:
            state, what = "failed", f"ended with exit code {exit_code}"
        else:
            try:
                outputs = output_sizes(step, self.paths)
            except FileNotFoundError as error:
                state, what = "failed", f"ended with exit code 0 but did not leave {error}"
        record = replace(
            running.record, state=state, outputs=outputs, exit_code=exit_code,
            seconds=running.record.seconds + time.time() - running.record.started,
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
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": f"{process.GRACE_SECONDS:.0f}",
    }
    if step.config.run.device == "cpu" and "OMP_WAIT_POLICY" not in os.environ:
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
