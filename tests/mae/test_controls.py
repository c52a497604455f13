"""Controls, held to their definition: as much hidden, by another's segment or no object at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import ndimage

from common.images import find_images
from mae.config import MethodConfig, ModelConfig, make_method
from mae.controls import SHAPES, SegmentSource
from mae.crops import Crop, crop_segment, crop_segments
from mae.data import MaskedImages
from mae.listing import encode_paths, make_listing
from segments.forms import open_segments
from segments.pack import pack
from segments.store import segment_key
from tests.mae.conftest import make_config, pack_segments, write_image, write_segments

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
    segments = SegmentSource(store=store, donors=paths, options=options)
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


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [12, 16])
def test_a_shape_has_exactly_the_pixels_that_are_asked_for(shape, side):
    rng = np.random.default_rng(0)
    for count in range(side**2 + 1):
        inside = SHAPES[shape](count, side, rng)
        assert (inside.shape, inside.dtype, inside.max(initial=0)) == (
            (side, side), np.uint8, min(count, 1),
        )  # fmt: skip
        assert inside.sum() == count


@pytest.mark.parametrize("share", [0.02, 0.15, 0.5])
def test_a_blob_has_few_islands_and_lies_anywhere(share):
    rng, heat, islands = np.random.default_rng(0), np.zeros((224, 224)), []
    for _ in range(200):
        inside = SHAPES["blob"](round(share * 224**2), 224, rng)
        heat += inside
        islands.append(ndimage.label(inside)[1])
    assert 1 <= np.mean(islands) <= 5
    quarters = heat.reshape(2, 112, 2, 112).sum(axis=(1, 3)) / heat.sum()
    assert 0.2 < quarters.min() <= quarters.max() < 0.3


def test_a_block_is_a_box_of_many_shapes_whose_last_row_may_be_short():
    rng, aspects = np.random.default_rng(0), []
    for _ in range(200):
        count = int(rng.integers(500, 8000))
        inside = SHAPES["block"](count, 224, rng)
        rows, columns = (np.flatnonzero(inside.any(axis)) for axis in (1, 0))
        box = inside[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert box[:-1].all()
        assert np.all(np.diff(box[-1].astype(int)) <= 0)
        aspects.append(box.shape[1] / box.shape[0])
    assert min(aspects) < 0.45
    assert max(aspects) > 2.2


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
    for name in ("0.jpg", "0.png"):  # the same segments are theirs
        write_image(tmp_path / f"train/{name}", rng)
    write_segments(tmp_path / "masks/0.json", rng)
    pack_segments(tmp_path / "masks")
    for segments_from, mask_method in (("own", "segments"), ("borrowed", "patches")):
        config = make_config(tmp_path, tmp_path / "out", segments_from=segments_from, mask_method=mask_method)
        assert len(listing_of(config).train) == 2
    with pytest.raises(ValueError, match="--segments-from borrowed takes the segments of other"):
        listing_of(make_config(tmp_path, tmp_path / "out", segments_from="borrowed"))


def listing_of(config):
    return make_listing(config.data, config.method)
