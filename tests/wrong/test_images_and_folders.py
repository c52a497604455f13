"""Pictures of every kind and folders of every shape, as the commands meet them."""

import io
import json
import os
import shutil

import numpy as np
import pytest
import yaml
from PIL import Image

from common.formats import read_log
from common.images import MOST_PIXELS_VARIABLE, ORIENTATION
from tests.wrong.world import Case, benchmark_words, call, check, pretrain_words, probe_words, train_words


def png(mode="RGB", size=(60, 48), **options):
    content = io.BytesIO()
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    if mode == "I;16":
        noise = Image.fromarray(rng.integers(0, 65536, (size[1], size[0]), dtype=np.uint16))
    else:
        noise = noise.convert(mode)
    noise.save(content, **{"format": "PNG", **options})
    return content.getvalue()


WHOLE = png(size=(48, 48))  # as the annotation is
JPEG = png(size=(48, 48), format="JPEG")
BROKEN = {
    "empty": b"", "text": b"no image", "cut PNG": WHOLE[:2000], "cut JPEG": JPEG[:2000],
    "a JPEG that ends too early": JPEG[: len(JPEG) // 2] + b"\xff\xd9",
    "a header alone": JPEG[:20], "PNG with a wrong checksum": WHOLE[:60] + b"xxxx" + WHOLE[64:],
    "a bomb": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\0\xff\xff" * 2 + b"\x08\x02" + bytes(99),
}  # fmt: skip
SOUND = {
    "grey": png("L"), "16 bits": png("I;16"), "palette": png("P"), "alpha": png("RGBA"),
    "CMYK": png("CMYK", format="JPEG"), "TIFF": png(format="TIFF"), "WebP": png(format="WEBP"),
    "one bit": png("1"), "grey with alpha": png("LA"),
}  # fmt: skip
TRAIN_IMAGE, DATA_IMAGE = "in1k/train/class0/image_0.jpg", "data/images/training/004.jpg"
LABELS = "data/annotations/training/004.png"
MASKS_CHECK = "segments check {w}/in1k --processes 1 --out {w}/offenders.txt"
GENERATE = "segments generate felzenszwalb --images {w}/in1k/train --processes 1 --out {w}/s.sqlite"


def run(command, world, capsys):
    words = command.split() if isinstance(command, str) else command
    return call([word.replace("{w}", str(world)) for word in words], capsys)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_image_is_found_by_the_checks_and_survived_by_the_work(name, world, capsys):
    for path in (TRAIN_IMAGE, DATA_IMAGE, "photos/photo_0.png"):
        (world / path).write_bytes(BROKEN[name])
    assert run(MASKS_CHECK, world, capsys)[0] == 1
    offenders = (world / "offenders.txt").read_text().splitlines()
    assert len(offenders) == 1
    assert offenders[0].startswith("class0/image_0.jpg\t")
    prepare = f"segmenter prepare check {world}/data/dataset.yml"
    check(Case(name, prepare, "004.jpg cannot be read as an image"), world, capsys)
    code, _, err = run(GENERATE, world, capsys)
    assert code == 1, err
    assert "1 of 8 images failed" in err
    assert run([*pretrain_words(world), "--epochs", "1"], world, capsys)[0] == 0
    assert read_log(world / "new/log.txt")[0]["unreadable_images"] == 1
    assert run([*train_words(world, "tuned"), "--epochs", "1"], world, capsys)[0] == 0
    assert read_log(world / "tuned/log.txt")[0]["unreadable_images"] == 1


@pytest.mark.parametrize("name", [n for n in BROKEN if "JPEG" not in n and n != "a header alone"])
def test_a_broken_annotation_is_named_or_skipped(name, world, capsys):
    (world / LABELS).write_bytes(BROKEN[name])
    prepare = f"segmenter prepare check {world}/data/dataset.yml"
    check(Case(name, prepare, "004.png cannot be read as an image"), world, capsys)
    assert run([*train_words(world, "tuned"), "--epochs", "1"], world, capsys)[0] == 0
    assert read_log(world / "tuned/log.txt")[0]["unreadable_images"] == 1


def each(folder, change):
    """Change every file of a folder; a change that returns an array is of labels."""

    def prepare(world):
        for path in sorted((world / "data" / folder).iterdir()):
            labels = change(path)
            if labels is not None:
                Image.fromarray(labels).save(path)

    return prepare


def relabelled(folder, change, **described):
    """Other labels, and what the dataset says of them."""

    def prepare(world):
        each(f"annotations/{folder}", lambda path: change(np.array(Image.open(path))))(world)
        path = world / "data/dataset.yml"
        path.write_text(json.dumps({**yaml.safe_load(path.read_text()), **described}))  # is YAML, too

    return prepare


def turned(orientation):
    def save(path):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        Image.open(path).save(path, exif=exif)

    return each("images/training", save)


def as_jpeg(path):
    Image.open(path).save(path, "JPEG", quality=95)


SUFFIXES = (".jpg", ".JPG", ".png", ".jpeg")
UNTRUSTED = {
    "0 and 255": (
        relabelled("training", lambda n: np.uint8(255) * (n == 1), classes=["bg", "a"], ignore_index=255),
        r"7 of 7 train .* looked at, and label 0 is the only class .*; 255 is ignored: did you mean 1\?",
    ),
    "one class": (relabelled("training", lambda n: n * 0), "label 0 is the only class in them$"),
    "a zero that is ignored": (
        relabelled("training", lambda n: n % 2, ignore_index=255, reduce_zero_label=True),
        "label 1 is the only class in them; 0 is ignored: did you mean reduce_zero_label: false",
    ),
    "one class and no other": (relabelled("validation", lambda n: n // 3 * 3), "val.* 3 is ignored: did"),
    "nothing to train on": (relabelled("training", lambda n: n * 0 + 3), "train.*no pixel counts: 3 is all"),
    "nothing to score": (relabelled("validation", lambda n: n * 0 + 3), "val.*no pixel counts: 3 is all"),
    "four suffixes": (
        each("images/training", lambda p: p.rename(p.with_suffix(SUFFIXES[int(p.stem) % 4])) and None),
        ("5 of 7 train annotations have no image", "5 images in .* have another suffix: 001.JPG, 002.png"),
    ),
    "no annotation": (lambda w: (w / LABELS).unlink(), "1 of 7 train images have no annotation: 004.jpg"),
    "no image": (lambda w: (w / DATA_IMAGE).unlink(), "1 of 7 train annotations have no image .*: 004.png"),
    "labels as JPEG": (each("annotations/training", as_jpeg), "000.png is a JPEG, .* lossy_annotations"),
    **{f"orientation {n}": (turned(n), "orientation" if n < 5 else "pixels|orientation") for n in (2, 3, 6)},
}  # fmt: skip


@pytest.mark.parametrize("command", ["prepare check", "train", "probe", "a plan"])
@pytest.mark.parametrize("name", UNTRUSTED)
def test_pairs_of_which_no_number_could_be_trusted_are_refused_first(name, command, world, capsys):
    prepare, says = UNTRUSTED[name]
    words = {
        "prepare check": ["segmenter", "prepare", "check", f"{world}/data/dataset.yml"],
        "train": train_words(world),
        "probe": probe_words(world),
        "a plan": [*benchmark_words(world), "--dry-run"],
    }[command]
    check(Case(name, words, says, prepare=prepare), world, capsys)


EVALUATE = "segmenter evaluate {w}/fine/best.pth --plugin {w}/nano.py --device cpu --workers 0"
EVALUATED = {
    "nothing to score": (*UNTRUSTED["nothing to score"], EVALUATE),
    "nothing to score itself by": (
        *UNTRUSTED["nothing to score"], "segmenter evaluate --predictions {w}/data/annotations/validation",
    ),
    "swapped names": (
        relabelled("validation", lambda n: n, classes=["box", "ground", "sky"]),
        r"0 is 'ground', not 'box', 1 .* \(2 of 3 differ\); .* --classes-by-number", EVALUATE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EVALUATED)
def test_an_evaluation_that_would_say_something_else_is_refused(name, world, capsys):
    prepare, says, command = EVALUATED[name]
    command += " --dataset {w}/data/dataset.yml --out {w}/scores.json"
    check(Case(name, command, says, prepare=prepare), world, capsys)
    if "classes-by-number" in says:
        check(Case(name, f"{command} --classes-by-number", code=0), world, capsys)


def test_a_finetuning_does_not_go_on_with_other_names(world, capsys):
    (world / "fine/result.json").unlink()
    prepare, says, _ = EVALUATED["swapped names"]
    says = f"checkpoint.pth is of other classes: {says.partition(';')[0]}"
    check(Case("names", train_words(world, "fine"), says, prepare=prepare), world, capsys)


def test_an_image_that_nobody_can_score_ends_the_run_and_leaves_no_numbers(world, capsys):
    for path in sorted((world / "data/images/validation").iterdir())[1:]:
        path.unlink()
        (world / f"data/annotations/validation/{path.stem}.png").unlink()
    (world / "data/images/validation/100.jpg").write_bytes(JPEG[: len(JPEG) // 2] + b"\xff\xd9")
    Image.new("L", (48, 48)).save(world / "data/annotations/validation/100.png")
    code, _, err = run(train_words(world), world, capsys)
    assert (code, "no pixel of the images has a label" in err) == (1, True), err
    assert not (world / "new/result.json").exists()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_photograph_does_not_keep_the_others_from_being_predicted(name, world, capsys):
    (world / "photos/photo_0.png").write_bytes(BROKEN[name])
    words = (f"segmenter predict {world}/fine/best.pth {world}/photos --plugin {world}/nano.py "
             f"--device cpu --out {world}/out")  # fmt: skip
    code, _, err = run(words, world, capsys)
    assert code in (1, 2), err  # by what its header says
    assert "Traceback" not in err
    assert (world / "out/photo_1.png").exists() == (code == 1)


@pytest.mark.parametrize("name", SOUND)
def test_every_kind_of_image_is_taken_everywhere(name, world, capsys):
    for path in (TRAIN_IMAGE, DATA_IMAGE, "photos/photo_0.png"):
        (world / path).write_bytes(SOUND[name])
    labels = Image.new("L", (60, 48))
    labels.save(world / LABELS)
    assert run(MASKS_CHECK, world, capsys)[0] == 0
    assert run(f"segmenter prepare check {world}/data/dataset.yml", world, capsys)[0] == 0
    assert run(GENERATE, world, capsys)[0] == 0
    assert run([*pretrain_words(world), "--epochs", "1"], world, capsys)[0] == 0
    assert read_log(world / "new/log.txt")[0]["unreadable_images"] == 0
    words = (f"segmenter predict {world}/fine/best.pth {world}/photos --plugin {world}/nano.py "
             f"--device cpu --out {world}/out")  # fmt: skip
    assert run(words, world, capsys)[0] == 0


def test_a_limit_of_pixels_that_is_no_number_is_said(world, capsys, monkeypatch):
    monkeypatch.setenv(MOST_PIXELS_VARIABLE, "lots")
    code, _, err = run([*train_words(world), "--epochs", "1"], world, capsys)
    assert code == 1
    assert f"{MOST_PIXELS_VARIABLE} is lots; give a whole number" in err


def test_pipes_links_and_devices_in_the_folders_of_images(world, capsys, caplog):
    train = world / "in1k/train"
    os.mkfifo(train / "class0/pipe.jpg")
    (train / "class0/zero.jpg").symlink_to("/dev/zero")
    (train / "up").symlink_to("..")
    (train / "class1/again").symlink_to(train / "class0")
    os.mkfifo(world / "data/images/training/pipe.jpg")
    assert run([*pretrain_words(world), "--epochs", "1"], world, capsys)[0] == 0
    assert "no regular files" in caplog.text
    assert run([*train_words(world, "tuned"), "--epochs", "1"], world, capsys)[0] == 0


ASKED_FOR = {
    "--config": lambda w, pipe: [*pretrain_words(w), "--config", pipe],
    "--plugin": lambda w, pipe: [*pretrain_words(w), "--plugin", pipe],
    "--plugin .py": lambda w, pipe: [*pretrain_words(w), "--plugin", f"{pipe}.py"],
    "--init of mae": lambda w, pipe: [*pretrain_words(w), "--init", pipe],
    "--masks-dir": lambda w, pipe: [*pretrain_words(w), "--masks-dir", pipe],
    "--init": lambda w, pipe: [*train_words(w), "--init", pipe],
    "--recipe": lambda w, pipe: [*train_words(w), "--recipe", f"{pipe}.yml"],
    "--dataset": lambda w, pipe: [*train_words(w), "--dataset", pipe],
    "unpack": lambda w, pipe: ["segments", "unpack", pipe, w / "out"],
    "export": lambda w, pipe: ["mae", "export", pipe, "--out", w / "out.pth"],
    "predict": lambda w, pipe: [
        "segmenter", "predict", w / "fine/best.pth", pipe, "--out", w / "out"],
}  # fmt: skip


@pytest.mark.parametrize("command", ASKED_FOR)
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "nothing", "a link to itself"])
def test_what_is_no_file_is_neither_waited_for_nor_read(command, kind, world, capsys):
    path = world / "there"
    for name in (path, world / "there.yml", world / "there.py"):
        if kind == "a pipe":
            os.mkfifo(name)
        elif kind == "a folder":
            name.mkdir()
        elif kind == "a link to itself":
            name.symlink_to(name.name)
    if kind == "a folder" and command == "predict":
        pytest.skip("a folder of images")
    check(Case(command, list(map(str, ASKED_FOR[command](world, path))), "there"), world, capsys)


def test_an_empty_and_a_missing_train_folder(world, capsys):
    shutil.rmtree(world / "in1k/train")
    check(Case("missing", pretrain_words(world), "train is not a folder"), world, capsys)
    (world / "in1k/train").mkdir()
    check(Case("empty", pretrain_words(world), "no image below"), world, capsys)
