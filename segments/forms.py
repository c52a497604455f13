"""The forms in which people keep segments: found by looking, and all read alike.

    source = open_any_form(Path("IN1K/masks"))  # a packed store, or files that can be packed
    source.segments("n01440764/n01440764_18")   # all of an image, the smallest first

A *key* is an image's path relative to the class folders, without suffix. Coverage is counted from
the pixels; a file that states another is reported. Training reads the packed store only.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

import numpy as np

from common.files import open_regular, path_below, read_bytes, relative_files, walk
from common.images import load_image
from segments.config import STORE_NAME
from segments.segment import Segment, ordered, segment_from_pixels, segment_from_rle
from segments.store import PackedStore

logger = logging.getLogger(__name__)

EMPTY_LIST = "emptyfiles.txt"
IMAGENET_NAME = re.compile(r"^(n\d{8})_\d+$")
MOST_AREA = 1e15  # pixels; what states more states nothing
# A stated coverage, in percent of the image, may differ this much from the pixels': rounding.
COVERAGE_TOLERANCE = 0.01


def form_of(path: Path) -> str:
    """What the segments at a path are kept as, "none" if there are none; raises nothing."""
    if os.path.isfile(_store_path(path)):  # noqa: PTH113  (Path's raises where it may not look)
        return PackedStore.name
    with suppress(ValueError):  # whoever opens them will say why
        form = _folder_form(path)
        return form.name if form else "none"
    return "none"


def open_segments(path: Path) -> PackedStore:
    """Open a packed store, given as a file or by the folder that holds masks.sqlite.

    Raises ValueError if the store is damaged, or the segments are kept in another form.
    """
    source = open_any_form(path)
    if isinstance(source, PackedStore):
        return source
    raise ValueError(
        f"{path} holds segments as {source.name}, and training reads a packed store only; make it "
        f"by `python -m segments pack {path}`"
    )


def open_any_form(path: Path) -> AnyForm:
    """Open segments to look at or check them. Raises ValueError if there are none."""
    store = _store_path(path)
    return PackedStore(store) if store.is_file() else open_folder(path)


def open_folder(root: Path) -> SegmentFolder:
    """Open segments that are kept as files, to pack them. Raises ValueError if there are none."""
    form = _folder_form(root)
    if form is None:
        raise ValueError(
            f"{root} is no folder of segments: expected {STORE_NAME}, or per image a .json, "
            f"a folder with {PngMetadataFolder.table} or a folder with {PngTableFolder.table}"
        )
    return form(root)


def _store_path(path: Path) -> Path:
    return path / STORE_NAME if os.path.isdir(path) else path  # noqa: PTH112  (as above)


def _folder_form(root: Path) -> type[SegmentFolder] | None:
    if not os.path.isdir(root):  # noqa: PTH112
        return None
    # The first file that tells decides; a whole walk could take minutes.
    for _, names in walk(root):
        for form in (PngTableFolder, PngMetadataFolder):
            if form.table in names:
                return form
        if any(name.endswith(JsonFolder.suffix) and name[0] != "." for name in names):
            return JsonFolder
    return None


class SegmentFolder:
    """What the forms share."""

    name: str
    settings: ClassVar[Mapping[str, Any]] = {}  # how they were made is not known
    states_pixels = True  # a file states coverages in pixels, not in percent

    def __init__(self, root: Path) -> None:
        self.root = root

    def images(self) -> set[str]:
        """The keys of the images that have a segment, or a damaged file that should hold some."""
        return {key for key, is_empty in self._scanned.items() if not is_empty}

    def listed_empty(self) -> set[str]:
        """The keys of the images that are known to have none: by a list, or their own file."""
        lists = (self.root / EMPTY_LIST, self.root.parent / "train" / EMPTY_LIST)
        listed = set().union(*map(read_empty_list, lists))
        return (listed | self._scanned.keys()) - self.images()

    def segments(self, key: str, report: Callable[[str], object] = logger.warning) -> list[Segment]:
        """All segments of an image, the smallest first. Raises ValueError that names a bad file.

        report: told about stated coverages that are not those of the pixels.
        """
        found = []
        try:
            for segment, what, stated in self._read(key):
                found.append(segment)
                counted, pixels = segment.coverage_percent, segment.height * segment.width
                percent = 100 * stated / pixels if stated and self.states_pixels else stated
                if percent is not None and abs(percent - counted) > COVERAGE_TOLERANCE:
                    report(
                        f"{what} is said to cover {percent:.3f} % of the image, its pixels are "
                        f"{counted:.3f} %; the pixels count"
                    )
            return ordered(found)
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            inside = str(error).startswith(str(self.root))
            raise ValueError(f"{'' if inside else f'{self.root / key}: '}{error}") from None

    @cached_property
    def _scanned(self) -> dict[str, bool]:
        """For every image that has a file: whether it holds no segment."""
        return dict(self._scan())

    def _scan(self) -> Iterable[tuple[str, bool]]:
        # A million files: by listing, and only what is small enough to be empty is opened.
        raise NotImplementedError

    def _read(self, key: str) -> Iterator[tuple[Segment, str, float | None]]:
        """Segments, where each comes from, and the coverage that is stated there.

        Raises FileNotFoundError if the image has no file.
        """
        raise NotImplementedError


class JsonFolder(SegmentFolder):
    """One JSON file per image: `amg.py --convert-to-rle` or SA-1B."""

    name = "RLE JSON"
    suffix = ".json"
    bytes_of_one_segment = 400  # a shorter file may be SA-1B's header without a segment

    def _scan(self) -> Iterable[tuple[str, bool]]:
        for path in relative_files(self.root):
            if path.endswith(self.suffix) and not path.rpartition("/")[2].startswith("."):
                yield path.removesuffix(self.suffix), self._is_empty(self.root / path)

    def _is_empty(self, path: Path) -> bool:
        try:
            return path.stat().st_size < self.bytes_of_one_segment and not _annotations(path)
        except (OSError, ValueError):
            return False  # damaged: it is named when it is read

    def _read(self, key: str) -> Iterator[tuple[Segment, str, float | None]]:
        path = self.root / f"{key}{self.suffix}"
        for number, entry in enumerate(_annotations(path)):
            try:
                segment = segment_from_rle(entry["segmentation"])
            except (TypeError, KeyError):
                raise ValueError(f"{path}: entry {number} has no segmentation") from None
            except ValueError as error:
                raise ValueError(f"{path}: entry {number} is damaged: {error}") from None
            area = entry.get("area")
            stated = area if isinstance(area, int | float) and abs(area) < MOST_AREA else None
            yield segment, f"{path}: entry {number}", stated


def _annotations(path: Path) -> list[Any]:
    """The entries of a file. Raises ValueError if it is damaged."""
    try:
        with open_regular(path) as file:
            content = json.loads(file.read())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is one, too
        raise ValueError(f"{path}: not JSON, or cut short: {error}") from None
    annotations = content.get("annotations") if isinstance(content, dict) else content
    if not isinstance(annotations, list):
        raise ValueError(f"{path}: neither a list of segments nor SA-1B's annotations")
    return annotations


class PngFolder(SegmentFolder):
    """One folder per image: a PNG per segment, and a table that lists them."""

    table: str  # its file name
    bytes_of_header: int  # a table that is not longer lists nothing

    def _scan(self) -> Iterable[tuple[str, bool]]:
        found: dict[str, bool] = {}

        def enter(below: str) -> bool:
            try:
                size = (self.root / below / self.table).stat().st_size
            except OSError:
                return True
            found[below.removesuffix("/")] = size <= self.bytes_of_header
            return False  # the hundred PNGs beside a table are not listed

        for _ in walk(self.root, enter):
            pass
        return found.items()

    def _read(self, key: str) -> Iterator[tuple[Segment, str, float | None]]:
        table = self.root / key / self.table
        with open_regular(table) as file:
            lines = file.read().decode(errors="replace").splitlines()
        for path, stated in self._listed(table, lines):
            pixels = np.asarray(load_image(path).convert("L"))  # anything but 0 = inside
            yield segment_from_pixels(pixels), str(path), stated

    def _listed(self, table: Path, lines: list[str]) -> Iterable[tuple[Path, float]]:
        """The PNGs of an image, each with the coverage that is stated."""
        raise NotImplementedError


class PngTableFolder(PngFolder):
    """PNGs and a `table.txt`: a line `<coverage percent> <file>` per segment."""

    name = "PNGs with table.txt"
    table = "table.txt"
    states_pixels = False
    bytes_of_header = 2

    def _listed(self, table: Path, lines: list[str]) -> Iterator[tuple[Path, float]]:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    percent, name = line.split(maxsplit=1)
                    stated = float(percent)
                except ValueError:
                    raise ValueError(f"{table}:{number}: not '<coverage percent> <file>'") from None
                if not 0 <= stated <= 100:  # NaN, too
                    raise ValueError(f"{table}:{number}: a coverage of {percent} percent")
                yield path_below(table.parent, name.strip(), f"{table}:{number}"), stated


class PngMetadataFolder(PngFolder):
    """PNGs and a `metadata.csv`, as `amg.py` writes them."""

    name = "SAM PNGs with metadata.csv"
    table = "metadata.csv"
    bytes_of_header = 150  # amg.py's has 142 characters, and a row at least 26

    def _listed(self, table: Path, lines: list[str]) -> list[tuple[Path, float]]:
        try:
            rows = list(csv.DictReader(lines))
            if any(None in row.values() for row in rows):
                raise ValueError
            listed = [(table.parent / f"{int(row['id'])}.png", float(row["area"])) for row in rows]
        except (ValueError, KeyError, TypeError, csv.Error):
            raise ValueError(f"{table}: not the metadata.csv of amg.py, or cut short") from None
        # amg.py lists every PNG it writes, so one that is not listed tells of a lost line.
        names = {path.name for path, _ in listed}
        there = {name for name in os.listdir(table.parent) if name.endswith(".png")}  # noqa: PTH208
        if names and there - names:
            raise ValueError(f"{table}: does not list {min(there - names)}; it was cut short")
        return listed


def read_empty_list(path: Path) -> set[str]:
    """The keys in a list of images without segments: a file name per line, folder optional."""
    if not path.is_file():
        return set()
    lines = read_bytes(path).decode(errors="replace").splitlines()
    # ImageNet's names tell their class folder: `n01735189_1185.JPEG` lies in `n01735189`.
    names = {os.path.splitext(line.strip())[0] for line in lines if line.strip()}  # noqa: PTH122
    return {IMAGENET_NAME.sub(r"\1/\g<0>", PurePosixPath(name).as_posix()) for name in names}


AnyForm = PackedStore | SegmentFolder
