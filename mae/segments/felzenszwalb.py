"""Segments without a network: graph-based segmentation at several scales.

Felzenszwalb and Huttenlocher, Efficient Graph-Based Image Segmentation, IJCV 2004. A larger scale
gives larger regions; the regions of all scales together stand in for Segment Anything's.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_rle

from mae.segments.segment import Segment, segment_from_pixels, verify_all


@dataclass(frozen=True, kw_only=True)
class Felzenszwalb:
    """Makes segments by regions of similar colour.

    scales: preference for large regions, one segmentation each. sigma: width of the smoothing, in
    pixels of the shrunken image. longest_side: images are shrunk to it first, in pixels; the time
    grows with its square. min_coverage, max_coverage: segments outside are dropped, in percent of
    the image. duplicate_iou: of two segments that overlap more, the later is dropped.
    """

    scales: tuple[float, ...] = (100, 300, 1000, 3000)
    sigma: float = 0.8
    longest_side: int = 256
    min_coverage: float = 0.5
    max_coverage: float = 90.0
    duplicate_iou: float = 0.85

    name = "felzenszwalb"
    batch_size = 1
    in_processes = True

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise ValueError(f"--scales {self.scales}: one or more positive numbers are needed")
        if self.longest_side < 16:
            raise ValueError(f"--longest-side {self.longest_side}: at least 16 pixels are needed")
        if not 0 <= self.min_coverage < self.max_coverage <= 100:
            raise ValueError(
                f"--min-coverage {self.min_coverage} has to be below --max-coverage "
                f"{self.max_coverage}, both from 0 to 100"
            )

    @property
    def settings(self) -> dict[str, Any]:
        """What is stored with the segments."""
        return {"generator": self.name, **asdict(self), "scales": list(self.scales)}

    def segments(self, images: list[np.ndarray]) -> list[list[Segment]]:
        """Segments of each image [H, W, 3] uint8, the smallest first."""
        return [self._segments(image) for image in images]

    def _segments(self, image: np.ndarray) -> list[Segment]:
        from PIL import Image
        from skimage.segmentation import felzenszwalb

        height, width = image.shape[:2]
        shrink = min(1.0, self.longest_side / max(height, width))
        small_size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        small = np.asarray(Image.fromarray(image).resize(small_size, Image.Resampling.BOX))
        min_pixels = max(1, round(self.min_coverage / 100 * small.shape[0] * small.shape[1]))
        found: list[Segment] = []
        for scale in self.scales:
            regions = felzenszwalb(small, scale=scale, sigma=self.sigma, min_size=min_pixels)
            labels = Image.fromarray(regions.astype(np.int32), mode="I")
            full = np.asarray(labels.resize((width, height), Image.Resampling.NEAREST))
            found += [
                segment
                for label in range(int(full.max()) + 1)
                if self.min_coverage
                <= (segment := segment_from_pixels(full == label)).coverage_percent
                <= self.max_coverage
            ]
        return verify_all(self._distinct(found))

    def _distinct(self, segments: list[Segment]) -> list[Segment]:
        """Without near copies of an earlier one."""
        if not segments:
            return []
        codes = [{"size": [s.height, s.width], "counts": s.counts} for s in segments]
        overlaps = np.asarray(coco_rle.iou(codes, codes, [0] * len(codes)))
        kept: list[int] = []
        for index in range(len(segments)):
            if not kept or overlaps[index, kept].max() <= self.duplicate_iou:
                kept.append(index)
        return [segments[index] for index in kept]
