"""Segments without a network: graph-based segmentation at several scales.

Felzenszwalb and Huttenlocher, Efficient Graph-Based Image Segmentation, IJCV 2004. A larger scale
gives larger regions; the regions of all scales together stand in for Segment Anything's.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations

import numpy as np
from PIL import Image
from skimage.segmentation import felzenszwalb

from segments.config import FelzenszwalbSettings, as_stored
from segments.generate import InputImage
from segments.segment import Segment, ordered, segment_from_flips


class Felzenszwalb:
    """Makes segments by regions of similar colour."""

    name = "felzenszwalb"
    batch_size = 1
    in_processes = True  # pure CPU work that holds the interpreter's lock

    def __init__(self, options: FelzenszwalbSettings) -> None:
        self.options = options
        self.read_side = options.longest_side
        self.tally: Counter[str] = Counter()
        self.settings = as_stored(self.name, options)

    def segments(self, images: Sequence[InputImage]) -> list[list[Segment]]:
        """Segments of each image, the smallest first."""
        return [self._segments(image) for image in images]

    def _segments(self, given: InputImage) -> list[Segment]:
        options, size = self.options, (given.width, given.height)
        shrink = min(1.0, options.longest_side / max(size))
        small_size = (max(1, round(size[0] * shrink)), max(1, round(size[1] * shrink)))
        image = Image.fromarray(given.pixels)
        # The time grows with the pixels; regions worth hiding survive the shrinking.
        small = np.asarray(image.resize(small_size, Image.Resampling.BOX))  # [h, w, 3]
        min_pixels = max(1, round(options.min_coverage / 100 * small.shape[0] * small.shape[1]))
        regions, count = [], 0  # [h, w] of every scale, numbered through
        for scale in options.scales:
            found = felzenszwalb(small, scale=scale, sigma=options.sigma, min_size=min_pixels)
            regions.append((found + count).astype(np.int32))
            count = int(regions[-1].max()) + 1
        # Back to the image's size, where coverage is counted; mode I, as there are over 255.
        labels = [
            np.asarray(Image.fromarray(each, mode="I").resize(size, Image.Resampling.NEAREST))
            for each in regions
        ]
        areas = np.sum([np.bincount(each.ravel(), minlength=count) for each in labels], axis=0)
        percent = areas * 100 / (size[0] * size[1])
        chosen = self._distinct(regions, percent)
        # Computed all the same: only what is stored becomes less.
        if given.ratios and chosen:
            distances = [np.abs(percent[chosen] - ratio) for ratio in given.ratios]
            chosen = [chosen[each.argmin()] for each in distances]
        return ordered(_segments_of(labels, set(chosen)))

    def _distinct(self, regions: list[np.ndarray], percent: np.ndarray) -> list[int]:
        """Regions [R] of allowed size, without near copies of an earlier one; by coverage."""
        options, count = self.options, len(percent)
        sizes = np.bincount(np.concatenate([each.ravel() for each in regions]), minlength=count)
        # Pixels that two regions share, [R, R], counted at the small size.
        pairs = np.zeros(count * count)
        for one, other in combinations(regions, 2):
            both = one.ravel().astype(np.int64) * count + other.ravel()
            pairs += np.bincount(both, minlength=count * count)
        common = pairs.reshape(count, count)
        # IoU above the threshold, without dividing.
        copies = common > options.duplicate_iou * (sizes[:, None] + sizes - common)
        allowed = (options.min_coverage <= percent) & (percent <= options.max_coverage)
        kept: list[int] = []
        for region in np.flatnonzero(allowed).tolist():
            if not copies[kept, region].any():
                kept.append(region)
        return sorted(kept, key=percent.__getitem__)


def _segments_of(labels: list[np.ndarray], chosen: set[int]) -> Iterator[Segment]:
    """The chosen regions of [H, W] each, all of one scale encoded in one pass."""
    for regions in labels:
        columns = regions.T.ravel()  # pixel by pixel down the columns, as COCO counts
        starts = np.append(0, np.flatnonzero(columns[1:] != columns[:-1]) + 1)
        # [runs, 2]: where each run of one region begins and ends.
        flips = np.stack([starts, np.append(starts[1:], len(columns))], axis=1)
        region = columns[starts]
        by_region = region.argsort(kind="stable")  # within a region the runs stay in order
        ends = np.flatnonzero(np.diff(region[by_region])) + 1
        for runs in np.split(by_region, ends):
            if int(region[runs[0]]) in chosen:
                yield segment_from_flips(flips[runs].ravel(), *regions.shape)
