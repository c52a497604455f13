"""Crops: what is not decoded is not missed, and damage does not pass."""

import numpy as np
import pytest
import torch
from PIL import Image

from mae.crops import Crop, crop_image, read_crop
from tests.common.test_images import gradient, read_image


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


@pytest.mark.parametrize(("height", "width"), [(90, 120), (20, 24)])
def test_a_crop_is_resized_as_pillow_does(height, width):
    """Bicubic, and over all pixels where it is shrunk."""
    pixels = np.random.default_rng(0).integers(0, 256, (130, 150, 3), dtype=np.uint8)
    crop = Crop(top=7, left=11, height=height, width=width)
    box = (11, 7, 11 + width, 7 + height)
    expected = Image.fromarray(pixels).crop(box).resize((32, 32), Image.Resampling.BICUBIC)
    found = crop_image(torch.from_numpy(pixels).permute(2, 0, 1), crop, 32).permute(1, 2, 0)
    assert np.abs(found.numpy().astype(int) - np.asarray(expected)).max() <= 1


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


def exif_of(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def ends_in_one_colour():
    """And is not one that ends too early."""
    image = gradient(120, 90)
    image[60:] = 255
    return Image.fromarray(image)


UPRIGHT = Image.fromarray(gradient())
JPEGS = {
    **{f"orientation {n}": (UPRIGHT, {"exif": exif_of(n)}) for n in range(1, 9)},
    **{f"exif cut after {exif!r}": (UPRIGHT, {"exif": exif}) for exif in (
        b"Exif\0\0MM\0*", b"Exif\0\0II*\0\x08\0\0", b"Exif\0\0")},
    "CMYK": (UPRIGHT.convert("CMYK"), {}), "the end in one colour": (ends_in_one_colour(), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", JPEGS)
def test_a_crop_is_that_of_the_upright_image(tmp_path, name):
    image, options = JPEGS[name]
    image.save(tmp_path / "a.jpg", quality=95, **options)
    assert options.get("exif", b"") in (tmp_path / "a.jpg").read_bytes()
    whole = read_image(tmp_path / "a.jpg")
    crop = Crop(top=3, left=2, height=min(110, whole.shape[1] - 5), width=25, flip=True)
    read = read_crop(tmp_path / "a.jpg", lambda *_: crop, 16)
    assert (read.height, read.width) == tuple(whole.shape[1:])
    assert torch.equal(read.pixels, crop_image(whole, crop, 16))


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("side", [80, 800])
def test_a_truncated_jpeg_is_refused_even_where_the_crop_is_whole(tmp_path, share, side):
    Image.fromarray(gradient()).resize((side, side)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: int(len(content) * share)])
    crop = Crop(top=0, left=0, height=side // 2, width=side // 2)
    with pytest.raises(ValueError, match=r".+"):
        read_crop(tmp_path / "a.jpg", lambda *_: crop, 32)


@pytest.mark.parametrize("side", [80, 800])
def test_a_jpeg_that_ends_too_early_is_refused_where_the_crop_needs_more(tmp_path, side):
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2] + b"\xff\xd9")
    crop = Crop(top=0, left=0, height=side, width=side)
    with pytest.raises(ValueError, match="premature end"):
        read_crop(tmp_path / "a.jpg", lambda *_: crop, 32)
