"""Writing a packed store: beside its final name until it is complete, resumable at any point."""

from __future__ import annotations

import json
import os
import sqlite3
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from mae.segments.segment import Segment
from mae.segments.store import FORMAT_VERSION, PackedImage, check_format

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
SECONDS_PER_COMMIT = 2.0
COMPRESSION_LEVEL = 6


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a command did. images: with segments; without: known to have none; left_out: damaged."""

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


def part_path(out: Path) -> Path:
    """Where an unfinished store lies."""
    return out.with_name(f"{out.name}.part")


class StoreWriter:
    """Adds images to `<out>.part`; `finish` gives it its name. Use as a context manager.

    What is committed survives a kill, and a process that goes on starts from there. Raises
    ValueError if an unfinished store was made in another way or is being written by another
    process, RuntimeError if the disk is full.
    """

    def __init__(self, out: Path, *, source: str, settings: dict[str, Any]) -> None:
        self.out = out
        self.part = part_path(out)
        self.committed_at = time.monotonic()
        wanted = {"source": source, "settings": json.dumps(settings, sort_keys=True)}
        try:
            self.connection = sqlite3.connect(self.part, timeout=1, isolation_level=None)
            self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.connection.execute("BEGIN EXCLUSIVE")
            self._begin(wanted)
        except sqlite3.Error as error:
            raise self._explained(error) from None

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.connection.close()

    def keys(self) -> set[str]:
        """The images that are done."""
        return {key for (key,) in self.connection.execute("SELECT key FROM images")}

    def summary(self, *, already_there: int, interrupted: bool = False) -> Summary:
        """What is there now."""
        return Summary(
            out=self.out,
            images=self._count("images WHERE segments > 0"),
            without=self._count("images WHERE segments = 0"),
            left_out=self._count("failures"),
            already_there=already_there,
            interrupted=interrupted,
        )

    def add(self, image: PackedImage) -> None:
        """Add an image that is not there; it counts as no failure any more."""
        try:
            cursor = self.connection.execute(
                "INSERT INTO images (key, height, width, segments) VALUES (?, ?, ?, ?)",
                (image.key, image.height, image.width, len(image.segments)),
            )
            self.connection.executemany(
                "INSERT INTO segments (image, coverage, counts) VALUES (?, ?, ?)",
                [(cursor.lastrowid, *segment) for segment in image.segments],
            )
            self.connection.execute("DELETE FROM failures WHERE key = ?", (image.key,))
            self._commit_now_and_then()
        except sqlite3.Error as error:
            raise self._explained(error) from None

    def add_failure(self, key: str, reason: str) -> None:
        """Record why an image is not there."""
        try:
            self.connection.execute("INSERT OR REPLACE INTO failures VALUES (?, ?)", (key, reason))
            self._commit_now_and_then()
        except sqlite3.Error as error:
            raise self._explained(error) from None

    def commit(self) -> None:
        """Make what was added survive a kill."""
        try:
            self.connection.execute("COMMIT")
            self.connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            raise self._explained(error) from None
        self.committed_at = time.monotonic()

    def finish(self) -> None:
        """Mark the store complete and give it its name."""
        try:
            self.connection.execute("INSERT OR REPLACE INTO meta VALUES ('complete', '1')")
            self.connection.execute("COMMIT")
            self.connection.close()
        except sqlite3.Error as error:
            raise self._explained(error) from None
        with self.part.open("rb+") as file:
            os.fsync(file.fileno())
        self.part.replace(self.out)

    def _count(self, rows: str) -> int:
        return int(self.connection.execute(f"SELECT count(*) FROM {rows}").fetchone()[0])

    def _begin(self, wanted: dict[str, str]) -> None:
        """Make the tables, or go on with those that are there."""
        if not self.connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            for statement in SCHEMA.split(";"):
                self.connection.execute(statement)
            meta = {"format_version": str(FORMAT_VERSION), "complete": "0", **wanted}
            self.connection.executemany("INSERT INTO meta VALUES (?, ?)", list(meta.items()))
            self.commit()
            return
        meta = dict(self.connection.execute("SELECT name, value FROM meta").fetchall())
        check_format(self.part, meta)
        for name, value in wanted.items():
            if meta[name] != value:
                raise ValueError(
                    f"{self.part} was begun with other settings: {name} {meta[name]}, now {value}; "
                    "remove it, or repeat the command it was begun with"
                )
        self.connection.execute("UPDATE meta SET value = '0' WHERE name = 'complete'")

    def _commit_now_and_then(self) -> None:
        if time.monotonic() - self.committed_at > SECONDS_PER_COMMIT:
            self.commit()

    def _explained(self, error: sqlite3.Error) -> Exception:
        text = str(error)
        if "locked" in text:
            return ValueError(f"{self.part} is being written by another process")
        if "unable to open" in text or "readonly" in text:
            return ValueError(f"{self.part} cannot be written")
        if "full" in text or "disk I/O" in text:
            return RuntimeError(
                f"{self.part} cannot be written: {text}. Make room and run the same command again; "
                "it goes on from there"
            )
        return ValueError(f"{self.part} is damaged ({text}); remove it and start again")
