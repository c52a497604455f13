"""Controls, held to their definition: as much hidden, by another's segment or no object at all."""

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
from mae.crops import Crop, crop_segment, crop_segments, read_crop
from mae.data import MaskedImages
from mae.listing import encode_paths, make_listing
from segments.forms import open_segments
from segments.pack import pack
from segments.segment import segment_from_pixels
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
