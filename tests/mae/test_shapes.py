"""The shapes of controls that know nothing of objects: counts, places, and what a crop shows of them."""

import itertools

import numpy as np
import pytest

from mae.controls import SHAPES
from mae.crops import Crop
from segments.segment import count_islands, segment_from_pixels


def whole(height, width):
    """A crop of everything."""
    return Crop(top=0, left=0, height=height, width=width)


def a_segment(height, width, share):
    """Of an image of this size, as much of it as `share`; where does not matter."""
    inside = np.zeros((height, width), np.uint8)
    inside.reshape(-1)[: round(share * height * width)] = 1
    return segment_from_pixels(inside)


@pytest.mark.parametrize("shape", SHAPES.values())
@pytest.mark.parametrize("side", [12, 16])
def test_a_shape_has_exactly_the_pixels_that_are_asked_for(shape, side):
    rng, crop = np.random.default_rng(0), Crop(top=5, left=20, height=30, width=40)
    own = a_segment(60, 80, 0.2)
    for count in range(side**2 + 1):
        inside = shape(own, count, crop, side, rng)
        assert (inside.shape, inside.dtype, inside.max(initial=0)) == (
            (side, side), np.uint8, min(count, 1),
        )  # fmt: skip
        assert inside.sum() == count


@pytest.mark.parametrize("share", [0.0005, 0.02, 0.15, 0.5])
def test_a_blob_has_few_islands_and_lies_anywhere(share):
    rng, heat, islands = np.random.default_rng(0), np.zeros((224, 224)), []
    own = a_segment(224, 224, share)
    for _ in range(200):
        inside = SHAPES["blob"](own, round(share * 224**2), whole(224, 224), 224, rng)
        heat += inside
        islands.append(count_islands(inside))
    assert 1 <= np.mean(islands) <= 5
    quarters = heat.reshape(2, 112, 2, 112).sum(axis=(1, 3)) / heat.sum()
    assert 0.18 < quarters.min() <= quarters.max() < 0.32


def boxes_of(own, crop, side, shares, times=200):
    """Drawn blocks as (top, left, height, width); each is a box whose last row may be short."""
    rng, boxes = np.random.default_rng(0), []
    for _ in range(times):
        inside = SHAPES["block"](own, int(rng.uniform(*shares) * side**2), crop, side, rng)
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        box = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box[:-1].all()
        assert np.all(np.diff(box[-1].astype(int)) <= 0)
        boxes.append((rows[0], columns[0], *box.shape))
    return np.array(boxes)


def test_a_block_is_a_box_of_many_shapes_at_any_place_to_all_four_edges():
    boxes = boxes_of(a_segment(224, 224, 0.1), whole(224, 224), 224, (0.1, 0.1))
    aspects = boxes[:, 3] / boxes[:, 2]
    assert 1 / 3.2 < aspects.min() < 0.4
    assert 2.5 < aspects.max() < 3.2
    assert np.median(aspects) == pytest.approx(1, abs=0.25)  # as wide as high, as often as not
    free = 224 - boxes[:, 2:]
    for at in (boxes[:, 0] / free[:, 0], boxes[:, 1] / free[:, 1]):  # uniform from 0 to 1
        assert at.min() < 0.03
        assert at.max() > 0.97
        assert np.histogram(at, 4, (0, 1))[0].min() > 30


class Drawn:
    """Random numbers that are known: how wide, how far down, how far to the right, each 0 to 1."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def random(self, count):
        return np.array(self.numbers[:count])


@pytest.mark.parametrize(("in_aspect", "height", "width"), [(0.0, 36, 12), (0.5, 21, 21), (1.0, 12, 36)])
@pytest.mark.parametrize("at", itertools.product((0.0, 1.0), repeat=2))
def test_a_block_reaches_every_edge_in_every_shape(in_aspect, height, width, at):
    """Of 432 pixels: three times as high as wide to three times as wide as high."""
    own = a_segment(60, 60, 432 / 3600)
    inside = SHAPES["block"](own, 432, whole(60, 60), 60, Drawn(in_aspect, *at))
    rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (height, width)
    assert rows[-1] == 59 if at[0] else rows[0] == 0
    assert columns[-1] == 59 if at[1] else columns[0] == 0


@pytest.mark.parametrize(("top", "left"), [(0, 4), (10, 20), (5, 15)])
def test_a_block_stays_at_its_place_of_the_image_whatever_the_crop(top, left):
    own, middle = a_segment(60, 60, 400 / 3600), (0.5, 0.4, 0.6)
    everything = SHAPES["block"](own, 400, whole(60, 60), 60, Drawn(*middle))
    crop = Crop(top=top, left=left, height=40, width=40)
    part = everything[top : top + 40, left : left + 40]
    assert part.sum() == 400  # it shows all of it
    assert np.array_equal(SHAPES["block"](own, 400, crop, 40, Drawn(*middle)), part)


def test_a_block_is_as_much_wider_as_its_crop_is_stretched():
    own, crop = a_segment(200, 200, 0.1), Crop(top=0, left=0, height=200, width=100)
    stretched = boxes_of(own, crop, 64, (0.1, 0.1))
    assert np.median(stretched[:, 3] / stretched[:, 2]) == pytest.approx(2, rel=0.3)


def test_crops_show_parts_of_one_field_of_noise():
    """Both are all that is higher than some height, so one is a part of the other."""
    own, sets = a_segment(120, 160, 0.15), {}
    for top, left, side, count in ((0, 0, 120, 2000), (0, 40, 120, 3000), (30, 50, 64, 700)):
        crop = Crop(top=top, left=left, height=side, width=side)
        inside = SHAPES["blob"](own, count, crop, side, np.random.default_rng(3))
        everywhere = np.full((120, 160), -1)
        everywhere[top : top + side, left : left + side] = inside
        sets[top, left] = everywhere
    for one, other in itertools.combinations(sets.values(), 2):
        both = (one >= 0) & (other >= 0)
        mine, theirs = one[both] == 1, other[both] == 1
        assert mine.any() and theirs.any()
        outside = min((mine & ~theirs).sum(), (theirs & ~mine).sum())
        assert outside <= 0.01 * both.sum()  # heights that are equal when rounded
