"""What Slurm's queue says, through squeue alone: accounting (sacct) is not set up everywhere."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable


def job_states(job_ids: Iterable[str]) -> dict[str, str]:
    """Job -> state (PENDING, RUNNING, ...) of those still in the queue; empty without Slurm."""
    wanted = sorted(set(job_ids))
    if not wanted or shutil.which("squeue") is None:
        return {}
    # Not --jobs: squeue fails as a whole when one of them is long gone.
    command = ["squeue", "--noheader", "--states=all", "--format=%i %T", "--me"]
    listing = subprocess.run(command, capture_output=True, text=True)
    if listing.returncode != 0:
        return {}
    found = dict(line.split(maxsplit=1) for line in listing.stdout.splitlines() if line.strip())
    return {job: found[job].strip() for job in wanted if job in found}


def is_live(state: str) -> bool:
    """Whether a job in that state may still work."""
    return state in {
        *("PENDING", "RUNNING", "SUSPENDED", "COMPLETING", "CONFIGURING", "REQUEUED"),
        *("REQUEUE_HOLD", "STOPPED", "RESIZING", "SIGNALING", "STAGE_OUT", "REQUEUE_FED"),
    }
