"""One process at a time in an output directory."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

_FORKED_SECONDS = 1.0  # what a killed process has just forked holds its lock until it has begun


class LockedError(ValueError):
    """Another process works in this output directory."""


@contextlib.contextmanager
def hold(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stays, while the block runs; a killed process lets go of it.

    Raises LockedError, which names the holder, if another process works in `folder`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=_FORKED_SECONDS)
    except Timeout:
        raise LockedError(
            f"{_holder(path)} already works in {folder}; wait for it, or use another --output-dir"
        ) from None
    try:
        here = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        path.write_text(json.dumps(here))
        yield
    finally:
        lock.release()


def _holder(path: Path) -> str:
    """Who holds it, as far as the file tells; its holder may be about to write it."""
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
