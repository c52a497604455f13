"""The packed store: all segments of a dataset in one SQLite file. README.md describes its tables.

store = PackedStore(Path("masks.sqlite"))
segment = store.nearest("n01440764/n01440764_18", 15.0)  # percent; None: the image has none
inside = segment.decode()  # [H, W] uint8

`write_store` writes one beside its final name until it is complete, resumable at any point.
"""

import json
import logging
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypeVar

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict  # typing's is not enough before Python 3.12

from common.files import beside, check_written_alone, open_regular
from common.formats import Percent, parsed, parsed_text
from common.parallel import Failure, one_pass
from segments.config import check_made_alike
from segments.segment import Segment

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

FORMAT_VERSION = "1"
SECONDS_PER_COMMIT = 2.0  # a kill loses so much work
MOST_FAILED = 0.01  # a larger share of the images is no accident

# counts: zlib, a segment at a time, takes 55% of the bytes of COCO's code (2231 segments of 96
# photographs: 1.91 MB become 1.04 MB; with level 9 no less), costs 6 microseconds to undo, and
# carries a checksum. A stream per image would take 50%, but no segment could be read alone.
COMPRESSION_LEVEL = 6
SCHEMA = """
    CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE images (
        id INTEGER PRIMARY KEY, key TEXT NOT NULL UNIQUE,
        height INTEGER, width INTEGER, segments INTEGER NOT NULL);
    CREATE TABLE segments (
        id INTEGER PRIMARY KEY, image INTEGER NOT NULL REFERENCES images,
        coverage REAL NOT NULL, counts BLOB NOT NULL);
    CREATE INDEX segments_by_coverage ON segments (image, coverage);
    CREATE TABLE failures (key TEXT PRIMARY KEY, reason TEXT NOT NULL) WITHOUT ROWID;
"""
LENGTH = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
ROWS = """
    SELECT i.height, i.width, s.coverage, s.counts
    FROM images AS i JOIN segments AS s ON s.image = i.id
    WHERE i.key = ?1 """
# The nearest coverage is the largest below or the smallest above: the index finds each at once; a
# sort by distance would read every segment of the image.
NEAREST = f"""{ROWS} AND s.coverage = (
        SELECT coverage FROM (
            SELECT max(coverage) AS coverage FROM segments WHERE image = i.id AND coverage <= ?2
            UNION ALL
            SELECT min(coverage) FROM segments WHERE image = i.id AND coverage >= ?2
        ) WHERE coverage NOT NULL ORDER BY abs(coverage - ?2), coverage LIMIT 1
    )
    ORDER BY s.id LIMIT 1
"""
ALL = f"{ROWS} ORDER BY s.coverage, s.id"


class _Meta(TypedDict):
    format_version: str
    complete: str
    source: str
    settings: str  # as JSON


@with_config(ConfigDict(extra="allow"))
class _Settings(TypedDict):
    """How the segments were made, as far as is known."""

    generator: NotRequired[str]
    for_coverage: NotRequired[list[Percent]]


class PackedImage(NamedTuple):
    """One image's rows. segments: (coverage in percent, compressed counts), the smallest first."""

    key: str
    height: int | None  # None if there is no segment
    width: int | None
    segments: Sequence[tuple[float, bytes]]
    empty: int = 0  # segments that were dropped


def pack_image(key: str, segments: Sequence[Segment]) -> PackedImage:
    """Compress the segments of one image, which are in order; those without a pixel are dropped."""
    some = [segment for segment in segments if segment.coverage_percent > 0]
    height, width = (some[0].height, some[0].width) if some else (None, None)
    rows = [(s.coverage_percent, zlib.compress(s.counts, COMPRESSION_LEVEL)) for s in some]
    return PackedImage(key, height, width, rows, len(segments) - len(some))


def segment_key(relative_path: str) -> str:
    """The name that segments know an image by: its path without suffix."""
    return os.path.splitext(relative_path)[0]  # noqa: PTH122, asked for every sample


def by_key(images: Iterable[tuple[str, Item]]) -> dict[str, Item]:
    """Images by the names of their segments. Raises ValueError if two have the same.

    images: relative path, and what messages call it.
    """
    found: dict[str, Item] = {}
    for path, image in images:
        other = found.setdefault(segment_key(path), image)
        if other != image:
            both = f"{other} and {image}"
            raise ValueError(f"{both} would have segments of the same name, {segment_key(path)}; rename one")
    return found


class PackedStore:
    """Reads a finished store.

    The file is opened when first asked, and again in every process that this object is pickled or
    forked into. It is opened as immutable: no locks and no files beside it, so it may lie on
    read-only media and be read from many nodes.
    """

    name = "packed store"

    def __init__(self, path: Path) -> None:
        """Raises ValueError if the file is cut short, unfinished, or no store of this format."""
        self.path = path
        # By process: SQLite's connections do not survive a fork, and loader processes are forked.
        self._connections: dict[int, sqlite3.Connection] = {}
        # Somebody copied or downloaded it: every way in which it may be no store is said here.
        try:
            open_regular(path).close()  # SQLite would wait for a pipe
            with closing(self._connect()) as connection:
                self.meta, self.settings = _read_meta(path, connection)
                connection.execute("SELECT 1 FROM images, segments LIMIT 0")  # are they there?
                (length,) = connection.execute(LENGTH).fetchone()
        except (sqlite3.Error, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            what = f"is not a packed store of segments, or cut short ({reason}); pack it again"
            raise ValueError(f"{path} {what}") from None
        # SQLite misses whole pages at once, but a part of the last one only when it needs it.
        if path.stat().st_size < length:
            raise ValueError(f"{path} is cut short: it was {length} bytes; copy or pack it again")
        if self.meta["complete"] != "1":
            raise ValueError(f"{path} was not finished; run the command that writes it again")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_connections": {}}

    def nearest(self, key: str, coverage_percent: float) -> Segment | None:
        """The segment closest to a coverage in percent, the smaller on a tie; None: there is none.

        One indexed query that reads one segment.
        """
        rows = self._query(NEAREST, key, coverage_percent)
        return self._segment(key, rows[0]) if rows else None

    def segments(self, key: str, report: object = None) -> list[Segment]:
        """All segments of an image, the smallest first. report: see `SegmentFolder.segments`."""
        # A store states no coverage that could be another than the pixels'.
        return [self._segment(key, row) for row in self._query(ALL, key)]

    def images(self) -> set[str]:
        """The keys of the images that have a segment."""
        return self._keys("segments > 0")

    def listed_empty(self) -> set[str]:
        """The keys of the images that are known to have none."""
        return self._keys("segments = 0")

    def failures(self) -> dict[str, str]:
        """Why images are not in the store, by their keys."""
        return dict(self._query("SELECT key, reason FROM failures ORDER BY key"))

    def _keys(self, condition: str) -> set[str]:
        keys = {key for (key,) in self._query(f"SELECT key FROM images WHERE {condition}")}
        for key in keys:
            if not isinstance(key, str):
                raise ValueError(f"{self.path} is damaged: {key!r} is no key of an image")
        return keys

    def _segment(self, key: str, row: tuple[Any, ...]) -> Segment:
        height, width, coverage, counts = row
        try:
            if not (height > 0 and width > 0 and 0 <= coverage <= 100):
                raise ValueError(f"{width} x {height} pixels, {coverage} % inside")
            # A code has at most two characters for each pixel; a bomb would have more.
            stream = zlib.decompressobj()
            unpacked = stream.decompress(counts, 2 * height * width + 64)
            if not stream.eof:
                raise ValueError("its counts are cut short, or too many")
        except (zlib.error, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.path}: a segment of {key} is damaged: {error}") from None
        return Segment(height=height, width=width, coverage_percent=coverage, counts=unpacked)

    def _query(self, sql: str, *values: Any) -> list[Any]:
        process = os.getpid()
        try:
            if process not in self._connections:
                self._connections[process] = self._connect()
            return self._connections[process].execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise ValueError(f"{self.path}: damaged: {error}") from None

    def _connect(self) -> sqlite3.Connection:
        uri = f"{self.path.resolve().as_uri()}?mode=ro&immutable=1"
        connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
        # Pages come from the page cache, which all loader processes share, without copies of each.
        connection.execute("PRAGMA mmap_size = 1073741824")
        return connection


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a command did. images: with segments; without: known to have none; left_out: failed."""

    out: Path
    images: int
    without: int
    left_out: int
    already_there: int
    interrupted: bool

    @property
    def too_many_failed(self) -> bool:
        """Whether they are more than accidents."""
        return self.left_out > MOST_FAILED * (self.images + self.without + self.left_out)


def write_store(
    out: Path, keys: Sequence[str],
    rows: Callable[[list[str]], Generator[PackedImage | Failure, None, None]],
    *, what: str, source: str, settings: Mapping[str, Any], allow_failed: bool = True,
) -> Summary:  # fmt: skip
    """Write a store of these images, or go on with it. A signal that asks to stop leaves it
    unfinished, and so do too many that fail, if they are not allowed.

    rows: makes those of the keys that it is given, in any order. What is committed survives a kill.
    Raises ValueError if the store was begun in another way or is being written by another process,
    RuntimeError if the disk is full.
    """
    part = beside(out)
    check_written_alone(part)
    with _explained(part), closing(sqlite3.connect(part, 1, isolation_level="EXCLUSIVE")) as store:
        _begin(store, part, source, settings)
        done = {key for (key,) in store.execute("SELECT key FROM images")}
        left = [key for key in keys if key not in done]
        already_there = len(keys) - len(left)
        added, failed, empty, committed_at = 0, 0, 0, time.monotonic()
        for row in one_pass(what, rows(left), total=len(keys), done=already_there):
            _add(store, row)
            added += 1
            failed += isinstance(row, Failure)
            empty += 0 if isinstance(row, Failure) else row.empty
            # Each commit is flushed to the disk: for every image that would take most of the time.
            if time.monotonic() - committed_at > SECONDS_PER_COMMIT:
                store.commit()  # survives a kill
                committed_at = time.monotonic()
        every = [number for (number,) in store.execute("SELECT segments FROM images")]
        summary = Summary(
            out=out, images=len(every) - every.count(0), without=every.count(0), left_out=failed,
            already_there=already_there, interrupted=added < len(left),
        )  # fmt: skip
        complete = not summary.interrupted and (allow_failed or not summary.too_many_failed)
        if complete:
            store.execute("INSERT OR REPLACE INTO meta VALUES ('complete', '1')")
        store.commit()
    if empty:
        logger.warning("%d segments without a pixel were dropped", empty)
    if complete:
        part.replace(out)
    return summary


def _begin(store: sqlite3.Connection, part: Path, source: str, settings: Mapping[str, Any]) -> None:
    """Take the file for this process, and make its tables if it has none."""
    # Held to the end: a second process that writes the same store is refused.
    store.execute("BEGIN EXCLUSIVE")
    store.execute("PRAGMA locking_mode = EXCLUSIVE")  # only now: see `common.tars._lock`
    if not store.execute("SELECT 1 FROM sqlite_master").fetchone():
        for statement in SCHEMA.split(";"):
            store.execute(statement)
        begun = {"format_version": FORMAT_VERSION, "complete": "0", "source": source,
                 "settings": json.dumps(settings, sort_keys=True)}  # fmt: skip
        store.executemany("INSERT INTO meta VALUES (?, ?)", begun.items())
        store.commit()
    meta, made = _read_meta(part, store)
    check_made_alike(part, {"source": meta["source"], **made}, {"source": source, **settings})


def _add(store: sqlite3.Connection, row: PackedImage | Failure) -> None:
    """Add an image that is not there, or why it still is not."""
    if isinstance(row, Failure):
        logger.warning("left out %s: %s", row.key, row.reason)
        store.execute("INSERT OR REPLACE INTO failures VALUES (?, ?)", (row.key, row.reason))
        return
    image = (row.key, row.height, row.width, len(row.segments))
    number = store.execute("INSERT INTO images VALUES (NULL, ?, ?, ?, ?)", image).lastrowid
    segments = [(number, *segment) for segment in row.segments]
    store.executemany("INSERT INTO segments VALUES (NULL, ?, ?, ?)", segments)
    store.execute("DELETE FROM failures WHERE key = ?", (row.key,))  # it may have failed before


@contextmanager
def _explained(part: Path) -> Iterator[None]:
    """Says what is wrong with the file in terms of what to do."""
    try:
        yield
    except sqlite3.Error as error:
        text = str(error)
        if "full" in text or "disk I/O" in text:
            advice = "Make room and run the same command again; it goes on from there"
            raise RuntimeError(f"{part} cannot be written: {text}. {advice}") from None
        advice = "name another --out" if "open" in text else "remove it and start again"
        advice = "another process is writing it" if "locked" in text else advice
        raise ValueError(f"{part}: {text}; {advice}") from None


def _read_meta(path: Path, store: sqlite3.Connection) -> tuple[dict[str, str], dict[str, Any]]:
    """What a store says of itself, and how its segments were made. Raises ValueError."""
    meta = dict(store.execute("SELECT name, value FROM meta").fetchall())
    if (version := meta.get("format_version")) != FORMAT_VERSION:
        advice = "if it is newer than this code, update SegMAE, else pack it again"
        raise ValueError(f"{path} is of format {version}, not {FORMAT_VERSION}; {advice}")
    damaged = f"{path}: its table meta is damaged"
    meta = parsed(_Meta, meta, damaged)
    return meta, parsed_text(meta["settings"], _Settings, f"{damaged}: settings")
