"""Which of Segment Anything's candidates become the segments of an image, and when to stop looking.

Either all segments are wanted, or for each of some coverage ratios the nearest one. In the second
case the search ends when each ratio has a segment within the tolerance, and a candidate that cannot
be nearer than what was found already is dropped as the decoder leaves it, before it is upsampled.
Each ratio searches by itself, so that adding one later chooses what both at once would have.

Shapes: K candidates, h x w pixels of the decoder's masks, H x W of the image.
"""

import zlib
from functools import lru_cache
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import nms

ROUNDING = 1e-3  # points: more than sums of float32 are off


class Candidates(NamedTuple):
    """Masks of one image that are good enough, on the device."""

    logits: Tensor  # [K, h, w] as the decoder left them
    boxes: Tensor  # [K, 4] corners in pixels
    quality: Tensor  # [K] as the model predicts it
    coverage: Tensor  # [K] float64, percent of the image, counted from its pixels

    def take(self, chosen: Tensor) -> Self:
        """Some of them, by number or as a [K] bool."""
        return type(self)(*(values[chosen] for values in self))


def join(parts: list[Candidates]) -> Candidates:
    """Candidates of the same image, one after the other."""
    return Candidates(*(torch.cat(values) for values in zip(*parts, strict=True)))


class Search:
    """For all segments of an image (ratio: None), or for the one nearest to a coverage in percent.

    finished: whether no further point is needed. changed: whether the nearest one had to give way
    to a duplicate of higher quality.
    """

    def __init__(self, ratio: float | None, tolerance: float, overlap: float) -> None:
        self.ratio, self.tolerance, self.overlap = ratio, tolerance, overlap
        self.parts: list[Candidates] = []
        self.chosen: Tensor | None = None  # numbers of the candidates that are segments
        self.distance = float("inf")  # of the nearest so far, in points
        self.finished = self.changed = False

    def possible(self, low: Tensor, high: Tensor) -> Tensor:
        """[K] bool: whether what covers `low` to `high` percent may be as near as the nearest."""
        assert self.ratio is not None
        farther = torch.maximum(low - self.ratio, self.ratio - high)
        return farther <= self.distance + ROUNDING

    def add(self, candidates: Candidates) -> None:
        """Take those that were possible."""
        if not len(candidates.quality):
            return
        self.parts.append(candidates)
        if self.ratio is None:
            return
        # The nearest that is no duplicate, the smaller on a tie: every candidate so far competes.
        self.parts = [found := join(self.parts)]
        kept = nms(found.boxes, found.quality, self.overlap).tolist()
        # Numbers of Python: one copy from the device, and exact comparisons.
        percent = found.coverage.tolist()
        order = [(abs(each - self.ratio), each, number) for number, each in enumerate(percent)]
        nearest = min(order[number] for number in kept)
        self.changed = nearest != min(order)
        self.distance = nearest[0]
        self.chosen = torch.tensor(nearest[2:], device=found.quality.device)
        self.finished = self.distance <= self.tolerance

    def result(self) -> Candidates | None:
        """All distinct segments, or the nearest one; None: there is none."""
        if not self.parts:
            return None
        found = join(self.parts)
        if self.chosen is None:
            return found.take(nms(found.boxes, found.quality, self.overlap))
        return found.take(self.chosen)


def visiting_order(side: int, key: str) -> Tensor:
    """Every point of a grid once, [side * side, 2] of x and y in (0, 1), evenly spread."""
    # A Sobol sequence has a point in each cell of any power of two before it has two in one.
    cells = 1 << (side - 1).bit_length()  # a power of two; points outside the grid are dropped
    sequence = (torch.quasirandom.SobolEngine(2).draw(cells * cells) * cells).long()
    visited = sequence[(sequence < side).all(1)]
    # Turned round the edges by an offset that is the image's own: no place is always first.
    digest = zlib.crc32(key.encode())
    offset = torch.tensor([digest % side, digest // side % side])
    return ((visited + offset) % side + 0.5) / side


def coverage_bounds(logits: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Least and most percent of the image that masks [K, h, w] can cover once upsampled: [K] each.

    weights: see `pixel_weights`. A pixel of the image is interpolated from the neighbours of the
    decoder's pixel below it: if all nine are inside, so is the pixel, and so for outside.
    """
    # The most: whatever has a neighbour inside; the least: whatever has all of them inside.
    inside = (logits > 0).float()
    most = F.max_pool2d(inside, 3, stride=1, padding=1)
    least = 1 - F.max_pool2d(1 - inside, 3, stride=1, padding=1)
    return 100 * (least * weights).sum((1, 2)), 100 * (most * weights).sum((1, 2))


@lru_cache(64)  # images of one size are many
def pixel_weights(size: tuple[int, int], low: tuple[int, int], fills: tuple[float, ...]) -> Tensor:
    """[h, w] float: the share of the image's H x W pixels above each pixel of the decoder's.

    fills: how much of the decoder's rows and columns the image takes up; the rest is padding.
    """
    shares = []  # of the rows, and of the columns
    for pixels, few, share in zip(size, low, fills, strict=True):
        below = ((torch.arange(pixels) + 0.5) / pixels * (few * share)).long()
        shares.append(torch.bincount(below, minlength=few) / pixels)
    return shares[0][:, None] * shares[1]
