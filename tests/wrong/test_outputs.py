"""An output is never an input, and one that cannot be written is found before the work."""

import os
from pathlib import Path

import pytest
from PIL import Image

from common.files import beside
from tests.wrong.world import (
    Case,
    benchmark_words,
    call,
    check,
    pretrain_words,
    snapshot,
    train_words,
)

# Commands that write one file, up to its name.
TO_FILE = {
    "export .pth": ("mae export {w}/pre/checkpoint-1.pth --plugin {w}/nano.py --out", ".pth"),
    "export .safetensors": (
        "mae export {w}/pre/checkpoint-1.pth --plugin {w}/nano.py --out", ".safetensors"),
    "reconstruct": ("mae reconstruct {w}/pre/checkpoint-1.pth --plugin {w}/nano.py --out", ".png"),
    "evaluate": ("segmenter evaluate {w}/fine/best.pth --plugin {w}/nano.py --device cpu "
                 "--workers 0 --dataset {w}/data/dataset.yml --out", ".json"),
    "pack": ("segments pack {w}/loose --processes 1 --out", ".sqlite"),
    "merge": ("segments merge {w}/in1k/masks/masks.sqlite --out", ".sqlite"),
    "generate": ("segments generate felzenszwalb --images {w}/photos --processes 1 --out",
                 ".sqlite"),
    "check": ("segments check {w}/in1k --processes 1 --out", ".txt"),
    "inspect": ("segments inspect {w}/in1k/masks --processes 1 --out", ""),
    "fetch": ("mae fetch --model vit_base --url http://127.0.0.1:9/x --out", ".pth"),
    "report": ("benchmark report {w}/run --out", ".html"),
}  # fmt: skip
# Commands that write into a folder, up to its name.
TO_FOLDER = {
    "predict": "segmenter predict {w}/fine/best.pth {w}/photos --plugin {w}/nano.py --device cpu "
               "--out",
    "save predictions": "segmenter evaluate {w}/fine/best.pth --plugin {w}/nano.py --device cpu "
                        "--workers 0 --dataset {w}/data/dataset.yml --save-predictions",
    "unpack": "segments unpack {w}/in1k/masks/masks.sqlite",
    "sample": "benchmark sample",
    "probe": "segmenter probe random --plugin {w}/nano.py --model vit_speck --device cpu --workers "
             "0 --dataset {w}/data/dataset.yml --output-dir",
    "prepare": "segmenter prepare ade20k --url http://127.0.0.1:9/x",
}  # fmt: skip


def a_run(world: Path) -> None:
    (world / "run/eval_output").mkdir(parents=True)


def spoil(kind, path):
    """Put something in the way of an output."""
    if kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a user's file":
        path.write_text("my own notes")
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    elif kind == "a photograph":
        Image.new("RGB", (3, 3)).save(path, format="PNG")


PLACES = {
    "a missing folder": "{w}/no/such/x",
    "below a file": "{w}/nano.py/x",
    "a long name": "{w}/" + "x" * 260,
    "a name too long for what is written beside": "{w}/" + "x" * 240,
    "a folder": "{w}/there",
    "a pipe": "{w}/there",
    "a user's file": "{w}/there",
    "a photograph": "{w}/there",
    "a link to itself": "{w}/there",
}

FILES = [
    Case(
        f"{command}: {kind}",
        f"{words} {place}{suffix}",
        "",
        prepare=lambda w, kind=kind, place=place, suffix=suffix: (
            a_run(w),
            spoil(kind, Path(place.replace("{w}", str(w)) + (suffix or ".png"))),
        ),
    )
    for command, (words, suffix) in TO_FILE.items()
    for kind, place in PLACES.items()
    if (command, kind) != ("inspect", "a link to itself")  # it adds .png, and then replaces the link
]
FOLDERS = [
    Case(f"{command}: {kind}", f"{words} {place}", prepare=lambda w: spoil("a link to itself", w / "there"))
    for command, words in TO_FOLDER.items()
    for kind, place in (
        ("a file", "{w}/nano.py"),
        ("below a file", "{w}/nano.py/x"),
        ("a long name", "{w}/" + "x" * 260),
        ("below a link to itself", "{w}/there/x"),
    )
]
CHECKPOINT = "{w}/pre/checkpoint-1.pth"
INPUTS = [
    Case("export onto its checkpoint", f"mae export {CHECKPOINT} --plugin {{w}}/nano.py --out "
         f"{CHECKPOINT}", "this command reads it"),
    Case("export onto a link to its checkpoint", f"mae export {CHECKPOINT} --plugin {{w}}/nano.py "
         "--out {w}/link.pth", "this command reads it",
         prepare=lambda w: (w / "link.pth").symlink_to(w / "pre/checkpoint-1.pth")),
    Case("export onto a second name of its checkpoint", f"mae export {CHECKPOINT} --plugin "
         "{w}/nano.py --out {w}/name.pth", "this command reads it",
         prepare=lambda w: (w / "name.pth").hardlink_to(w / "pre/checkpoint-1.pth")),
    Case("export onto another training checkpoint", f"mae export {CHECKPOINT} --plugin "
         "{w}/nano.py --out {w}/fine/checkpoint.pth", "did not make it"),
    Case("reconstruct onto its image", f"mae reconstruct {CHECKPOINT} {{w}}/photos/photo_0.png "
         "--plugin {w}/nano.py --out {w}/photos/photo_0.png", "this command reads it"),
    Case("reconstruct onto another image", f"mae reconstruct {CHECKPOINT} {{w}}/photos/photo_0.png "
         "--plugin {w}/nano.py --out {w}/photos/photo_1.png", "did not make it"),
    Case("predict into the images' folder", "segmenter predict {w}/fine/best.pth {w}/photos "
         "--plugin {w}/nano.py --device cpu --out {w}/photos", "which is read"),
    Case("predict beside the images that are named", "segmenter predict {w}/fine/best.pth "
         "{w}/photos/photo_0.png --plugin {w}/nano.py --device cpu --out {w}/photos",
         "this command reads it"),
    Case("predict into the annotations", "segmenter predict {w}/fine/best.pth "
         "{w}/data/images/validation --plugin {w}/nano.py --device cpu --out "
         "{w}/data/annotations/validation", "did not make it"),
    Case("predictions that get one name", "segmenter predict {w}/fine/best.pth {w}/photos/photo_0."
         "png {w}/photos/photo_0_overlay.png --plugin {w}/nano.py --device cpu --out {w}/o",
         "would both become photo_0_overlay.png",
         prepare=lambda w: Image.new("RGB", (9, 9)).save(w / "photos/photo_0_overlay.png")),
    Case("scores onto the dataset's file", "segmenter evaluate {w}/fine/best.pth --plugin "
         "{w}/nano.py --device cpu --dataset {w}/data/dataset.yml --out {w}/data/dataset.yml",
         "this command reads it"),
    Case("scores onto the checkpoint", "segmenter evaluate {w}/fine/best.pth --plugin {w}/nano.py "
         "--device cpu --dataset {w}/data/dataset.yml --out {w}/fine/best.pth",
         "this command reads it"),
    Case("merge onto one of the stores", "segments merge {w}/in1k/masks/masks.sqlite --overwrite "
         "--out {w}/in1k/masks/masks.sqlite", "this command reads it"),
    Case("pack over a file that is no store", "segments pack {w}/loose --overwrite --out "
         "{w}/photos/photo_0.png", "did not make it"),
    Case("generate onto an image", "segments generate felzenszwalb --images {w}/photos --out "
         "{w}/photos/photo_0.png", "has an image's name"),
    Case("inspect into the training images", "segments inspect {w}/in1k/masks --processes 1 --out "
         "{w}/in1k/train/class0/picture", "which is read"),
    Case("save predictions into the annotations", "segmenter evaluate {w}/fine/best.pth --plugin "
         "{w}/nano.py --device cpu --dataset {w}/data/dataset.yml --save-predictions "
         "{w}/data/annotations/validation/p", "which is read"),
]  # fmt: skip


@pytest.mark.parametrize("case", [*FILES, *FOLDERS, *INPUTS], ids=lambda case: case.name)
def test_refused_before_any_work(case, world, capsys):
    check(case, world, capsys)


@pytest.mark.parametrize("place", ["in1k/train", "in1k/train/class0", "in1k/val/x", "in1k/masks/y"])
@pytest.mark.parametrize("check_only", [[], ["--dry-run", "check"]])
def test_a_run_inside_its_input_is_refused(world, capsys, place, check_only):
    words = [*pretrain_words(world, place), *check_only]
    check(Case(place, words, ("which is read", "nothing was written")), world, capsys)


def test_a_run_behind_a_link_into_its_input_is_refused(world, capsys):
    (world / "out").symlink_to(world / "in1k/train")
    check(Case("link", pretrain_words(world, "out/run"), "which is read"), world, capsys)


@pytest.mark.parametrize("place", ["data/images/training", "data/annotations/validation/run"])
def test_a_finetuning_inside_its_input_is_refused(world, capsys, place):
    check(Case(place, train_words(world, place), "which is read"), world, capsys)


def test_a_plan_inside_its_input_is_refused(world, capsys):
    words = [*benchmark_words(world, "in1k/train/run"), "--dry-run"]
    check(Case("plan", words, "which is read"), world, capsys)


@pytest.mark.parametrize("name", ["results.csv", "report.html", "run.yml"])
def test_a_plan_does_not_replace_what_a_user_keeps_under_its_names(world, capsys, name):
    (world / "new").mkdir()
    (world / "new" / name).write_text("my: own\n")
    words = [*benchmark_words(world), "--dry-run"]
    check(Case(name, words, f"{name}.*did not make it"), world, capsys)


# What grows over several calls, under the name that it has until it is complete.
GROWING = {
    **{name: "out" + TO_FILE[name][1] for name in ("pack", "merge", "generate", "fetch")},
    "prepare": "out/ADEChallengeData2016.zip",
}  # fmt: skip


@pytest.mark.parametrize("name", GROWING)
@pytest.mark.parametrize("kind", ["link", "second name", "pipe"])
def test_an_unfinished_file_is_not_written_through_a_link(world, capsys, name, kind):
    part = beside(world / GROWING[name])
    part.parent.mkdir(exist_ok=True)
    if kind == "pipe":
        os.mkfifo(part)
    else:
        (part.symlink_to if kind == "link" else part.hardlink_to)(world / "nano.py")
    words, out = (TO_FILE[name][0], GROWING[name]) if name in TO_FILE else (TO_FOLDER[name], "out")
    check(Case(name, f"{words} {{w}}/{out}", f"{part.name} is in the way"), world, capsys)


KEPT = ("pack", "merge", "generate", "fetch")  # finished stores and downloads: their own tests


@pytest.mark.parametrize("name", [name for name in TO_FILE if name not in KEPT])
def test_its_own_output_is_made_again(world, capsys, name):
    a_run(world)
    words, suffix = TO_FILE[name]
    words = [*words.replace("{w}", str(world)).split(), f"{world}/made{suffix}"]
    if name == "check":
        (world / "in1k/train/class0/image_0.jpg").write_bytes(b"no image")
    expected = 1 if name == "check" else 0
    for _ in range(2):
        code, _, err = call(words, capsys)
        assert code == expected, err


def test_predictions_are_made_again(world, capsys):
    words = TO_FOLDER["predict"].replace("{w}", str(world)).split()
    for _ in range(2):
        code, _, err = call([*words, world / "out"], capsys)
        assert code == 0, err
    before = snapshot(world / "photos")
    assert call([*words, world / "photos"], capsys)[0] == 2
    assert snapshot(world / "photos") == before
