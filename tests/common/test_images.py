"""The one reader of images: every kind comes out as people see it, damage is named; and listing."""

import io
import os
import socket

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from common.images import MOST_PIXELS_VARIABLE, find_images, read_reduced, read_rgb
from segments.forms import form_of
from segments.store import segment_key


def read_image(path):
    """[3, H, W], as the pictures below are made."""
    return torch.from_numpy(read_rgb(path)).permute(2, 0, 1)


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
    with pytest.raises(ValueError, match="it is no image"):
        read_image(tmp_path / "a.jpg")


def test_flat_nested_and_class_folders_are_found(tmp_path):
    for name in ("b.jpg", "class/a.JPEG", "deep/er/c.png", "deep/.hidden.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert find_images(tmp_path) == ["b.jpg", "class/a.JPEG", "deep/er/c.png"]
    assert segment_key("deep/er/c.v2.png") == "deep/er/c.v2"


def test_an_image_turned_by_xmp_alone_is_turned(tmp_path):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/>'
    lying = Image.fromarray(gradient()).transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "a.jpg", quality=95, xmp=xmp + b"</rdf:RDF></x:xmpmeta>")
    assert_shows_gradient(read_image(tmp_path / "a.jpg"))


def test_grey_of_no_fixed_range_is_stretched(tmp_path):
    values = np.linspace(-3, 7, 40 * 60, dtype=np.float32).reshape(40, 60)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    image = read_rgb(tmp_path / "a.tiff")
    assert (image.min(), image.max(), image.shape) == (0, 255, (40, 60, 3))


def test_of_an_animation_the_first_picture_counts(tmp_path):
    first, second = Image.fromarray(gradient()), Image.new("RGB", (60, 40))
    first.save(tmp_path / "a.webp", save_all=True, append_images=[second], lossless=True)
    first.save(tmp_path / "a.tiff", save_all=True, append_images=[second])
    first.save(tmp_path / "a.png", save_all=True, append_images=[second])
    for path in tmp_path.iterdir():
        assert_shows_gradient(read_image(path), 1)


def jpeg(**options):
    content = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (120, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(content, format="JPEG", **options)
    return content.getvalue()


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_jpeg_that_ends_too_early_with_the_mark_of_its_end_is_damaged(tmp_path, progressive, share):
    content = jpeg(progressive=progressive)
    (tmp_path / "a.jpg").write_bytes(content[: int(len(content) * share)] + b"\xff\xd9")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read as an image: .*premature end"):
        read_rgb(tmp_path / "a.jpg")


def test_bytes_that_belong_to_nothing_do_no_harm(tmp_path):
    content = jpeg(restart_marker_rows=1)
    (tmp_path / "a.jpg").write_bytes(content)
    (tmp_path / "b.jpg").write_bytes(content[:-2] + b"\0\0\0" + content[-2:] + b"\0" * 30)
    assert np.array_equal(read_rgb(tmp_path / "a.jpg"), read_rgb(tmp_path / "b.jpg"))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path, monkeypatch, suffix):
    Image.new("RGB", (60, 40)).save(tmp_path / f"a.{suffix}")
    monkeypatch.setenv(MOST_PIXELS_VARIABLE, "2399")
    with pytest.raises(ValueError, match=f"60 x 40 pixels, more than 2399; {MOST_PIXELS_VARIABLE}"):
        read_rgb(tmp_path / f"a.{suffix}")
    monkeypatch.setenv(MOST_PIXELS_VARIABLE, "2400")
    assert read_rgb(tmp_path / f"a.{suffix}").shape == (40, 60, 3)
    monkeypatch.setenv(MOST_PIXELS_VARIABLE, "many")
    with pytest.raises(RuntimeError, match="is many; give a whole number"):
        read_rgb(tmp_path / f"a.{suffix}")


def test_a_bomb_is_refused_without_its_memory(tmp_path):
    header = b"\x89PNG\r\n\x1a\n"
    stream = io.BytesIO()
    PngImagePlugin.putchunk(stream, b"IHDR", b"\0\0\xff\xff" * 2 + b"\x08\x02\0\0\0")
    PngImagePlugin.putchunk(stream, b"IDAT", b"")
    (tmp_path / "a.png").write_bytes(header + stream.getvalue())
    with pytest.raises(ValueError, match="65535 x 65535 pixels, more than"):
        read_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1)])
def test_images_of_one_row_or_column_are_read(tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "b.jpg")
    for path in tmp_path.iterdir():
        assert read_rgb(path).shape == (size[1], size[0], 3)


def make_images(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_links_to_folders_are_followed_and_lead_to_nothing_twice(tmp_path):
    make_images(tmp_path / "elsewhere", "x.jpg")
    train = tmp_path / "train"
    make_images(train, "b/one.jpg", "c/two.jpg")
    (train / "a_first").symlink_to(train / "b")  # what it names is there by its own name
    (train / "c/up").symlink_to(train)
    (train / "loop").symlink_to("loop")
    (train / "d").symlink_to(tmp_path / "elsewhere")
    (train / "e").symlink_to(tmp_path / "elsewhere")
    assert find_images(train) == ["b/one.jpg", "c/two.jpg", "d/x.jpg"]


def test_links_in_circles_do_not_multiply_what_is_looked_for(tmp_path):
    for name in "abc":
        (tmp_path / name).mkdir()
        for other in "abc":
            (tmp_path / name / f"to_{other}").symlink_to(tmp_path / other)
    assert form_of(tmp_path) == "none"  # of segments; for ever, if every way were gone


def test_pipes_sockets_and_devices_are_left_out_with_a_word(tmp_path, caplog):
    make_images(tmp_path, "one.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "null.jpg").symlink_to("/dev/null")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.jpg"))
        assert find_images(tmp_path) == ["one.jpg"]
    assert "3 names are no regular files" in caplog.text
    assert "null.jpg, pipe.jpg, socket.jpg" in caplog.text


def test_what_programs_put_among_the_images_is_left_out_with_a_word(tmp_path, caplog):
    names = [
        "a/.ipynb_checkpoints/one-checkpoint.jpg",
        "@eaDir/one.jpg/THUMB.jpg",
        "__MACOSX/a/one.jpg",
        ".git/x.png",
    ]
    make_images(tmp_path, "a/one.jpg", *names, "a/._one.jpg")
    assert find_images(tmp_path) == ["a/one.jpg"]
    assert "4 folders of programs are left out" in caplog.text
    assert find_images(tmp_path / "@eaDir") == ["one.jpg/THUMB.jpg"]  # who names one means it


def test_images_of_a_kind_that_is_not_read_are_counted_and_named(tmp_path, caplog):
    make_images(tmp_path, "one.jpg", "two.gif")
    (tmp_path / "three.PGM").write_bytes(b"P5 1 1 255 x")
    assert find_images(tmp_path) == ["one.jpg"]
    assert "2 images are left out, such as three.PGM; those that are read end in .bmp" in caplog.text


def test_a_link_to_nothing_is_named_when_it_is_read(tmp_path):
    (tmp_path / "a.jpg").symlink_to("nowhere.jpg")
    assert find_images(tmp_path) == ["a.jpg"]
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read: No such file"):
        read_rgb(tmp_path / "a.jpg")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read: it is no regular file"):
        read_rgb(tmp_path / "a.jpg")


def test_a_name_that_is_not_utf8_is_named_and_left_out(tmp_path, caplog):
    make_images(tmp_path, "one.jpg", "zwei-äöü.jpg")
    os.close(os.open(os.fsencode(tmp_path) + b"/b\xffd.jpg", os.O_CREAT))
    assert find_images(tmp_path) == ["one.jpg", "zwei-äöü.jpg"]
    assert "1 names are no regular files, or not UTF-8, and left out: b\\udcffd.jpg" in caplog.text


@pytest.mark.parametrize(("side", "shape"), [(10, (10, 15)), (15, (15, 23)), (20, (20, 30)), (21, (40, 60))])
def test_a_large_jpeg_is_read_reduced_but_never_below_the_wanted_side(tmp_path, side, shape):
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", quality=95)
    pixels, size = read_reduced(tmp_path / "a.jpg", side)
    assert (pixels.shape[:2], size) == (shape, (40, 60))
    expected = Image.fromarray(gradient()).resize(shape[::-1], Image.Resampling.BOX)
    assert np.abs(pixels.astype(float) - np.asarray(expected)).mean() < 12


def test_what_is_turned_or_damaged_or_no_jpeg_is_read_as_ever(tmp_path):
    image = Image.fromarray(gradient())
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", quality=95, exif=exif)
    image.save(tmp_path / "a.png")
    for name in ("turned.jpg", "a.png"):
        pixels, size = read_reduced(tmp_path / name, 5)
        assert (pixels == read_rgb(tmp_path / name)).all()
        assert size == pixels.shape[:2]
    image.save(tmp_path / "cut.jpg", quality=95)
    content = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2] + content[-2:])
    with pytest.raises(ValueError, match=r"cut\.jpg cannot be read"):
        read_reduced(tmp_path / "cut.jpg", 5)
