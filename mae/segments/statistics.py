"""What the segments of a dataset are like, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np

from common.progress import Counter
from mae.segments.forms import SegmentSource
from mae.segments.parallel import in_order


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the images that were looked at.

    keys: of images with segments. coverages: of each one's segments, in percent, ascending.
    images, without: numbers of images in the whole source. damaged: what could not be read.
    """

    keys: list[str]
    coverages: list[np.ndarray]
    images: int
    without: list[str]
    damaged: list[str]

    @property
    def segments_per_image(self) -> np.ndarray:
        """Number of segments of each image."""
        return np.array([len(coverage) for coverage in self.coverages])

    def distances(self, ratio: float) -> np.ndarray:
        """How far each image's nearest segment is from a coverage, in percentage points."""
        return np.array([np.abs(coverage - ratio).min() for coverage in self.coverages])


def collect(source: SegmentSource, *, limit: int, processes: int | None) -> Statistics:
    """Read the segments of at most `limit` images, evenly spread."""
    keys = sorted(source.images())
    chosen = [keys[i * len(keys) // limit] for i in range(limit)] if len(keys) > limit else keys
    read: list[str] = []
    coverages, damaged = [], []
    with (
        Counter("read", total=len(chosen)) as counter,
        closing(in_order(partial(_coverages, source), chosen, processes=processes)) as results,
    ):
        for key, found in zip(chosen, results, strict=True):
            counter.advance()
            if isinstance(found, str):
                damaged.append(found)
            elif len(found):
                read.append(key)
                coverages.append(found)
    if not read:
        raise ValueError(f"no image has a readable segment; {len(damaged)} are damaged")
    return Statistics(
        keys=read,
        coverages=coverages,
        images=len(keys),
        without=sorted(source.listed_empty()),
        damaged=damaged,
    )


def describe(statistics: Statistics, ratios: Sequence[float]) -> list[tuple[str, str]]:
    """Lines of a table: what, and how much."""
    numbers = statistics.segments_per_image
    all_coverages = np.concatenate(statistics.coverages)
    lines = [
        ("images with segments", f"{statistics.images} ({len(statistics.keys)} looked at)"),
        ("images known to have none", str(len(statistics.without))),
        ("damaged", str(len(statistics.damaged))),
        ("segments per image", _spread(numbers, "", 0)),
        ("coverage of a segment", _spread(all_coverages, " %", 1)),
    ]
    for ratio in ratios:
        distances = statistics.distances(ratio)
        far = float((distances > 5).mean() * 100)
        lines.append(
            (
                f"nearest to {ratio:g} %",
                f"off by {_spread(distances, ' points', 1)}; by more than 5 points in "
                f"{far:.0f} % of images",
            )
        )
    return lines


def _coverages(source: SegmentSource, key: str) -> np.ndarray | str:
    """Of one image's segments, in percent, ascending; or why they cannot be read."""
    try:
        return np.array([segment.coverage_percent for segment in source.segments(key)])
    except ValueError as error:
        return str(error)


def _spread(values: np.ndarray, unit: str, digits: int) -> str:
    low, middle, high = np.percentile(values, [10, 50, 90])
    return f"median {middle:.{digits}f}{unit} (10-90 %: {low:.{digits}f} to {high:.{digits}f})"
