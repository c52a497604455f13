"""One segment of one image: where an object is, and how much of the image it covers.

Shapes: H x W pixels of the image, upright (EXIF rotation applied). A segment is kept run-length
encoded, column by column, as COCO does: https://cocodataset.org/#format-data.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from pycocotools import mask as coco_rle
from pydantic import Field
from scipy import ndimage
from typing_extensions import TypedDict  # typing's is not enough before Python 3.12

from common.formats import parsed

# Characters of COCO's code, the last one not announcing another. pycocotools reads past the end of
# anything else.
COMPLETE_CODE = re.compile(rb"[0-o]*[0-O]")
FIRST_CHARACTER, LOW_BITS, SIGN_BIT, MORE_BIT, BITS = np.uint8(48), 0x1F, 0x10, 0x20, 5


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What Segment Anything found."""

    height: int  # of the image, in pixels
    width: int
    coverage_percent: float  # share of the image inside, 0 to 100, counted from the pixels
    counts: bytes  # COCO's compressed run lengths

    def fits(self, height: int, width: int) -> bool:
        """Whether it is of an image of this size, or of one that was shrunk to it, by whole pixels."""
        if (self.height, self.width) == (height, width):
            return True
        # `images pack --short-side` rounds the longer side: to half a pixel of the shrunk image.
        is_smaller = height < self.height and width < self.width
        return is_smaller and 2 * abs(self.height * width - self.width * height) <= min(
            self.height, self.width
        )

    def decode(self) -> np.ndarray:
        """[H, W] uint8, 1 inside. Raises ValueError if the runs do not fill the image."""
        runs = _checked_runs(self.height, self.width, self.counts)
        inside = np.zeros(len(runs), np.uint8)
        inside[1::2] = 1
        return np.repeat(inside, runs).reshape(self.width, self.height).T


def segment_from_pixels(inside: np.ndarray) -> Segment:
    """Encode [H, W]; anything but 0 is inside."""
    rle = coco_rle.encode(np.asfortranarray(inside != 0, dtype=np.uint8))
    height, width = inside.shape
    return segment_from_counts(height, width, rle["counts"])


def segment_from_flips(flips: np.ndarray, height: int, width: int) -> Segment:
    """From the pixels, ascending and counted down the columns, at which inside begins and ends."""
    flips = flips[: np.searchsorted(flips, height * width)]  # the end of the image is none
    # Runs outside and inside in turn; the first is outside, if need be 0 long.
    runs = np.diff(flips, prepend=0, append=height * width)
    return segment_from_rle({"size": [height, width], "counts": runs.tolist()})


class _Rle(TypedDict):
    size: Annotated[list[Annotated[int, Field(ge=1, lt=2**31)]], Field(min_length=2, max_length=2)]
    counts: str | list[Annotated[int, Field(ge=0, lt=2**32)]]  # C would wrap others


def segment_from_rle(segmentation: Any) -> Segment:
    """Read COCO's `{"size": [height, width], "counts": ...}`, compressed text or run lengths.

    Raises ValueError if it is anything else, or its runs do not fill the image.
    """
    rle = parsed(_Rle, segmentation, "its run-length code")
    (height, width), counts = rle["size"], rle["counts"]
    is_text = isinstance(counts, str)
    code = counts.encode() if is_text else coco_rle.frPyObjects(rle, height, width)["counts"]
    return segment_from_counts(height, width, code)


def segment_from_counts(height: int, width: int, counts: bytes) -> Segment:
    """From compressed run lengths. Raises ValueError unless they are that, and fill the image."""
    percent = 100 * int(_checked_runs(height, width, counts)[1::2].sum()) / (height * width)
    return Segment(height=height, width=width, coverage_percent=percent, counts=counts)


def _checked_runs(height: int, width: int, counts: bytes) -> np.ndarray:
    """The run lengths of a code. Raises ValueError unless it is one, and they fill the image."""
    if not COMPLETE_CODE.fullmatch(counts):
        raise ValueError("its counts stop in the middle of a number, or are no counts at all")
    (runs,) = run_lengths([counts])
    if runs.min() < 0 or int(runs.sum()) != height * width:
        raise ValueError(f"its runs cover {int(runs.sum())} pixels, its size is {height} x {width}")
    return runs


def ordered(segments: Iterable[Segment]) -> list[Segment]:
    """The segments of one image, the smallest first. Raises ValueError if their sizes differ."""
    found = sorted(segments, key=_order)
    sizes = {(segment.height, segment.width) for segment in found}
    if len(sizes) > 1:
        raise ValueError(f"its segments have different sizes: {sorted(sizes)}")
    return found


def nearest(segments: Iterable[Segment], coverage_percent: float) -> Segment | None:
    """The segment whose coverage is closest to the wanted one; on a tie the smaller."""
    return next(iter(nearest_first(segments, coverage_percent)), None)


def nearest_first(segments: Iterable[Segment], coverage_percent: float) -> list[Segment]:
    """By the distance of their coverage from the wanted one; on a tie the smaller first."""
    # Sorting keeps the order of equals: the first is the one that `PackedStore.nearest` finds.
    ranked = sorted(segments, key=_order)
    return sorted(ranked, key=lambda s: abs(s.coverage_percent - coverage_percent))


def sides_touched(inside: np.ndarray) -> int:
    """How many of its four sides what is not 0 in [H, W] reaches."""
    edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
    return sum(bool(edge.any()) for edge in edges)


def count_islands(inside: np.ndarray) -> int:
    """Parts of [H, W] that do not touch, neither by a side nor by a corner."""
    return int(ndimage.label(inside, structure=np.ones((3, 3)))[1])


def largest_island(segment: Segment) -> Segment:
    """The largest of these parts alone; the first of those that are equally large."""
    islands, count = ndimage.label(segment.decode(), structure=np.ones((3, 3)))
    if count < 2:
        return segment
    return segment_from_pixels(islands == 1 + np.bincount(islands.ravel())[1:].argmax())


def _order(segment: Segment) -> tuple[float, bytes]:
    """By coverage; by code where that is equal, so that every form of the files agrees."""
    return segment.coverage_percent, segment.counts


def decode_at(segments: Sequence[Segment], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """All segments of one image at some of its rows and columns, ascending: [M, R, C] uint8.

    For few pixels a quarter of the time of `decode`. Raises ValueError as that does.
    """
    height, width = segments[0].height, segments[0].width
    # A crop that is enlarged asks for a column several times: it is looked up once.
    columns, again = np.unique(columns, return_inverse=True)
    places = (columns[:, None] * height + rows).ravel()  # of the points, in the order of the runs
    decoded = np.empty((len(segments), len(places)), np.uint8)
    every_run = run_lengths([segment.counts for segment in segments])
    for points, runs in zip(decoded, every_run, strict=True):
        ends = runs.cumsum()
        if not len(ends) or ends[-1] != height * width:
            raise ValueError(f"its runs do not fill {width} x {height} pixels")
        inside = np.zeros(len(runs), np.uint8)
        inside[1::2] = 1
        # How many of the points lie in each run: all those before its end, less the runs' before.
        points_before = places.searchsorted(ends)
        points_before[1:] -= points_before[:-1].copy()
        points[:] = inside.repeat(points_before)  # ValueError for runs of less than nothing
    by_column = decoded.reshape(len(segments), len(columns), len(rows))  # as the runs lie
    return by_column[:, again].transpose(0, 2, 1)  # [M, rows, columns]


def run_lengths(codes_of_each: list[bytes]) -> list[np.ndarray]:
    """COCO's compressed counts as run lengths, outside and inside in turn, of several segments.

    The code of pycocotools' `rleFrString`: five bits a character, least significant first, bit 5 =
    more follow, sign in bit 4 of the last, and from the fourth run on the difference to the run
    before the last. Each must be a complete code; numpy is entered once for all of them.
    """
    codes = np.frombuffer(b"".join(codes_of_each), dtype=np.uint8) - FIRST_CHARACTER
    last = np.flatnonzero(codes < MORE_BIT)  # characters of each number, and first
    first = np.append(0, last[:-1] + 1)
    place = np.arange(len(codes)) - first.repeat(last - first + 1)  # of a character in its number
    values = np.add.reduceat((codes & LOW_BITS).astype(np.int64) << (BITS * place), first)
    # The sign bit, twice: what it was counted as, and what it takes away.
    values -= (codes[last] & SIGN_BIT).astype(np.int64) << (BITS * place[last] + 1)
    stops = last.searchsorted(np.cumsum([len(counts) for counts in codes_of_each])).tolist()
    each = [values[start:stop] for start, stop in pairwise([0, *stops])]
    for runs in each:  # undo the differences, by which similar columns take few characters
        runs[1::2] = runs[1::2].cumsum()
        runs[2::2] = runs[2::2].cumsum()
    return each
