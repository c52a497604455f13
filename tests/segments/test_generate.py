"""Making segments: the same however the work was interrupted or shared."""

import json
import os
import signal
import sqlite3

import numpy as np
import pytest
from PIL import Image

from common.files import beside
from common.images import read_rgb
from segments import store
from segments.config import FelzenszwalbSettings
from segments.felzenszwalb import Felzenszwalb
from segments.generate import generate, images_by_key, parse_shard
from segments.pack import merge, pack
from segments.store import PackedStore


def felzenszwalb(**settings):
    return Felzenszwalb(FelzenszwalbSettings(**settings))


FAST = felzenszwalb(scales=(100, 800), longest_side=64, sigma=0.8)
FAST_OPTIONS = ["--scales", "100,800", "--longest_side", 64, "--sigma", 0.8]


def run(images, out, generator=FAST, index=0, count=1, processes=1):
    shard = (index, count)
    return generate(images_by_key(images, None), out, generator, shard=shard, processes=processes)


def all_segments(path):
    source = PackedStore(path)
    return {key: source.segments(key) for key in source.images()}


def test_flat_boxes_are_found_exactly(photograph):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[10:30, 10:40] = 255
    (found,) = felzenszwalb(scales=(100, 400), sigma=0.1).segments([photograph(pixels)])
    assert [segment.decode().sum() for segment in found] == [600, 1800]
    assert found[0].decode()[10:30, 10:40].all()


def test_segments_have_the_size_of_a_large_image_and_no_near_copies(sample, photograph):
    image = read_rgb(min((sample / "train").rglob("*.JPEG")))
    (found,) = felzenszwalb(longest_side=128).segments([photograph(image)])
    assert len(found) > 5
    assert {(segment.height, segment.width) for segment in found} == {image.shape[:2]}
    assert all(0.5 <= segment.coverage_percent <= 90 for segment in found)
    pixels = np.stack([segment.decode().ravel() for segment in found]).astype(np.float32)
    common = pixels @ pixels.T
    areas = pixels.sum(1)
    overlap = common / (areas[:, None] + areas[None] - common)
    assert (overlap - np.eye(len(found))).max() <= 0.85


def test_a_store_says_how_it_was_made_and_unpacks_to_what_packs_again(images, tmp_path, masks_command, dump):
    store = tmp_path / "masks.sqlite"
    arguments = ["--images", images, "--out", store, *FAST_OPTIONS]
    code, said = masks_command("generate", "felzenszwalb", *arguments)
    assert code == 0, said
    assert all_segments(store).keys() == {"a/one", "a/two", "b/three", "b/deep/four", "b/five"}
    assert PackedStore(store).settings == FAST.settings
    assert FAST.settings["scales"] == [100, 800]
    assert FAST.settings["generator"] == "felzenszwalb"
    assert masks_command("unpack", store, tmp_path / "json")[0] == 0
    assert masks_command("pack", tmp_path / "json", "--out", tmp_path / "again.sqlite")[0] == 0
    assert dump(store)[1:] == dump(tmp_path / "again.sqlite")[1:]


def test_what_is_done_is_skipped_and_new_images_are_added(images, tmp_path):
    out = tmp_path / "masks.sqlite"
    assert run(images, out).already_there == 0
    assert run(images, out).already_there == 5
    Image.new("RGB", (64, 48), (9, 9, 9)).save(images / "a/new.png")
    summary = run(images, out)
    assert (summary.already_there, summary.images + summary.without) == (5, 6)


def test_other_settings_are_refused_naming_the_difference(images, tmp_path, in_child):
    out, other = (
        tmp_path / "masks.sqlite",
        felzenszwalb(scales=(100, 800), longest_side=48, sigma=0.8),
    )
    assert in_child(kill_during, images, out, FAST, 2) == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"masks\.sqlite\.segmae-part .*longest_side: 64 -> 48"):
        run(images, out, other)
    run(images, out)
    with pytest.raises(ValueError, match=r"masks\.sqlite was made .*longest_side: 64 -> 48"):
        run(images, out, other)
    run(images, tmp_path / "other.sqlite", other)
    with pytest.raises(ValueError, match="longest_side: 48 -> 64"):
        merge([out, tmp_path / "other.sqlite"], tmp_path / "m.sqlite", overwrite=False)


def test_a_store_that_was_packed_is_not_added_to(images, tmp_path, json_folder):
    out = tmp_path / "masks.sqlite"
    pack(json_folder, out, overwrite=False, allow_damaged=False, processes=1)
    with pytest.raises(ValueError, match="generator: None -> felzenszwalb"):
        run(images, out)


def forget_setting(path, name):
    """As a version before the setting existed left the store."""
    with sqlite3.connect(path) as connection:
        (text,) = connection.execute("SELECT value FROM meta WHERE name = 'settings'").fetchone()
        settings = json.loads(text)
        del settings[name]
        connection.execute("UPDATE meta SET value = ? WHERE name = 'settings'", (json.dumps(settings),))
    connection.close()


def test_a_setting_that_a_later_version_adds_orphans_no_store(images, tmp_path, in_child):
    finished, unfinished = tmp_path / "finished.sqlite", tmp_path / "unfinished.sqlite"
    run(images, finished)
    forget_setting(finished, "sigma")
    assert in_child(kill_during, images, unfinished, FAST, 2) == -signal.SIGKILL
    forget_setting(beside(unfinished), "sigma")
    new = felzenszwalb(scales=(100, 800), longest_side=64, sigma=0.5)
    for out in (finished, unfinished):
        with pytest.raises(ValueError, match=r"sigma: 0\.8 -> 0\.5"):
            run(images, out, new)
    Image.new("RGB", (64, 48), (9, 9, 9)).save(images / "a/new.png")
    assert run(images, finished).already_there == 5
    assert run(images, unfinished).already_there == 2
    run(images, tmp_path / "now.sqlite")
    for order in ([finished, tmp_path / "now.sqlite"], [tmp_path / "now.sqlite", finished]):
        merge(order, tmp_path / "merged.sqlite", overwrite=True)
    run(images, tmp_path / "new.sqlite", new)
    for order in ([finished, tmp_path / "new.sqlite"], [tmp_path / "new.sqlite", finished]):
        with pytest.raises(ValueError, match=r"sigma: 0\.\d -> 0\.\d"):
            merge(order, tmp_path / "merged.sqlite", overwrite=True)


def kill_during(images, out, generator, after):
    add, added = store._add, []

    def add_or_die(*arguments):
        added.append(arguments)
        if len(added) > after:
            os.kill(os.getpid(), signal.SIGKILL)
        add(*arguments)

    store._add, store.SECONDS_PER_COMMIT = add_or_die, -1
    run(images, out, generator)


@pytest.mark.parametrize("after", [0, 3])
def test_a_killed_run_equals_one_that_was_not(images, tmp_path, in_child, after):
    out, whole = tmp_path / "masks.sqlite", tmp_path / "whole.sqlite"
    run(images, whole)
    assert in_child(kill_during, images, out, FAST, after) == -signal.SIGKILL
    assert run(images, out).already_there == after
    assert all_segments(out) == all_segments(whole)
    assert not list(tmp_path.rglob("*.segmae-part"))


def test_a_run_killed_before_it_gave_the_store_its_name_finishes_it(images, tmp_path, in_child):
    out = tmp_path / "masks.sqlite"
    run(images, out)
    out.rename(beside(out))
    assert run(images, out).already_there == 5
    assert len(PackedStore(out).images()) == 5


def test_two_merged_shards_equal_one_run(images, tmp_path, dump):
    run(images, tmp_path / "whole.sqlite", processes=2)
    for index in (0, 1):
        run(images, tmp_path / "masks.sqlite", index=index, count=2)
    shards = [tmp_path / f"masks-{index}-of-2.sqlite" for index in (0, 1)]
    assert [len(PackedStore(path).images()) for path in shards] == [3, 2]
    with pytest.raises(ValueError, match="of the 2 shards 0 are missing"):
        merge(shards[1:], tmp_path / "masks.sqlite", overwrite=False)
    merge(shards, tmp_path / "masks.sqlite", overwrite=False)
    assert dump(tmp_path / "masks.sqlite") == dump(tmp_path / "whole.sqlite")


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")])
def test_torchrun_and_slurm_share_the_images(monkeypatch, names):
    assert parse_shard(None) == (0, 1)
    monkeypatch.setenv(names[0], "2")
    monkeypatch.setenv(names[1], "4")
    assert parse_shard(None) == (2, 4)


def test_a_failed_image_is_named_recorded_and_tried_again(images, tmp_path, masks_command):
    (images / "b/broken.jpg").write_bytes(b"no image")
    store = tmp_path / "masks.sqlite"
    arguments = ["generate", "felzenszwalb", "--images", images, "--out", store, *FAST_OPTIONS]
    code, said = masks_command(*arguments)
    assert code == 1
    assert "b/broken.jpg" in said
    assert len(PackedStore(store).images()) == 5
    assert "b/broken" in PackedStore(store).failures()
    Image.new("RGB", (64, 48), (200, 0, 0)).save(images / "b/broken.jpg")
    assert masks_command(*arguments)[0] == 0
    assert "b/broken" in PackedStore(store).images() | PackedStore(store).listed_empty()


def test_a_failure_in_a_shard_is_in_the_merged_store(images, tmp_path):
    (images / "b/broken.jpg").write_bytes(b"no image")
    for index in (0, 1):
        try:
            run(images, tmp_path / "masks.sqlite", index=index, count=2)
        except RuntimeError as error:
            assert "1 of 3 images failed" in str(error)
    shards = [tmp_path / f"masks-{index}-of-2.sqlite" for index in (0, 1)]
    assert merge(shards, tmp_path / "masks.sqlite", overwrite=False).left_out == 1
    assert "b/broken" in PackedStore(tmp_path / "masks.sqlite").failures()


def test_trying_a_broken_image_again_leaves_the_finished_store_to_its_readers(images, tmp_path):
    (images / "b/broken.jpg").write_bytes(b"no image")
    store = tmp_path / "masks.sqlite"
    with pytest.raises(RuntimeError, match="1 of 6 images failed"):
        run(images, store)
    before = store.stat()
    with pytest.raises(RuntimeError, match="1 of 6 images failed"):
        run(images, store)
    assert (store.stat().st_ino, store.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    (images / "b/broken.jpg").unlink()
    Image.new("RGB", (64, 48), (200, 0, 0)).save(images / "b/broken.jpg")
    run(images, store)
    assert not PackedStore(store).failures()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shard", "2/2"], "counts from 0"),
        (["--shard", "first"], "write it as 0/4"),
        (["--scales", "a,b"], "--scales is 'a'; it should be a valid number"),
        (["--scales", "0,50"], "--scales is '0'; it should be greater than 0"),
        (["--points-per-side", "3"], "No such option"),
        (["--min-coverage", "95"], "below --max-coverage"),
        (["--images", "/nowhere/at/all"], "is not a folder"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(images, tmp_path, masks_command, arguments, said):
    out = tmp_path / "out"
    basic = ["generate", "felzenszwalb", "--images", images, "--out", out]
    code, text = masks_command(*basic, *arguments)
    assert code == 2
    assert said in text
    assert len(text.strip().splitlines()) == 1
    assert not out.exists()


def test_images_that_differ_in_suffix_only_are_refused(images, tmp_path):
    Image.new("RGB", (8, 8)).save(images / "a/one.png")
    with pytest.raises(ValueError, match=r"a/one\.jpg and .*a/one\.png"):
        run(images, tmp_path / "masks.sqlite")
