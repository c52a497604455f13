"""Where a run stands: readable while it works, from any machine that sees the folder, and after."""

import socket
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

from common.progress import duration
from pipeline.launch import slurm_queue
from pipeline.launch.local import progress_text
from pipeline.launch.process import marked
from pipeline.launch.view import step_table
from pipeline.plan.layout import Layout
from pipeline.plan.records import PlannedStep, Record, read_plan, read_record

_UNFINISHED = ("submitted", "running", "stopped")  # recorded states of which the queue knows more


class StepStatus(NamedTuple):
    """One line of `status`."""

    name: str
    state: str
    """done, running, waiting, submitted, cancelled, interrupted, stopped or failed."""
    detail: str


def read_status(paths: Layout) -> list[StepStatus]:
    """The steps of the latest call in the plan's order; ValueError where no run has been."""
    plan = read_plan(paths)
    records = {step["name"]: read_record(paths, step["name"]) for step in plan}
    unfinished = [r for r in records.values() if r is not None and r.state in _UNFINISHED]
    jobs = {record.name: slurm_queue.submitted_job(paths, record) for record in unfinished}
    queue = None  # cannot be asked
    with suppress(slurm_queue.QueueError):
        queue = slurm_queue.job_states(jobs.values())
        for name, job in jobs.items():
            # It may have ended after its record was read, and before the queue was.
            if job and queue.get(job) not in slurm_queue.LIVE:
                records[name] = read_record(paths, name)
    return [
        _status(paths, step, records[step["name"]], jobs.get(step["name"], ""), queue)
        for step in plan
    ]


def _status(
    paths: Layout, step: PlannedStep, record: Record | None, job: str, queue: dict[str, str] | None
) -> StepStatus:
    """job: the one submitted for it, "" for none. queue: job -> state in Slurm."""
    if record is None:
        detail = f"for {', '.join(step['needs'])}" if step["needs"] else ""
        return StepStatus(step["name"], "waiting", detail)
    state = _state(paths, record, job, queue)
    details = {
        "running": progress_text(paths.root / step["folder"]),
        "done": f"took {duration(record.seconds)}",
        "failed": f"exit code {record.exit_code}, see {step['folder']}/console.log",
        "submitted": (queue or {}).get(job, "").lower(),
        "cancelled": "the same command submits it again",
    }
    parts = [details.get(state, "the same command continues")]
    parts += [f"job {record.job_id}"] if record.job_id else []
    if job and queue is None:
        parts.append("by its record: Slurm's queue cannot be asked")
    return StepStatus(step["name"], state, ", ".join(filter(None, parts)))


def _state(paths: Layout, record: Record, job: str, queue: dict[str, str] | None) -> str:
    """What its record says, unless the queue or the table of processes knows that it is over."""
    if not job:
        # Of processes on another host nothing is known; its word is taken.
        is_here = record.state == "running" and record.host == socket.gethostname()
        is_gone = is_here and not marked(f"{paths.root}:{record.name}")
        return "interrupted" if is_gone else record.state
    # It has ended, or was submitted again, since the queue was asked.
    if queue is None or record.state not in _UNFINISHED or record.job_id != job:
        return record.state
    in_queue = queue.get(job, "")  # nothing: it is gone
    if in_queue not in slurm_queue.LIVE:
        return {"submitted": "cancelled", "running": "interrupted"}.get(record.state, record.state)
    if record.state == "running" and in_queue not in slurm_queue.WAITING:
        return "running"
    return "submitted"  # waiting, just begun, or about to be queued up again


def status_text(paths: Layout) -> str:
    """All steps as a table, with the count of each state at the end."""
    found = read_status(paths)
    columns = {"state": [step.state for step in found], "": [step.detail for step in found]}
    counts = Counter(columns["state"])
    table = step_table([step.name for step in found], columns)
    return f"{table}\n{', '.join(f'{count} {state}' for state, count in counts.items())}"
