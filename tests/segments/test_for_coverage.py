"""Segments for some coverage ratios only: as near as promised, at a part of the work."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import read_rgb
from segments.config import FelzenszwalbSettings, SamSettings
from segments.felzenszwalb import Felzenszwalb
from segments.generate import Work, generate, images_by_key
from segments.pack import merge
from segments.sam import Candidates, Sam, Search, coverage_bounds, pixel_weights, visiting_order
from segments.segment import nearest, run_lengths
from segments.store import PackedStore
from tests.segments.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

PHOTOGRAPHS = 6
TOLERANCE = 1.5


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    pytest.importorskip("transformers")
    return make_tiny_model("sam", tmp_path_factory.mktemp("sam"))


@pytest.fixture(scope="session")
def photographs(sample, tmp_path_factory):
    """A folder of some of the sample's."""
    folder = tmp_path_factory.mktemp("photographs")
    for path in sorted((sample / "train").rglob("*.JPEG"))[::8][:PHOTOGRAPHS]:
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture(scope="session")
def make(model, photographs):
    """Make a store; what was done for it."""

    def run(out, *ratios, shard=None, **changed):
        options = {
            "model": str(model), "points_per_side": 10, "points_per_batch": 24, "batch_size": 3,
            "pred_iou_thresh": -1000.0, "stability_score_thresh": 0.8,
            "stability_score_offset": 0.1, "device": "cpu", "tolerance": TOLERANCE, **changed,
        }  # fmt: skip
        sam = Sam(SamSettings(for_coverage=ratios, **options))
        generate(images_by_key(photographs, None), out, sam, shard=shard or (0, 1), processes=None)
        return sam.tally

    return run


@pytest.fixture(scope="session")
def made(make, tmp_path_factory):
    """Stores with all segments and with those for 15 %, and what was done for each."""
    folder = tmp_path_factory.mktemp("made")
    return {
        name: (folder / f"{name}.sqlite", make(folder / f"{name}.sqlite", *ratios))
        for name, ratios in {"all": (), "15": (15.0,)}.items()
    }


def distance(store, key, ratio):
    return abs(store.nearest(key, ratio).coverage_percent - ratio)


def test_a_chosen_segment_is_within_the_tolerance_or_as_near_as_all_points_come(made):
    every, few = (PackedStore(made[name][0]) for name in ("all", "15"))
    assert few.images() == every.images()
    assert len(few.images()) == PHOTOGRAPHS
    for key in few.images():
        assert distance(few, key, 15) <= distance(every, key, 15) + TOLERANCE
        assert len(few.segments(key)) == 1
    within = [distance(few, key, 15) <= TOLERANCE for key in few.images()]
    assert sum(within) >= sum(distance(every, key, 15) <= TOLERANCE for key in every.images())
    assert any(within)


@pytest.mark.parametrize(
    ("percents", "chosen", "finished"),
    [
        ((16, 14), 14, True),  # as near: the smaller
        ((14, 16), 14, True),
        ((16.5, 40), 16.5, True),  # as far as the tolerance goes
        ((13.5, 40), 13.5, True),
        ((16.75, 12), 16.75, False),
    ],
)
def test_the_nearest_is_chosen_and_ends_the_search_within_the_tolerance(percents, chosen, finished):
    search = Search(15.0, TOLERANCE, 0.7)
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 20, 29, 29]])
    coverage = torch.tensor(percents, dtype=torch.float64)
    search.add(Candidates(torch.zeros(2, 1, 1), boxes, torch.ones(2), coverage))
    assert search.result().coverage.tolist() == [chosen]
    assert search.finished == finished


def test_points_are_saved_and_most_masks_are_never_upsampled(made):
    every, few = made["all"][1], made["15"][1]
    assert every["points"] == PHOTOGRAPHS * 10 * 10
    assert few["points"] < 0.7 * every["points"]
    assert few["masks upsampled"] < 0.35 * every["masks upsampled"]


def test_a_ratio_added_later_is_chosen_as_both_at_once(make, made, tmp_path, dump):
    later, at_once = tmp_path / "later.sqlite", tmp_path / "at_once.sqlite"
    shutil.copyfile(made["15"][0], later)
    make(later, 40.0)
    make(at_once, 15.0, 40.0)
    assert dump(later) == dump(at_once)
    assert PackedStore(later).settings["for_coverage"] == [15, 40]
    before = PackedStore(made["15"][0])
    for key in before.images():
        assert set(before.segments(key)) <= set(PackedStore(later).segments(key))
    assert not make(later, 15.0)  # nothing is left to do
    assert dump(later) == dump(at_once)


def test_adding_a_ratio_can_be_killed_and_leaves_the_store_to_its_readers(
    make, made, tmp_path, dump, monkeypatch
):
    out = tmp_path / "masks.sqlite"
    shutil.copyfile(made["15"][0], out)
    segments, calls = Sam.segments, []

    def fail_later(self, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return segments(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Sam, "segments", fail_later)
        patch.setattr("segments.store.SECONDS_PER_COMMIT", 0)
        with pytest.raises(KeyboardInterrupt):
            make(out, 40.0)
    assert dump(out) == dump(made["15"][0])
    assert list(tmp_path.glob("*.segmae-part"))
    assert make(out, 40.0)["images"] == PHOTOGRAPHS - 3
    make(tmp_path / "at_once.sqlite", 15.0, 40.0)
    assert dump(out) == dump(tmp_path / "at_once.sqlite")
    assert not list(tmp_path.glob("*.segmae-part"))


def test_shards_add_a_ratio_to_the_merged_store_and_so_does_merge(make, made, tmp_path, dump):
    out = tmp_path / "masks.sqlite"
    shutil.copyfile(made["15"][0], out)
    for index in (0, 1):
        make(out, 40.0, shard=(index, 2))
    merge([tmp_path / f"masks-{i}-of-2.sqlite" for i in (0, 1)], out, overwrite=True)
    make(tmp_path / "at_once.sqlite", 15.0, 40.0)
    assert dump(out) == dump(tmp_path / "at_once.sqlite")
    make(tmp_path / "40.sqlite", 40.0)
    stores = [made["15"][0], tmp_path / "40.sqlite"]
    merge(stores, tmp_path / "merged.sqlite", overwrite=False)
    assert dump(tmp_path / "merged.sqlite") == dump(out)
    assert PackedStore(tmp_path / "merged.sqlite").settings["for_coverage"] == [15, 40]


def test_all_segments_and_those_for_a_ratio_do_not_mix(make, made, tmp_path):
    for there, ratios in (("all", (15.0,)), ("15", ())):
        out = tmp_path / f"{there}.sqlite"
        shutil.copyfile(made[there][0], out)
        with pytest.raises(ValueError, match="for_coverage: "):
            make(out, *ratios)
    with pytest.raises(ValueError, match=r"tolerance: 1\.5 -> 3"):
        make(tmp_path / "15.sqlite", 40.0, tolerance=3.0)


def test_felzenszwalb_keeps_the_nearest_of_all(sample, photograph):
    image = read_rgb(min((sample / "train").rglob("*.JPEG")))
    generator = Felzenszwalb(FelzenszwalbSettings(longest_side=96))
    (every,) = generator.segments([photograph(image)])
    (few,) = generator.segments([photograph(image, ratios=(15.0, 40.0))])
    assert set(few) == {nearest(every, 15), nearest(every, 40)}


def test_pretraining_refuses_other_ratios_and_says_what_adds_them(made, photographs, tmp_path, capsys):
    from mae.cli import main

    data = tmp_path / "in1k"
    data.mkdir()
    (data / "train").symlink_to(photographs)

    def check(*options):
        arguments = ["--in1k-dir", data, "--masks-dir", made["15"][0], "--dry-run", "check"]
        arguments += ["--output-dir", tmp_path / "out", "--effective-batch-size", 4]
        with pytest.raises(SystemExit) as ended:
            main(["pretrain", *map(str, [*arguments, *options])])
        return ended.value.code, capsys.readouterr().err

    assert check("--mask-method", "segments")[0] == 0
    assert check("--mask-method", "patches", "--coverage-ratio", 40)[0] == 0
    code, said = check("--mask-method", "segments", "--coverage-ratio", 40)
    assert code == 2
    assert f"generate sam --images {data / 'train'} --out {made['15'][0]} --for-coverage 40" in said
    assert "--points-per-side 10" in said
    code, said = check("--mask-method", "segment_patches")
    assert code == 2
    assert "segment_patches needs all" in said
    assert "--for-coverage" not in said
    assert f"--out {made['15'][0].with_name('15-all.sqlite')}" in said


@pytest.mark.parametrize("side", [1, 5, 8, 32])
def test_every_point_is_visited_once_and_the_first_ones_lie_evenly(side):
    order = visiting_order(side, "n01440764/one")
    grid = {(round(x * side - 0.5), round(y * side - 0.5)) for x, y in order.tolist()}
    assert grid == {(x, y) for x in range(side) for y in range(side)}
    assert len(order) == side * side
    if side == 32:
        for first in (16, 64, 256):  # one in each of so many squares
            cells = (order[:first] * first**0.5).long()
            assert len({tuple(cell) for cell in cells.tolist()}) >= 0.5 * first
        assert not torch.equal(order, visiting_order(side, "n01440764/two"))
        assert torch.equal(order, visiting_order(side, "n01440764/one"))


@pytest.mark.parametrize("size", [(40, 56), (97, 31), (13, 200), (300, 400)])
def test_no_upsampled_mask_covers_more_or_less_than_its_bounds(size):
    import transformers

    pad = transformers.SamImageProcessor(pad_size={"height": 64, "width": 64})
    stretch = transformers.Sam2ImageProcessor()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 16, 16, generator=generator) + torch.randn(40, 1, 1)
    reshaped = [round(length * 64 / max(size)) for length in size]
    for processor, fills in ((pad, [side / 64 for side in reshaped]), (stretch, [1.0, 1.0])):
        full = processor.post_process_masks([logits[:, None]], [list(size)], reshaped_input_sizes=[reshaped])
        percent = full[0][:, 0].double().mean((1, 2)) * 100
        low, high = coverage_bounds(logits, pixel_weights(size, (16, 16), tuple(fills)))
        assert (low <= percent + 1e-3).all()
        assert (percent <= high + 1e-3).all()
        assert (high - low).mean() < 95


def test_only_what_was_chosen_is_copied_to_the_host(model, sample, photograph, monkeypatch):
    """Bytes of all tensors that numpy, lists or numbers were made of."""
    image = read_rgb(min((sample / "train").rglob("*.JPEG")))
    copied = []
    for name in ("numpy", "tolist", "item", "__bool__", "__int__", "__float__", "__array__"):
        original = getattr(torch.Tensor, name)

        def count(self, *arguments, original=original, **more):
            copied.append(self.nbytes)
            return original(self, *arguments, **more)

        monkeypatch.setattr(torch.Tensor, name, count)
    sam = Sam(
        SamSettings(
            model=str(model), points_per_side=8, pred_iou_thresh=-1000.0, device="cpu",
            stability_score_thresh=0.8, stability_score_offset=0.1,
        )
    )  # fmt: skip
    for ratios in ((), (15.0,)):
        copied.clear()
        (segments,) = sam.segments([photograph(image, ratios=ratios)])
        runs = sum(map(len, run_lengths([segment.counts for segment in segments])))
        # 4 bytes for each place where a survivor begins or ends, 8 for each number of few.
        assert sum(copied) <= 4 * runs + 8 * 3 * 64 * 4
        assert sum(copied) < image.shape[0] * image.shape[1] / 8  # one mask as bits


def test_a_large_photograph_is_read_reduced_and_its_segments_have_its_size(tmp_path):
    pixels = np.zeros((300, 400, 3), np.uint8)
    pixels[100:200, 100:300] = 255
    for kind in ("jpg", "png"):
        Image.fromarray(pixels).save(tmp_path / f"{kind}.{kind}", quality=95)
    generator = Felzenszwalb(FelzenszwalbSettings(longest_side=64))
    work = Work(images_by_key(tmp_path, None), generator)
    reduced, whole = (work.read([name])[0] for name in ("jpg", "png"))
    assert (reduced.pixels.shape, whole.pixels.shape) == ((75, 100, 3), (300, 400, 3))
    assert (reduced.height, reduced.width) == (300, 400)
    for photograph in (reduced, whole):
        (segments,) = work.generator.segments([photograph])
        assert {(segment.height, segment.width) for segment in segments} == {(300, 400)}


@pytest.mark.parametrize("generator", ["sam", "felzenszwalb"])
def test_an_estimate_writes_nothing_and_its_numbers_hold(
    generator, model, photographs, tmp_path, masks_command
):
    options = ["--images", photographs, "--out", tmp_path / "out.sqlite", "--estimate", "--json"]
    if generator == "sam":
        options += ["--model", model, "--points-per-side", 4, "--device", "cpu"]
    else:
        options += ["--longest-side", 64]
    code, said = masks_command("generate", generator, *options)
    assert code == 0, said
    price = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert price["images"] == PHOTOGRAPHS
    assert price["seconds"] == pytest.approx(price["seconds_per_image"] * PHOTOGRAPHS)
    assert price["points_per_image"] == (16 if generator == "sam" else None)
    assert list(tmp_path.iterdir()) == []
    masks_command("generate", generator, *(o for o in options if o not in ("--estimate", "--json")))
    assert price["bytes"] == pytest.approx((tmp_path / "out.sqlite").stat().st_size, rel=0.5)


@pytest.fixture
def add(tmp_path):
    """Add a ratio to the store of two training images and a held-out one."""
    rng = np.random.default_rng(0)
    for name in ("train/a.png", "train/b.png", "val/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(tmp_path / name)

    def run(*ratios, val_dir=tmp_path / "val", out=tmp_path / "masks.sqlite"):
        settings = FelzenszwalbSettings(longest_side=60, for_coverage=ratios)
        images = images_by_key(tmp_path / "train", val_dir)
        generate(images, out, Felzenszwalb(settings), processes=1)
        return PackedStore(out)

    return run


def test_a_ratio_is_added_to_all_images_of_a_store_or_refused(add):
    """Held-out images that are not named would lack it."""
    before = add(15.0).path.read_bytes()
    with pytest.raises(ValueError, match=r"has 1 images that are not among .* such as val/c, and"):
        add(25.0, val_dir=None)
    store = add(15.0, val_dir=None)
    assert store.path.read_bytes() == before
    store = add(25.0)
    assert store.images() | store.listed_empty() == {"a", "b", "val/c"}
    assert store.settings["for_coverage"] == [15, 25]


def test_an_image_that_failed_is_tried_again_for_every_ratio(add, tmp_path, dump):
    sound = (tmp_path / "train/a.png").read_bytes()
    (tmp_path / "train/a.png").write_bytes(b"no image")
    for ratio in (15.0, 25.0):
        with pytest.raises(RuntimeError, match="1 of 3 images failed"):
            add(ratio)
        assert PackedStore(tmp_path / "masks.sqlite").failures().keys() == {"a"}
    (tmp_path / "train/a.png").write_bytes(sound)
    (tmp_path / "train/b.png").write_bytes(b"no image")  # it fails for a new ratio only
    with pytest.raises(RuntimeError, match="1 of 3 images failed"):
        add(40.0)
    store = PackedStore(tmp_path / "masks.sqlite")
    assert (store.images() | store.listed_empty(), store.failures().keys()) == (
        {"a", "val/c"},
        {"b"},
    )
    Image.new("RGB", (60, 40)).save(tmp_path / "train/b.png")
    at_once = tmp_path / "at_once.sqlite"
    assert dump(add(15.0).path) == dump(add(15.0, 25.0, 40.0, out=at_once).path)


def test_stores_of_other_images_for_other_ratios_are_not_merged(add, tmp_path):
    paths = [tmp_path / "15.sqlite", tmp_path / "25.sqlite"]
    add(15.0, out=paths[0])
    add(25.0, out=paths[1], val_dir=None)
    with pytest.raises(ValueError, match=r"of 25 %, no store has .* such as val/c; make"):
        merge(paths, tmp_path / "merged.sqlite", overwrite=False)
