"""Forms with one folder per image: a PNG per segment, and a file that lists them."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mae.segments.forms import COVERAGE_TOLERANCE, SegmentFolder, warn_of_difference
from mae.segments.segment import Segment, nearest, segment_from_pixels, verify_all

if TYPE_CHECKING:
    from PIL.Image import Image

TABLE = "table.txt"
METADATA = "metadata.csv"


class PngFolder(SegmentFolder):
    """What the two forms share."""

    table: str
    """Name of the file that lists an image's PNGs."""
    bytes_of_header: int
    """A table that is not longer lists nothing."""

    def segments(self, key: str) -> list[Segment]:
        """All segments; reads every PNG that is listed."""
        read = [self._segment(path, stated)[0] for path, stated in self._listed(key)]
        try:
            return verify_all(read)
        except ValueError as error:
            raise ValueError(f"{self.root / key}: {error}") from None

    def nearest(self, key: str, coverage_percent: float) -> Segment | None:
        """Reads only the PNGs that the table, within its rounding, says may be the nearest.

        Where the table is wrong about one of them, or silent, all are read.
        """
        listed = self._listed(key)
        percents = self._percents(listed)
        if not listed or percents is None:
            return nearest(self.segments(key), coverage_percent)
        distances = [abs(percent - coverage_percent) for percent in percents]
        limit = min(distances) + 2 * COVERAGE_TOLERANCE
        read = [
            self._segment(*entry)
            for entry, distance in zip(listed, distances, strict=True)
            if distance <= limit
        ]
        if any(wrong for _, wrong in read):
            return nearest(self.segments(key), coverage_percent)
        return nearest((segment for segment, _ in read), coverage_percent)

    def _percents(self, listed: list[tuple[Path, float | None]]) -> list[float] | None:
        """What the table says in percent of the image; None: nothing about some PNG."""
        stated = [value for _, value in listed if value is not None]
        return stated if len(stated) == len(listed) else None

    def _segment(self, path: Path, stated: float | None) -> tuple[Segment, bool]:
        """The segment of a PNG, and whether its stated coverage is wrong."""
        segment = segment_from_pixels(read_segment_png(path))
        if stated is None:
            return segment, False
        percent = self._percent(stated, segment)
        return segment, warn_of_difference(path, self.table, percent, segment.coverage_percent)

    def _listed(self, key: str) -> list[tuple[Path, float | None]]:
        """The PNGs of an image, each with its coverage, where one is stated; see `_percent`."""
        raise NotImplementedError

    def _percent(self, stated: float, segment: Segment) -> float:
        """A stated coverage in percent of the image."""
        raise NotImplementedError

    def _scan(self) -> Iterator[tuple[str, bool]]:
        """Looks for the table in every folder, and does not list the PNGs beside it."""
        open_folders = [self.root]
        while open_folders:
            with os.scandir(open_folders.pop()) as entries:
                folders = [Path(entry.path) for entry in entries if entry.is_dir()]
            for folder in folders:
                try:
                    size = (folder / self.table).stat().st_size
                except OSError:
                    open_folders.append(folder)
                    continue
                yield folder.relative_to(self.root).as_posix(), size <= self.bytes_of_header

    def _read_table(self, key: str) -> list[str]:
        table = self.root / key / self.table
        try:
            return table.read_text().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ValueError(f"{table}: cannot be read: {error.strerror}") from None
        except ValueError:
            raise ValueError(f"{table}: not text") from None


class PngTableFolder(PngFolder):
    """PNGs and a `table.txt`: a line `<coverage percent> <file>` per segment."""

    name = "PNGs with a coverage table"
    table = TABLE
    bytes_of_header = 2

    def _listed(self, key: str) -> list[tuple[Path, float | None]]:
        table = self.root / key / TABLE
        lines = enumerate(self._read_table(key), 1)
        return [self._entry(table, number, line) for number, line in lines if line.strip()]

    def _percent(self, stated: float, segment: Segment) -> float:
        return stated

    def _entry(self, table: Path, number: int, line: str) -> tuple[Path, float | None]:
        try:
            percent, name = line.split(maxsplit=1)
            stated = float(percent)
        except ValueError:
            raise ValueError(f"{table}:{number}: not '<coverage percent> <file>'") from None
        if not 0 <= stated <= 100:
            raise ValueError(f"{table}:{number}: a coverage of {percent} percent")
        return table.parent / name.strip(), stated


class PngMetadataFolder(PngFolder):
    """PNGs and a `metadata.csv`, as `amg.py` writes them."""

    name = "PNGs with metadata.csv"
    table = METADATA
    bytes_of_header = 150  # amg.py's has 142 characters, and a row at least 26

    def _listed(self, key: str) -> list[tuple[Path, float | None]]:
        table = self.root / key / METADATA
        try:
            rows = list(csv.DictReader(self._read_table(key)))
            if any(None in row.values() for row in rows):
                raise ValueError
            listed = [
                (
                    table.parent / f"{int(row['id'])}.png",
                    float(row["area"]) if "area" in row else None,
                )
                for row in rows
            ]
        except (ValueError, KeyError, TypeError, csv.Error):
            raise ValueError(f"{table}: not the metadata.csv of amg.py, or cut short") from None
        self._check_complete(table, {path.name for path, _ in listed})
        return listed

    def _percents(self, listed: list[tuple[Path, float | None]]) -> list[float] | None:
        """Areas are stated in pixels; the header of one PNG tells the size of the image."""
        areas = super()._percents(listed)
        if not areas:
            return None
        width, height = png_size(listed[0][0])
        return [100 * area / (width * height) for area in areas]

    def _check_complete(self, table: Path, listed: set[str]) -> None:
        """`amg.py` lists every PNG it writes, so one that is not listed tells of a lost line."""
        if not listed:
            return
        there = {name for name in os.listdir(table.parent) if name.endswith(".png")}  # noqa: PTH208
        if there - listed:
            raise ValueError(f"{table}: does not list {min(there - listed)}; it was cut short")

    def _percent(self, stated: float, segment: Segment) -> float:
        return 100 * stated / (segment.height * segment.width)


def read_segment_png(path: Path) -> np.ndarray:
    """The pixels of a segment's PNG as [H, W] uint8, anything but 0 = inside.

    Raises ValueError naming the file if it is missing or no image.
    """
    with _opened(path) as image:
        return np.asarray(image.convert("L"))


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG, from its header. Raises ValueError as `read_segment_png`."""
    with _opened(path) as image:
        return image.size


@contextmanager
def _opened(path: Path) -> Iterator[Image]:
    """An image, with whatever Pillow raises about damaged files as a ValueError."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise ValueError(f"{path}: listed, but not there") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).split(" '")[0]
        raise ValueError(f"{path}: not an image, or cut short: {reason}") from None
