"""Looking at the segments of a dataset: numbers, and one picture."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from pycocotools import mask as coco_rle

from common.images import read_rgb
from common.progress import Counter
from common.samples import evenly_spread
from segments.forms import SegmentSource
from segments.parallel import in_order
from segments.segment import Segment, nearest

MOST_READ = 2000  # images whose segments are counted
MOST_DRAWN = 8  # images on a contact sheet
WITHIN = (1, 2, 5)  # points from the wanted coverage
SAME_IOU = 0.8
WORST = 5  # images drawn for each ratio
HIDDEN_COLOUR = np.array([235, 30, 140], np.float32)
THUMBNAIL = 240


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the images that were looked at.

    coverages: in percent, ascending, of the segments of each image that has some, by its key.
    images, without: in the whole source, those with segments and those known to have none.
    damaged: what could not be read, and why.
    """

    coverages: dict[str, np.ndarray]
    images: int
    without: int
    damaged: list[str]

    @property
    def segments_per_image(self) -> np.ndarray:
        """Number of segments of each image."""
        return np.array([len(coverage) for coverage in self.coverages.values()])

    def distances(self, ratio: float) -> np.ndarray:
        """How far each image's nearest segment is from a coverage, in percentage points."""
        return np.array([np.abs(coverage - ratio).min() for coverage in self.coverages.values()])


def collect(source: SegmentSource, *, processes: int | None) -> Statistics:
    """Read the segments of at most `MOST_READ` images. Raises ValueError if there are none."""
    keys = sorted(source.images())
    chosen = evenly_spread(keys, MOST_READ)
    coverages: dict[str, np.ndarray] = {}
    damaged = []
    with (
        Counter("read", total=len(chosen)) as counter,
        closing(in_order(partial(_coverages, source), chosen, processes=processes)) as results,
    ):
        for key, found in zip(chosen, results, strict=True):
            counter.advance()
            if isinstance(found, str):
                damaged.append(found)
            elif len(found):
                coverages[key] = found
    if not coverages:
        raise ValueError(f"no image has a readable segment; {len(damaged)} are damaged")
    return Statistics(
        coverages=coverages,
        images=len(keys),
        without=len(source.listed_empty()),
        damaged=damaged,
    )


def _coverages(source: SegmentSource, key: str) -> np.ndarray | str:
    """Of one image's segments, in percent, ascending; or why they cannot be read."""
    try:
        return np.array([segment.coverage_percent for segment in source.segments(key)])
    except ValueError as error:
        return str(error)


def describe(statistics: Statistics, ratios: Sequence[float]) -> dict[str, str]:
    """What, and how much."""
    coverages = statistics.coverages
    lines = {
        "images with segments": f"{statistics.images} ({len(coverages)} looked at)",
        "images known to have none": str(statistics.without),
        "damaged": "; ".join([str(len(statistics.damaged)), *statistics.damaged[:1]]),
        "segments per image": _spread(statistics.segments_per_image, "", 0),
        "coverage of a segment": _spread(np.concatenate([*coverages.values()]), " %", 1),
    }
    for ratio in ratios:
        distances = statistics.distances(ratio)
        within = ", ".join(f"{(distances <= w).mean() * 100:.0f} % within {w}" for w in WITHIN)
        lines[f"nearest to {ratio:g} %"] = (
            f"off by {_spread(distances, ' points', 1)}; of images, {within}"
        )
    return lines


def compare(source: SegmentSource, other: SegmentSource, ratios: Sequence[float]) -> dict[str, str]:
    """For how many images two stores choose the same segment. Raises ValueError if none is in both.

    At most `MOST_READ` images are looked at; the same is an overlap (IoU) of at least `SAME_IOU`.
    """
    keys = evenly_spread(sorted(source.images() & other.images()), MOST_READ)
    if not keys:
        raise ValueError("no image has segments in both; were both made of the same images?")
    lines = {}
    for ratio in ratios:
        overlaps = np.array([_overlap(source, other, key, ratio) for key in keys])
        lines[f"chosen for {ratio:g} %"] = (
            f"the same in {(overlaps >= SAME_IOU).mean() * 100:.0f} % of {len(keys)} images (IoU "
            f"at least {SAME_IOU:g}); IoU {_spread(overlaps, '', 2)}"
        )
    return lines


def _overlap(source: SegmentSource, other: SegmentSource, key: str, ratio: float) -> float:
    """Intersection over union of the segments chosen; 0 if they are of different sizes."""
    chosen = [nearest(each.segments(key), ratio) for each in (source, other)]
    codes = [{"size": [s.height, s.width], "counts": s.counts} for s in chosen if s]
    if len(codes) < 2 or codes[0]["size"] != codes[1]["size"]:
        return 0.0
    return float(coco_rle.iou(codes[:1], codes[1:], [0])[0, 0])


def _spread(values: np.ndarray, unit: str, digits: int) -> str:
    low, middle, high = np.percentile(values, [10, 50, 90])
    return f"median {middle:.{digits}f}{unit} (10-90 %: {low:.{digits}f} to {high:.{digits}f})"


def draw(
    statistics: Statistics,
    source: SegmentSource,
    images: dict[str, Path],
    ratios: Sequence[float],
    title: str,
) -> Figure:
    """Three charts above contact sheets: what each coverage would hide of some images, and of those
    whose nearest segment is farthest from it.

    images: the files by key, perhaps not all.
    """
    known = [key for key in statistics.coverages if key in images]
    shown = evenly_spread(known, MOST_DRAWN)
    columns, charts_height, row_height = max(1 + len(ratios), WORST), 3.8, 2.05
    heights = [charts_height]
    if shown:
        heights += [row_height * len(shown) + 0.6, row_height * len(ratios) + 0.6]
    figure = Figure(figsize=(max(12.0, 2.4 * columns), sum(heights) + 0.9), layout="constrained")
    figure.suptitle(title, fontsize=14)
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    _draw_charts(parts[0].subplots(1, 3), statistics, ratios)
    if shown:
        parts[1].suptitle("What --hide segment hides (pink) at each --coverage-ratio", fontsize=12)
        rows = parts[1].subplots(len(shown), 1 + len(ratios), squeeze=False)
        for row, key in zip(rows, shown, strict=True):
            _draw_row(row, source, key, images[key], ratios)
        parts[2].suptitle("The images that are farthest from each --coverage-ratio", fontsize=12)
        rows = parts[2].subplots(len(ratios), WORST, squeeze=False)
        for row, ratio in zip(rows, ratios, strict=True):
            _draw_worst(row, statistics, source, {key: images[key] for key in known}, ratio)
    return figure


def _draw_worst(
    row: Any,
    statistics: Statistics,
    source: SegmentSource,
    images: dict[str, Path],
    ratio: float,
) -> None:
    distances = dict(zip(statistics.coverages, statistics.distances(ratio).tolist(), strict=True))
    farthest = sorted(images, key=distances.__getitem__, reverse=True)[: len(row)]
    for axes in row:
        axes.set_axis_off()
    for axes, key in zip(row, farthest, strict=False):
        try:
            _draw_hidden(axes, read_rgb(images[key]), nearest(source.segments(key), ratio), ratio)
        except ValueError as error:
            axes.set_title(f"unreadable: {error}", fontsize=8)


def _draw_charts(charts: Any, statistics: Statistics, ratios: Sequence[float]) -> None:
    numbers, coverages, distances = charts
    counted = statistics.segments_per_image
    step = counted.max() // 30 + 1
    numbers.hist(counted, bins=np.arange(0.5, counted.max() + step + 1, step))
    numbers.set(xlabel="segments of an image", ylabel="images", xlim=(0, counted.max() + step))
    numbers.set_title(f"{statistics.without} more images are known to have none", fontsize=10)
    coverages.hist(np.concatenate([*statistics.coverages.values()]), bins=np.arange(0, 101, 2))
    coverages.set(xlabel="coverage, % of the image", ylabel="segments", yscale="log", xlim=(0, 100))
    coverages.set_title("dashed: the coverage ratios asked for", fontsize=10)
    share = np.linspace(0, 100, len(statistics.coverages) + 1)[1:]
    for number, ratio in enumerate(ratios, 1):
        colour = f"C{number}"  # of matplotlib's cycle
        coverages.axvline(ratio, color=colour, linestyle="--", linewidth=1.5)
        nearest_first = np.sort(statistics.distances(ratio))
        distances.plot(nearest_first, share, color=colour, label=f"{ratio:g} %", linewidth=2)
    distances.set(
        xlabel="distance to the nearest segment, points",
        ylabel="% of images within it",
        xlim=(0, 30),
        ylim=(0, 101),
    )
    distances.grid(alpha=0.3)
    distances.legend(title="coverage ratio", fontsize=9)


def _draw_row(
    row: Any, source: SegmentSource, key: str, path: Path, ratios: Sequence[float]
) -> None:
    for axes in row:
        axes.set_axis_off()
    try:
        image = read_rgb(path)
        segments = source.segments(key)
    except ValueError as error:
        row[0].set_title(f"unreadable: {error}", fontsize=8)
        return
    row[0].imshow(_thumbnail(image))
    row[0].set_title(path.name, fontsize=8)
    for axes, ratio in zip(row[1:], ratios, strict=True):
        _draw_hidden(axes, image, nearest(segments, ratio), ratio)


def _draw_hidden(axes: Any, image: np.ndarray, segment: Segment | None, ratio: float) -> None:
    if segment is None or (segment.height, segment.width) != image.shape[:2]:
        axes.set_title(f"{ratio:g} %: does not fit the image", fontsize=8, color="red")
        return
    axes.imshow(_thumbnail(_hide(image, segment)))
    axes.set_title(f"{ratio:g} % asked: {segment.coverage_percent:.1f} % hidden", fontsize=8)


def _hide(image: np.ndarray, segment: Segment) -> np.ndarray:
    """Tint the segment; what it hides can still be guessed."""
    inside = segment.decode()[..., None].astype(np.float32)
    return (image * (1 - 0.75 * inside) + HIDDEN_COLOUR * 0.75 * inside).astype(np.uint8)


def _thumbnail(image: np.ndarray) -> np.ndarray:
    step = max(1, max(image.shape) // THUMBNAIL)
    return image[::step, ::step]
