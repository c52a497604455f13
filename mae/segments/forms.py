"""The forms in which people keep segments as files in class folders, found by looking.

A *key* is an image's path relative to the class folders, without suffix: `n01440764/n01440764_18`.
Every form answers the same four questions (`SegmentSource`). A source holds only paths, so it can
be pickled into loader workers; files are opened when an image is asked for.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

from mae.segments.segment import Segment, nearest, segment_from_rle, verify, verify_all

logger = logging.getLogger(__name__)

EMPTY_LIST = "emptyfiles.txt"
IMAGENET_NAME = re.compile(r"(n\d{8})_\d+")
# A stated coverage, in percent of the image, may differ this much from the pixels': rounding.
COVERAGE_TOLERANCE = 0.01


class SegmentSource(Protocol):
    """Where segments come from."""

    name: str
    """What this form is called."""

    def nearest(self, key: str, coverage_percent: float) -> Segment | None:
        """The segment closest to a coverage in percent; None: the image has none."""

    def segments(self, key: str) -> list[Segment]:
        """All segments of an image, the smallest first."""

    def images(self) -> set[str]:
        """The keys of the images that have a segment, or a damaged file that should hold some."""

    def listed_empty(self) -> set[str]:
        """The keys of the images that are known to have none."""


class SegmentFolder:
    """What the folder forms share: keys from file names, the list of images without segments."""

    name: str

    def __init__(self, root: Path, empty_lists: tuple[Path, ...]) -> None:
        self.root = root
        self.empty_lists = empty_lists
        self._found: tuple[set[str], set[str]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the listing: a million names do not travel into every worker."""
        return {**self.__dict__, "_found": None}

    def images(self) -> set[str]:
        """By listing, once; only files that are small enough to be empty are opened."""
        return set(self._scanned()[0])

    def listed_empty(self) -> set[str]:
        """What the lists beside the class folders name, and images whose file holds nothing."""
        listed = set().union(*(read_empty_list(path) for path in self.empty_lists))
        return (listed | self._scanned()[1]) - self._scanned()[0]

    def nearest(self, key: str, coverage_percent: float) -> Segment | None:
        """Reads all segments; a form that can choose before it reads does."""
        return nearest(self.segments(key), coverage_percent)

    def segments(self, key: str) -> list[Segment]:
        """All segments of an image, the smallest first; raises ValueError naming a bad file."""
        raise NotImplementedError

    def _scanned(self) -> tuple[set[str], set[str]]:
        if self._found is None:
            found: tuple[set[str], set[str]] = (set(), set())
            for key, is_empty in self._scan():
                found[is_empty].add(key)
            self._found = found
        return self._found

    def _scan(self) -> Iterator[tuple[str, bool]]:
        """Every key for which there are files, and whether they hold no segment."""
        raise NotImplementedError


class JsonFolder(SegmentFolder):
    """One JSON file per image: `amg.py --convert-to-rle` or SA-1B."""

    name = "RLE JSON"
    suffix = ".json"
    bytes_of_one_segment = 400  # a shorter file may be SA-1B's header without a segment

    def nearest(self, key: str, coverage_percent: float) -> Segment | None:
        """Verifies the chosen segment only."""
        chosen = nearest(self._read(key), coverage_percent)
        try:
            return None if chosen is None else verify(chosen)
        except ValueError as error:
            raise ValueError(f"{self._path(key)}: a segment is damaged: {error}") from None

    def segments(self, key: str) -> list[Segment]:
        """All segments, verified."""
        read = self._read(key)
        try:
            return verify_all(read)
        except ValueError as error:
            raise ValueError(f"{self._path(key)}: a segment is damaged: {error}") from None

    def _scan(self) -> Iterator[tuple[str, bool]]:
        for parent, _, names in os.walk(self.root, followlinks=True):
            prefix = _prefix(parent, self.root)
            for name in names:
                if name.endswith(self.suffix) and not name.startswith("."):
                    key = prefix + name[: -len(self.suffix)]
                    yield key, self._is_empty(Path(parent, name))

    def _is_empty(self, path: Path) -> bool:
        try:
            if path.stat().st_size >= self.bytes_of_one_segment:
                return False
            return not _annotations(json.loads(path.read_bytes()))
        except (OSError, ValueError):
            return False  # damaged: it is named when it is read

    def _path(self, key: str) -> Path:
        return self.root / f"{key}{self.suffix}"

    def _read(self, key: str) -> list[Segment]:
        path = self._path(key)
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one, too
            raise ValueError(f"{path}: not JSON, or cut short: {error}") from None
        annotations = _annotations(content)
        if annotations is None:
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
            warn_of_difference(path, f"entry {number}", percent, segment.coverage_percent)
        return segment


def read_empty_list(path: Path) -> set[str]:
    """The keys in a list of images without segments: a file name per line, class folder optional.

    A name without its class folder gets it from ImageNet's naming: `n01735189_1185.JPEG` lies in
    `n01735189`; other names lie in no folder.
    """
    if not path.is_file():
        return set()
    keys = set()
    for line in path.read_text(errors="replace").splitlines():
        if line.strip():
            name = Path(line.strip()).with_suffix("").as_posix()
            imagenet = IMAGENET_NAME.fullmatch(name)
            keys.add(f"{imagenet[1]}/{name}" if imagenet else name)
    return keys


def warn_of_difference(path: Path, what: str, stated: float, counted: float) -> bool:
    """Whether a stated coverage in percent is not that of the pixels; logged, once per file."""
    if abs(stated - counted) <= COVERAGE_TOLERANCE:
        return False
    _warn_once(
        f"{path}: {what} states {stated:.3f} % of the image, its pixels are {counted:.3f} %; "
        "the pixels count"
    )
    return True


@lru_cache(maxsize=4096)
def _warn_once(message: str) -> None:
    logger.warning(message)


def _annotations(content: Any) -> list[Any] | None:
    annotations = content.get("annotations") if isinstance(content, dict) else content
    return annotations if isinstance(annotations, list) else None


def _prefix(parent: str, root: Path) -> str:
    relative = Path(parent).relative_to(root).as_posix()
    return "" if relative == "." else f"{relative}/"
