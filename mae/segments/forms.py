"""The forms in which people keep segments as files in class folders, found by looking.

A *key* is an image's path relative to the class folders, without suffix: `n01440764/n01440764_18`.
Every form answers the same four questions (`SegmentSource`). A source holds only paths, so it can
be pickled into loader workers; files are opened when an image is asked for.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mae.segments.segment import (
    Segment,
    nearest,
    segment_from_pixels,
    segment_from_rle,
    verify,
)

logger = logging.getLogger(__name__)

EMPTY_LIST = "emptyfiles.txt"
TABLE = "table.txt"
METADATA = "metadata.csv"
# A stated coverage, in percent of the image, may differ this much from the pixels': rounding.
COVERAGE_TOLERANCE = 0.01
SHORT_FILE = 256  # bytes; whatever lists an image's segments and is longer lists at least one


class SegmentSource(Protocol):
    """Where segments come from."""

    def nearest(self, key: str, coverage_percent: float) -> Segment | None:
        """The segment closest to a coverage in percent; None: the image has none."""

    def segments(self, key: str) -> list[Segment]:
        """All segments of an image, the smallest first."""

    def images(self) -> set[str]:
        """The keys of the images that have a segment, or at least a file that should hold some."""

    def listed_empty(self) -> set[str]:
        """The keys of the images that are known to have none."""


class _Folder:
    """What the folder forms share: keys from file names, the list of images without segments."""

    pattern: str
    """What a file that describes one image's segments is called, for `rglob`."""

    def __init__(self, root: Path, empty_lists: tuple[Path, ...]) -> None:
        self.root = root
        self.empty_lists = empty_lists

    def listed_empty(self) -> set[str]:
        """What the lists beside the class folders name."""
        return set().union(*(read_empty_list(path) for path in self.empty_lists))

    def images(self) -> set[str]:
        """By listing; files too short to be sure of are read."""
        keys = ((self.key_of(path), path) for path in self.root.rglob(self.pattern))
        return {key for key, path in keys if path.stat().st_size > SHORT_FILE or self._any(key)}

    def _any(self, key: str) -> bool:
        """Whether a short file holds a segment; a damaged one counts, and is named when used."""
        try:
            return bool(self.segments(key))
        except ValueError:
            return True

    def nearest(self, key: str, coverage_percent: float) -> Segment | None:
        """Reads all segments; a form that can choose before it reads does."""
        return nearest(self.segments(key), coverage_percent)

    def key_of(self, path: Path) -> str:
        """The key of the image that a file of this form describes."""
        raise NotImplementedError

    def segments(self, key: str) -> list[Segment]:
        """All segments of an image, the smallest first; raises ValueError naming a bad file."""
        raise NotImplementedError


class JsonFolder(_Folder):
    """One JSON file per image: `amg.py --convert-to-rle` or SA-1B."""

    pattern = "*.json"

    def key_of(self, path: Path) -> str:
        """The path itself, without suffix."""
        return path.relative_to(self.root).with_suffix("").as_posix()

    def nearest(self, key: str, coverage_percent: float) -> Segment | None:
        """Verifies the chosen segment only."""
        chosen = nearest(self._read(key), coverage_percent)
        return None if chosen is None else self._verified(key, chosen)

    def segments(self, key: str) -> list[Segment]:
        """All segments, verified."""
        return _by_coverage(self._verified(key, segment) for segment in self._read(key))

    def _path(self, key: str) -> Path:
        return self.root / f"{key}.json"

    def _verified(self, key: str, segment: Segment) -> Segment:
        try:
            return verify(segment)
        except ValueError as error:
            raise ValueError(f"{self._path(key)}: a segment is damaged: {error}") from None

    def _read(self, key: str) -> list[Segment]:
        path = self._path(key)
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return []
        except ValueError as error:  # UnicodeDecodeError is one, too
            raise ValueError(f"{path}: not JSON, or cut short: {error}") from None
        annotations = content.get("annotations") if isinstance(content, dict) else content
        if not isinstance(annotations, list):
            raise ValueError(f"{path}: neither a list of segments nor SA-1B's annotations")
        return [self._segment(path, number, entry) for number, entry in enumerate(annotations)]

    def _segment(self, path: Path, number: int, entry: Any) -> Segment:
        try:
            segment = segment_from_rle(entry["segmentation"])
        except (TypeError, KeyError):
            raise ValueError(f"{path}: entry {number} has no segmentation") from None
        except ValueError as error:
            raise ValueError(f"{path}: entry {number}: {error}") from None
        stated = entry.get("area")
        if isinstance(stated, int | float):
            percent = 100 * stated / (segment.height * segment.width)
            _warn_of_difference(path, f"entry {number}", percent, segment.coverage_percent)
        return segment


class _PngFolder(_Folder):
    """One folder per image with a PNG per segment, and a file that lists them."""

    def key_of(self, path: Path) -> str:
        """The path of its folder."""
        return path.parent.relative_to(self.root).as_posix()

    def segments(self, key: str) -> list[Segment]:
        """All segments; reads every PNG that is listed."""
        return _by_coverage(self._segment(path, stated) for path, stated in self._listed(key))

    def _segment(self, path: Path, stated_percent: float | None) -> Segment:
        segment = segment_from_pixels(read_segment_png(path))
        if stated_percent is not None:
            _warn_of_difference(path, "the PNG", stated_percent, segment.coverage_percent)
        return segment

    def _listed(self, key: str) -> list[tuple[Path, float | None]]:
        """The PNGs of an image, each with its stated coverage in percent, where one is stated."""
        raise NotImplementedError


class PngTableFolder(_PngFolder):
    """PNGs and a `table.txt`: a line `<coverage percent> <file>` per segment."""

    pattern = TABLE

    def nearest(self, key: str, coverage_percent: float) -> Segment | None:
        """Trusts the table for the choice, so that one PNG is read, not all."""
        best = min(
            ((abs(stated - coverage_percent), stated, path) for path, stated in self._listed(key)),
            default=None,
        )
        return None if best is None else self._segment(best[2], best[1])

    def _listed(self, key: str) -> list[tuple[Path, float]]:  # type: ignore[override]
        table = self.root / key / TABLE
        try:
            lines = table.read_text().splitlines()
        except FileNotFoundError:
            return []
        except ValueError:
            raise ValueError(f"{table}: not text") from None
        return [self._entry(table, number, line) for number, line in enumerate(lines, 1) if line]

    def _entry(self, table: Path, number: int, line: str) -> tuple[Path, float]:
        try:
            percent, name = line.split(maxsplit=1)
            return table.parent / name.strip(), float(percent)
        except ValueError:
            raise ValueError(f"{table}:{number}: not '<coverage percent> <file>'") from None


class PngMetadataFolder(_PngFolder):
    """PNGs and a `metadata.csv`, as `amg.py` writes them."""

    pattern = METADATA

    def _listed(self, key: str) -> list[tuple[Path, float | None]]:
        import csv

        table = self.root / key / METADATA
        try:
            with table.open(newline="") as file:
                numbers = [row["id"] for row in csv.DictReader(file)]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError):
            raise ValueError(f"{table}: not the metadata.csv of amg.py") from None
        return [(table.parent / f"{number}.png", None) for number in numbers]


def read_segment_png(path: Path) -> np.ndarray:
    """The pixels of a segment's PNG as [H, W] uint8, anything but 0 = inside.

    Raises ValueError naming the file if it is missing or no image.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))
    except FileNotFoundError:
        raise ValueError(f"{path}: listed, but not there") from None
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises on damaged files
        raise ValueError(f"{path}: not an image, or cut short: {error}") from None


def read_empty_list(path: Path) -> set[str]:
    """The keys in a list of images without segments: a file name per line, class folder optional.

    A name without its class folder gets it from ImageNet's naming: `n01735189_1185.JPEG` lies in
    `n01735189`.
    """
    if not path.is_file():
        return set()
    keys = set()
    for line in path.read_text().split():
        name = Path(line).with_suffix("").as_posix()
        keys.add(name if "/" in name else f"{name.rpartition('_')[0]}/{name}")
    return keys


def _by_coverage(segments: Iterator[Segment]) -> list[Segment]:
    return sorted(segments, key=lambda segment: segment.coverage_percent)


def _warn_of_difference(path: Path, what: str, stated: float, counted: float) -> None:
    if abs(stated - counted) > COVERAGE_TOLERANCE:
        logger.warning(
            "%s: %s states %.3f %% of the image, its pixels are %.3f %%; the pixels count",
            path,
            what,
            stated,
            counted,
        )


def open_folder(root: Path) -> SegmentSource:
    """Find out in which form a folder keeps its segments. Raises ValueError if in none."""
    empty_lists = (root / EMPTY_LIST, root.parent / "train" / EMPTY_LIST)
    for form in (PngTableFolder, PngMetadataFolder, JsonFolder):
        if next(root.rglob(form.pattern), None) is not None:
            return form(root, empty_lists)
    raise ValueError(
        f"{root} holds no segments: expected masks.sqlite, or per image a .json, "
        f"a folder with {METADATA} or a folder with {TABLE}"
    )
