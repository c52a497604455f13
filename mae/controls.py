"""Which segments hide an image: its own, or a control for all about them that is not "object".

A difference between a method's own segments and `borrowed` ones is what the content does, as those
have the shapes of objects, too; `blob` and `block` have the area alone.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from mae.config import MethodConfig
from mae.crops import CroppedImage, crop_segment, crop_segments
from mae.masking import MaskingMethod
from segments.segment import Segment
from segments.store import PackedStore, segment_key

CANDIDATES = 4  # images of which the one with the likest segment is borrowed from
ASPECT = (1 / 3, 3.0)  # of a block, width / height


@dataclass(frozen=True, kw_only=True, eq=False)
class SegmentSource:
    """What `MaskingMethod.pattern` gets as segments.

    donors: paths of the training images, as bytes; each has a segment. Two of them at least where
    segments are borrowed, see `mae.listing.check_donors`.
    """

    store: PackedStore
    donors: np.ndarray
    options: MethodConfig

    def cut(
        self, method: MaskingMethod, key: str, image: CroppedImage, rng: np.random.Generator
    ) -> np.ndarray:
        """[H, W] uint8, cut as the image was, or [M, H, W] for a method that takes all segments.

        Raises ValueError if the image has no segment, or those of another size.
        """
        size, side = (image.height, image.width), method.segment_side
        segments = own = self._segments(method, key, self.options.coverage_ratio)
        if (own[0].height, own[0].width) != size:
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
            cut = np.stack([shape(int(np.count_nonzero(inside)), side, rng) for inside in cut])
        return cut if method.all_segments else cut[0]

    def _segments(self, method: MaskingMethod, key: str, coverage_percent: float) -> list[Segment]:
        if method.all_segments:
            segments = self.store.segments(key)
        else:
            nearest = self.store.nearest(key, coverage_percent)
            segments = [nearest] if nearest else []
        if not segments:
            raise ValueError("it has no segment")
        return segments

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
            return self._segments(method, others[0], 0)
        wanted = own[0].coverage_percent
        return min(
            (self._segments(method, other, wanted) for other in others),
            key=lambda segments: abs(segments[0].coverage_percent - wanted),
        )


def blob(count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """[side, side] uint8 with exactly `count` pixels inside: the highest places of smooth noise.

    The noise has hills about as wide as the square of that area, so that there are few islands.
    """
    cells = max(2, min(side // 4, round(side / max(count, 1) ** 0.5)))
    coarse = torch.from_numpy(rng.standard_normal((1, 1, cells, cells), dtype=np.float32))
    # Nothing to antialias, but so torch takes rows and columns in turn: a quarter of the time.
    noise = F.interpolate(coarse, (side, side), mode="bicubic", antialias=True).numpy()
    depth = (noise * -1000).astype(np.int16).ravel()  # numpy orders these four times as fast
    inside = np.zeros(side * side, np.uint8)
    inside[np.argpartition(depth, min(count, side * side - 1))[:count]] = 1
    return inside.reshape(side, side)


def block(count: int, side: int, rng: np.random.Generator) -> np.ndarray:
    """[side, side] uint8 with exactly `count` pixels inside: a box, its last row cut short."""
    in_aspect, in_rows, in_columns = rng.random(3).tolist()
    aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** in_aspect
    width = min(side, max(1, -(-count // side), round((count * aspect) ** 0.5)))
    height = -(-count // width)
    top, left = int(in_rows * (side - height + 1)), int(in_columns * (side - width + 1))
    inside = np.zeros((side, side), np.uint8)
    box = np.arange(height * width).reshape(height, width) < count
    inside[top : top + height, left : left + width] = box
    return inside


SHAPES: dict[str, Callable[[int, int, np.random.Generator], np.ndarray]] = {
    "blob": blob, "block": block,
}  # fmt: skip
