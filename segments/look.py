"""Looking at the segments of a dataset: numbers, and one picture."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from pycocotools import mask as coco_rle

from common.contact_sheet import Tile, contact_sheet, stacked
from common.images import ImagePath, evenly_spread, read_rgb
from common.parallel import Failure, each, in_order, one_pass
from segments.forms import AnyForm
from segments.segment import Segment, count_islands, decode_at, nearest, sides_touched

MOST_READ = 2000  # images whose segments are counted
MOST_DRAWN = 8  # images on a contact sheet
WITHIN = (1, 2, 5)  # points from the wanted coverage
SAME_IOU = 0.8
WORST = 5  # images drawn for each ratio
HIDDEN_COLOUR = np.array([235, 30, 140], np.float32)
TILE_WIDTH = 240  # pixels
UNREADABLE = np.full((3, 4, 3), 200, np.uint8)  # the tile of an image that cannot be drawn


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """Of the images that were looked at."""

    coverages: dict[str, np.ndarray]  # percent, ascending, of the segments of each that has some
    # [images, 2] by ratio: sides of the image that the nearest segment touches, and its islands.
    shapes: dict[float, np.ndarray]
    images: int  # in the whole source, those with segments,
    without: int  # and those known to have none
    damaged: list[str]  # what could not be read, and why

    def distances(self, ratio: float) -> np.ndarray:
        """How far each image's nearest segment is from a coverage, in percentage points."""
        return np.array([np.abs(coverage - ratio).min() for coverage in self.coverages.values()])


def collect(source: AnyForm, ratios: Sequence[float] = (), *, processes: int | None) -> Statistics | None:
    """Of at most `MOST_READ` images; None: a signal asked to stop. ValueError if there are none."""
    images = source.images()
    chosen = evenly_spread(sorted(images), MOST_READ)

    def read(key: str) -> tuple[np.ndarray, list[tuple[int, int]]]:
        segments = source.segments(key)
        hidden = [one.decode() for ratio in ratios if (one := nearest(segments, ratio))]
        shapes = [(sides_touched(inside), count_islands(inside)) for inside in hidden]
        return np.array([segment.coverage_percent for segment in segments]), shapes

    found = list(one_pass("inspect", each(read, chosen, processes=processes), total=len(chosen)))
    if len(found) < len(chosen):
        return None  # numbers of a part would look like those of all
    damaged = [f"{one.key}: {one.reason}" for one in found if isinstance(one, Failure)]
    pairs = zip(chosen, found, strict=True)
    usable = {key: one for key, one in pairs if not isinstance(one, Failure) and len(one[0])}
    coverages = {key: one for key, (one, _) in usable.items()}
    shapes = {r: np.array([of[n] for _, of in usable.values()]) for n, r in enumerate(ratios)}
    if not coverages:
        why = f": {damaged[0]}" if damaged else ""
        raise ValueError(f"no image has a readable segment; {len(damaged)} are damaged{why}")
    without = len(source.listed_empty())
    return Statistics(
        coverages=coverages, shapes=shapes, images=len(images), without=without, damaged=damaged
    )


def describe(statistics: Statistics, ratios: Sequence[float]) -> dict[str, str]:
    """What, and how much."""
    coverages, damaged = statistics.coverages, statistics.damaged
    lines = {
        "images with segments": f"{statistics.images} ({len(coverages)} looked at)",
        "images known to have none": str(statistics.without),
        "damaged": "; ".join([str(len(damaged)), *damaged[:1]]),
        "segments per image": _spread([*map(len, coverages.values())], "", 0),
        "coverage of a segment": _spread(np.concatenate([*coverages.values()]), " %", 1),
    }
    for ratio in ratios:
        distances = statistics.distances(ratio)
        within = ", ".join(f"{(distances <= w).mean() * 100:.0f} % within {w}" for w in WITHIN)
        spread = _spread(distances, " points", 1)
        lines[f"nearest to {ratio:g} %"] = f"off by {spread}; of images, {within}"
        if ratio in statistics.shapes:
            sides, islands = statistics.shapes[ratio].T
            lines[f"shape of that near {ratio:g} %"] = (
                f"touches an edge of the image in {(sides > 0).mean() * 100:.0f} %, two or more in "
                f"{(sides > 1).mean() * 100:.0f} %; islands: {_spread(islands, '', 0)}"
            )
    return lines


def compare(
    source: AnyForm, other: AnyForm, ratios: Sequence[float], *, processes: int | None
) -> dict[str, str]:
    """For how many images two stores choose the same segment. Raises ValueError if none is in both.

    At most `MOST_READ` images are looked at; the same is an overlap (IoU) of at least `SAME_IOU`.
    """
    keys = evenly_spread(sorted(source.images() & other.images()), MOST_READ)
    if not keys:
        raise ValueError("no image has segments in both; were both made of the same images?")

    def overlaps_of(key: str) -> list[float]:
        both = source.segments(key), other.segments(key)
        return [_overlap(*(nearest(segments, ratio) for segments in both)) for ratio in ratios]

    every = np.array(list(in_order(overlaps_of, keys, processes=processes)))  # [images, ratios]
    return {
        f"chosen for {ratio:g} %": (
            f"the same in {(overlaps >= SAME_IOU).mean() * 100:.0f} % of {len(keys)} images (IoU "
            f"at least {SAME_IOU:g}); IoU {_spread(overlaps, '', 2)}"
        )
        for ratio, overlaps in zip(ratios, every.T, strict=True)
    }


def _overlap(one: Segment | None, other: Segment | None) -> float:
    """Intersection over union; 0 if there is none, or sizes differ."""
    if not one or not other or (one.height, one.width) != (other.height, other.width):
        return 0.0
    ours, theirs = ([{"size": [s.height, s.width], "counts": s.counts}] for s in (one, other))
    return float(coco_rle.iou(ours, theirs, [0])[0, 0])


def _spread(values: np.ndarray | list[int], unit: str, digits: int) -> str:
    # A mean would say little: coverages are far from symmetric.
    low, middle, high = np.percentile(values, [10, 50, 90])
    return f"median {middle:.{digits}f}{unit} (10-90 %: {low:.{digits}f} to {high:.{digits}f})"


def draw(
    statistics: Statistics, source: AnyForm, images: Mapping[str, ImagePath], ratios: Sequence[float]
) -> Image.Image:
    """Contact sheets: what each coverage would hide of some images, and of those whose nearest
    segment is farthest from it.

    images: the files by key, of images that were looked at.
    """

    def tiles(keys: Sequence[str], shown: Sequence[float | None]) -> list[Tile]:
        return [tile for key in keys for tile in _tiles(source, key, images[key], shown)]

    spread = [tiles([key], [None, *ratios]) for key in evenly_spread([*images], MOST_DRAWN)]
    worst = [tiles(farthest(statistics, [*images], ratio), [ratio]) for ratio in ratios]
    parts, width = [], max(1 + len(ratios), WORST) * TILE_WIDTH
    for text, rows in (
        ("What --hide segment hides at each --coverage-ratio, asked: found", spread),
        ("The images that are farthest from each --coverage-ratio", worst),
    ):
        parts.append(contact_sheet([], titles=[text], tile_width=width))
        parts.append(contact_sheet(rows, tile_width=TILE_WIDTH))
    return stacked(parts)


def farthest(statistics: Statistics, keys: Sequence[str], ratio: float) -> list[str]:
    """Of these images, those that come least near to a coverage, the worst first."""
    distances = dict(zip(statistics.coverages, statistics.distances(ratio).tolist(), strict=True))
    return sorted(keys, key=distances.__getitem__, reverse=True)[:WORST]


def _tiles(source: AnyForm, key: str, path: ImagePath, ratios: Sequence[float | None]) -> list[Tile]:
    """The image with what is hidden for each coverage; None: the image as it is."""
    try:
        image, segments = read_rgb(path), source.segments(key)
    except ValueError as error:
        return [(UNREADABLE, f"unreadable: {error}")]
    tiles: list[Tile] = []
    for ratio in ratios:
        segment = None if ratio is None else nearest(segments, ratio)
        if segment is None:
            tiles.append((image, path.name))
        elif not segment.fits(*image.shape[:2]):
            tiles.append((image, f"{ratio:g}: does not fit"))
        else:
            # Tinted, so that what is hidden can still be guessed.
            rows, columns = (
                np.arange(length) * whole // length
                for length, whole in zip(image.shape, (segment.height, segment.width), strict=False)
            )
            inside = decode_at([segment], rows, columns)[0]  # of the image's size, which may be shrunk
            tint = 0.75 * inside[..., None].astype(np.float32)  # [H, W, 1]
            hidden = (image * (1 - tint) + HIDDEN_COLOUR * tint).astype(np.uint8)
            tiles.append((hidden, f"{ratio:g}: {segment.coverage_percent:.1f} %"))
    return tiles
