"""Images in tar files, read where they lie: `read(name) -> bytes`, by an index that is built once.

    images = open_tars(Path("IN1K/train"), ["train-000000.tar"], is_image, None)
    images.names()                                  # those of the folder that they would unpack to
    (images / "n01440764/n01440764_18.JPEG").read()

`ILSVRC2012_img_train.tar` is a tar of a tar for each class; the index looks into these, too, so that
each image is one `pread` of the outer file. What a tar holds is judged when it is indexed.
"""

import errno
import io
import logging
import os
import posixpath
import re
import shlex
import shutil
import sqlite3
import tarfile
import tempfile
import time
from atexit import register
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from common.files import (
    NOT_UTF8,
    OF_PROGRAMS,
    beside,
    check_written_alone,
    open_regular,
    read_bytes,
    shortened,
)
from common.parallel import in_order
from common.progress import Counter

logger = logging.getLogger(__name__)

TAR = ".tar"
# What unpacks each kind of compression, told by the first bytes: a name may say anything.
UNPACKERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
BLOCK = tarfile.BLOCKSIZE
INDEX = "tars.sqlite"  # beside the tars
INDEX_ID, INDEX_VERSION = 0x5E67AE01, 1  # SQLite's application_id: the file is ours
WAIT_SECONDS = 3600.0  # for another process that builds the same index
SECONDS_PER_COMMIT = 2.0  # a kill loses so much work
SCHEMA = """
    CREATE TABLE tars (id INTEGER PRIMARY KEY, path TEXT NOT NULL UNIQUE, size INTEGER, mtime_ns INTEGER);
    CREATE TABLE parts (tar INTEGER, start INTEGER, PRIMARY KEY (tar, start)) WITHOUT ROWID;
    CREATE TABLE inner (tar INTEGER, start INTEGER, size INTEGER, folder TEXT, PRIMARY KEY (tar, start));
    CREATE TABLE images (name TEXT PRIMARY KEY, tar INTEGER, start INTEGER, size INTEGER) WITHOUT ROWID;
"""
FIND = "SELECT tar, start, size FROM images WHERE name = ?"
# ImageNet's classes, and its validation images, whose classes stand in the development kit.
WORDNET_ID = re.compile(r"(n\d{8})(_.*|$)")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\b")
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
DEVKIT_FILES = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
CLASS_SUFFIX, CLASS_NAME = "cls", re.compile(r"[\w][\w.-]{0,200}")  # WebDataset's


class TarMember(NamedTuple):
    """An image in a tar, by the name that it would have below the folder of its tars."""

    images: "TarImages"
    path: str

    @property
    def name(self) -> str:
        """Without its folders, as `Path.name`."""
        return posixpath.basename(self.path)

    def read(self) -> bytes:
        """All of the file. Raises ValueError that names it."""
        return self.images.read(self.path)

    def __str__(self) -> str:
        return f"{self.images.folder}/{self.path}"


@dataclass(eq=False)
class TarImages:
    """The images of the tars in a folder, by an index that was built of them.

    `/` and `parent` give what a Path's do, so that callers need not know which of the two they have.
    Each process opens a tar once.
    """

    folder: Path
    index: Path
    below: str = ""  # what names begin with, and those in the index do not
    _connections: dict[int, sqlite3.Connection] = field(default_factory=dict, repr=False)
    _opened: dict[int, io.FileIO] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connections": {}, "_opened": {}}

    def __truediv__(self, name: str) -> TarMember:
        return TarMember(self, name.removeprefix(self.below))

    @property
    def parent(self) -> "TarImages":
        """The same images by names that begin with the folder's own."""
        return TarImages(self.folder, self.index, f"{self.folder.name}/{self.below}")

    def names(self) -> list[str]:
        """All of them, sorted."""
        return sorted(f"{self.below}{name}" for (name,) in self._query("SELECT name FROM images"))

    def read(self, name: str) -> bytes:
        """An image's bytes, by its name in the index. Raises ValueError that names it."""
        found = self._query(FIND, name)
        if not found:
            raise ValueError(f"{self.folder}/{name} is in none of the tars there")
        tar, start, size = found[0]
        try:
            content = os.pread(self._file(tar).fileno(), size, start)
        except OSError as error:
            raise ValueError(f"{self.folder}/{name} cannot be read: {error.strerror}") from None
        if len(content) < size:
            ((path,),) = self._query("SELECT path FROM tars WHERE id = ?", tar)
            raise ValueError(f"{self.folder}/{name} cannot be read: {path} was cut short")
        return content

    def _file(self, tar: int) -> io.FileIO:
        if tar not in self._opened:
            ((path, *stamp),) = self._query("SELECT path, size, mtime_ns FROM tars WHERE id = ?", tar)
            try:
                try:
                    file = open_regular(self.folder / path)
                except OSError as error:
                    if error.errno != errno.EMFILE:
                        raise
                    self._opened.clear()  # more tars than a process may have open: closes them
                    file = open_regular(self.folder / path)
            except OSError as error:
                raise ValueError(f"{self.folder / path} cannot be read: {error.strerror}") from None
            if _stamp(os.fstat(file.fileno())) != tuple(stamp):
                raise ValueError(f"{self.folder / path} was changed after it was indexed; start again")
            self._opened[tar] = file
        return self._opened[tar]

    def _query(self, sql: str, *values: Any) -> list[Any]:
        process = os.getpid()  # SQLite's connections do not survive a fork
        try:
            if process not in self._connections:
                uri = f"{self.index.resolve().as_uri()}?mode=ro&immutable=1"
                self._connections[process] = sqlite3.connect(uri, uri=True, check_same_thread=False)
            return self._connections[process].execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise ValueError(f"{self.index} is damaged ({error}); remove it") from None


def open_tars(
    folder: Path, tars: Sequence[str], is_image: Callable[[str], bool], index_dir: Path | None
) -> TarImages:
    """The images in these tars of a folder, indexed if they are not yet, or were changed since.

    The index lies beside them; else, where that cannot be written, in index_dir; else it is built
    for this process alone. Raises ValueError for tars that cannot be read in place.
    """
    kit = _devkit(folder)  # what names are made with is part of what the index is of
    try:
        stamps = {name: _stamp((folder / name).stat()) for name in sorted([*tars, *map(str, kit)])}
    except OSError as error:  # a link to nothing, say
        raise ValueError(f"{error.filename} cannot be read: {error.strerror}") from None
    places = [folder / INDEX]
    if index_dir is not None and index_dir.is_dir():
        digest = sha256(os.fsencode(folder.resolve())).hexdigest()[:8]  # several may lie there
        places.append(index_dir / f"tars-{folder.name}-{digest}.sqlite")
    for place in places:
        if _is_of(place, stamps):
            return TarImages(folder, place)
    for place in places:
        if os.access(place.parent, os.W_OK):
            try:
                _build(place, folder, stamps, is_image)
                return TarImages(folder, place)
            except sqlite3.Error as error:  # some network file systems have no locks
                logger.warning("%s cannot be written: %s", place, error)
    logger.warning("%s cannot be written: the index of its tars is kept for this process alone", folder)
    scratch = Path(tempfile.mkdtemp(prefix="segmae-tars-"))
    register(partial(_remove, scratch, os.getpid()))
    _build(scratch / INDEX, folder, stamps, is_image)
    return TarImages(folder, scratch / INDEX)


def tars_among(folder: Path, paths: Iterable[str]) -> list[str]:
    """Which of these files below a folder are tars. Raises ValueError for a compressed one."""
    for path in sorted(paths):
        if COMPRESSED.search(path) and not path.endswith(DEVKIT):
            _refuse_compressed(folder / path, read_bytes(folder / path, 6), f"{folder / path}")
    return [path for path in paths if path.lower().endswith(TAR)]


def _refuse_compressed(path: Path, head: bytes, where: str) -> None:
    """Raise ValueError, with the command that unpacks it, if a tar with these first bytes is compressed."""
    for magic, tool in UNPACKERS.items():
        if head.startswith(magic):
            unpacked = path.with_name(f"{COMPRESSED.sub('', path.name).removesuffix(TAR)}-unpacked.tar")
            command = f"{tool} -dc {shlex.quote(str(path))} > {shlex.quote(str(unpacked))}"
            if where != str(path):  # one in a tar
                command = f"tar -C FOLDER -xf {shlex.quote(str(path))}, and then {tool} -d FOLDER/*"
            raise ValueError(
                f"{where} is compressed, so that no image can be read by itself. This unpacks it: {command}; "
                "then move the compressed one away"
            )


def _remove(scratch: Path, process: int) -> None:
    if os.getpid() == process:  # not when a process ends that was forked from it
        shutil.rmtree(scratch, ignore_errors=True)


def _stamp(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


# Building the index


class _Part(NamedTuple):
    """A tar, or one inside it: bytes `start` to `start + size` of a file."""

    tar: int
    path: str
    start: int
    size: int
    folder: str  # what its names are below


class _Found(NamedTuple):
    """What a part holds: images (name, start, size), tars, and names of what is left out."""

    images: list[tuple[str, int, int]]
    inner: list[_Part]
    left_out: list[str]


def _is_of(index: Path, stamps: dict[str, tuple[int, int]]) -> bool:
    """Whether it is a complete index of tars of these sizes and times. ValueError if it is no index."""
    if not index.exists():
        return False
    try:
        open_regular(index).close()
        uri = f"{index.resolve().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            is_ours = connection.execute("PRAGMA application_id").fetchone() == (INDEX_ID,)
            if is_ours and connection.execute("PRAGMA user_version").fetchone() == (INDEX_VERSION,):
                return _stamps_in(connection) == stamps
    except (sqlite3.Error, OSError):
        is_ours = index.is_file() and b"SQLite" in index.read_bytes()[:16]
    if is_ours:
        return False
    raise ValueError(f"{index} is in the way: the index of the tars is written there; move it")


def _stamps_in(connection: sqlite3.Connection) -> dict[str, tuple[int, int]]:
    rows = connection.execute("SELECT path, size, mtime_ns FROM tars ORDER BY path")
    return {path: (size, mtime) for path, size, mtime in rows}


def _build(
    index: Path, folder: Path, stamps: dict[str, tuple[int, int]], is_image: Callable[[str], bool]
) -> None:
    """Write the index, or go on with one that was begun; what is committed survives a kill.

    A process that comes while another builds waits, and finds it done. Raises sqlite3.Error.
    """
    part = beside(index)
    check_written_alone(part)
    with closing(sqlite3.connect(part, 1, isolation_level="EXCLUSIVE")) as store:
        store.execute("PRAGMA locking_mode = EXCLUSIVE")
        _lock(store)
        if _is_of(index, stamps):
            with suppress(OSError):
                if part.exists() and not part.stat().st_size:
                    part.unlink()  # made by waiting for it
            return
        try:
            is_same = _stamps_in(store) == stamps
        except sqlite3.Error:
            is_same = False
        if not is_same:
            _begin(store, stamps)
        where = _classes_of_val(folder)
        _fill(store, folder, partial(_scan, folder, is_image, where))
        store.execute(f"PRAGMA user_version = {INDEX_VERSION}")
        store.commit()  # and flushed
        part.replace(index)  # before others get the lock


def _lock(store: sqlite3.Connection) -> None:
    """Wait for whoever holds it; a second at a time, or Ctrl-C would wait, too."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            store.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
        else:
            return


def _begin(store: sqlite3.Connection, stamps: dict[str, tuple[int, int]]) -> None:
    for table in ("tars", "parts", "inner", "images"):
        store.execute(f"DROP TABLE IF EXISTS {table}")
    for statement in SCHEMA.split(";"):
        store.execute(statement)
    store.execute(f"PRAGMA application_id = {INDEX_ID}")
    rows = ((path, *stamp) for path, stamp in stamps.items())
    store.executemany("INSERT INTO tars VALUES (NULL, ?, ?, ?)", rows)
    store.commit()


def _fill(store: sqlite3.Connection, folder: Path, scan: Callable[[_Part], _Found]) -> None:
    """All tars, and all that lie in them, on all cores: on a network's disk each header is a wait."""
    left_out: list[str] = []
    committed_at = time.monotonic()
    try:
        while waiting := _waiting(store):
            logger.info("indexing %d tars of %s", len(waiting), folder)
            with Counter(f"index {folder.name}", total=len(waiting), unit="tars", of_step=False) as counter:
                for part, found in zip(waiting, in_order(scan, waiting, processes=None), strict=True):
                    _add(store, folder, part, found)
                    left_out += found.left_out
                    counter.advance()
                    if time.monotonic() - committed_at > SECONDS_PER_COMMIT:
                        store.commit()
                        committed_at = time.monotonic()
    finally:
        store.commit()
    if left_out:
        text = "%s: %d members are left out: no regular files, not UTF-8, or of programs: %s"
        logger.warning(text, folder, len(left_out), ", ".join(map(shortened, left_out[:3])))


def _waiting(store: sqlite3.Connection) -> list[_Part]:
    """What was not looked into yet."""
    return [_Part(*row) for row in store.execute("""
        SELECT id, path, 0, size, '' FROM tars
        WHERE path NOT LIKE '%.gz' AND (id, 0) NOT IN (SELECT tar, start FROM parts)
        UNION ALL SELECT tar, path, start, inner.size, folder FROM inner JOIN tars ON tar = id
        WHERE (tar, start) NOT IN (SELECT tar, start FROM parts)
        ORDER BY path, 3
    """)]  # fmt: skip


def _add(store: sqlite3.Connection, folder: Path, part: _Part, found: _Found) -> None:
    """All of it, or if it is refused nothing, so that it is looked at again."""
    if not store.in_transaction:  # or releasing it would be a commit, and flush
        store.execute("BEGIN EXCLUSIVE")
    store.execute("SAVEPOINT part")
    store.execute("INSERT INTO parts VALUES (?, ?)", (part.tar, part.start))
    inner = ((part.tar, one.start, one.size, one.folder) for one in found.inner)
    store.executemany("INSERT INTO inner VALUES (?, ?, ?, ?)", inner)
    for name, start, size in found.images:
        try:
            store.execute("INSERT INTO images VALUES (?, ?, ?, ?)", (name, part.tar, start, size))
        except sqlite3.IntegrityError:
            ((other, *_),) = store.execute(FIND, (name,))
            ((path,),) = store.execute("SELECT path FROM tars WHERE id = ?", (other,))
            store.execute("ROLLBACK TO part")
            where = f"{folder / part.path} twice" if other == part.tar else f"{path} and in {part.path}"
            raise ValueError(f"{folder}: {name} is in {where}; rename or remove one") from None
    store.execute("RELEASE part")


class _Window(io.RawIOBase):
    """Some bytes of a file, as a file of its own."""

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self.file, self.start, self.size, self.at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        content = os.pread(
            self.file.fileno(), min(len(buffer), max(0, self.size - self.at)), self.start + self.at
        )
        buffer[: len(content)] = content
        self.at += len(content)
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + (0, self.at, self.size)[whence]
        return self.at

    def tell(self) -> int:
        return self.at


def _scan(folder: Path, is_image: Callable[[str], bool], classes: dict[str, str], part: _Part) -> _Found:
    """The images of one tar. Raises ValueError, which names it, for what cannot be read in place."""
    where = f"{folder / part.path}" + (f" ({part.folder}.tar in it)" if part.folder else "")
    try:
        with open_regular(folder / part.path) as file:
            _refuse_compressed(folder / part.path, os.pread(file.fileno(), 6, part.start), where)
            window = _Window(file, part.start, part.size)
            members = _Members(where, is_image, part)
            with tarfile.open(fileobj=window, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # a million would fill the memory
                    members.add(member)
                end = tar.offset
            _check_end(window, end, where)
            return members.found(window, classes)
    except tarfile.TarError as error:
        raise ValueError(f"{where} is no whole tar: {error}; download or copy it again") from None
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror or error}") from None


def _check_end(window: _Window, end: int, where: str) -> None:
    """Whether the tar ends as it should: tarfile takes damage in the middle for the end."""
    window.seek(end)
    if len(mark := window.read(BLOCK) or b"") < BLOCK:
        raise tarfile.ReadError(f"it was cut short at byte {end}, where its end mark should be")
    if any(mark):
        raise tarfile.ReadError(f"there is no member's header at byte {end}")
    while rest := window.read(2**20):  # zeros up to a whole record, 10 KB as a rule
        if any(rest):
            raise tarfile.ReadError("something comes after its end mark, as where tars were joined by `cat`")


class _Members:
    """What was seen of a part's members so far."""

    def __init__(self, where: str, is_image: Callable[[str], bool], part: _Part) -> None:
        self.where, self.is_image, self.part = where, is_image, part
        self.files: dict[str, tuple[int, int]] = {}  # images: where they lie in the part
        self.links: dict[str, str] = {}  # images that are links, to what
        self.classes: dict[str, tuple[int, int]] = {}  # WebDataset's, by key
        self.inner: list[_Part] = []
        self.left_out: list[str] = []

    def add(self, member: tarfile.TarInfo) -> None:
        """Note a member, or leave it out. Raises ValueError for an image that cannot be read in place."""
        name = self._inside(member.name, member.name)
        if member.isdir() or not name:
            return
        pure = PurePosixPath(name)
        is_tar, is_class = pure.suffix.lower() == TAR, pure.suffix == f".{CLASS_SUFFIX}"
        if not (self.is_image(name) or is_tar or is_class):
            if COMPRESSED.search(name):
                advice = "unpack it, and what it holds, into tars or folders"
                raise ValueError(f"{self.where}: {name} in it is compressed; {advice}")
            return
        if name in self.files or name in self.links:
            raise ValueError(f"{self.where} has two members {name}; rename or remove one")
        if NOT_UTF8.search(name) or any(part.startswith(".") or part in OF_PROGRAMS for part in pure.parts):
            self.left_out.append(name)
        elif member.issparse():
            raise ValueError(f"{self.where}: {name} in it is sparse; pack it again without --sparse")
        elif member.isreg():
            self._add_file(name, member, is_tar=is_tar, is_class=is_class)
        elif member.islnk() or member.issym():
            target, below = member.linkname, posixpath.dirname(name)
            target = target if member.islnk() else posixpath.normpath(posixpath.join(below, target))
            self.links[name] = self._inside(target, f"{name} -> {member.linkname}")
        else:
            self.left_out.append(name)

    def _add_file(self, name: str, member: tarfile.TarInfo, *, is_tar: bool, is_class: bool) -> None:
        place = self.part.start + member.offset_data, member.size
        if is_tar:
            folder = posixpath.join(self.part.folder, name[: -len(TAR)])
            self.inner.append(_Part(self.part.tar, self.part.path, *place, folder))
        elif is_class:
            self.classes[_key(name)] = place
        else:
            self.files[name] = place

    def _inside(self, name: str, shown: str) -> str:
        """A member's name without what means nothing. Raises ValueError if it leads elsewhere."""
        parts = [part for part in name.split("/") if part not in ("", ".")]
        if name.startswith("/") or ".." in parts:
            raise ValueError(f"{self.where}: {shortened(shown)} leads out of its folder; pack it again")
        return "/".join(parts)

    def found(self, window: _Window, classes: dict[str, str]) -> _Found:
        """All of it by the names that it would have in class folders."""
        for name, target in self.links.items():
            seen = {name}
            while target in self.links and target not in seen:  # a link to a link
                seen.add(target)
                target = self.links[target]
            if target not in self.files:
                raise ValueError(
                    f"{self.where}: {name} in it is a link to {shortened(target)}, no image of this tar; "
                    "pack it again with --dereference"
                )
            self.files.setdefault(name, self.files[target])
        named = [
            (self._folder_of(name, window, classes) + name, *place) for name, place in self.files.items()
        ]
        return _Found(named, self.inner, self.left_out)

    def _folder_of(self, name: str, window: _Window, classes: dict[str, str]) -> str:
        """Where the image would lie: a tar's name, or what stands beside it, tells the class."""
        if self.part.folder:
            return f"{self.part.folder}/"
        of_tar = WORDNET_ID.fullmatch(PurePosixPath(self.part.path).stem)
        if "/" in name:
            return ""
        if of_tar:
            return f"{of_tar[1]}/"
        if place := self.classes.get(_key(name)):
            text = (
                os.pread(window.file.fileno(), min(place[1], 256), place[0])
                .decode("utf-8", "replace")
                .strip()
            )
            if not CLASS_NAME.fullmatch(text):
                raise ValueError(
                    f"{self.where}: {_key(name)}.{CLASS_SUFFIX} in it is no class: {shortened(text)!r}"
                )
            wordnet = WORDNET_ID.match(name)  # numbers are ImageNet's classes, sorted: the name says more
            return f"{wordnet[1] if wordnet and text.isdecimal() else text}/"
        of_val = VAL_IMAGE.match(name)
        return f"{classes[of_val[1]]}/" if of_val and of_val[1] in classes else ""


def _key(name: str) -> str:
    """WebDataset's: the path up to the first dot of the file's name."""
    folder, _, base = name.rpartition("/")
    return posixpath.join(folder, base.partition(".")[0])


def _devkit(folder: Path) -> list[Path]:
    """ImageNet's development kit, in the folder or beside it, or none."""
    return [path for path in (folder / DEVKIT, folder.parent / DEVKIT) if path.is_file()][:1]


def _classes_of_val(folder: Path) -> dict[str, str]:
    """ImageNet's validation images, by number, to their classes, if the development kit is at hand."""
    if not (kit := _devkit(folder)):
        return {}
    (path,) = kit
    from scipy.io import loadmat  # slow to import

    try:
        with tarfile.open(path) as tar:
            files = {name: tar.extractfile(f"{path.name[:-7]}/data/{name}") for name in DEVKIT_FILES}
            meta, truth = (file.read() for file in files.values() if file)
        rows = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wordnet = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if not row["num_children"]}
        numbers: Iterable[bytes] = truth.split()
        return {f"{n:08d}": wordnet[int(number)] for n, number in enumerate(numbers, start=1)}
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{path} cannot be read: {shortened(error)}; download it again") from None
