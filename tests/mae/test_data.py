"""Images of every kind, crops that line up, and samples that hang on nothing but their index."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import find_images
from mae.config import MethodConfig, ModelConfig, make_method
from mae.data import FixedImages, MaskedImages
from mae.decode import read_crop, read_image
from mae.listing import make_listing, segment_key
from mae.schedule import make_batch_plan
from mae.segments import open_segments
from mae.transforms import Crop, crop_image, crop_segment, random_crop
from tests.mae.conftest import (
    as_annotation,
    make_config,
    pack_segments,
    write_image,
    write_segments,
)

MODEL = ModelConfig(model="vit_tiny", image_size=64, patch_size=16)


def gradient(height=40, width=60):
    """[H, W, 3]: red grows to the right, green downwards."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 250, width)[None]
    image[..., 1] = np.linspace(0, 250, height)[:, None]
    return image


def assert_shows_gradient(image, tolerance=12.0):
    assert image.dtype == torch.uint8
    expected = torch.from_numpy(gradient()).permute(2, 0, 1)
    assert image.shape == expected.shape
    assert (image.float() - expected.float()).abs().mean() < tolerance


def test_usual_images_are_read_as_rgb(tmp_path):
    image = Image.fromarray(gradient())
    image.save(tmp_path / "a.jpg", quality=95)
    image.save(tmp_path / "a.png")
    image.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    image.convert("RGBA").save(tmp_path / "rgba.png")
    image.convert("P", palette=Image.Palette.ADAPTIVE, colors=256).save(tmp_path / "palette.png")
    image.save(tmp_path / "a.webp", quality=95)
    image.save(tmp_path / "a.bmp")
    for path in tmp_path.iterdir():
        assert_shows_gradient(read_image(path))


def test_a_wrong_suffix_does_not_matter(tmp_path):
    Image.fromarray(gradient()).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.JPEG")
    assert_shows_gradient(read_image(tmp_path / "a.JPEG"), 1)


def test_greyscale_gets_three_equal_channels(tmp_path):
    grey = Image.fromarray(gradient()).convert("L")
    for name in ("grey.jpg", "grey.png"):
        grey.save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert image.shape == (3, 40, 60)
        assert torch.equal(image[0], image[1])
        assert torch.equal(image[0], image[2])


def test_16_bit_png_is_scaled_to_8_bits(tmp_path):
    deep = (np.arange(40 * 60).reshape(40, 60) * 27).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    expected = torch.from_numpy((deep / 257).round().astype(np.uint8))
    assert torch.equal(read_image(tmp_path / "deep.png")[1], expected)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_exif_orientation_is_applied(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    lying = Image.fromarray(gradient()).transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / f"a.{suffix}", exif=exif, quality=95)
    assert_shows_gradient(read_image(tmp_path / f"a.{suffix}"))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_truncated_files_are_refused(tmp_path, suffix, share):
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, format={"jpg": "JPEG", "png": "PNG"}[suffix])
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content.getvalue()[: int(len(content.getvalue()) * share)])
    with pytest.raises(ValueError, match=r".+"):
        read_image(path)


def test_a_text_file_named_jpg_is_refused(tmp_path):
    (tmp_path / "a.jpg").write_text("no image")
    with pytest.raises(ValueError, match="cannot identify"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("height", "width"), [(1200, 1601), (901, 700)])
def test_reading_at_reduced_scale_changes_neither_crop_nor_colours(tmp_path, height, width, flip):
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    smooth = smooth.resize((width, height), Image.Resampling.BICUBIC)
    path = tmp_path / "large.jpg"
    smooth.save(path, quality=97)
    crop = Crop(top=101, left=33, height=700, width=650, flip=flip)
    full = crop_image(read_image(path), crop, 224).float()
    asked = []

    def choose(*size):
        asked.append(size)
        return crop

    reduced = read_crop(path, choose, 224)
    assert asked == [(height, width)]  # and not once more for a full decode
    assert (reduced.height, reduced.width, reduced.crop) == (height, width, crop)
    assert (reduced.pixels.float() - full).abs().mean() < 1.0
    shifted = (reduced.pixels.float().roll(1, -1) - full)[..., 1:].abs().mean()
    assert (reduced.pixels.float() - full).abs().mean() < shifted / 3


JPEG_KINDS = {
    "one sample a colour": {"subsampling": "4:4:4"},
    "half the columns": {"subsampling": "4:2:2"},
    "half of both": {"subsampling": "4:2:0"},
    "progressive": {"subsampling": "4:2:0", "progressive": True},
    "with restart markers": {"subsampling": "4:2:0", "restart_marker_rows": 1},
    "optimised": {"subsampling": "4:2:0", "optimize": True},
    "with an upright orientation": {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03"
                                            b"\0\0\0\x01\0\x01\0\0\0\0\0\0"},
}  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", JPEG_KINDS)
def test_decoding_no_more_than_the_crop_needs_changes_no_pixel(tmp_path, capfd, kind, mode):
    path = tmp_path / "a.jpg"
    noisy = np.random.default_rng(0).integers(0, 256, (120, 93, 3), dtype=np.uint8)
    Image.fromarray(noisy).convert(mode).save(path, quality=80, **JPEG_KINDS[kind])
    before = path.read_bytes()
    whole = read_image(path)
    for bottom in (*range(1, 120, 7), 15, 16, 17, 118, 119, 120):
        crop = Crop(top=bottom // 3, left=5, height=bottom - bottom // 3, width=60)
        read = read_crop(path, lambda *_, crop=crop: crop, 64)
        assert (read.height, read.width, read.crop) == (120, 93, crop)
        assert torch.equal(read.pixels, crop_image(whole, crop, 64))
    assert path.read_bytes() == before
    assert capfd.readouterr().err == ""  # libjpeg would tell of the data that it leaves over


@pytest.mark.parametrize("orientation", range(1, 9))
def test_crops_are_of_the_upright_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    whole = read_image(tmp_path / "a.jpg")
    crop = Crop(top=3, left=2, height=20, width=25, flip=True)
    read = read_crop(tmp_path / "a.jpg", lambda *_: crop, 16)
    assert (read.height, read.width) == tuple(whole.shape[1:])
    assert torch.equal(read.pixels, crop_image(whole, crop, 16))


@pytest.mark.parametrize("exif", [b"Exif\0\0MM\0*", b"Exif\0\0II*\0\x08\0\0", b"Exif\0\0"])
def test_a_jpeg_whose_exif_is_cut_short_is_read_all_the_same(tmp_path, exif):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    assert exif in (tmp_path / "a.jpg").read_bytes()
    crop = Crop(top=3, left=2, height=20, width=25)
    read = read_crop(tmp_path / "a.jpg", lambda *_: crop, 16)
    assert torch.equal(read.pixels, crop_image(read_image(tmp_path / "a.jpg"), crop, 16))


def test_a_cmyk_jpeg_is_cropped_as_it_is_read(tmp_path):
    Image.fromarray(gradient()).convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    crop = Crop(top=3, left=2, height=20, width=25)
    read = read_crop(tmp_path / "a.jpg", lambda *_: crop, 16)
    assert torch.equal(read.pixels, crop_image(read_image(tmp_path / "a.jpg"), crop, 16))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("side", [80, 800])
def test_a_truncated_jpeg_is_refused_even_where_the_crop_is_whole(tmp_path, share, side):
    Image.fromarray(gradient()).resize((side, side)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: int(len(content) * share)])
    crop = Crop(top=0, left=0, height=side // 2, width=side // 2)
    with pytest.raises(ValueError, match=r".+"):
        read_crop(tmp_path / "a.jpg", lambda *_: crop, 32)


def test_flat_nested_and_class_folders_are_found(tmp_path):
    for name in ("b.jpg", "class/a.JPEG", "deep/er/c.png", "deep/.hidden.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == ["b.jpg", "class/a.JPEG", "deep/er/c.png"]
    assert segment_key("deep/er/c.v2.png") == "deep/er/c.v2"


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


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [32, 64, 90])
def test_segment_lines_up_with_the_image(size, flip):
    """The segment is drawn into the image itself: white inside, black outside."""
    segment = np.zeros((120, 160), np.uint8)
    segment[30:80, 50:120] = 1
    image = torch.from_numpy(np.repeat(segment[None] * 255, 3, axis=0))
    crop = Crop(top=13, left=21, height=80, width=110, flip=flip)
    small = crop_segment(segment, crop, size)
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
        segments = open_segments(folder / "masks")
    return MaskedImages(
        folder=folder / "train", paths=paths, segments=segments, method=method,
        coverage_ratio=method_config.coverage_ratio, seed=7,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(6):
        write_image(tmp_path / f"train/{number}.jpg", rng)
        write_segments(tmp_path / f"masks/{number}.json", rng)
    return tmp_path


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
    fixed = FixedImages(images, folder / "train", np.array([b"1.jpg", b"4.jpg"]))
    one, two = fixed[1], fixed[1]
    assert torch.equal(one.image, two.image)
    assert np.array_equal(one.pattern, two.pattern)
    assert 0 < one.hidden_pixels < 64 * 64


def test_a_held_out_image_hides_its_own_segment(folder):
    inside = np.zeros((48, 60), np.uint8)
    inside[10:30, 20:50] = 1
    (folder / "val").mkdir()
    Image.fromarray(np.repeat(inside[..., None] * 255, 3, 2)).save(folder / "val/own.png")
    (folder / "masks/own.json").write_text(as_text([as_annotation(inside)]))
    fixed = FixedImages(open_images(folder), folder / "val", np.array([b"own.png"]))
    white = fixed[0].image[0].numpy() > 127
    assert ((fixed[0].pattern == 0) == white).mean() > 0.97


def test_held_out_images_without_segments_are_left_to_methods_that_need_none(folder, tmp_path):
    rng = np.random.default_rng(1)
    for name in ("own", "none"):
        write_image(folder / f"val/{name}.jpg", rng)
    write_segments(folder / "masks/own.json", rng)
    pack_segments(folder / "masks")
    held_out = {}
    for mask_method in ("patches", "segments"):
        config = make_config(folder, tmp_path / "out", mask_method=mask_method)
        listing = make_listing(config.data, make_method(config.method, config.model))
        held_out[mask_method] = listing.val.tolist()
    assert held_out == {"patches": [b"none.jpg", b"own.jpg"], "segments": [b"own.jpg"]}


def test_a_folder_of_segments_that_are_not_packed_is_refused_with_the_command(folder, tmp_path):
    config = make_config(folder, tmp_path / "out", mask_method="segments")
    with pytest.raises(ValueError, match="python -m mae masks pack"):
        make_listing(config.data, make_method(config.method, config.model))


def test_images_without_segments_are_left_out_for_all_methods_alike(in1k_dir, tmp_path):
    listings = {}
    for mask_method in ("patches", "segments"):
        config = make_config(in1k_dir, tmp_path, mask_method=mask_method)
        listings[mask_method] = make_listing(config.data, make_method(config.method, config.model))
    assert listings["patches"].left_out == listings["segments"].left_out == 2
    assert listings["patches"].digest == listings["segments"].digest
    everything = make_config(in1k_dir, tmp_path, mask_method="patches", use_unmasked_images=True)
    listing = make_listing(everything.data, make_method(everything.method, everything.model))
    assert (len(listing.train), listing.left_out) == (26, 0)


def test_patches_needs_no_segments(folder, tmp_path):
    (folder / "masks").rename(folder / "elsewhere")
    config = make_config(folder, tmp_path / "out", mask_method="patches")
    listing = make_listing(config.data, make_method(config.method, config.model))
    assert (len(listing.train), listing.source) == (6, None)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_step_has_the_same_images_on_any_number_of_processes(tmp_path, processes):
    config = make_config(tmp_path, tmp_path, effective_batch_size=16)
    plan = make_batch_plan(config.optimisation, num_images=50, processes=processes, batch_size=3)
    assert plan.steps_per_epoch == 3
    assert plan.micro_batch_size <= 3
    parts = [list(plan.micro_batches(rank, (0, 0), 2)) for rank in range(processes)]
    order = [np.random.default_rng([0, 0, epoch]).permutation(50) for epoch in range(2)]
    for number in range(6):
        taken = slice(number * plan.accumulation_steps, (number + 1) * plan.accumulation_steps)
        keys = np.concatenate([batch for part in parts for batch in part[taken]])
        epoch, step = divmod(number, 3)
        assert set(keys[:, 0]) == {epoch}
        assert sorted(keys[:, 1]) == sorted(order[epoch][step * 16 : step * 16 + 16])


def test_batches_can_start_anywhere(tmp_path):
    config = make_config(tmp_path, tmp_path, effective_batch_size=16)
    plan = make_batch_plan(config.optimisation, num_images=50, processes=1, batch_size=8)
    everything = list(plan.micro_batches(0, (0, 0), 3))
    rest = list(plan.micro_batches(0, (1, 2), 3))
    assert len(everything) == 3 * 3 * 2
    assert np.array_equal(everything[(3 + 2) * 2 :], rest)
