"""One segment of one image: where an object is, and how much of the image it covers.

Shapes: H x W pixels of the image, upright (EXIF rotation applied). A segment is kept run-length
encoded, column by column, as COCO does: https://cocodataset.org/#format-data. A photograph's
segment then takes some hundred bytes, and decodes in microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_rle


@dataclass(frozen=True, kw_only=True)
class Segment:
    """What Segment Anything found.

    height, width: of the image, in pixels. coverage_percent: share of the image inside, 0 to 100,
    counted from the pixels. counts: COCO's compressed run lengths.
    """

    height: int
    width: int
    coverage_percent: float
    counts: bytes

    def decode(self) -> np.ndarray:
        """The segment as [H, W] uint8, 1 inside and 0 outside."""
        return coco_rle.decode({"size": [self.height, self.width], "counts": self.counts})


def segment_from_pixels(inside: np.ndarray) -> Segment:
    """Encode [H, W]; anything but 0 is inside."""
    height, width = inside.shape
    rle = coco_rle.encode(np.asfortranarray(inside != 0, dtype=np.uint8))
    percent = 100 * int(np.count_nonzero(inside)) / (height * width)
    return Segment(height=height, width=width, coverage_percent=percent, counts=rle["counts"])


def segment_from_rle(segmentation: Any) -> Segment:
    """Read COCO's `{"size": [height, width], "counts": ...}`, compressed text or run lengths.

    Raises ValueError if it is anything else. Whether the runs fill the image is left to `verify`,
    which costs more than choosing among an image's sixty segments may.
    """
    height, width, counts = _parts_of_rle(segmentation)
    if not isinstance(counts, bytes):
        encoded = coco_rle.frPyObjects({"size": [height, width], "counts": counts}, height, width)
        counts = encoded["counts"]
    area = int(coco_rle.area({"size": [height, width], "counts": counts}))
    percent = 100 * area / (height * width)
    return Segment(height=height, width=width, coverage_percent=percent, counts=counts)


def verify(segment: Segment) -> Segment:
    """Return the segment, or raise ValueError if its runs do not fill the image exactly."""
    runs = _run_lengths(segment.counts)
    if min(runs, default=0) < 0 or sum(runs) != segment.height * segment.width:
        size = f"{segment.height} x {segment.width}"
        raise ValueError(f"its runs cover {sum(runs)} pixels, its size is {size}")
    return segment


def nearest(segments: Iterable[Segment], coverage_percent: float) -> Segment | None:
    """The segment whose coverage is closest to the wanted one; on a tie the smaller."""
    return min(
        segments,
        key=lambda s: (abs(s.coverage_percent - coverage_percent), s.coverage_percent),
        default=None,
    )


def _parts_of_rle(segmentation: Any) -> tuple[int, int, bytes | list[int]]:
    try:
        height, width = segmentation["size"]
        counts = segmentation["counts"]
    except (TypeError, KeyError, ValueError):
        raise ValueError('it is no run-length code: {"size": [h, w], "counts": ...}') from None
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        raise ValueError(f"its size is {segmentation['size']}")
    if isinstance(counts, str):
        try:
            return height, width, counts.encode("ascii")
        except UnicodeEncodeError:
            raise ValueError("its counts are not ASCII") from None
    if isinstance(counts, list) and all(isinstance(run, int) for run in counts):
        return height, width, counts
    raise ValueError("its counts are neither text nor a list of run lengths")


def _run_lengths(counts: bytes) -> list[int]:
    """COCO's compressed counts as run lengths, outside and inside in turn.

    The code of pycocotools' `rleFrString`, which reads past the end of a code cut short: five bits
    a character, least significant first, bit 5 = more follow, sign in bit 4 of the last, and from
    the fourth run on the difference to the run before the last.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = character - 48
        if not 0 <= code < 64:
            raise ValueError(f"its counts hold the byte {character}")
        value |= (code & 0x1F) << shift
        shift += 5
        if code & 0x20:
            continue
        if code & 0x10:
            value |= -1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise ValueError("its counts stop in the middle of a number")
    return runs
