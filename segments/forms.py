"""The forms in which people keep segments: found by looking, and all read alike.

    source = open_any_form(Path("IN1K/masks"))  # a packed store, or files that can be packed
    source.segments("n01440764/n01440764_18")   # all of an image, the smallest first

A *key* is an image's path relative to the class folders, without suffix. Coverage is counted from
the pixels; a file that states another is reported. Training reads the packed store only.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple, NotRequired

import numpy as np
from pydantic import FiniteFloat
from typing_extensions import TypedDict  # typing's is not enough before Python 3.12

from common.files import path_below, read_bytes, walk
from common.formats import read_json
from common.images import load_image
from segments.config import STORE_NAME
from segments.segment import Segment, ordered, segment_from_pixels, segment_from_rle
from segments.store import PackedStore

logger = logging.getLogger(__name__)

EMPTY_LIST = "emptyfiles.txt"
IMAGENET_NAME = re.compile(r"^(n\d{8})_\d+$")
# A stated coverage, in percent of the image, may differ this much from the pixels': rounding. What
# differs more is reported; much more, it is not of these pixels.
COVERAGE_TOLERANCE, COVERAGE_DAMAGE = 0.01, 1.0


def form_of(path: Path) -> str:
    """What the segments at a path are kept as, "none" if there are none; raises nothing."""
    if os.path.isfile(_store_path(path)):  # noqa: PTH113  (Path's raises where it may not look)
        return PackedStore.name
    with suppress(ValueError):  # whoever opens them will say why
        return open_folder(path).name
    return "none"


def open_segments(path: Path) -> PackedStore:
    """Open a packed store, given as a file or by the folder that holds masks.sqlite.

    Raises ValueError if the store is damaged, or the segments are kept in another form.
    """
    source = open_any_form(path)
    if isinstance(source, PackedStore):
        return source
    how = f"training reads a packed store only; make it by `python -m segments pack {path}`"
    raise ValueError(f"{path} holds segments as {source.name}, and {how}")


def open_any_form(path: Path) -> AnyForm:
    """Open segments to look at or check them. Raises ValueError if there are none."""
    store = _store_path(path)
    return PackedStore(store) if store.is_file() else open_folder(path)


def open_folder(root: Path) -> SegmentFolder:
    """Open segments that are kept as files, to pack them. Raises ValueError if there are none."""
    # The first file that tells decides; a whole walk could take minutes.
    for _, names in walk(root) if os.path.isdir(root) else ():  # noqa: PTH112
        for form in FORMS:
            if any(f"/{n}".endswith(form.ending) for n in names if not n.startswith(".")):
                return SegmentFolder(root, form)
    raise ValueError(
        f"{root} is no folder of segments: expected {STORE_NAME}, or per image a .json, or a "
        "folder with metadata.csv or table.txt; `python -m segments generate` makes some"
    )


def _store_path(path: Path) -> Path:
    return path / STORE_NAME if os.path.isdir(path) else path  # noqa: PTH112  (as above)


class Form(NamedTuple):
    """Files of segments, one for each image."""

    name: str
    ending: str  # of the file's path, behind the image's key
    bytes_of_none: int  # a file without segments is not longer
    # Yields a file's segments, each with the coverage that is stated for it, in percent.
    read: Callable[[Path], Iterator[tuple[Segment, float | None]]]


class SegmentFolder:
    """A folder of such files."""

    settings: ClassVar[Mapping[str, Any]] = {}  # how they were made is not known

    def __init__(self, root: Path, form: Form) -> None:
        self.root, self.form, self.name = root, form, form.name

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
        file, found = self.root / f"{key}{self.form.ending}", []
        try:
            if not os.path.lexists(file):
                return []
            for number, (segment, percent) in enumerate(self.form.read(file)):
                found.append(segment)
                counted = segment.coverage_percent
                off = 0.0 if percent is None else abs(percent - counted)
                if not off <= COVERAGE_TOLERANCE:  # NaN, too
                    what = f"{file}: entry {number} is said to cover {percent:.3f} % of the image"
                    what += f", its pixels are {counted:.3f} %"
                    if not off <= COVERAGE_DAMAGE:
                        raise ValueError(what)
                    report(f"{what}; the pixels count")
            return ordered(found)
        except (OSError, ValueError) as error:
            inside = str(error).startswith(str(self.root))
            raise ValueError(f"{'' if inside else f'{file}: '}{error}") from None

    @cached_property
    def _scanned(self) -> dict[str, bool]:
        """For every image that has a file: whether it holds no segment."""
        ending, keys = self.form.ending, []

        def enter(below: str) -> bool:
            key = below.removesuffix("/")
            if ending.startswith("/") and os.path.exists(f"{self.root}/{key}{ending}"):  # noqa: PTH110
                keys.append(key)
                return False  # the hundred PNGs beside a table are not listed
            return True

        for below, names in walk(self.root, enter):
            found = [n for n in names if n.endswith(ending) and not n.startswith(".")]
            keys += [below + name.removesuffix(ending) for name in found]
        return {key: self._is_empty(self.root / f"{key}{ending}") for key in keys}

    def _is_empty(self, file: Path) -> bool:
        try:  # of a million files only what is small enough is opened
            is_small = file.stat().st_size <= self.form.bytes_of_none
            return is_small and not any(self.form.read(file))
        except (OSError, ValueError):
            return False  # damaged: it is named when it is read


class _Annotation(TypedDict):
    segmentation: Any  # see `segment_from_rle`
    area: NotRequired[FiniteFloat]  # in pixels


class _Annotations(TypedDict):  # of SA-1B
    annotations: list[_Annotation]
    images: NotRequired[list[Any]]  # of COCO, for a whole dataset


def _read_json(file: Path) -> Iterator[tuple[Segment, float | None]]:
    content = read_json(file, list[_Annotation] | _Annotations)
    if isinstance(content, dict) and "images" in content:
        raise ValueError(f"{file}: it is of {len(content['images'])} images; give a file for each image")
    entries = content["annotations"] if isinstance(content, dict) else content
    for number, entry in enumerate(entries):
        try:
            segment = segment_from_rle(entry["segmentation"])
        except ValueError as error:
            raise ValueError(f"{file}: entry {number} is damaged: {error}") from None
        yield segment, _percent(entry["area"], segment) if "area" in entry else None


def _percent(area: float, segment: Segment) -> float:
    return 100 * area / (segment.height * segment.width)


def _read_table(file: Path) -> Iterator[tuple[Segment, float | None]]:
    """A line `<coverage percent> <file>` per segment."""
    for number, line in enumerate(_lines(file), 1):
        if line.strip():
            try:
                percent, name = line.split(maxsplit=1)
                stated = float(percent)
            except ValueError:
                raise ValueError(f"{file}:{number}: not '<coverage percent> <file>'") from None
            if not 0 <= stated <= 100:  # NaN, too
                raise ValueError(f"{file}:{number}: a coverage of {percent} percent")
            yield _read_png(path_below(file.parent, name.strip(), f"{file}:{number}")), stated


def _read_metadata(file: Path) -> Iterator[tuple[Segment, float | None]]:
    try:
        rows = list(csv.DictReader(_lines(file)))
        if any(None in row.values() for row in rows):
            raise ValueError
        areas = {file.parent / f"{int(row['id'])}.png": float(row["area"]) for row in rows}
    except (ValueError, KeyError, TypeError, csv.Error):
        raise ValueError(f"{file}: not the metadata.csv of amg.py, or cut short") from None
    # amg.py lists every PNG it writes, 0.png and so on: one that is not listed tells of a lost line.
    there = {path for path in file.parent.iterdir() if re.fullmatch(r"[0-9]+\.png", path.name)}
    if areas and (unlisted := there - areas.keys()):
        raise ValueError(f"{file}: does not list {min(unlisted).name}; it was cut short")
    for png, area in areas.items():
        segment = _read_png(png)
        yield segment, _percent(area, segment)


def _read_png(path: Path) -> Segment:
    """Inside is what is not 0, in any colour or as index of a palette; else what is not transparent."""
    image = load_image(path)
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    colours = [number for number, band in enumerate(image.getbands()) if band not in "Aa"]
    inside = np.any(pixels[..., colours], axis=2, keepdims=False)
    if image.has_transparency_data and inside.all() == inside.any():
        inside = np.asarray(image.convert("RGBA"))[..., 3]
    return segment_from_pixels(inside)


def _lines(file: Path) -> list[str]:
    return read_bytes(file).decode(errors="replace").splitlines()


def read_empty_list(path: Path) -> set[str]:
    """The keys in a list of images without segments: a file name per line, folder optional."""
    lines = _lines(path) if path.is_file() else []
    # ImageNet's names tell their class folder: `n01735189_1185.JPEG` lies in `n01735189`.
    names = {os.path.splitext(line.strip())[0] for line in lines if line.strip()}  # noqa: PTH122
    return {IMAGENET_NAME.sub(r"\1/\g<0>", PurePosixPath(name).as_posix()) for name in names}


AnyForm = PackedStore | SegmentFolder
# Which one it is is found in this order.
FORMS = (
    Form("PNGs with table.txt", "/table.txt", 2, _read_table),
    # amg.py's header has 142 characters, and a row at least 26.
    Form("SAM PNGs with metadata.csv", "/metadata.csv", 150, _read_metadata),
    # SA-1B's header; a segment takes more.
    Form("RLE JSON", ".json", 400, _read_json),
)
