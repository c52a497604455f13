"""Every form gives the same segments; what is damaged is named."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from mae.segments import open_segments
from mae.segments.forms import read_empty_list
from mae.segments.segment import (
    Segment,
    nearest,
    run_lengths,
    segment_from_pixels,
    segment_from_rle,
)

FORMS = ["masks", "masks-amg-png", "masks-sa1b"]
RATIOS = [0, 2, 5, 15, 40, 100]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_segments(sample, form):
    source, reference = open_segments(sample / form), open_segments(sample / "masks-amg-rle")
    assert source.images() <= reference.images()
    for key in sorted(source.images())[:8]:
        assert source.segments(key) == reference.segments(key)
        for ratio in RATIOS:
            assert source.nearest(key, ratio) == reference.nearest(key, ratio)


def test_a_segment_decodes_to_the_pixels_of_its_png(sample):
    source = open_segments(sample / "masks")
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
    source = open_segments(sample / form)
    assert len(source.images()) == images
    assert "n01735189/n01735189_1185" in source.listed_empty()
    assert not source.images() & source.listed_empty()
    assert source.nearest("n01735189/n01735189_1185", 15) is None
    assert source.segments("nowhere/nothing") == []


def test_the_nearest_is_by_pixels_and_the_smaller_on_a_tie():
    def square(percent):
        return Segment(height=10, width=10, coverage_percent=percent, counts=b"")

    assert nearest([square(20.0), square(10.0), square(40.0)], 15).coverage_percent == 10
    assert nearest([square(20.0), square(10.0)], 15.1).coverage_percent == 20
    assert nearest([], 15) is None


def test_uncompressed_run_lengths_are_read(tmp_path):
    inside = np.zeros((3, 4), np.uint8)
    inside[1:, 1:3] = 1
    annotation = {"segmentation": {"size": [3, 4], "counts": [4, 2, 1, 2, 3]}, "area": 4}
    (tmp_path / "image.json").write_text(json.dumps([annotation]))
    segment = open_segments(tmp_path).nearest("image", 15)
    np.testing.assert_array_equal(segment.decode(), inside)
    assert segment.coverage_percent == pytest.approx(100 / 3)


def test_run_lengths_agree_with_what_was_encoded():
    rng = np.random.default_rng(0)
    for _ in range(50):
        runs = (2 ** rng.uniform(0, 22, rng.integers(1, 12))).astype(int).tolist()
        size = [1, sum(runs)]
        counts = coco.frPyObjects({"size": size, "counts": runs}, *size)["counts"]
        assert run_lengths(counts).tolist() == runs


def test_a_wrong_area_is_reported_and_the_pixels_count(json_folder, read_json, caplog):
    path = sorted(json_folder.rglob("*.json"))[0]
    content = read_json(path)
    content[0]["area"] *= 3
    path.write_text(json.dumps(content))
    key = path.relative_to(json_folder).with_suffix("").as_posix()
    open_segments(json_folder).nearest(key, 15)
    assert str(path) in caplog.text
    assert "the pixels count" in caplog.text


def test_a_wrong_table_is_reported_and_the_pixels_choose(table_folder, sample, caplog):
    table = sorted(table_folder.rglob("table.txt"))[0]
    names = [line.split()[1] for line in table.read_text().splitlines()]
    table.write_text("".join(f"{15 + i / 1e6:.6f} {name}\n" for i, name in enumerate(names)))
    key = table.parent.relative_to(table_folder).as_posix()
    expected = open_segments(sample / "masks-amg-rle").nearest(key, 15)
    assert open_segments(table_folder).nearest(key, 15) == expected
    assert str(table.parent) in caplog.text


def test_the_nearest_of_a_table_opens_few_pngs(table_folder, monkeypatch):
    from mae.segments import pngs

    opened = []
    read = pngs.read_segment_png
    monkeypatch.setattr(pngs, "read_segment_png", lambda path: opened.append(path) or read(path))
    source = open_segments(table_folder)
    for key in source.images():
        source.nearest(key, 15)
    assert len(opened) <= 2 * len(source.images())


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-40])


def wrong_length(path):
    content = json.loads(path.read_text())
    for entry in content:
        entry["segmentation"]["size"][0] += 1
        del entry["area"]
    path.write_text(json.dumps(content))


def ends_inside_a_number(path):
    content = json.loads(path.read_text())
    for entry in content:
        entry["segmentation"]["counts"] = entry["segmentation"]["counts"][:-1] + "o"
    path.write_text(json.dumps(content))


def not_segments(path):
    path.write_text(json.dumps({"images": [1, 2, 3], "padding": "x" * 500}))


def not_even_text(path):
    path.write_bytes(bytes(range(256)) * 4)


@pytest.mark.parametrize(
    "damage", [cut_short, wrong_length, ends_inside_a_number, not_segments, not_even_text]
)
def test_damaged_json_is_named_never_read(json_folder, damage):
    path = sorted(json_folder.rglob("*.json"))[2]
    key = path.relative_to(json_folder).with_suffix("").as_posix()
    damage(path)
    source = open_segments(json_folder)
    assert key in source.images()
    for read in (source.segments, lambda key: source.nearest(key, 15)):
        with pytest.raises(ValueError, match=path.name):
            read(key)


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
    source = open_segments(table_folder)
    for path in (bad, gone):
        with pytest.raises(ValueError, match=f"{path.parent.name}/{path.name}"):
            source.segments(path.parent.relative_to(table_folder).as_posix())


def test_segments_of_different_sizes_in_one_image_are_refused(table_folder):
    table = sorted(table_folder.rglob("table.txt"))[0]
    png = table.parent / table.read_text().split()[1]
    Image.open(png).transpose(Image.Transpose.TRANSPOSE).save(png)
    with pytest.raises(ValueError, match="different sizes"):
        open_segments(table_folder).segments(table.parent.relative_to(table_folder).as_posix())


@pytest.mark.parametrize(
    "line", ["15.0", "much 0.png", "150 0.png", "-1 0.png", "nan 0.png"], ids=str
)
def test_a_bad_line_of_a_table_is_named(table_folder, line):
    table = sorted(table_folder.rglob("table.txt"))[0]
    table.write_text(f"{line}\n")
    with pytest.raises(ValueError, match=r"table\.txt:1"):
        open_segments(table_folder).nearest(table.parent.relative_to(table_folder).as_posix(), 15)


def test_metadata_cut_short_is_refused(sample, tmp_path):
    import shutil

    folder = min((sample / "masks-amg-png").glob("*/*"))
    shutil.copytree(folder, tmp_path / "class/image")
    table = tmp_path / "class/image/metadata.csv"
    table.chmod(0o644)
    table.write_text(table.read_text()[:-60])
    with pytest.raises(ValueError, match=r"metadata\.csv"):
        open_segments(tmp_path).segments("class/image")


def test_a_folder_without_segments_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"expected masks\.sqlite"):
        open_segments(tmp_path)
    with pytest.raises(ValueError, match="neither a folder"):
        open_segments(tmp_path / "nowhere")


def test_the_list_of_empty_images_knows_class_folders(tmp_path):
    path = tmp_path / "emptyfiles.txt"
    path.write_text("n01735189_1185.JPEG\nflowers/a b.jpg\nholiday.png\n\n")
    assert read_empty_list(path) == {"n01735189/n01735189_1185", "flowers/a b", "holiday"}


def test_a_source_travels_into_another_process(sample):
    source = open_segments(sample / "masks-amg-rle")
    key = min(source.images())
    again = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < 2000
    assert again.nearest(key, 15) == source.nearest(key, 15)


def test_importing_segments_imports_no_torch():
    code = "import mae.segments, mae.segments.cli, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_decoding_agrees_with_pycocotools(sample):
    source = open_segments(sample / "masks-amg-rle")
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
