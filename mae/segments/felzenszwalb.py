"""Segments without a network: graph-based segmentation at several scales.

Felzenszwalb and Huttenlocher, Efficient Graph-Based Image Segmentation, IJCV 2004. A larger scale
gives larger regions; the regions of all scales together stand in for Segment Anything's.
"""

from __future__ import annotations

import numpy as np
from PIL import Image
from pycocotools import mask as coco_rle
from skimage.segmentation import felzenszwalb

from mae.segments.segment import Segment, ordered, segment_from_pixels
from mae.segments.settings import FelzenszwalbSettings, as_stored


class Felzenszwalb:
    """Makes segments by regions of similar colour."""

    name = "felzenszwalb"
    batch_size = 1
    in_processes = True

    def __init__(self, options: FelzenszwalbSettings) -> None:
        self.options = options
        self.settings = as_stored(self.name, options)

    def segments(self, images: list[np.ndarray]) -> list[list[Segment]]:
        """Segments of each image [H, W, 3] uint8, the smallest first."""
        return [self._segments(image) for image in images]

    def _segments(self, image: np.ndarray) -> list[Segment]:
        options, (height, width) = self.options, image.shape[:2]
        shrink = min(1.0, options.longest_side / max(height, width))
        small_size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        small = np.asarray(Image.fromarray(image).resize(small_size, Image.Resampling.BOX))
        min_pixels = max(1, round(options.min_coverage / 100 * small.shape[0] * small.shape[1]))
        found: list[Segment] = []
        for scale in options.scales:
            regions = felzenszwalb(small, scale=scale, sigma=options.sigma, min_size=min_pixels)
            labels = Image.fromarray(regions.astype(np.int32), mode="I")
            full = np.asarray(labels.resize((width, height), Image.Resampling.NEAREST))
            found += [
                segment
                for label in range(int(full.max()) + 1)
                if options.min_coverage
                <= (segment := segment_from_pixels(full == label)).coverage_percent
                <= options.max_coverage
            ]
        return ordered(self._distinct(found))

    def _distinct(self, segments: list[Segment]) -> list[Segment]:
        """Without near copies of an earlier one."""
        codes = [{"size": [s.height, s.width], "counts": s.counts} for s in segments]
        overlaps = np.asarray(coco_rle.iou(codes, codes, [0] * len(codes)))
        kept: list[int] = []
        for index in range(len(segments)):
            if not kept or overlaps[index, kept].max() <= self.options.duplicate_iou:
                kept.append(index)
        return [segments[index] for index in kept]
