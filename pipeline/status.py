"""Where a run stands: readable while it works, from any machine that sees the folder, and after."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

from pipeline import slurm_queue
from pipeline.layout import Layout
from pipeline.local import duration, progress_text
from pipeline.preview import read_plan
from pipeline.process import marked_pids
from pipeline.records import Record, read_record


@dataclass(frozen=True, kw_only=True)
class StepStatus:
    """One line of `status`."""

    name: str
    state: str
    """done, running, waiting, submitted, interrupted, stopped or failed."""
    detail: str


def read_status(paths: Layout) -> list[StepStatus]:
    """The steps of the latest call in the plan's order; ValueError where no run has been."""
    plan = read_plan(paths)
    records = {step["name"]: read_record(paths, step["name"]) for step in plan}
    jobs = {record.job_id for record in records.values() if record and record.job_id}
    queue = slurm_queue.job_states(jobs)
    return [_status(paths, step, records[step["name"]], queue) for step in plan]


def _status(
    paths: Layout, step: dict[str, Any], record: Record | None, queue: dict[str, str]
) -> StepStatus:
    state, detail = "waiting", ""
    if step["needs"]:
        detail = f"for {', '.join(step['needs'])}"
    if record is not None:
        state = record.state
        job = f"job {record.job_id}" if record.job_id else ""
        in_queue = queue.get(record.job_id, "")
        if state == "running" and not _is_running(paths, record, in_queue):
            state = "interrupted"
        if in_queue and in_queue != "RUNNING" and state not in ("done", "failed"):
            state = "submitted"
        details = {
            "running": progress_text(paths.root / step["folder"]),
            "done": f"took {duration(record.seconds)}",
            "failed": f"exit code {record.exit_code}, see {step['folder']}/console.log",
            "submitted": in_queue.lower(),
        }
        parts = [details.get(state, "the same command continues"), job]
        detail = ", ".join(part for part in parts if part)
    return StepStatus(name=step["name"], state=state, detail=detail)


def _is_running(paths: Layout, record: Record, in_queue: str) -> bool:
    """By the queue for a job, by the process table here; another host's word is taken."""
    if record.job_id:
        return in_queue == "RUNNING"
    if record.host != socket.gethostname():
        return True
    return bool(marked_pids(f"{paths.root}:{record.name}"))


def status_text(paths: Layout) -> str:
    """All steps as aligned text, with the count of each state at the end."""
    found = read_status(paths)
    width = max(len(step.name) for step in found)
    lines = [f"{s.name.ljust(width)}  {s.state.ljust(11)}  {s.detail}".rstrip() for s in found]
    counts: dict[str, int] = {}
    for step in found:
        counts[step.state] = counts.get(step.state, 0) + 1
    return "\n".join([*lines, ", ".join(f"{count} {state}" for state, count in counts.items())])
