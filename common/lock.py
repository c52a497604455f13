"""One process at a time in an output directory."""

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
    # The file is written to below: not through a link, and not over a file of somebody else's.
    if os.path.lexists(path):
        is_plain = path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
        if not is_plain or path.read_bytes()[:1] not in (b"", b"{"):
            raise ValueError(f"{path} is in the way: it is no lock of a run here; remove it")
    try:
        held = FileLock(path).acquire(timeout=_FORKED_SECONDS)
    except Timeout:
        raise LockedError(
            f"{_holder(path)} already works in {folder}; wait for it, or use another --output-dir"
        ) from None
    with held:  # then the file is left: who waits for it would hold one that has no name
        here = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        path.write_text(json.dumps(here))
        yield


def _holder(path: Path) -> str:
    # As far as the file tells: its holder may be about to write it.
    try:
        holder = json.loads(path.read_text())
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
