"""Controls, held to their definition: as much hidden, by another's segment or no object at all."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from common.images import find_images
from mae.config import MethodConfig, ModelConfig, make_method
from mae.controls import SHAPES, SegmentSource
from mae.crops import Crop, crop_segment, crop_segments, random_crop, read_crop
from mae.data import MaskedImages
from mae.listing import encode_paths, make_listing
from segments.forms import open_segments
from segments.pack import pack
from segments.segment import count_islands, segment_from_pixels
from segments.store import segment_key
from tests.mae.conftest import as_annotation, make_config, pack_segments, write_image, write_segments

DATA = Path(__file__).resolve().parents[3] / "shared/data/imagenet-sample"
MODEL = ModelConfig(model="vit_tiny", image_size=64, patch_size=16)
CONTROLS = ["borrowed", "blob", "block"]


def whole(height, width):
    """A crop of everything."""
    return Crop(top=0, left=0, height=height, width=width)


def open_images(train, store, mask_method="segments", **options):
    options = MethodConfig(mask_method=mask_method, **options)
    with_segment = store.images()
    paths = encode_paths([p for p in find_images(train) if segment_key(p) in with_segment])
    segments = SegmentSource(store=store, donors=paths, options=options, seed=7)
    method = make_method(options, MODEL)
    return MaskedImages(folder=train, paths=paths, segments=segments, method=method, seed=7)


@pytest.fixture(params=["tiny", "photographs"], scope="module")
def real(request, in1k_dir, tmp_path_factory):
    """train/ and the packed segments of the tiny dataset, and of real photographs."""
    if request.param == "tiny":
        return in1k_dir / "train", open_segments(in1k_dir / "masks")
    if not DATA.is_dir():
        pytest.skip("the real images in ../shared/data are missing")
    store = tmp_path_factory.mktemp("packed") / "masks.sqlite"
    pack(DATA / "masks-amg-rle", store, overwrite=False, allow_damaged=False, processes=1)
    return DATA / "train", open_segments(store)


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


def crops(height, width, count=12):
    rng = np.random.default_rng(5)
    return [random_crop(rng, height, width) for _ in range(count)]


def test_crops_show_parts_of_one_field_of_noise(monkeypatch):
    """Both are all that is higher than some height, so one is a part of the other."""
    own, scale = a_segment(120, 160, 0.15), 1
    sets = {}
    for top, left, side, count in ((0, 0, 120, 2000), (0, 40, 120, 3000), (30, 50, 64, 700)):
        crop = Crop(top=top, left=left, height=side, width=side)
        inside = SHAPES["blob"](own, count, crop, side * scale, np.random.default_rng(3))
        everywhere = np.full((120, 160), -1)
        everywhere[top : top + side, left : left + side] = inside
        sets[top, left] = everywhere
    for one, other in itertools.combinations(sets.values(), 2):
        both = (one >= 0) & (other >= 0)
        mine, theirs = one[both] == 1, other[both] == 1
        assert mine.any() and theirs.any()
        outside = min((mine & ~theirs).sum(), (theirs & ~mine).sum())
        assert outside <= 0.01 * both.sum()  # heights that are equal when rounded


@pytest.mark.parametrize("segments_from", ["own", *CONTROLS])
def test_a_fixed_segment_is_the_same_in_every_epoch_and_another_one_with_another_seed(real, segments_from):
    images = open_images(*real, segments_from=segments_from)
    other = replace(images, segments=replace(images.segments, seed=8))
    assert not images.segments.options.nearest_count
    different = 0
    for index in range(len(images)):
        key, view = cropped(images, index, whole)
        cuts = [
            one.segments.cut(images.method, key, view, np.random.default_rng(epoch))
            for epoch, one in enumerate((images, images, other))
        ]
        assert np.array_equal(cuts[0], cuts[1])
        different += not np.array_equal(cuts[0], cuts[2])
    assert different > len(images) / 2 or (segments_from == "own" and not different)


def cropped(images, index, choose_crop):
    """Key, and the image as `cut` gets it."""
    relative = images.paths[index].decode()
    view = read_crop(images.folder / relative, choose_crop, images.method.image_size)
    return segment_key(relative), view


@pytest.mark.parametrize("segments_from", CONTROLS)
def test_a_mirrored_crop_mirrors_what_is_hidden(real, segments_from):
    images = open_images(*real, segments_from=segments_from)
    key, view = cropped(images, 0, lambda h, w: Crop(top=1, left=2, height=h - 3, width=w - 4))
    mirrored = replace(view, crop=replace(view.crop, flip=True))
    straight, other = (
        images.segments.cut(images.method, key, one, np.random.default_rng(0)) for one in (view, mirrored)
    )
    assert np.array_equal(other, straight[:, ::-1])


def test_own_segments_are_drawn_from_those_nearest_to_the_ratio(real):
    _, store = real
    images = open_images(*real, segment_variety="nearest-3")
    for index in range(0, len(images), 9):
        key, view = cropped(images, index, whole)
        by_distance = sorted(store.segments(key), key=lambda s: abs(s.coverage_percent - 15))
        expected = {cut_whole(s, 64).tobytes() for s in by_distance[:3]}
        drawn = {
            images.segments.cut(images.method, key, view, np.random.default_rng(n)).tobytes()
            for n in range(40)
        }
        assert drawn == expected


@pytest.mark.parametrize("segments_from", CONTROLS)
def test_controls_of_nearest_segments_are_drawn_anew_in_every_epoch(real, segments_from):
    own, control = (
        open_images(*real, segments_from=name, segment_variety="nearest-1") for name in ("own", segments_from)
    )
    fixed = open_images(*real)
    key, view = cropped(own, 0, whole)
    patterns = set()
    for epoch in range(12):
        rngs = [np.random.default_rng(epoch) for _ in range(3)]
        alone, drawn, nearest = (
            images.segments.cut(images.method, key, view, rng)
            for images, rng in zip((own, control, fixed), rngs, strict=True)
        )
        assert np.array_equal(alone, nearest)  # of one there is nothing to choose
        patterns.add(drawn.tobytes())
    assert len(patterns) > 6


def test_inner_segments_touch_one_side_at_most_and_compact_ones_are_an_island(real):
    _, store = real
    chosen = {
        choice: open_images(*real, segment_choice=choice) for choice in ("nearest", "interior", "compact")
    }
    for index in range(0, len(chosen["nearest"]), 5):
        key, view = cropped(chosen["nearest"], index, whole)
        segments = store.segments(key)
        sides = {id(s): sides_by_pixels(s.decode()) for s in segments}
        allowed = [s for s in segments if sides[id(s)] <= 1]
        fewest = [s for s in segments if sides[id(s)] == min(sides.values())]
        inner = min(allowed or fewest, key=lambda s: abs(s.coverage_percent - 15))
        labelled, count = ndimage.label(inner.decode(), np.ones((3, 3)))
        sizes = [int((labelled == n + 1).sum()) for n in range(count)]
        island = segment_from_pixels(labelled == 1 + int(np.argmax(sizes)))
        for choice, expected in (("interior", inner), ("compact", island)):
            images = chosen[choice]
            cut = images.segments.cut(images.method, key, view, np.random.default_rng(0))
            assert np.array_equal(cut, cut_whole(expected, 64)), (key, choice)


def sides_by_pixels(inside):
    edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
    return sum(int(edge.any()) for edge in edges)


@pytest.mark.parametrize("variety", ["nearest", "nearest-0", "fixed-2", "nearest--1", "", "5"])
def test_another_variety_is_refused(variety):
    with pytest.raises(ValueError, match=r"--segment-variety is .*; give fixed, or nearest-K"):
        MethodConfig(segment_variety=variety)


@pytest.mark.parametrize("mask_method", ["segments", "segment_patches"])
@pytest.mark.parametrize("hide", ["segment", "background"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_hide_as_many_pixels_of_every_image_as_its_own_segment(real, mask_method, hide, shape):
    own, control = (
        open_images(*real, mask_method=mask_method, hide=hide, segments_from=name) for name in ("own", shape)
    )
    different = 0
    for key in ((epoch, index) for epoch in range(2) for index in range(len(own))):
        mine, theirs = own[key], control[key]
        assert torch.equal(mine.image, theirs.image)
        assert mine.hidden_pixels == theirs.hidden_pixels
        different += not np.array_equal(mine.pattern, theirs.pattern)
    assert different > len(own)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_segment_of_an_image_is_replaced_by_a_shape_as_large(real, shape, monkeypatch):
    given = []
    for name in ("own", shape):
        images = open_images(*real, mask_method="segment_patches", segments_from=name)
        pattern = type(images.method).pattern
        monkeypatch.setattr(
            images.method, "pattern",
            lambda rng, segment, method=images.method, pattern=pattern: (
                given.append(segment), pattern(method, rng, segment),
            )[1],
            raising=False,
        )  # fmt: skip
        images[(1, 2)]
    own, shapes = given
    assert own.shape == shapes.shape
    assert np.array_equal(own.sum(axis=(1, 2)), shapes.sum(axis=(1, 2)))
    assert not np.array_equal(own, shapes)


def asked_of(store, name, monkeypatch):
    """The keys that the store is asked for from now on."""
    asked, answer = [], getattr(type(store), name)
    monkeypatch.setattr(
        type(store), name, lambda self, key, *more: (asked.append(key), answer(self, key, *more))[1]
    )
    return asked


@pytest.mark.parametrize("ratio", [5.0, 15.0, 40.0])
def test_a_borrowed_segment_is_another_images_and_covers_nearly_as_much(real, ratio, monkeypatch):
    train, store = real
    images = open_images(train, store, segments_from="borrowed", coverage_ratio=ratio)
    keys = [segment_key(images.paths[index].decode()) for index in range(len(images))]
    everything = [(key, segment) for key in keys for segment in store.segments(key)]
    owners = np.array([key for key, _ in everything])
    coverage = np.array([segment.coverage_percent for _, segment in everything])
    cut = np.stack([cut_whole(segment, 64) for _, segment in everything])
    asked, off = asked_of(store, "nearest", monkeypatch), []
    monkeypatch.setattr("mae.data.random_crop", lambda rng, *size: whole(*size))
    for index, key in enumerate(keys):
        asked.clear()
        pattern = images[0, index].pattern
        assert asked[0] == key
        assert key not in asked[1:]
        alike = np.where(owners == key, 0, (cut == 1 - pattern).mean(axis=(1, 2)))
        assert alike.max() > 0.97  # not 1: images of different sizes are rounded differently
        own = store.nearest(key, ratio)
        off.append(np.abs(coverage[alike > 0.97] - own.coverage_percent).min())
    assert np.median(off) < 2  # of 100; one of four, and few images have any near 40


def boxed(folder, boxes):
    """A store of images of 48 x 60 pixels, their segments given as (top, left, height, width)."""
    rng = np.random.default_rng(0)
    (folder / "masks").mkdir()
    for name, of_image in boxes.items():
        write_image(folder / f"train/{name}.png", rng)
        segments = []
        for top, left, height, width in of_image:
            inside = np.zeros((48, 60), np.uint8)
            inside[top : top + height, left : left + width] = 1
            segments.append(as_annotation(inside))
        (folder / f"masks/{name}.json").write_text(json.dumps(segments))
    pack_segments(folder / "masks")
    return open_segments(folder / "masks")


def test_where_all_segments_touch_two_sides_the_one_that_touches_fewest_is_chosen(tmp_path):
    strip, corner = (0, 0, 7, 60), (0, 0, 20, 20)  # of 15 % and of 14 %, at three sides and at two
    store = boxed(tmp_path, {"a": [strip, corner, (0, 0, 48, 50)]})
    for choice, (top, left, height, width) in (("nearest", strip), ("interior", corner)):
        images = open_images(tmp_path / "train", store, segment_choice=choice)
        key, view = cropped(images, 0, whole)
        inside = np.zeros((48, 60), np.uint8)
        inside[top : top + height, left : left + width] = 1
        cut = images.segments.cut(images.method, key, view, np.random.default_rng(0))
        assert np.array_equal(cut, cut_whole(segment_from_pixels(inside), 64))


def test_a_borrowed_segment_is_as_large_as_the_own_one_and_not_as_the_ratio_says(tmp_path):
    """One image has a small segment only, the others have one as small, and one as is wanted."""
    boxes = {n: [(n, n, 12, 12), (n, n, 21, 21)] for n in range(6)}  # 5 % and 15 %
    store = boxed(tmp_path, {**boxes, 0: boxes[0][:1]})
    images = open_images(tmp_path / "train", store, segments_from="borrowed", segment_variety="nearest-1")
    key, view = cropped(images, 0, whole)
    for epoch in range(8):
        cut = images.segments.cut(images.method, key, view, np.random.default_rng(epoch))
        assert 100 * cut.mean() == pytest.approx(5, abs=0.7)


def cut_whole(segment, size):
    height, width = segment.height, segment.width
    return crop_segment(segment.decode(), whole(height, width), size, (height, width))


def test_all_segments_are_borrowed_from_one_other_image(real, monkeypatch):
    train, store = real
    images = open_images(train, store, mask_method="segment_patches", segments_from="borrowed")
    asked = asked_of(store, "segments", monkeypatch)
    for index in range(len(images)):
        images[(0, index)]
    own, others = asked[::2], asked[1::2]
    assert own == [segment_key(images.paths[index].decode()) for index in range(len(images))]
    assert all(mine != other for mine, other in zip(own, others, strict=True))
    assert len(set(others)) > len(images) / 3


@pytest.mark.parametrize("flip", [False, True])
def test_a_segment_of_another_size_is_stretched_over_the_image(flip):
    small = np.random.default_rng(0).integers(0, 2, (30, 40), dtype=np.uint8)
    large = np.kron(small, np.ones((2, 3), np.uint8))
    crop = Crop(top=7, left=11, height=41, width=83, flip=flip)
    for size in (16, 64, 200):
        stretched = crop_segment(small, crop, size, (60, 120))
        assert np.array_equal(stretched, crop_segment(large, crop, size, (60, 120)))


@pytest.mark.parametrize("size", [10, 70, 130])
def test_all_segments_are_cut_as_one_by_one(real, size):
    _, store = real
    for key in sorted(store.images())[:8]:
        segments = store.segments(key)
        height, width = segments[0].height, segments[0].width
        for image in ((height, width), (height * 2 + 1, width + 3)):
            crop = Crop(top=3, left=5, height=image[0] - 7, width=image[1] // 2, flip=size == 70)
            expected = [crop_segment(s.decode(), crop, size, image) for s in segments]
            assert np.array_equal(crop_segments(segments, crop, size, image), expected)


@pytest.mark.parametrize("segments_from", CONTROLS)
def test_held_out_images_are_always_hidden_in_the_same_way(in1k_dir, segments_from):
    store = open_segments(in1k_dir / "masks")
    images = open_images(in1k_dir / "train", store, segments_from=segments_from)
    val = encode_paths(find_images(in1k_dir / "val"))
    fixed = replace(images, folder=in1k_dir / "val", paths=val, is_fixed=True)
    first = [fixed[0, index].pattern for index in range(len(val))]
    assert all(np.array_equal(fixed[0, index].pattern, first[index]) for index in (4, 2, 0))
    assert all(0 < pattern.mean() < 1 for pattern in first)


def test_one_image_alone_can_borrow_from_nobody(tmp_path):
    rng = np.random.default_rng(0)
    write_image(tmp_path / "train/0.jpg", rng)
    write_segments(tmp_path / "masks/0.json", rng)
    pack_segments(tmp_path / "masks")
    for segments_from, mask_method in (("own", "segments"), ("borrowed", "patches")):
        config = make_config(tmp_path, tmp_path / "out", segments_from=segments_from, mask_method=mask_method)
        assert len(listing_of(config).train) == 1
    with pytest.raises(ValueError, match="--segments-from borrowed takes the segments of other"):
        listing_of(make_config(tmp_path, tmp_path / "out", segments_from="borrowed"))


def listing_of(config):
    return make_listing(config.data, config.method)
