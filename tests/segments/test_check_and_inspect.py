"""Checking a dataset before a run, and looking at its segments."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image

from segments.check import check
from segments.cli import _InspectOptions
from segments.forms import open_any_form
from segments.look import WORST, collect, farthest

IMAGES = 6


@pytest.fixture
def dataset(sample, json_folder):
    """train/ and masks/ of the images of `json_folder`."""
    root = json_folder.parent
    for path in json_folder.rglob("*.json"):
        name = path.relative_to(json_folder).with_suffix(".JPEG")
        (root / "train" / name).parent.mkdir(parents=True)
        shutil.copyfile(sample / "train" / name, root / "train" / name)
    return root


def images_of(dataset):
    return sorted((dataset / "train").rglob("*.JPEG"))


def json_of(dataset, image):
    return dataset / "masks" / image.relative_to(dataset / "train").with_suffix(".json")


@pytest.mark.parametrize("packed", [False, True])
def test_a_good_dataset_passes(dataset, tmp_path, masks_command, packed):
    if packed:
        assert masks_command("pack", dataset / "masks")[0] == 0
    out = tmp_path / "offenders.txt"
    code, said = masks_command("check", dataset, "--out", out)
    assert code == 0, said
    assert f"{IMAGES} images checked, 0 offenders" in said
    assert out.read_text() == ""


def test_every_kind_of_offender_is_listed_with_its_reason(dataset, tmp_path, masks_command):
    images = images_of(dataset)
    images[0].write_bytes(images[0].read_bytes()[:-2000])
    json_of(dataset, images[1]).unlink()
    turned = Image.open(images[2]).transpose(Image.Transpose.ROTATE_90)
    turned.save(images[2], "JPEG")
    content = json.loads(json_of(dataset, images[3]).read_text())
    content[4]["area"] += 1000
    json_of(dataset, images[3]).write_text(json.dumps(content))
    damaged = json_of(dataset, images[4])
    damaged.write_text(damaged.read_text()[:-30])
    out = tmp_path / "offenders.txt"
    code, said = masks_command("check", dataset, "--out", out)
    assert code == 1, said
    lines = dict(line.split("\t") for line in out.read_text().splitlines())
    names = [image.relative_to(dataset / "train").as_posix() for image in images]
    assert lines.keys() == set(names[:5])
    assert "cannot be read" in lines[names[0]]
    assert "no list says so" in lines[names[1]]
    assert "transposed" in lines[names[2]]
    assert "the pixels count" in lines[names[3]]
    assert damaged.name in lines[names[4]]


def test_an_image_listed_as_empty_is_no_offender(dataset, tmp_path, masks_command):
    image = images_of(dataset)[0]
    json_of(dataset, image).unlink()
    (dataset / "train/emptyfiles.txt").write_text(f"{image.name}\n")
    assert masks_command("check", dataset, "--out", tmp_path / "offenders.txt")[0] == 0


def test_segments_of_the_displayed_orientation_fit_a_rotated_photograph(dataset, tmp_path, masks_command):
    path = images_of(dataset)[0]
    image = Image.open(path)
    exif = image.getexif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    image.transpose(Image.Transpose.ROTATE_90).save(path, "JPEG", exif=exif.tobytes())
    code, said = masks_command("check", dataset, "--out", tmp_path / "offenders.txt")
    assert code == 0, said


def check_and_stop(dataset, out, how):
    from segments import check as module

    check_one = module._check_one
    seen = []

    def stop_at_the_third(*arguments):
        seen.append(arguments)
        if len(seen) == 3:
            os.kill(os.getpid(), how)
        return check_one(*arguments)

    module._check_one = stop_at_the_third
    from mae.cli import main

    main(["masks", "check", str(dataset), "--out", str(out), "--processes", "1"])


@pytest.mark.parametrize(
    ("how", "code", "to_do"), [(signal.SIGTERM, 75, 3), (signal.SIGKILL, -signal.SIGKILL, 4)]
)
def test_a_stopped_check_goes_on_where_it_was(dataset, tmp_path, in_child, how, code, to_do):
    images_of(dataset)[0].write_bytes(b"broken")
    out = tmp_path / "offenders.txt"
    assert in_child(check_and_stop, dataset, out, how) == code
    assert not out.exists()
    state = tmp_path / "offenders.txt.state"
    assert len(state.read_text().splitlines()) == 1 + IMAGES - to_do
    checked, left = check(dataset, dataset / "masks", out, processes=1)
    assert (len(checked), left, len([*filter(None, checked.values())])) == (IMAGES, 0, 1)
    assert len(out.read_text().splitlines()) == 1
    assert not state.exists()


def test_the_state_of_another_check_is_refused(dataset, tmp_path, in_child):
    out = tmp_path / "offenders.txt"
    in_child(check_and_stop, dataset, out, signal.SIGTERM)
    shutil.copytree(dataset / "masks", dataset / "other")
    with pytest.raises(ValueError, match="is of a check of"):
        check(dataset, dataset / "other", out, processes=1)


def test_inspect_prints_numbers_and_draws(dataset, tmp_path, masks_command):
    Image.open(images_of(dataset)[0]).save(dataset / "train/stranger.jpeg")
    out = tmp_path / "look.png"
    ratios = ["--coverage_ratio", "10,25"]
    code, said = masks_command("inspect", dataset / "masks", "--out", out, *ratios)
    assert code == 0, said
    assert re.search(r"images with segments: +5 \(5 looked at\)", said)
    assert "nearest to 10 %" in said
    assert "nearest to 25 %" in said
    assert "1 images have no segments and no list says so: stranger" in said
    assert min(Image.open(tmp_path / "look.png").size) > 800


def test_inspect_needs_no_images(packed_table, tmp_path, masks_command):
    code, said = masks_command("inspect", packed_table, "--out", tmp_path / "look")
    assert code == 0, said
    assert "no picture" in said
    assert not (tmp_path / "look.png").exists()


def test_inspect_counts_exactly(tmp_path):

    folder = write_masks(tmp_path / "masks", a=annotations(10, 20), b=annotations(40), c=[])
    (folder / "d.json").write_text("[{")
    statistics = collect(open_any_form(folder), processes=1)
    assert list(statistics.coverages) == ["a", "b"]
    assert statistics.without == 1
    assert [reason for reason in statistics.damaged if "d.json" in reason]
    assert [*map(len, statistics.coverages.values())] == [2, 1]
    assert statistics.distances(15).tolist() == [5, 25]


def annotations(*areas):
    """Segments of 10 x 10 pixels, each the last so many of them."""
    return [{"segmentation": {"size": [10, 10], "counts": [100 - area, area]}} for area in areas]


def write_masks(folder, **images):
    folder.mkdir()
    for name, found in images.items():
        (folder / f"{name}.json").write_text(json.dumps(found))
    return folder


def test_inspect_says_for_how_many_images_a_store_comes_near(tmp_path, masks_command):
    near = {f"i{distance}": annotations(15 + distance) for distance in (0, 1, 2, 4, 30)}
    masks = write_masks(tmp_path / "masks", **near)
    code, said = masks_command("inspect", masks, "--out", tmp_path / "look", "--coverage-ratio", 15)
    assert code == 0, said
    assert "of images, 40 % within 1, 60 % within 2, 80 % within 5" in said


def test_inspect_compares_what_two_stores_choose(tmp_path, masks_command):
    ours = write_masks(
        tmp_path / "ours", a=annotations(20), b=annotations(20), c=annotations(20), d=annotations(9)
    )
    theirs = write_masks(tmp_path / "theirs", a=annotations(20), b=annotations(17), c=annotations(10), e=[])
    out = tmp_path / "look"
    arguments = ["inspect", ours, "--against", theirs, "--out", out, "--coverage-ratio", 20]
    code, said = masks_command(*arguments)
    assert code == 0, said
    # IoU 1, 17 / 20 and 1 / 2 of the three images that both have.
    assert re.search(r"chosen for 20 %: +the same in 67 % of 3 images", said)
    assert "IoU median 0.85" in said
    empty = write_masks(tmp_path / "others", z=annotations(3))
    code, said = masks_command("inspect", ours, "--against", empty, "--out", out)
    assert code == 2
    assert "no image has segments in both" in said


def test_the_images_farthest_from_a_ratio_are_drawn_worst_first(tmp_path):

    masks = write_masks(tmp_path / "masks", **{f"i{n}": annotations(n) for n in range(10, 20)})
    statistics = collect(open_any_form(masks), processes=1)
    assert farthest(statistics, sorted(statistics.coverages), 20) == [f"i{n}" for n in range(10, 10 + WORST)]


def test_a_picture_goes_by_default_beside_the_folders_of_the_project():
    assert not (Path(__file__).parents[2] / _InspectOptions().out).exists()
