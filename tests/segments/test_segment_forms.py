"""Every form gives the same segments; what is damaged is named."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from common.files import path_below
from segments.forms import form_of, open_any_form, open_segments, read_empty_list
from segments.pack import pack
from segments.segment import (
    Segment,
    decode_at,
    run_lengths,
    segment_from_pixels,
    segment_from_rle,
)

FORMS = ["masks", "masks-amg-png", "masks-sa1b"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_segments(sample, form):
    source, reference = open_any_form(sample / form), open_any_form(sample / "masks-amg-rle")
    assert source.images() <= reference.images()
    for key in sorted(source.images())[:8]:
        assert source.segments(key) == reference.segments(key)


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("masks", "PNGs with table.txt"),
        ("masks-amg-png", "SAM PNGs with metadata.csv"),
        ("masks-sa1b", "RLE JSON"),
        ("masks-amg-rle", "RLE JSON"),
    ],
)
def test_training_opens_no_folder_and_says_how_to_pack_it(sample, form, name):
    assert form_of(sample / form) == name
    with pytest.raises(ValueError, match=f"holds segments as {name}") as refused:
        open_segments(sample / form)
    assert f"`python -m segments pack {sample / form}`" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_form_of_a_store_of_nothing_and_of_a_folder_that_cannot_be_listed(
    packed_table, tmp_path, monkeypatch
):
    assert form_of(packed_table) == "packed store"
    assert form_of(tmp_path) == form_of(tmp_path / "nowhere") == "none"
    shutil.copyfile(packed_table, tmp_path / "masks.sqlite")
    (tmp_path / "image.json").write_text("[]")
    assert form_of(tmp_path) == "packed store"
    assert open_segments(tmp_path).path == tmp_path / "masks.sqlite"
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    monkeypatch.setattr("os.scandir", lambda path: (_ for _ in ()).throw(PermissionError(path)))
    assert form_of(hidden) == "none"


def test_a_segment_decodes_to_the_pixels_of_its_png(sample):
    source = open_any_form(sample / "masks")
    key = min(source.images())
    for line, segment in zip(
        (sample / "masks" / key / "table.txt").read_text().splitlines(),
        source.segments(key),
        strict=True,
    ):
        percent, name = line.split()
        inside = np.asarray(Image.open(sample / "masks" / key / name)) > 0
        np.testing.assert_array_equal(segment.decode(), inside)
        assert segment.coverage_percent == pytest.approx(float(percent), abs=1e-5)
        assert segment.coverage_percent == 100 * inside.sum() / inside.size


@pytest.mark.parametrize(("form", "images"), [("masks", 23), ("masks-amg-rle", 93)])
def test_images_without_segments_are_told_from_images_that_were_forgotten(sample, form, images):
    source = open_any_form(sample / form)
    assert len(source.images()) == images
    assert "n01735189/n01735189_1185" in source.listed_empty()
    assert not source.images() & source.listed_empty()
    assert source.segments("nowhere/nothing") == []


def test_uncompressed_run_lengths_are_read(tmp_path):
    inside = np.zeros((3, 4), np.uint8)
    inside[1:, 1:3] = 1
    annotation = {"segmentation": {"size": [3, 4], "counts": [4, 2, 1, 2, 3]}, "area": 4}
    (tmp_path / "image.json").write_text(json.dumps([annotation]))
    (segment,) = open_any_form(tmp_path).segments("image")
    np.testing.assert_array_equal(segment.decode(), inside)
    assert segment.coverage_percent == pytest.approx(100 / 3)


def test_run_lengths_agree_with_what_was_encoded():
    rng = np.random.default_rng(0)
    for _ in range(50):
        runs = (2 ** rng.uniform(0, 22, rng.integers(1, 12))).astype(int).tolist()
        size = [1, sum(runs)]
        counts = coco.frPyObjects({"size": size, "counts": runs}, *size)["counts"]
        assert run_lengths([counts])[0].tolist() == runs


def test_segments_are_decoded_at_some_pixels_as_at_all():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.02, 0.5, 1.0):
        segments = [segment_from_pixels(rng.random((37, 53)) < share) for _ in range(5)]
        rows, columns = (np.sort(rng.integers(0, most, 60)) for most in (37, 53))  # some twice
        expected = [segment.decode()[rows][:, columns] for segment in segments]
        assert np.array_equal(decode_at(segments, rows, columns), expected)


@pytest.mark.parametrize("counts", [b"", b"5", b"52o", b"o"])
def test_codes_that_do_not_fill_the_image_are_not_decoded_in_part(counts):
    sound = segment_from_pixels(np.ones((4, 3)))
    damaged = Segment(height=4, width=3, coverage_percent=50, counts=counts)
    for segments in ([damaged], [sound, damaged], [damaged, sound]):
        with pytest.raises(ValueError):
            decode_at(segments, np.arange(4), np.arange(3))


def test_a_wrong_area_is_reported_and_the_pixels_count(json_folder, read_json, caplog):
    path = sorted(json_folder.rglob("*.json"))[0]
    content = read_json(path)
    content[0]["area"] *= 1.5
    path.write_text(json.dumps(content))
    key = path.relative_to(json_folder).with_suffix("").as_posix()
    open_any_form(json_folder).segments(key)
    assert str(path) in caplog.text
    assert "the pixels count" in caplog.text


def test_a_wrong_table_is_reported_and_the_pixels_count(table_folder, sample, caplog):
    table = sorted(table_folder.rglob("table.txt"))[0]
    names = [line.split()[1] for line in table.read_text().splitlines()]
    key = table.parent.relative_to(table_folder).as_posix()
    expected = open_any_form(sample / "masks-amg-rle").segments(key)
    off = [f"{abs(segment.coverage_percent - 0.5):.6f}" for segment in expected]
    table.write_text("".join(f"{percent} {name}\n" for percent, name in zip(off, names, strict=True)))
    assert open_any_form(table_folder).segments(key) == expected
    assert str(table.parent) in caplog.text


def test_counts_that_are_no_code_are_refused_before_c_code_sees_them():
    for counts in ("", "é", "\x00", "oooo", 17, None, [-1, 5], [5, "x"]):
        with pytest.raises(ValueError):
            segment_from_rle({"size": [2, 2], "counts": counts})
    for size in ([0, 2], [2], "22", [2.0, 2]):
        with pytest.raises(ValueError):
            segment_from_rle({"size": size, "counts": [4]})


def test_a_png_that_is_none_and_one_that_is_missing_are_named(table_folder):
    first, second = sorted(table_folder.rglob("table.txt"))[:2]
    bad = first.parent / first.read_text().splitlines()[3].split()[1]
    bad.write_bytes(b"not a picture")
    gone = second.parent / second.read_text().splitlines()[0].split()[1]
    gone.unlink()
    source = open_any_form(table_folder)
    for path in (bad, gone):
        with pytest.raises(ValueError, match=f"{path.parent.name}/{path.name}"):
            source.segments(path.parent.relative_to(table_folder).as_posix())


BOX = np.zeros((4, 5), np.uint8)
BOX[1:3, 1:4] = 1
COLOURS = np.random.default_rng(0).integers(1, 256, (4, 5, 3), dtype=np.uint8)  # of a cut-out


def palette(pixels, *colours):
    image = Image.fromarray(pixels, "P")
    image.putpalette([channel for colour in colours for channel in colour])
    return image


PNGS = {
    "white on black": Image.fromarray(255 * BOX),
    "1 on 0": Image.fromarray(BOX),
    "one bit": Image.fromarray(255 * BOX).convert("1"),
    "16 bits": Image.fromarray(BOX.astype(np.uint16)),
    "a dark palette": palette(BOX, (0, 0, 0), (0, 0, 3)),
    "a palette of black on white": palette(BOX, (255, 255, 255), (0, 0, 0)),
    "a dark colour": Image.fromarray(BOX[..., None] * np.array([0, 0, 3], np.uint8)),
    "alpha over black": Image.fromarray(BOX[..., None] * np.array([0, 0, 0, 200], np.uint8)),
    "alpha of a cut-out": Image.fromarray(np.dstack([COLOURS, 255 * BOX])),
    "alpha over white": Image.fromarray(np.dstack([np.full_like(BOX, 255), 255 * BOX]), "LA"),
    "white on black, not transparent": Image.fromarray(np.dstack([255 * BOX] * 3 + [0 * BOX + 255])),
}  # fmt: skip


@pytest.mark.parametrize("kind", PNGS)
def test_what_is_not_0_or_else_not_transparent_is_inside(kind, tmp_path):
    (tmp_path / "image").mkdir()
    PNGS[kind].save(tmp_path / "image/0.png")
    (tmp_path / "image/table.txt").write_text("30.0 0.png\n")
    (segment,) = open_any_form(tmp_path).segments("image")
    np.testing.assert_array_equal(segment.decode(), BOX)


@pytest.mark.parametrize("area", ["0", "4", "nan", "inf", "-inf", "1" + 400 * "0", "1e400"])
@pytest.mark.parametrize("form", ["json", "metadata.csv"])
def test_an_area_that_cannot_be_of_these_pixels_is_damage(form, area, tmp_path):
    if form == "json":
        text = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}.get(area, area)
        rle = '{"size": [4, 5], "counts": [5, 2, 2, 2, 2, 2, 5]}'
        (tmp_path / "image.json").write_text(f'[{{"segmentation": {rle}, "area": {text}}}]')
    else:
        (tmp_path / "image").mkdir()
        Image.fromarray(BOX).save(tmp_path / "image/0.png")
        (tmp_path / "image/metadata.csv").write_text(f"id,area\n0,{area}\n")
    with pytest.raises(ValueError, match="image"):
        open_any_form(tmp_path).segments("image")


def test_segments_without_a_pixel_are_dropped_and_counted(tmp_path, caplog):
    for name, boxes in (("some", [BOX, 0 * BOX]), ("none", [0 * BOX])):
        rles = [coco.encode(np.asfortranarray(box)) for box in boxes]
        entries = [{"segmentation": {**rle, "counts": rle["counts"].decode()}} for rle in rles]
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    pack(tmp_path, None, overwrite=False, allow_damaged=False, processes=1)
    store = open_segments(tmp_path)
    assert (store.images(), store.listed_empty()) == ({"some"}, {"none"})
    assert len(store.segments("some")) == 1
    assert "2 segments without a pixel were dropped" in caplog.text


@pytest.mark.parametrize("target", ["nothing", "image.json"])
def test_a_link_that_leads_nowhere_is_damage_and_not_an_image_without_segments(tmp_path, target):
    (tmp_path / "image.json").symlink_to(target)
    with pytest.raises(ValueError, match=r"image\.json"):
        open_any_form(tmp_path).segments("image")


def test_a_dataset_of_coco_is_not_taken_for_one_image(tmp_path):
    entry = {"segmentation": {"size": [2, 2], "counts": [1, 3]}, "image_id": 1}
    (tmp_path / "instances.json").write_text(json.dumps({"images": [{}, {}], "annotations": [entry]}))
    with pytest.raises(ValueError, match=r"instances\.json: it is of 2 images; give a file for each image"):
        open_any_form(tmp_path).segments("instances")


def test_a_picture_beside_the_masks_is_no_mask(sample, tmp_path):
    folder = min((sample / "masks-amg-png").glob("*/*"))
    shutil.copytree(folder, tmp_path / "class/image")
    expected = open_any_form(tmp_path).segments("class/image")
    shutil.copy(folder / "0.png", tmp_path / "class/image/overlay.png")
    assert open_any_form(tmp_path).segments("class/image") == expected
    shutil.copy(folder / "0.png", tmp_path / "class/image/999.png")
    with pytest.raises(ValueError, match=r"does not list 999\.png"):
        open_any_form(tmp_path).segments("class/image")


def test_segments_of_different_sizes_in_one_image_are_refused(table_folder):
    table = sorted(table_folder.rglob("table.txt"))[0]
    png = table.parent / table.read_text().split()[1]
    Image.open(png).transpose(Image.Transpose.TRANSPOSE).save(png)
    with pytest.raises(ValueError, match="different sizes"):
        open_any_form(table_folder).segments(table.parent.relative_to(table_folder).as_posix())


@pytest.mark.parametrize("line", ["15.0", "much 0.png", "150 0.png", "-1 0.png", "nan 0.png"], ids=str)
def test_a_bad_line_of_a_table_is_named(table_folder, line):
    table = sorted(table_folder.rglob("table.txt"))[0]
    table.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"table\.txt:1"):
        open_any_form(table_folder).segments(table.parent.relative_to(table_folder).as_posix())


@pytest.mark.parametrize("name", ["../other/0.png", "/etc/0.png", "..", "a/../../0.png", "0.png\0"])
def test_a_name_in_a_file_never_leads_out_of_its_folder(table_folder, name):
    with pytest.raises(ValueError, match="is no name of a file below"):
        path_below(table_folder, name, "here")
    assert path_below(table_folder, "a/0..png", "here") == table_folder / "a/0..png"
    table = sorted(table_folder.rglob("table.txt"))[0]
    table.write_text(f"15.0 {name}\n")
    with pytest.raises(ValueError, match=r"table\.txt:1.* is no name of a file below"):
        open_any_form(table_folder).segments(table.parent.relative_to(table_folder).as_posix())


def test_metadata_cut_short_is_refused(sample, tmp_path):
    folder = min((sample / "masks-amg-png").glob("*/*"))
    shutil.copytree(folder, tmp_path / "class/image")
    table = tmp_path / "class/image/metadata.csv"
    table.chmod(0o644)
    table.write_text(table.read_text()[:-60])
    with pytest.raises(ValueError, match=r"metadata\.csv"):
        open_any_form(tmp_path).segments("class/image")


def test_a_folder_without_segments_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"expected masks\.sqlite"):
        open_segments(tmp_path)
    with pytest.raises(ValueError, match="no folder of segments"):
        open_segments(tmp_path / "nowhere")


def test_the_list_of_empty_images_knows_class_folders(tmp_path):
    path = tmp_path / "emptyfiles.txt"
    path.write_text("n01735189_1185.JPEG\nflowers/a b.jpg\nholiday.png\n\n")
    assert read_empty_list(path) == {"n01735189/n01735189_1185", "flowers/a b", "holiday"}


def test_importing_segments_imports_no_torch():
    code = "import segments, segments.cli, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_decoding_agrees_with_pycocotools(sample):
    source = open_any_form(sample / "masks-amg-rle")
    for key in sorted(source.images())[::10]:
        for segment in source.segments(key):
            size = [segment.height, segment.width]
            expected = coco.decode({"size": size, "counts": segment.counts})
            decoded = segment.decode()
            assert decoded.dtype == np.uint8
            np.testing.assert_array_equal(decoded, expected)


def test_pixels_make_a_segment_and_come_back():
    inside = np.random.default_rng(0).integers(0, 2, (7, 5)).astype(bool)
    segment = segment_from_pixels(inside)
    np.testing.assert_array_equal(segment.decode(), inside)
    assert segment.coverage_percent == 100 * inside.sum() / 35
