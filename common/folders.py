"""What lies below a folder: one walk, for everybody who lists."""

import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

from common.files import shortened

logger = logging.getLogger(__name__)

MOST_NAMED = 3


def walk(
    folder: Path, enter: Callable[[str], bool] = lambda below: True
) -> Iterator[tuple[str, list[os.DirEntry[str]]]]:
    """Yields what each folder holds, by name, and where it is: "" or "below/folder/".

    Every real folder is visited once: links to folders come last, and lead nowhere if what they
    name was visited by its own name. enter: asked about each folder before it is listed. Names
    that are not UTF-8, pipes, sockets and devices are left out with a warning. Raises ValueError
    for a folder that cannot be listed.
    """
    visited: set[tuple[int, int]] = set()
    left_out: list[str] = []
    waiting = deque([""])
    while waiting:
        below = waiting.popleft()
        path = f"{folder}/{below}"
        try:
            here = os.stat(path)  # noqa: PTH116
            if (here.st_dev, here.st_ino) in visited or (below and not enter(below)):
                continue
            visited.add((here.st_dev, here.st_ino))
            with os.scandir(path) as listed:
                entries = sorted(listed, key=lambda entry: entry.name)
        except OSError as error:
            raise ValueError(f"{path} cannot be listed: {error.strerror}") from None
        left_out += [below + entry.name for entry in entries if not _is_usable(entry)]
        entries = [entry for entry in entries if _is_usable(entry)]
        yield below, entries
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.appendleft(f"{below}{entry.name}/")
            elif entry.is_symlink() and os.path.isdir(entry.path):  # noqa: PTH112
                waiting.append(f"{below}{entry.name}/")
    if left_out:
        some = ", ".join(shortened(name) for name in left_out[:MOST_NAMED])
        logger.warning(
            "%s: %d names are no regular files, or not UTF-8, and left out: %s",
            folder, len(left_out), some,
        )  # fmt: skip


def relative_files(folder: Path) -> set[str]:
    """Regular files below a folder, at any depth, as relative posix paths; see `walk`.

    A link to nothing is among them: whoever wants to read it will name it.
    """
    return {
        below + entry.name
        for below, entries in walk(folder)
        for entry in entries
        if entry.is_file(follow_symlinks=False)
        or (entry.is_symlink() and not os.path.isdir(entry.path))  # noqa: PTH112
    }


def _is_usable(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file or a folder, or a link to one or to nothing, with a name in UTF-8."""
    if not entry.name.isascii():
        try:
            entry.name.encode()
        except UnicodeEncodeError:
            return False
    if entry.is_file(follow_symlinks=False) or entry.is_dir(follow_symlinks=False):
        return True
    if not entry.is_symlink():
        return False
    there = os.path.exists(entry.path)  # noqa: PTH110
    return not there or os.path.isfile(entry.path) or os.path.isdir(entry.path)  # noqa: PTH112, PTH113
