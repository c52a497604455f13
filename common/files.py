"""Writing files: beside, flushed, renamed. A file that exists is complete."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def beside(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f"{path.name}.part")


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields the name to write to; after the block, what is there is flushed and becomes `path`.

    A kill at any moment leaves the old file or the new one. shared: several processes may do this
    at once. Raises RuntimeError if the disk does not take it; then nothing is left.
    """
    own = f"{path.name}.{socket.gethostname()}-{os.getpid()}.part"
    unfinished = path.with_name(own) if shared else beside(path)
    unfinished.unlink(missing_ok=True)  # it may be a second name of a file that is whole
    try:
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        # torch wraps what the file system said in an error of its own.
        said = error if isinstance(error, OSError) else error.__context__
        if not isinstance(said, OSError):
            raise
        raise RuntimeError(
            f"{path} cannot be written: {said.strerror}. Make room and run the same command again"
        ) from error
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a small file, whoever else may be doing so; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """The same with JSON."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def also_save_as(existing: Path, path: Path) -> None:
    """Give a complete file a second name, without writing gigabytes twice where links work.

    Files are only ever replaced, never changed, so that the two names do not disturb each other.
    """
    with replacing(path) as second:
        try:
            second.hardlink_to(existing)
        except OSError:
            shutil.copyfile(existing, second)


def check_output_folder(folder: Path, flag: str = "--output-dir") -> None:
    """Raise ValueError unless the folder can be written to, or made. Makes nothing."""
    nearest = folder.absolute()
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"{flag} {folder}: {nearest} is not a folder")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{flag} {folder}: {nearest} cannot be written to")


def check_output_file(path: Path, flag: str = "--out") -> None:
    """Raise ValueError unless the file can be made, or replaced."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: {path.absolute().parent} is not a folder")
    if path.is_dir():
        raise ValueError(f"{flag} {path} is a folder; name a file")
