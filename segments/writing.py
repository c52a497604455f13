"""Writing a packed store: beside its final name until it is complete, resumable at any point."""

from __future__ import annotations

import json
import logging
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import beside
from common.interruption import Interruption
from common.progress import Counter
from segments.config import check_made_alike
from segments.segment import Segment
from segments.store import (
    FORMAT_VERSION,
    SCHEMA,
    PackedImage,
    PackedStore,
    check_format,
    connect_for_reading,
)

logger = logging.getLogger(__name__)

SECONDS_PER_COMMIT = 2.0
COMPRESSION_LEVEL = 6
MOST_FAILED = 0.01  # a larger share of the images is no accident


@dataclass(frozen=True)
class Failure:
    """An image that could not be done, and why."""

    key: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a command did. images: with segments; without: known to have none; left_out: failed."""

    out: Path
    images: int
    without: int
    left_out: int
    already_there: int = 0
    interrupted: bool = False


def pack_image(key: str, segments: Sequence[Segment]) -> PackedImage:
    """Compress the segments of one image, which are in order."""
    first = segments[0] if segments else None
    return PackedImage(
        key=key,
        height=first.height if first else None,
        width=first.width if first else None,
        segments=tuple(
            (segment.coverage_percent, zlib.compress(segment.counts, COMPRESSION_LEVEL))
            for segment in segments
        ),
    )


class StoreWriter:
    """Adds images to `<out>.segmae-part`; `finish` gives it its name. Use as a context manager.

    What is committed survives a kill, and a process that goes on starts from there. extend: a
    finished store `out` is taken away from its readers too, but only once there is something new
    to add. Raises ValueError if the store was made in another way or is being written by another
    process, RuntimeError if the disk is full.
    """

    def __init__(
        self, out: Path, *, source: str, settings: Mapping[str, Any], extend: bool = False
    ) -> None:
        self.out, self.part = out, beside(out)
        self.source, self.settings = source, settings
        self.left_out = 0  # of this run
        self.committed_at = time.monotonic()
        self.untouched = extend and out.exists()
        if self.untouched:
            check_made_alike(out, PackedStore(out).settings, settings)
            self.connection = connect_for_reading(out)
        else:
            self._open()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def keys(self) -> set[str]:
        """The images that are done."""
        return {key for (key,) in self.connection.execute("SELECT key FROM images")}

    def add_all(
        self,
        images: Iterable[PackedImage | Failure],
        *,
        what: str,
        total: int,
        already_there: int,
    ) -> Summary:
        """Add what comes, until all is there or a signal asks to stop; then it survives a kill."""
        with Interruption() as stop, Counter(what, total=total, done=already_there) as counter:
            for image in images:
                self.add(image)
                counter.advance()
                if stop.requested:
                    logger.warning("stopped; run the same command again to go on")
                    break
        self.commit()
        return Summary(
            out=self.out,
            images=self._count("images WHERE segments > 0"),
            without=self._count("images WHERE segments = 0"),
            left_out=self.left_out,
            already_there=already_there,
            interrupted=stop.requested,
        )

    def add(self, image: PackedImage | Failure) -> None:
        """Add an image that is not there, or why it still is not."""
        with self._explained():
            if not isinstance(image, Failure):
                self._take_from_readers()
                self._add_rows(image)
            else:
                logger.warning("left out %s: %s", image.key, image.reason)
                self.left_out += 1
                row = (image.key, image.reason)
                known = "SELECT 1 FROM failures WHERE key = ? AND reason = ?"
                if self.connection.execute(known, row).fetchone() is None:
                    self._take_from_readers()
                    self.connection.execute("INSERT OR REPLACE INTO failures VALUES (?, ?)", row)
        if time.monotonic() - self.committed_at > SECONDS_PER_COMMIT:
            self.commit()

    def commit(self) -> None:
        """Make what was added survive a kill."""
        if not self.untouched:
            with self._explained():
                self.connection.execute("COMMIT")
                self.connection.execute("BEGIN EXCLUSIVE")
            self.committed_at = time.monotonic()

    def finish(self) -> None:
        """Mark the store complete and give it its name."""
        if self.untouched:
            return
        with self._explained():
            self.connection.execute("INSERT OR REPLACE INTO meta VALUES ('complete', '1')")
            self.connection.execute("COMMIT")  # SQLite flushes it
            self.connection.close()
        self.part.replace(self.out)

    def _add_rows(self, image: PackedImage) -> None:
        cursor = self.connection.execute(
            "INSERT INTO images (key, height, width, segments) VALUES (?, ?, ?, ?)",
            (image.key, image.height, image.width, len(image.segments)),
        )
        self.connection.executemany(
            "INSERT INTO segments (image, coverage, counts) VALUES (?, ?, ?)",
            [(cursor.lastrowid, *segment) for segment in image.segments],
        )
        self.connection.execute("DELETE FROM failures WHERE key = ?", (image.key,))

    def _take_from_readers(self) -> None:
        """Readers that have a finished store open keep it; no one else finds it until `finish`."""
        if self.untouched:
            self.connection.close()
            self.out.replace(self.part)
            self.untouched = False
            self._open()

    def _open(self) -> None:
        with self._explained():
            self.connection = sqlite3.connect(self.part, timeout=1, isolation_level=None)
            try:
                self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
                self.connection.execute("BEGIN EXCLUSIVE")
                if not self._count("sqlite_master"):
                    self._make_tables()
                self._continue()
            except BaseException:
                self.connection.close()  # nobody else will, and it holds a lock
                raise

    def _make_tables(self) -> None:
        for statement in SCHEMA.split(";"):
            self.connection.execute(statement)
        meta = {
            "format_version": str(FORMAT_VERSION),
            "complete": "0",
            "source": self.source,
            "settings": json.dumps(self.settings, sort_keys=True),
        }
        self.connection.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
        self.commit()

    def _continue(self) -> None:
        meta = dict(self.connection.execute("SELECT name, value FROM meta").fetchall())
        check_format(self.part, meta)
        begun = {"source": meta["source"], **json.loads(meta["settings"])}
        check_made_alike(self.part, begun, {"source": self.source, **self.settings})
        self.connection.execute("UPDATE meta SET value = '0' WHERE name = 'complete'")

    def _count(self, rows: str) -> int:
        return int(self.connection.execute(f"SELECT count(*) FROM {rows}").fetchone()[0])

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Says what is wrong with the file in terms of what to do."""
        try:
            yield
        except sqlite3.Error as error:
            text = str(error)
            if "full" in text or "disk I/O" in text:
                raise RuntimeError(
                    f"{self.part} cannot be written: {text}. Make room and run the same command "
                    "again; it goes on from there"
                ) from None
            reason = f"is damaged ({text}); remove it and start again"
            if "locked" in text:
                reason = "is being written by another process"
            elif "unable to open" in text or "readonly" in text:
                reason = "cannot be written; name another --out"
            raise ValueError(f"{self.part} {reason}") from None
