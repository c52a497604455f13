"""What Slurm says, through squeue and sinfo alone: accounting (sacct) is not set up everywhere."""

import os
import re
import subprocess
import time
from collections.abc import Iterable

from pipeline.plan.layout import Layout
from pipeline.plan.records import Record

_TRIES = 3  # a busy controller lets a question time out now and then
_RETRY_SECONDS = 2.0
_ANSWER_SECONDS = 60
# States in which a job is yet to start, or to start again; and in which it may still work.
WAITING = {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT"}
LIVE = WAITING | {
    *("RUNNING", "SUSPENDED", "COMPLETING", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT"),
}


class QueueError(ValueError):
    """Slurm cannot be asked; the message is one line and says why."""


def job_states(job_ids: Iterable[str]) -> dict[str, str]:
    """Job -> state (PENDING, RUNNING, ...) of those that Slurm still lists; "" is no job.

    Raises QueueError if squeue gives no answer: that is not the same as "no job is live".
    """
    wanted = set(job_ids) - {""}
    if not wanted:
        return {}
    # Not --jobs: squeue fails when the only one is long gone. Not --me: Slurm has it since 20.02.
    user = f"--user={os.getuid()}"
    listing = _ask("squeue", "--noheader", "--states=all", "--format=%i %T", user, tries=_TRIES)
    found = dict(line.split() for line in listing.splitlines() if line.strip())
    return {job: state for job, state in found.items() if job in wanted}


def submitted_job(paths: Layout, record: Record) -> str:
    """The job that was submitted for the step, "" if there is none.

    A local run inside an allocation records that allocation, which says nothing about the step;
    what was submitted has left submitit's file.
    """
    left = paths.slurm / f"{record.job_id}_submitted.pkl"
    return record.job_id if left.exists() else ""


def most_cpus(partition: str | None, *, gpus: int) -> int | None:
    """CPUs of the largest node with so many GPUs (of the default partition unless named).

    None where Slurm does not say.
    """
    try:
        listing = _ask("sinfo", "--noheader", "--Node", "--format=%P %c %G")
    except QueueError:
        return None
    found = []
    for line in listing.splitlines():
        name, cpus, gres = line.split(maxsplit=2)
        chosen = name.rstrip("*") in partition.split(",") if partition else name.endswith("*")
        # gres: (null), gpu:8, gpu:a100:8(S:0-1), shard:32,gpu:h200:4
        there = sum(map(int, re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres)))
        if chosen and cpus.isdecimal() and there >= gpus:
            found.append(int(cpus))
    return max(found, default=None)


def _ask(*command: str, tries: int = 1) -> str:
    """A client command's output; QueueError if it gives none."""
    for left in reversed(range(tries)):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_ANSWER_SECONDS)
        except FileNotFoundError:
            raise QueueError(f"{command[0]} is not on the PATH here") from None
        except subprocess.TimeoutExpired:
            problem = "does not answer"
        else:
            if done.returncode == 0:
                return done.stdout
            problem = f"fails: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}"
        time.sleep(_RETRY_SECONDS if left else 0)
    raise QueueError(f"{command[0]} {problem}")
