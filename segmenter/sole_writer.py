"""One run at a time in an output directory."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = ".lock"


@contextmanager
def sole_writer(output_dir: Path) -> Iterator[None]:
    """Hold the folder, which is made, while the block runs; a killed process lets go of it.

    Loader processes do not inherit the lock. File systems that know no locks are used without.
    Raises ValueError if another process works there.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / LOCK
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(
                f"another process is writing into {output_dir}; wait for it, or use another "
                "--output-dir"
            ) from None
        except OSError:
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
