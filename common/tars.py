"""Images in tar files, read where they lie, by an index of their offsets that is built once.

    images = open_tars(Path("IN1K/train"), ["train-000000.tar"], is_image, None)
    images.tars.names()                             # those of the folder that they would unpack to
    (images / "n01440764/n01440764_18.JPEG").read_bytes()

`ILSVRC2012_img_train.tar` is a tar of a tar for each class; the index looks into these, too, so that
each image is one `pread` of the outer file. What a tar holds is judged when it is indexed.
"""

import atexit
import errno
import io
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

from common.files import beside, check_written_alone, open_regular, read_bytes, shortened
from common.parallel import in_order
from common.progress import Counter
from common.tar_members import DEVKIT, TAR_NAME, Found, Part, classes_of_val, scan

logger = logging.getLogger(__name__)
Stamps = dict[str, tuple[int, int]]  # file below the folder -> size, and time of its last change in ns

INDEX = "tars.sqlite"  # beside the tars
# SQLite's application_id, where it stands in a file's head: the file is ours.
INDEX_ID, ID_AT = 0x5E67AE01, slice(68, 72)
INDEX_VERSION = 2
WAIT_SECONDS = 3600.0  # for another process that builds the same index
SECONDS_PER_COMMIT = 2.0  # a kill loses so much work
# parts: the tars, and those in them (inner: their name there); is_done: its images are listed.
SCHEMA = f"""
    DROP TABLE IF EXISTS tars; DROP TABLE IF EXISTS parts; DROP TABLE IF EXISTS images;
    CREATE TABLE tars (id INTEGER PRIMARY KEY, path TEXT NOT NULL, size INTEGER, mtime_ns INTEGER);
    CREATE TABLE parts (tar INTEGER, start INTEGER, size INTEGER, inner TEXT, is_done INTEGER DEFAULT 0);
    CREATE TABLE images (tar INTEGER, name TEXT NOT NULL, start INTEGER, size INTEGER);
    PRAGMA application_id = {INDEX_ID};
    PRAGMA user_version = {INDEX_VERSION};
"""
JOINED = "FROM images JOIN tars ON id = tar"
FIND = f"SELECT path, tars.size, mtime_ns, start, images.size {JOINED} WHERE name = ?"
FIND_TWO = f"SELECT name, min(path), max(path) {JOINED} GROUP BY name HAVING count(*) > 1"
WAITING = """
    SELECT tar, path, start, parts.size, inner FROM parts JOIN tars ON id = tar WHERE NOT is_done
    ORDER BY path, start
"""


@dataclass(frozen=True)
class TarPath:
    """A path below a folder of tars, as if they were unpacked there. Used as a Path is."""

    tars: "Tars"
    path: Path

    def __truediv__(self, name: str) -> "TarPath":
        return TarPath(self.tars, self.path / name)

    def __str__(self) -> str:
        return str(self.path)

    @property
    def parent(self) -> "TarPath":
        """The folder that it is in."""
        return TarPath(self.tars, self.path.parent)

    @property
    def name(self) -> str:
        """Without its folders."""
        return self.path.name

    def read_bytes(self) -> bytes:
        """All of the image. Raises ValueError that names it."""
        return self.tars.read(self.path.relative_to(self.tars.folder).as_posix())


@dataclass(eq=False)
class Tars:
    """The tars in a folder, and the index of their images. Each process opens a tar once."""

    folder: Path
    index: Path
    _connections: dict[int, sqlite3.Connection] = field(default_factory=dict, repr=False)
    _files: dict[str, io.FileIO] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connections": {}, "_files": {}}

    def names(self) -> list[str]:
        """All images, sorted."""
        return sorted(name for (name,) in self._query("SELECT name FROM images"))

    def read(self, name: str) -> bytes:
        """An image's bytes. Raises ValueError that names it."""
        if not (found := self._query(FIND, name)):
            raise ValueError(f"{self.folder}/{name} is in none of the tars there")
        path, *stamp, start, size = found[0]
        try:
            content = os.pread(self._open(path, tuple(stamp)).fileno(), size, start)
            if len(content) < size:
                raise OSError(0, "it was cut short")
        except OSError as error:
            raise ValueError(f"{self.folder}/{name} cannot be read: {path}: {error.strerror}") from None
        return content

    def _open(self, path: str, stamp: tuple[int, ...]) -> io.FileIO:
        if path not in self._files:
            try:
                file = open_regular(self.folder / path)
            except OSError as error:
                if error.errno != errno.EMFILE or not self._files:
                    raise
                self._files.clear()  # more tars than a process may have open: this closes them
                return self._open(path, stamp)
            if _stamp(os.fstat(file.fileno())) != stamp:
                raise OSError(0, "it was changed after it was indexed; start again")
            self._files[path] = file
        return self._files[path]

    def _query(self, sql: str, *values: Any) -> list[Any]:
        process = os.getpid()  # SQLite's connections do not survive a fork
        try:
            if process not in self._connections:
                self._connections[process] = _read_only(self.index)
            return self._connections[process].execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise ValueError(f"{self.index} is damaged ({error}); remove it") from None


def is_tar(path: str) -> bool:
    """Whether a file is called like a tar, compressed ones included: those are refused by `open_tars`."""
    return bool(TAR_NAME.search(path)) and not path.endswith(DEVKIT)


def open_tars(
    folder: Path, tars: Sequence[str], is_image: Callable[[str], bool], index_dir: Path | None
) -> TarPath:
    """The folder that these tars in it would unpack to, indexed if they are not yet, or were changed.

    The index lies beside them; else, where that cannot be written, in index_dir; else it is built
    for this process alone. Raises ValueError for tars that cannot be read in place.
    """
    # What names are made with is part of what the index is of.
    kit = [path for path in (DEVKIT, f"../{DEVKIT}") if (folder / path).is_file()][:1]
    try:
        stamps = {path: _stamp((folder / path).stat()) for path in [*tars, *kit]}
    except OSError as error:  # a link to nothing, say
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None
    for index in _places(folder, index_dir):
        try:
            if not _is_current(index, stamps):
                if not os.access(index.parent, os.W_OK):
                    continue
                _build(index, folder, stamps, tars, is_image)
            return TarPath(Tars(folder, index), folder)
        except sqlite3.Error as error:  # some network file systems have no locks
            logger.warning("%s cannot be written: %s", index, error)
    raise ValueError(f"there is no room for the index of the tars in {folder}")


def _places(folder: Path, index_dir: Path | None) -> Iterator[Path]:
    """Where the index may lie, in turn."""
    yield folder / INDEX
    if index_dir is not None:
        digest = sha256(os.fsencode(folder.resolve())).hexdigest()[:8]  # several may lie there
        yield index_dir / f"tars-{folder.name}-{digest}.sqlite"
    logger.warning("%s cannot be written: the index of its tars is kept for this process alone", folder)
    scratch = Path(tempfile.mkdtemp(prefix="segmae-tars-"))
    atexit.register(shutil.rmtree, scratch, ignore_errors=True)
    yield scratch / INDEX


def _stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def _read_only(index: Path) -> sqlite3.Connection:
    # immutable: no locks, and no files beside it. Threads of a process take turns by Python's lock.
    uri = f"{index.resolve().as_uri()}?mode=ro&immutable=1"
    return sqlite3.connect(uri, uri=True, check_same_thread=False)


# Building the index


def _is_current(index: Path, stamps: Stamps) -> bool:
    """Whether it is there, and of tars of these sizes and times. Raises ValueError if it is no index."""
    if not index.exists():
        return False
    if read_bytes(index, ID_AT.stop)[ID_AT] != INDEX_ID.to_bytes(4):
        raise ValueError(f"{index} is in the way: the index of the tars is written there; move it")
    with closing(_read_only(index)) as store:
        return _is_of(store, stamps)


def _is_of(store: sqlite3.Connection, stamps: Stamps) -> bool:
    try:
        rows = store.execute("SELECT path, size, mtime_ns FROM tars").fetchall()
        version = store.execute("PRAGMA user_version").fetchone()
    except sqlite3.Error:  # damaged, or not begun
        return False
    return version == (INDEX_VERSION,) and {path: tuple(stamp) for path, *stamp in rows} == stamps


def _build(
    index: Path, folder: Path, stamps: Stamps, tars: Sequence[str], is_image: Callable[[str], bool]
) -> None:
    """Write the index, or go on with one that was begun; what is committed survives a kill.

    A process that comes while another builds waits, and finds it done. Raises sqlite3.Error.
    """
    part = beside(index)
    check_written_alone(part)
    with closing(sqlite3.connect(part, 1, isolation_level="EXCLUSIVE")) as store:
        _lock(store)
        if _is_current(index, stamps):
            part.unlink(missing_ok=True)  # made by waiting for it
            return
        if not _is_of(store, stamps):
            store.executescript(SCHEMA)
            rows = [(number, path, *stamps[path]) for number, path in enumerate(sorted(stamps))]
            store.executemany("INSERT INTO tars VALUES (?, ?, ?, ?)", rows)
            whole = [(number, 0, size, "") for number, path, size, _ in rows if path in tars]
            store.executemany("INSERT INTO parts (tar, start, size, inner) VALUES (?, ?, ?, ?)", whole)
            store.commit()
        kit = stamps.keys() - set(tars)
        classes = classes_of_val(folder / kit.pop()) if kit else {}
        _fill(store, folder, partial(scan, folder, is_image, classes))
        part.replace(index)  # before others get the lock


def _lock(store: sqlite3.Connection) -> None:
    """Wait for whoever holds it; a second at a time, or Ctrl-C would wait, too."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            store.execute("BEGIN EXCLUSIVE")
            # Kept over commits; before, whoever waits would keep what he shares, and all wait for each other.
            store.execute("PRAGMA locking_mode = EXCLUSIVE")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise


def _fill(store: sqlite3.Connection, folder: Path, scan: Callable[[Part], Found]) -> None:
    """All tars, then all that lie in them, on all cores: on a network's disk each header is a wait."""
    left_out: list[str] = []
    committed_at = time.monotonic()
    while parts := [Part(*row) for row in store.execute(WAITING)]:
        logger.info("indexing %d tars of %s", len(parts), folder)
        with Counter(f"index {folder.name}", total=len(parts), unit="tars") as counter:
            for part, found in zip(parts, in_order(scan, parts, processes=None), strict=True):
                of = part.tar, part.start
                store.execute("UPDATE parts SET is_done = 1 WHERE tar = ? AND start = ?", of)
                inner = [(part.tar, *row) for row in found.inner]
                store.executemany("INSERT INTO parts (tar, start, size, inner) VALUES (?, ?, ?, ?)", inner)
                images = [(part.tar, *row) for row in found.images]
                store.executemany("INSERT INTO images VALUES (?, ?, ?, ?)", images)
                left_out += found.left_out
                counter.advance()
                # Here, never where something was raised: a part is there as a whole, or not at all.
                if time.monotonic() - committed_at >= SECONDS_PER_COMMIT:
                    store.commit()
                    committed_at = time.monotonic()
    try:
        store.execute("CREATE UNIQUE INDEX IF NOT EXISTS by_name ON images (name)")
    except sqlite3.IntegrityError:
        name, first, last = store.execute(FIND_TWO).fetchone()
        where = f"{folder / first} twice" if first == last else f"{first} and in {last}"
        raise ValueError(f"{folder}: {name} is in {where}; rename or remove one") from None
    store.commit()
    if left_out:
        text = "%s: %d members are left out: they are no regular files, of dot folders, or not UTF-8: %s"
        logger.warning(text, folder, len(left_out), ", ".join(map(shortened, left_out[:3])))
