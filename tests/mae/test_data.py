"""Crops that line up, and samples that hang on nothing but their index."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import find_images
from engine.schedule import sample_rng
from mae.config import MethodConfig, ModelConfig, make_method
from mae.controls import SegmentSource
from mae.crops import Crop, centre_crop, crop_image, crop_segment, random_crop
from mae.data import MaskedImages
from mae.listing import make_listing
from segments.forms import open_segments
from tests.mae.conftest import (
    as_annotation,
    make_config,
    pack_segments,
    write_image,
    write_segments,
)

MODEL = ModelConfig(model="vit_tiny", image_size=64, patch_size=16)


def test_crops_are_inside_and_cover_the_areas_of_mae():
    rng = np.random.default_rng(0)
    for height, width in ((40, 60), (7, 200), (200, 7), (1, 1)):
        for _ in range(300):
            crop = random_crop(rng, height, width)
            assert 0 <= crop.top <= crop.top + crop.height <= height
            assert 0 <= crop.left <= crop.left + crop.width <= width
            assert min(crop.height, crop.width) >= 1
    crops = [random_crop(rng, 300, 300) for _ in range(3000)]
    shares = np.array([crop.height * crop.width / 90000 for crop in crops])
    assert shares.min() > 0.18
    assert shares.max() < 1.001
    assert 0.50 < np.mean(shares) < 0.60  # uniform from 0.2, the largest rejected now and then
    assert 0.45 < np.mean([crop.flip for crop in crops]) < 0.55


def test_shapes_and_places_of_crops_are_those_of_mae():
    """Three quarters to four thirds, as wide as often as high; from the first pixel to the last."""
    rng = np.random.default_rng(0)
    crops = [random_crop(rng, 300, 300) for _ in range(3000)]
    aspects = np.log([crop.width / crop.height for crop in crops])
    assert 0.95 * np.log(4 / 3) < np.abs(aspects).max() < 1.05 * np.log(4 / 3)
    assert abs(np.median(aspects)) < 0.02
    assert 0.45 < np.mean(np.abs(aspects) < np.log(4 / 3) / 2) < 0.6  # uniform in the logarithm
    small = [random_crop(rng, 6, 6) for _ in range(300)]
    for at, size in (("top", "height"), ("left", "width")):
        cropped = [crop for crop in small if getattr(crop, size) < 6]
        assert any(getattr(crop, at) == 0 for crop in cropped)
        assert any(getattr(crop, at) + getattr(crop, size) == 6 for crop in cropped)


def test_held_out_images_show_the_usual_middle_square():
    """224 of 256 pixels of the shorter side."""
    assert centre_crop(256, 320) == Crop(top=16, left=48, height=224, width=224)
    assert centre_crop(64, 32) == Crop(top=18, left=2, height=28, width=28)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [32, 64, 90])
def test_segment_lines_up_with_the_image(size, flip):
    """The segment is drawn into the image itself: white inside, black outside."""
    segment = np.zeros((120, 160), np.uint8)
    segment[30:80, 50:120] = 1
    image = torch.from_numpy(np.repeat(segment[None] * 255, 3, axis=0))
    crop = Crop(top=13, left=21, height=80, width=110, flip=flip)
    small = crop_segment(segment, crop, size, segment.shape)
    assert set(np.unique(small)) == {0, 1}
    cut = crop_image(image, crop, size)[0].numpy() > 127
    assert (cut == (small > 0)).mean() > 0.97
    rows, columns = (np.flatnonzero(small.any(axis)) for axis in (1, 0))
    assert abs(rows[0] - (30 - 13) / 80 * size) <= 1
    left = (50 - 21) / 110 * size
    right = (120 - 21) / 110 * size
    assert abs(columns[0] - (size - right if flip else left)) <= 1


@pytest.mark.parametrize("hide", ["segment", "background"])
def test_loaded_visible_map_lines_up_with_the_loaded_image(tmp_path, hide):
    folder = tmp_path / "in1k"
    inside = np.zeros((100, 130), np.uint8)
    inside[20:70, 30:100] = 1
    (folder / "train").mkdir(parents=True)
    Image.fromarray(np.repeat(inside[..., None] * 255, 3, 2)).save(folder / "train/a.png")
    (folder / "masks").mkdir()
    (folder / "masks/a.json").write_text(as_text([as_annotation(inside)]))
    images = open_images(folder, hide=hide)
    for epoch in range(20):
        sample = images[(epoch, 0)]
        assert set(np.unique(sample.pattern)) <= {0, 1}
        white = sample.image[0].numpy() > 127
        shown = sample.pattern > 0
        assert (white == (shown if hide == "background" else ~shown)).mean() > 0.96


def as_text(annotations):
    import json

    return json.dumps(annotations)


def open_images(folder, mask_method="segments", **settings):
    method_config = MethodConfig(mask_method=mask_method, **settings)
    method = make_method(method_config, MODEL)
    paths = np.array([p.encode() for p in find_images(folder / "train")])
    segments = None
    if method.uses_segments:
        pack_segments(folder / "masks")
        store = open_segments(folder / "masks")
        segments = SegmentSource(store=store, donors=paths, options=method_config, seed=7)
    return MaskedImages(folder=folder / "train", paths=paths, segments=segments, method=method, seed=7)


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(6):
        write_image(tmp_path / f"train/{number}.jpg", rng)
        write_segments(tmp_path / f"masks/{number}.json", rng)
    return tmp_path


@pytest.mark.parametrize("changed", [{"seed": 1}, {"stream": 2}, {"epoch": 3}, {"index": 4}])
def test_every_sample_of_a_seed_an_epoch_and_a_stream_has_numbers_of_its_own(changed):
    place = {"seed": 0, "stream": 1, "epoch": 0, "index": 0}
    one, other = (sample_rng(**values).random(8) for values in (place, {**place, **changed}))
    assert not np.intersect1d(one, other).size


@pytest.mark.parametrize("mask_method", ["patches", "segments"])
def test_a_sample_is_a_function_of_seed_epoch_and_index(folder, mask_method):
    images, again = open_images(folder, mask_method), open_images(folder, mask_method)
    first = images[(1, 3)]
    for other in ((0, 0), (1, 2), (5, 3)):
        again[other]
    second, other_epoch = again[(1, 3)], images[(2, 3)]
    assert torch.equal(first.image, second.image)
    assert np.array_equal(first.pattern, second.pattern)
    assert not torch.equal(first.image, other_epoch.image)


def test_an_unreadable_image_is_named_and_replaced_by_the_next(folder):
    (folder / "train/2.jpg").write_bytes(b"\xff\xd8\xff broken")
    images = open_images(folder)
    sample, substitute = images[(0, 2)], images[(0, 3)]
    assert torch.equal(sample.image, substitute.image)
    assert len(sample.unreadable) == 1
    assert sample.unreadable[0].startswith("2.jpg (")
    assert substitute.unreadable == ()


def test_a_segment_of_another_size_is_named_not_stretched(folder):
    write_image(folder / "train/2.jpg", np.random.default_rng(1), width=48, height=60)
    sample = open_images(folder)[(0, 2)]
    assert "48x60" in sample.unreadable[0]
    assert "60x48" in sample.unreadable[0]


def test_fixed_images_never_change(folder):
    images = open_images(folder)
    fixed = replace(images, paths=np.array([b"1.jpg", b"4.jpg"]), is_fixed=True)
    one, two = fixed[0, 1], fixed[0, 1]
    assert torch.equal(one.image, two.image)
    assert np.array_equal(one.pattern, two.pattern)
    assert 0 < one.hidden_pixels < 64 * 64


def test_a_held_out_image_hides_its_own_segment(folder):
    inside = np.zeros((48, 60), np.uint8)
    inside[10:30, 20:50] = 1
    (folder / "val").mkdir()
    Image.fromarray(np.repeat(inside[..., None] * 255, 3, 2)).save(folder / "val/own.png")
    (folder / "masks/own.json").write_text(as_text([as_annotation(inside)]))
    images, paths = open_images(folder), np.array([b"own.png"])
    sample = replace(images, folder=folder / "val", paths=paths, is_fixed=True)[0, 0]
    white = sample.image[0].numpy() > 127
    assert ((sample.pattern == 0) == white).mean() > 0.97


def test_held_out_images_without_segments_are_left_to_methods_that_need_none(folder, tmp_path):
    rng = np.random.default_rng(1)
    for name in ("own", "none"):
        write_image(folder / f"val/{name}.jpg", rng)
    write_segments(folder / "masks/own.json", rng)
    pack_segments(folder / "masks")
    held_out = {}
    for mask_method in ("patches", "segments"):
        config = make_config(folder, tmp_path / "out", mask_method=mask_method)
        listing = make_listing(config.data, config.method)
        held_out[mask_method] = listing.val.tolist()
    assert held_out == {"patches": [b"none.jpg", b"own.jpg"], "segments": [b"own.jpg"]}


def test_images_without_segments_are_left_out_for_all_methods_alike(in1k_dir, tmp_path):
    listings = {}
    for mask_method in ("patches", "segments"):
        config = make_config(in1k_dir, tmp_path, mask_method=mask_method)
        listings[mask_method] = make_listing(config.data, config.method)
    assert listings["patches"].left_out == listings["segments"].left_out == 2
    assert listings["patches"].digest == listings["segments"].digest
    everything = make_config(in1k_dir, tmp_path, mask_method="patches", use_unmasked_images=True)
    listing = make_listing(everything.data, everything.method)
    assert (len(listing.train), listing.left_out) == (26, 0)


def test_patches_needs_no_segments(folder, tmp_path):
    (folder / "masks").rename(folder / "elsewhere")
    config = make_config(folder, tmp_path / "out", mask_method="patches")
    listing = make_listing(config.data, config.method)
    assert (len(listing.train), listing.source) == (6, None)
