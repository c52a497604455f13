"""Segments without a network: graph-based segmentation at several scales.

Felzenszwalb and Huttenlocher, Efficient Graph-Based Image Segmentation, IJCV 2004. A larger scale
gives larger regions; the regions of all scales together stand in for Segment Anything's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from PIL import Image
from pycocotools import mask as coco_rle
from skimage.segmentation import felzenszwalb

from mae.segments.generate import Photograph
from mae.segments.segment import Segment, nearest, ordered, segment_from_flips
from mae.segments.settings import FelzenszwalbSettings, as_stored


class Felzenszwalb:
    """Makes segments by regions of similar colour."""

    name = "felzenszwalb"
    batch_size = 1
    in_processes = True

    def __init__(self, options: FelzenszwalbSettings) -> None:
        self.options = options
        self.read_side = options.longest_side
        self.tally: Counter[str] = Counter()
        self.settings = as_stored(self.name, options)

    def segments(self, photographs: Sequence[Photograph]) -> list[list[Segment]]:
        """Segments of each photograph, the smallest first."""
        return [self._segments(photograph) for photograph in photographs]

    def _segments(self, photograph: Photograph) -> list[Segment]:
        options, size = self.options, (photograph.width, photograph.height)
        shrink = min(1.0, options.longest_side / max(size))
        small_size = (max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink)))
        image = Image.fromarray(photograph.pixels)
        small = np.asarray(image.resize(small_size, Image.Resampling.BOX))
        min_pixels = max(1, round(options.min_coverage / 100 * small.shape[0] * small.shape[1]))
        found: list[Segment] = []
        for scale in options.scales:
            regions = felzenszwalb(small, scale=scale, sigma=options.sigma, min_size=min_pixels)
            labels = Image.fromarray(regions.astype(np.int32), mode="I")
            found += [
                segment
                for segment in _segments_of(
                    np.asarray(labels.resize(size, Image.Resampling.NEAREST))
                )
                if options.min_coverage <= segment.coverage_percent <= options.max_coverage
            ]
        distinct = self._distinct(found)
        if photograph.ratios:
            chosen = {nearest(distinct, ratio) for ratio in photograph.ratios}
            distinct = [segment for segment in distinct if segment in chosen]
        return ordered(distinct)

    def _distinct(self, segments: list[Segment]) -> list[Segment]:
        """Without near copies of an earlier one."""
        codes = [{"size": [s.height, s.width], "counts": s.counts} for s in segments]
        overlaps = np.asarray(coco_rle.iou(codes, codes, [0] * len(codes)))
        kept: list[int] = []
        for index in range(len(segments)):
            if not kept or overlaps[index, kept].max() <= self.options.duplicate_iou:
                kept.append(index)
        return [segments[index] for index in kept]


def _segments_of(labels: np.ndarray) -> list[Segment]:
    """One segment for each number in [H, W], all encoded in one pass."""
    columns = labels.T.ravel()  # pixel by pixel down the columns, as COCO counts
    starts = np.append(0, np.flatnonzero(columns[1:] != columns[:-1]) + 1)
    flips = np.stack([starts, np.append(starts[1:], len(columns))], axis=1)
    label = columns[starts]
    by_label = label.argsort(kind="stable")
    ends = np.flatnonzero(np.diff(label[by_label])) + 1
    height, width = labels.shape
    return [
        segment_from_flips(flips[runs].ravel(), height, width) for runs in np.split(by_label, ends)
    ]
