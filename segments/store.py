"""The packed store: all segments of a dataset in one SQLite file. README.md describes its tables.

store = PackedStore(Path("masks.sqlite"))
segment = store.nearest("n01440764/n01440764_18", 15.0)  # percent; None: the image has none
inside = segment.decode()  # [H, W] uint8
"""

import os
import sqlite3
import zlib
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import open_regular
from common.formats import parsed_text
from segments.segment import Segment

FORMAT_VERSION = 1

# counts: zlib, a segment at a time, takes 55% of the bytes of COCO's code (2231 segments of 96
# photographs: 1.91 MB become 1.04 MB; with level 9 no less), costs 6 microseconds to undo, and
# carries a checksum. A stream per image would take 50%, but no segment could be read alone.
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


@dataclass(frozen=True, kw_only=True)
class PackedImage:
    """One image's rows. segments: (coverage in percent, compressed counts), the smallest first."""

    key: str
    height: int | None
    width: int | None
    segments: tuple[tuple[float, bytes], ...]


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
        self._connection: sqlite3.Connection | None = None
        self._process_id = 0
        # Somebody copied or downloaded it: every way in which it may be no store is said here.
        try:
            open_regular(path).close()  # SQLite would wait for a pipe
            with closing(connect_for_reading(path)) as connection:
                self.meta = dict(connection.execute("SELECT name, value FROM meta").fetchall())
                connection.execute("SELECT 1 FROM images, segments LIMIT 0")  # are they there?
                (length,) = connection.execute(LENGTH).fetchone()
        except (sqlite3.Error, OSError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ValueError(
                f"{path} is not a packed store of segments, or cut short ({reason}); pack it again"
            ) from None
        # SQLite misses whole pages at once, but a part of the last one only when it needs it.
        if path.stat().st_size < length:
            raise ValueError(f"{path} is cut short: it was {length} bytes; copy or pack it again")
        check_format(path, self.meta)
        # How the segments were made, as far as is known.
        settings = str(self.meta.get("settings"))
        self.settings = parsed_text(settings, dict[str, Any], f"{path}: how it was made")
        if self.meta.get("complete") != "1":
            raise ValueError(f"{path} was not finished; run the command that writes it again")

    def __getstate__(self) -> dict[str, Any]:
        # Each process opens the file itself.
        return {**self.__dict__, "_connection": None, "_process_id": 0}

    def nearest(self, key: str, coverage_percent: float) -> Segment | None:
        """The segment closest to a coverage in percent, the smaller on a tie; None: there is none.

        One indexed query that reads one segment.
        """
        rows = self._query(NEAREST, (key, coverage_percent))
        return self._segment(key, rows[0]) if rows else None

    def segments(self, key: str, report: object = None) -> list[Segment]:
        """All segments of an image, the smallest first.

        report: as of the other forms; a store states no coverage that could be another.
        """
        return [self._segment(key, row) for row in self._query(ALL, (key,))]

    def images(self) -> set[str]:
        """The keys of the images that have a segment."""
        return self._keys("segments > 0")

    def listed_empty(self) -> set[str]:
        """The keys of the images that are known to have none."""
        return self._keys("segments = 0")

    def all_images(self) -> set[str]:
        """The keys of both."""
        return self._keys("1")

    def failures(self) -> dict[str, str]:
        """Why images are not in the store, by their keys."""
        return dict(self._query("SELECT key, reason FROM failures ORDER BY key"))

    def packed(self, key: str) -> PackedImage:
        """The rows of one of `keys`, for copying; what cannot be read is not copied."""
        [(height, width)] = self._query("SELECT height, width FROM images WHERE key = ?", (key,))
        rows = self._query(ALL, (key,))
        for row in rows:
            self._segment(key, row)
        segments = tuple((coverage, counts) for *_, coverage, counts in rows)
        return PackedImage(key=key, height=height, width=width, segments=segments)

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
            unpacked = zlib.decompressobj().decompress(counts, 2 * height * width + 64)
        except (zlib.error, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{self.path}: a segment of {key} is damaged: {error}") from None
        return Segment(height=height, width=width, coverage_percent=coverage, counts=unpacked)

    def _query(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        try:
            # SQLite's connections do not survive a fork, and loader processes are forked.
            if self._connection is None or self._process_id != os.getpid():
                self._connection = connect_for_reading(self.path)
                self._process_id = os.getpid()
            return self._connection.execute(sql, values).fetchall()
        except sqlite3.Error as error:
            raise ValueError(f"{self.path}: damaged: {error}") from None


def segment_key(relative_path: str) -> str:
    """The name that segments know an image by: its path without suffix."""
    return os.path.splitext(relative_path)[0]  # noqa: PTH122, asked for every sample


def connect_for_reading(path: Path) -> sqlite3.Connection:
    """A connection that neither locks nor writes anything."""
    uri = f"{path.resolve().as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True, check_same_thread=False)
    # Pages come from the page cache, which all loader processes share, without a copy for each.
    connection.execute("PRAGMA mmap_size = 1073741824")
    return connection


def check_format(path: Path, meta: dict[str, str]) -> None:
    """Raise ValueError unless `meta` is that of a store of a format known here."""
    version = meta.get("format_version")
    if version != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} is of format {version}, not {FORMAT_VERSION}; if it is newer than this code, "
            "update SegMAE, else pack it again"
        )
