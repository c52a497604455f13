"""Files: reading regular ones; writing beside, flushed, renamed, so that what exists is complete.

An output never replaces an input: what is there already is only replaced by the command that made
it, which is told by the first bytes of the file (see `mark`). And one walk for all, and one lock.
"""

import json
import logging
import os
import re
import shutil
import socket
import stat
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Any

logger = logging.getLogger(__name__)

HEAD_BYTES = 4096  # of a file, in which its mark stands
UNFINISHED = ".segmae-part"  # whatever bears it is ours, and may be replaced
NOT_UTF8 = re.compile("[\ud800-\udfff]")  # as Python has such bytes in a name
NOTHING_WRITTEN = "nothing was written"
# Folders that programs make among a user's, as dot folders are, with copies of what lies beside them.
OF_PROGRAMS = ("@eaDir", "__MACOSX")


def open_regular(path: Path | str) -> FileIO:
    """Open a file to read it. Raises OSError, also for a pipe, a socket or a device."""
    # Opening a pipe would otherwise wait for someone to write into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(0, "it is no regular file", str(path))
    return os.fdopen(descriptor, "rb", buffering=0)


def read_bytes(path: Path | str, most: int = -1) -> bytes:
    """What a regular file holds, or its first bytes. Raises ValueError that names it."""
    try:
        with open_regular(path) as file:
            return file.read(most)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def read_text(path: Path) -> str:
    """The same as text. Raises ValueError that names the file, also if it is not UTF-8."""
    try:
        return read_bytes(path).decode("utf-8-sig")  # a byte order mark is no text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text: byte {error.start} is not UTF-8") from None


def path_below(folder: Path, name: str, source: str) -> Path:
    """The path of a name that stands in someone's file. Raises ValueError if it leads elsewhere."""
    pure = PurePosixPath(name.replace("\\", "/"))
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in name:
        raise ValueError(f"{source}: {name!r} is no name of a file below {folder}")
    return folder / pure


def beside(path: Path, *, shared: bool = False) -> Path:
    """Where a file is written before it gets its name; shared: several processes may do so."""
    own = f".{socket.gethostname()}-{os.getpid()}" if shared else ""
    return path.with_name(f"{path.name}{own}{UNFINISHED}")


def check_written_alone(path: Path) -> None:
    """Raise ValueError if to write into `path` is to change what has another name, or is no file."""
    if os.path.lexists(path):
        there = path.lstat()
        if not stat.S_ISREG(there.st_mode) or there.st_nlink > 1:
            raise ValueError(
                f"{path} is in the way: it is a link, or no regular file; remove it, or name another place"
            )


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yields the name to write to; after the block, what is there is flushed and becomes `path`.

    A kill at any moment leaves the old file or the new one. shared: several processes may do this
    at once. Raises RuntimeError if the disk does not take it; then nothing is left.
    """
    unfinished = beside(path, shared=shared)
    try:
        unfinished.unlink(missing_ok=True)  # it may be a second name of a file that is whole
        yield unfinished
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException as error:
        with suppress(OSError):
            unfinished.unlink()
        # torch wraps what the file system said in a RuntimeError.
        said = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(said, OSError):
            raise
        text = f"{path} cannot be written: {said.strerror or said}. "
        raise RuntimeError(text + "Make room and run the same command again") from error


def write_text(path: Path, text: str) -> None:
    """Replace a small file, whoever else may be doing so; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, shared=True) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """The same with JSON, which has no word for NaN and infinity: such a value is a ValueError."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def also_save_as(existing: Path, path: Path) -> None:
    """Give a complete file a second name, without writing gigabytes twice where links work."""
    # Files are only ever replaced, never changed: the two names do not disturb each other.
    with replacing(path) as second:
        try:
            second.hardlink_to(existing)
        except OSError:
            shutil.copyfile(existing, second)


def check_output_folder(folder: Path, flag: str = "--output-dir", *, reads: Iterable[Path] = ()) -> None:
    """Raise ValueError unless the folder can be written to, or made, outside `reads`, the input."""
    with _refusing(flag, folder):
        nearest = folder.absolute() / ("x" * 64)  # about what is written into it
        while not nearest.exists():
            nearest = nearest.parent
        _check_writable(nearest)
        for read in reads:
            if folder.resolve().is_relative_to(read.resolve()):
                raise OSError(f"it lies in {read}, which is read; name another place")


def check_output_file(
    path: Path, flag: str = "--out", *, reads: Iterable[Path] = (),
    is_own: Callable[[bytes], bool] | None = None, makes_folder: bool = False,
) -> None:  # fmt: skip
    """Raise ValueError unless the file can be made, or replaced.

    reads: files that the command reads: none is replaced, under whatever name. is_own: whether a
    file that is there, of which it gets the first bytes, was made by the same command; None: the
    command judges that by itself. makes_folder: the command makes it, and checks it by itself.
    """
    with _refusing(flag, path):
        if not makes_folder:
            _check_writable(path.absolute().parent)
        if path.is_dir():
            raise OSError("it is a folder; name a file")
        beside(path, shared=True).exists()  # raises OSError for a name that is too long
        if not path.exists():
            return
        if not path.is_file():
            raise OSError("it is no regular file")
        if not os.access(path, os.W_OK):
            raise OSError("it is read-only")
        if any(read.exists() and path.samefile(read) for read in reads):
            raise OSError("this command reads it; name another file")
        if is_own is not None:
            with open_regular(path) as file:
                if not is_own(file.read(HEAD_BYTES)):
                    raise OSError("it is there, and this command did not make it; name another")


def _check_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise OSError(f"{folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OSError(f"{folder} cannot be written to")


@contextmanager
def _refusing(flag: str, path: Path) -> Iterator[None]:
    """What the disk or a rule has against an output, as a ValueError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{flag} {shortened(path)}: {reason}; {NOTHING_WRITTEN}") from None


def mark(kind: str) -> str:
    """What a picture or a file of weights says of its maker: files of this kind may replace it."""
    return f"SegMAE/{kind}"


def is_marked(kind: str) -> Callable[[bytes], bool]:
    """Whether the first bytes of a file hold the mark; for `is_own`."""
    return lambda head: mark(kind).encode() in head


def shortened(value: object, most: int = 200) -> str:
    """A path or a value for a message: one line that is not too long."""
    text = str(value).encode("utf-8", "backslashreplace").decode()
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    return text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}"


def relative_files(folder: Path) -> set[str]:
    """Regular files below a folder, at any depth, as relative posix paths; see `walk`."""
    return {below + name for below, names in walk(folder) for name in names}


def walk(folder: Path, enter: Callable[[str], bool] = lambda below: True) -> Iterator[tuple[str, list[str]]]:
    """Yields where each folder is, "" or "below/folder/", and the names of its files, sorted.

    Links to folders come last, and lead nowhere if what they name was visited by its own name. A
    link to nothing is a file: whoever wants to read it will name it. Dot folders and OF_PROGRAMS are
    left out. enter: asked about each other folder before it is listed. Raises ValueError for a folder
    that cannot be listed.
    """
    visited: set[tuple[int, int]] = set()
    left_out: list[str] = []
    of_programs: list[str] = []
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
        files = []
        for entry in entries:
            is_file = entry.is_file(follow_symlinks=False)
            is_folder = entry.is_dir(follow_symlinks=False)
            if is_link := entry.is_symlink():  # not by `entry`, which raises for one to itself
                is_folder = os.path.isdir(entry.path)  # noqa: PTH112
                is_file = os.path.isfile(entry.path) or not os.path.exists(entry.path)  # noqa: PTH110, PTH113
            if is_folder and (entry.name.startswith(".") or entry.name in OF_PROGRAMS):
                of_programs.append(below + entry.name)
            elif not (is_file or is_folder) or NOT_UTF8.search(entry.name):
                left_out.append(below + entry.name)
            elif is_file:
                files.append(entry.name)
            elif is_link:
                waiting.append(f"{below}{entry.name}/")
            else:
                waiting.appendleft(f"{below}{entry.name}/")
        yield below, files
    for names, what in (
        (left_out, "names are no regular files, or not UTF-8, and"),
        (of_programs, "folders of programs are"),
    ):
        if names:
            text = "%s: %d %s left out: %s"
            logger.warning(text, folder, len(names), what, ", ".join(map(shortened, names[:3])))


@contextmanager
def hold(path: Path, folder: Path) -> Iterator[None]:
    """Hold the lock file `path`, which stays, while the block runs; or ValueError, at once."""
    from filelock import FileLock, Timeout  # slow to import, and needed by runs only

    path.parent.mkdir(parents=True, exist_ok=True)
    # The file is written to below: not through a link, and not over a file of somebody else's.
    check_written_alone(path)
    if path.exists() and path.read_bytes()[:1] not in (b"", b"{"):
        raise ValueError(f"{path} is in the way: it is no lock of a run here; remove it")
    try:  # What a killed process has just forked holds its lock until it has begun.
        held = FileLock(path).acquire(timeout=1.0)
    except Timeout:
        holder = "another process"
        with suppress(OSError, ValueError, KeyError, TypeError):  # it may be about to write this
            at = json.loads(path.read_text())
            holder = f"process {at['pid']} on {at['host']}, since {at['since']},"
        remedy = "wait for it, or use another --output-dir"
        raise ValueError(f"{holder} already works in {folder}; {remedy}") from None
    with held:  # then the file is left: who waits for it would hold one that has no name
        here = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        path.write_text(json.dumps(here))
        yield
