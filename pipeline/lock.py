"""One benchmark.py per output directory."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from pipeline.process import is_alive, start_ticks


class LockedError(RuntimeError):
    """Another benchmark.py works in this output directory."""


@contextlib.contextmanager
def hold(path: Path) -> Iterator[None]:
    """Holds the lock file while the block runs; LockedError names a living holder.

    A lock left by a dead process of this host is taken over, and so is one of the same Slurm job,
    which has been started again elsewhere. Another host's cannot be judged from here: it counts as
    living.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _acquire(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _acquire(path: Path) -> None:
    pid = os.getpid()
    holder = {"host": socket.gethostname(), "pid": pid, "pid_started": start_ticks(pid)}
    holder |= _slurm_job()
    # Write aside, then link: the lock appears complete or not at all, for one process only.
    aside = path.with_name(f"lock.{socket.gethostname()}.{pid}")
    aside.write_text(json.dumps({**holder, "since": time.strftime("%F %T")}))
    try:
        for _ in range(10):
            try:
                os.link(aside, path)
            except FileExistsError:
                _take_away_stale(path)
            else:
                return
        raise LockedError(f"{path} keeps coming back: several runs start at once")
    finally:
        aside.unlink()


def _slurm_job() -> dict[str, str]:
    """The Slurm job this process works in, and how often it was started again."""
    names = {"job": "SLURM_JOB_ID", "restart": "SLURM_RESTART_COUNT"}
    return {key: os.environ.get(name, "") for key, name in names.items()}


def _is_restarted(other: dict[str, object]) -> bool:
    """Whether the holder was an earlier start of the job that this process works in."""
    own = _slurm_job()
    same_job = bool(own["job"]) and other.get("job") == own["job"]
    return same_job and other.get("restart") != own["restart"]


def _take_away_stale(path: Path) -> None:
    """Removes a dead process's lock; raises LockedError for a living one's."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return  # its holder has just finished
    try:
        other = json.loads(text)
        here = other["host"] == socket.gethostname()
        alive = is_alive(other["pid"], other["pid_started"]) if here else not _is_restarted(other)
    except (ValueError, KeyError, TypeError):
        raise LockedError(f"{path} is not a lock; remove it if nothing runs there") from None
    if alive:
        away = "" if here else f"; if that run is dead, remove {path}"
        raise LockedError(
            f"a benchmark.py already works in {path.parents[1]}: process {other['pid']} "
            f"on {other['host']} since {other['since']}{away}"
        )
    # Rename first: of two that find it stale, one takes it away and the other starts over.
    taken = path.with_name(f"stale.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(taken)
        if taken.read_text() != text:  # a new holder came in between: give it back
            with contextlib.suppress(FileExistsError):
                os.link(taken, path)
        taken.unlink()
