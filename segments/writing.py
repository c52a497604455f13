"""Writing a packed store: beside its final name until it is complete, resumable at any point."""

from __future__ import annotations

import json
import logging
import math
import sqlite3
import time
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import beside
from segments.config import check_made_alike
from segments.parallel import Failure, one_pass
from segments.segment import Segment
from segments.store import FORMAT_VERSION, SCHEMA, PackedImage, check_format

logger = logging.getLogger(__name__)

SECONDS_PER_COMMIT = 2.0  # a kill loses so much work
COMPRESSION_LEVEL = 6  # see SCHEMA
MOST_FAILED = 0.01  # a larger share of the images is no accident


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
    height, width = (segments[0].height, segments[0].width) if segments else (None, None)
    rows = [(s.coverage_percent, zlib.compress(s.counts, COMPRESSION_LEVEL)) for s in segments]
    return PackedImage(key=key, height=height, width=width, segments=tuple(rows))


def write_store(
    out: Path,
    keys: Sequence[str],
    rows: Callable[[list[str]], Generator[PackedImage | Failure, None, None]],
    *,
    what: str,
    source: str,
    settings: Mapping[str, Any],
    most_failed: float = math.inf,
) -> Summary:
    """Write a store of these images, or go on with it. A signal that asks to stop leaves it
    unfinished, and so do more than `most_failed` images.

    rows: makes those of the keys that it is given, in any order.
    """
    with StoreWriter(out, source=source, settings=settings) as writer:
        done = writer.keys()
        left = [key for key in keys if key not in done]
        added = failed = 0
        for row in one_pass(what, rows(left), total=len(keys), done=len(keys) - len(left)):
            writer.add(row)
            added += 1
            failed += isinstance(row, Failure)
        writer.commit()
        summary = Summary(
            out=out,
            images=writer.count("images WHERE segments > 0"),
            without=writer.count("images WHERE segments = 0"),
            left_out=failed,
            already_there=len(keys) - len(left),
            interrupted=added < len(left),
        )
        if not summary.interrupted and failed <= most_failed:
            writer.finish()
    return summary


class StoreWriter:
    """Adds images to `<out>.segmae-part`; `finish` gives it its name. Use as a context manager.

    What is committed survives a kill, and a process that goes on starts from there. Raises
    ValueError if it was begun in another way or is being written by another process, RuntimeError
    if the disk is full.
    """

    def __init__(self, out: Path, *, source: str, settings: Mapping[str, Any]) -> None:
        self.out, self.part = out, beside(out)
        self.committed_at = time.monotonic()
        with self._explained():
            # isolation_level None: transactions begin and end where this code says.
            self.connection = sqlite3.connect(self.part, timeout=1, isolation_level=None)
            try:
                # Held to the end: a second process that writes the same store is refused.
                self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
                self.connection.execute("BEGIN EXCLUSIVE")
                if not self.count("sqlite_master"):
                    self._make_tables(source, settings)
                self._check_begun(source, settings)
            except BaseException:
                self.connection.close()  # nobody else will, and it holds a lock
                raise

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def keys(self) -> set[str]:
        """The images that are done."""
        return {key for (key,) in self.connection.execute("SELECT key FROM images")}

    def add(self, image: PackedImage | Failure) -> None:
        """Add an image that is not there, or why it still is not."""
        with self._explained():
            if isinstance(image, Failure):
                logger.warning("left out %s: %s", image.key, image.reason)
                row = (image.key, image.reason)
                self.connection.execute("INSERT OR REPLACE INTO failures VALUES (?, ?)", row)
            else:
                self._add_rows(image)
        # Each commit is flushed to the disk: for every image that would take most of the time.
        if time.monotonic() - self.committed_at > SECONDS_PER_COMMIT:
            self.commit()

    def commit(self) -> None:
        """Make what was added survive a kill."""
        with self._explained():
            self.connection.execute("COMMIT")
            self.connection.execute("BEGIN EXCLUSIVE")
        self.committed_at = time.monotonic()

    def finish(self) -> None:
        """Mark the store complete and give it its name."""
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
        # It may have failed before.
        self.connection.execute("DELETE FROM failures WHERE key = ?", (image.key,))

    def _make_tables(self, source: str, settings: Mapping[str, Any]) -> None:
        for statement in SCHEMA.split(";"):
            self.connection.execute(statement)
        meta = {
            "format_version": str(FORMAT_VERSION),
            "complete": "0",
            "source": source,
            "settings": json.dumps(settings, sort_keys=True),
        }
        self.connection.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
        self.commit()

    def _check_begun(self, source: str, settings: Mapping[str, Any]) -> None:
        meta = dict(self.connection.execute("SELECT name, value FROM meta").fetchall())
        check_format(self.part, meta)
        begun = {"source": meta["source"], **json.loads(meta["settings"])}
        check_made_alike(self.part, begun, {"source": source, **settings})

    def count(self, rows: str) -> int:
        """How many there are, as SQL."""
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
