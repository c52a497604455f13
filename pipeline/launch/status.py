"""Where a run stands: readable while it works, from any machine that sees the folder, and after.

Slurm is asked through squeue alone: accounting (sacct) is not set up everywhere.
"""

import os
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from common.progress import duration, progress_text
from pipeline.launch.local import marked
from pipeline.launch.time_left import time_left_text
from pipeline.launch.view import step_table
from pipeline.plan.layout import Layout
from pipeline.plan.records import PlannedStep, Record, read_plan, read_progress, read_record

_UNFINISHED = ("submitted", "running", "stopped")  # recorded states of which the queue knows more
_RETRY_SECONDS = 2.0
# States in which a job is yet to start, or to start again; and in which it may still work.
_WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
LIVE = _WAITING | {"RUNNING", "SUSPENDED", "COMPLETING", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"}


class StepStatus(NamedTuple):
    """One line of `status`."""

    name: str
    # done, running, waiting, submitted, cancelled, interrupted, stopped or failed
    state: str
    detail: str


def status_text(paths: Layout) -> str:
    """How many steps are in each state and how long the rest takes, then all that are not done."""
    found = read_status(paths)
    counts = Counter(step.state for step in found)
    left = time_left_text(paths, [step.name for step in found if step.state == "running"])
    said = [f"{count} {state}" for state, count in counts.most_common()]
    text = f"{len(found)} steps: {', '.join(said)}" + (f"; {left}" if left else "")
    # What needs a hand comes first, and what runs before what waits.
    order = ["failed", "interrupted", "stopped", "cancelled", "running", "submitted", "waiting"]
    shown = sorted((s for s in found if s.state != "done"), key=lambda step: order.index(step.state))
    columns = {"state": [step.state for step in shown], "": [step.detail for step in shown]}
    return f"{text}\n{step_table([step.name for step in shown], columns)}" if shown else text


def read_status(paths: Layout) -> list[StepStatus]:
    """The steps of the latest call in the plan's order; ValueError where no run has been."""
    plan = read_plan(paths)
    records = {step["name"]: read_record(paths, step["name"]) for step in plan}
    unfinished = [r for r in records.values() if r is not None and r.state in _UNFINISHED]
    queue: dict[str, str] | None = None  # it cannot be asked
    with suppress(ValueError):
        queue = job_states(paths, unfinished)
    for record in unfinished:
        # What has ended may have done so after its record was read, and before the queue was.
        if queue and queue.get(record.job_id, "RUNNING") not in LIVE:
            records[record.name] = read_record(paths, record.name)
    return [_status(paths, step, records[step["name"]], queue) for step in plan]


def _status(
    paths: Layout, step: PlannedStep, record: Record | None, queue: dict[str, str] | None
) -> StepStatus:
    """queue: job -> state in Slurm."""
    if record is None:
        detail = f"for {', '.join(step['needs'])}" if step["needs"] else ""
        return StepStatus(step["name"], "waiting", detail)
    state = _state(paths, record, queue)
    details = {
        "running": progress_text(read_progress(paths.root / step["folder"])),
        "done": f"took {duration(record.seconds)}",
        "failed": f"exit code {record.exit_code}, see {step['folder']}/console.log",
        "submitted": (queue or {}).get(record.job_id, "").lower(),
        "cancelled": "the same command submits it again",
    }
    parts = [details.get(state, "the same command continues")]
    parts += [f"job {record.job_id}"] if record.job_id else []
    if queue is None and record.state in _UNFINISHED and was_submitted(paths, record):
        parts.append("by its record: Slurm's queue cannot be asked")
    return StepStatus(step["name"], state, ", ".join(filter(None, parts)))


def _state(paths: Layout, record: Record, queue: dict[str, str] | None) -> str:
    """What its record says, unless the queue or the table of processes knows that it is over."""
    if not was_submitted(paths, record):
        # Of processes on another host nothing is known; its word is taken.
        is_here = record.state == "running" and record.host == socket.gethostname()
        is_gone = is_here and not marked(f"{paths.root}:{record.name}")
        return "interrupted" if is_gone else record.state
    # A job that is not in `queue` was submitted since that was asked.
    if queue is None or record.state not in _UNFINISHED or record.job_id not in queue:
        return record.state
    in_queue = queue[record.job_id]
    if in_queue not in LIVE:
        return {"submitted": "cancelled", "running": "interrupted"}.get(record.state, record.state)
    if record.state == "running" and in_queue not in _WAITING:
        return "running"
    return "submitted"  # waiting, just begun, or about to be queued up again


def was_submitted(paths: Layout, record: Record) -> bool:
    """Whether the record's job is the step's own: what was submitted left submitit's file."""
    # A local run inside an allocation records that allocation, which says nothing about the step.
    return (paths.slurm / f"{record.job_id}_submitted.pkl").exists()


def job_states(paths: Layout, records: Iterable[Record]) -> dict[str, str]:
    """Job -> state (PENDING, RUNNING, ...) of the steps' own, "" for those long gone.

    Raises ValueError if squeue gives no answer: that is not the same as "no job is live".
    """
    jobs = [record.job_id for record in records if was_submitted(paths, record)]
    if not jobs:
        return {}
    # Not --jobs: squeue fails when the only one is long gone. Not --me: Slurm has it since 20.02.
    user = f"--user={os.getuid()}"
    # A busy controller lets a question time out now and then.
    listing = ask_slurm("squeue", "--noheader", "--states=all", "--format=%i %T", user, tries=3)
    found = dict(line.split() for line in listing.splitlines() if line.strip())
    return {job: found.get(job, "") for job in jobs}


def ask_slurm(*command: str, tries: int = 1) -> str:
    """A client command's output. Raises ValueError, in one line, if it gives none."""
    for left in reversed(range(tries)):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            raise ValueError(f"{command[0]} is not on the PATH here") from None
        except subprocess.TimeoutExpired:
            problem = "does not answer"
        else:
            if done.returncode == 0:
                return done.stdout
            problem = f"fails: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}"
        time.sleep(_RETRY_SECONDS if left else 0)
    raise ValueError(f"{command[0]} {problem}")
