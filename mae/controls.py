"""Which segments hide an image: its own, or a control for all about them that is not "object".

A difference between a method's own segments and `borrowed` ones is what the content does, as those
have the shapes of objects, too; `blob` and `block` have the area alone. Own segments and controls
vary alike: in the first place an image has one of either, which the crop moves.
"""

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch

from engine.schedule import CONTROL, sample_rng
from mae.config import MethodConfig
from mae.crops import Crop, CroppedImage, crop_segment, crop_segments
from mae.masking import MaskingMethod
from segments.segment import Segment, largest_island, nearest_first, sides_touched
from segments.store import PackedStore, segment_key

CANDIDATES = 4  # images of which the one with the likest segment is borrowed from
ASPECT = (1 / 3, 3.0)  # of a block, width / height
MOST_HILLS = 32  # of the noise of a blob, along the longer side of the image
SOFTNESS = 0.6  # of these hills: the deviation of a Gaussian for a width of 1


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentSource:
    """What `MaskingMethod.pattern` gets as segments.

    donors: paths of the training images, as bytes; each has a segment. Two of them at least where
    segments are borrowed, see `mae.listing.check_donors`. seed: of the controls that are fixed.
    """

    store: PackedStore
    donors: np.ndarray
    options: MethodConfig
    seed: int

    def cut(
        self, method: MaskingMethod, key: str, image: CroppedImage, rng: np.random.Generator
    ) -> np.ndarray:
        """[H, W] uint8, cut as the image was, or [M, H, W] for a method that takes all segments.

        rng: the sample's. Raises ValueError if the image has no segment, or those of another size.
        """
        if self.options.nearest_count is None:  # whatever the epoch and the crop
            rng = sample_rng(self.seed, CONTROL, 0, zlib.crc32(key.encode()))
        size, side = (image.height, image.width), method.segment_side
        segments = own = self._segments(method, key, rng)
        if not own[0].fits(*size):
            raise ValueError(
                f"it is {image.width}x{image.height} pixels, upright, but its segments are "
                f"{own[0].width}x{own[0].height}"
            )
        if self.options.segments_from == "borrowed":
            segments = self._borrowed(method, key, own, rng)
        if method.all_segments:
            cut = crop_segments(segments, image.crop, side, size)
        else:
            cut = crop_segment(segments[0].decode(), image.crop, side, size)[None]
        shape = SHAPES.get(self.options.segments_from)
        if shape is not None:
            counts = np.count_nonzero(cut, axis=(1, 2)).tolist()
            of_each = zip(own, counts, strict=True)
            crop = _in_pixels_of(own[0], image)
            cut = np.stack([shape(one, count, crop, side, rng) for one, count in of_each])
            cut = cut[..., ::-1] if image.crop.flip else cut
        return cut if method.all_segments else np.ascontiguousarray(cut[0])

    def _segments(self, method: MaskingMethod, key: str, rng: np.random.Generator) -> list[Segment]:
        """The image's own: all, or the one that is hidden."""
        if method.all_segments:
            segments = self.store.segments(key)
        else:
            several = self.options.nearest_count or 1
            segments = self._nearest(key, self.options.coverage_ratio, several)
            segments = segments if several == 1 else segments[rng.integers(len(segments)) :][:1]
        if not segments:
            raise ValueError("it has no segment")
        return segments

    def _nearest(self, key: str, coverage_percent: float, count: int = 1) -> list[Segment]:
        """At most `count` of an image's, the nearest to a coverage first, that may be chosen."""
        choice = self.options.segment_choice
        if choice == "nearest" and count == 1:  # one indexed query, which reads one segment
            nearest = self.store.nearest(key, coverage_percent)
            return [nearest] if nearest else []
        found = nearest_first(self.store.segments(key), coverage_percent)
        if choice == "nearest":
            return found[:count]
        inner = islice((one for one in found if sides_touched(one.decode()) <= 1), count)
        chosen = list(inner) or [min(found, key=lambda one: sides_touched(one.decode()))]
        return [largest_island(one) for one in chosen] if choice == "compact" else chosen

    def _borrowed(
        self, method: MaskingMethod, key: str, own: list[Segment], rng: np.random.Generator
    ) -> list[Segment]:
        """All segments of another image, or of some the one whose coverage is closest."""
        others: list[str] = []
        while not others:
            drawn = rng.integers(len(self.donors), size=CANDIDATES).tolist()
            keys = [segment_key(self.donors[index].decode()) for index in drawn]
            others = [other for other in keys if other != key]
        if method.all_segments:
            return self._segments(method, others[0], rng)
        wanted = own[0].coverage_percent
        lent = [segment for other in others for segment in self._nearest(other, wanted)]
        return [min(lent, key=lambda segment: abs(segment.coverage_percent - wanted))]


# --- Shapes that know nothing of objects, by (own segment, pixels, crop, side, random numbers) ---
# What is drawn depends on the image and its segment alone: a crop shows the part of it that it
# shows of the image, with as many pixels as are left of the segment.


def blob(own: Segment, count: int, crop: Crop, side: int, rng: np.random.Generator) -> np.ndarray:
    """[side, side] uint8 with exactly `count` pixels inside: the highest places of smooth noise.

    Its hills are about as wide as the square of the segment's area, so that there are few islands.
    """
    longer = max(own.height, own.width)
    width = max(_area(own) ** 0.5, longer / MOST_HILLS)
    hills = [math.ceil(length / width) + 3 for length in (own.height, own.width)]
    heights = torch.from_numpy(rng.standard_normal(hills, dtype=np.float32))
    # The hills stand in rows and columns, from one beyond the image to the other side: each spreads
    # as a Gaussian, which is the product of one along the rows and one along the columns.
    spread = [
        torch.from_numpy((places / width - np.arange(-1, number - 1)[:, None]) / SOFTNESS)
        .square().div(-2).exp().float()
        for places, number in zip(_places(crop, side), hills, strict=True)
    ]  # fmt: skip
    noise = (spread[0].T @ heights @ spread[1]).numpy()
    depth = (noise * -1000).astype(np.int16).ravel()  # numpy orders these four times as fast
    inside = np.zeros(side * side, np.uint8)
    inside[np.argpartition(depth, min(count, side * side - 1))[:count]] = 1
    return inside.reshape(side, side)


def block(own: Segment, count: int, crop: Crop, side: int, rng: np.random.Generator) -> np.ndarray:
    """[side, side] uint8 with exactly `count` pixels inside: a box, its last row cut short.

    It lies around the same place of the image, or as near to it as the crop reaches.
    """
    in_aspect, in_rows, in_columns = rng.random(3).tolist()
    aspect, area = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** in_aspect, _area(own)
    rows, columns = min(own.height, (area / aspect) ** 0.5), min(own.width, (area * aspect) ** 0.5)
    middle = (
        rows / 2 + in_rows * (own.height - rows),
        columns / 2 + in_columns * (own.width - columns),
    )
    # From here on in pixels of the crop, which a resize may have stretched.
    in_crop = aspect * crop.height / crop.width
    width = min(side, max(1, -(-count // side), round((count * in_crop) ** 0.5)))
    height = -(-count // width)
    row, column = (
        (place - start) * side / length - size / 2
        for place, start, length, size in zip(
            middle, (crop.top, crop.left), (crop.height, crop.width), (height, width), strict=True
        )
    )
    top, left = min(max(0, round(row)), side - height), min(max(0, round(column)), side - width)
    inside = np.zeros((side, side), np.uint8)
    box = np.arange(height * width).reshape(height, width) < count
    inside[top : top + height, left : left + width] = box
    return inside


def _in_pixels_of(own: Segment, image: CroppedImage) -> Crop:
    """The crop of an image in pixels of its segments, which were made before it was shrunk."""
    if (own.height, own.width) == (image.height, image.width):
        return image.crop
    crop, rows, columns = image.crop, own.height / image.height, own.width / image.width
    return replace(
        crop, top=round(crop.top * rows), height=max(1, round(crop.height * rows)),
        left=round(crop.left * columns), width=max(1, round(crop.width * columns)),
    )  # fmt: skip


def _area(own: Segment) -> float:
    """Pixels of the image."""
    return own.coverage_percent / 100 * own.height * own.width


def _places(crop: Crop, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [side] of the image in the middle of each pixel of a crop, not mirrored."""
    middles = (np.arange(side) + 0.5) / side
    return crop.top + middles * crop.height, crop.left + middles * crop.width


Shape = Callable[[Segment, int, Crop, int, np.random.Generator], np.ndarray]
SHAPES: dict[str, Shape] = {"blob": blob, "block": block}
