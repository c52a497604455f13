"""Input that was put together wrongly: loose segments, archives, dataset files."""

import json
import zipfile

import numpy as np
import pytest
import yaml

from tests.wrong.world import Case, call, check, train_words


def json_of(content):
    def prepare(world):
        (world / "loose/class0/image_0.json").write_text(
            content if isinstance(content, str) else json.dumps(content)
        )

    return prepare


GOOD, CODE = {"size": [48, 60], "counts": [0, 2880]}, "0Pj2"  # and the same compressed
LOOSE = {
    "no JSON": json_of("{"), "no list": json_of({"a": 1}), "a number": json_of(7),
    "SA-1B without annotations": json_of({"image": {"width": 60, "height": 48}}),
    "annotations that are text": json_of({"annotations": "none"}),
    "entries of text": json_of(["one"]), "no segmentation": json_of([{"area": 7}]),
    "a polygon": json_of([{"segmentation": [[1, 2, 3, 4, 5, 6]]}]),
    "sizes of text": json_of([{"segmentation": {**GOOD, "size": ["a", "b"]}}]),
    "sizes of 0": json_of([{"segmentation": {**GOOD, "size": [0, 0]}}]),
    "huge sizes": json_of([{"segmentation": {**GOOD, "size": [10**6, 10**6]}}]),
    "runs below 0": json_of([{"segmentation": {**GOOD, "counts": [-5, 2885]}}]),
    "runs that are too few": json_of([{"segmentation": {**GOOD, "counts": [1, 2]}}]),
    "runs of text": json_of([{"segmentation": {**GOOD, "counts": ["a"]}}]),
    "a code of noise": json_of([{"segmentation": {**GOOD, "counts": "ooooooooooooo"}}]),
    "a code of another size": json_of([{"segmentation": {"size": [49, 60], "counts": CODE}}]),
    "an unfinished code": json_of([{"segmentation": {**GOOD, "counts": CODE[:-1] + "o"}}]),
    "an empty code": json_of([{"segmentation": {**GOOD, "counts": ""}}]),
    "deep": json_of("[" * 9000), "no UTF-8": lambda w: (
        w / "loose/class0/image_0.json").write_bytes(b"\xff\xfe[]"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOOSE)
def test_damaged_segments_are_named_and_not_packed(name, world, capsys, caplog):
    LOOSE[name](world)
    words = f"segments pack {world}/loose --processes 1".split()
    code, _, err = call(words, capsys)
    assert code == 1, err
    assert "Traceback" not in err
    assert "image_0" in caplog.text
    assert not (world / "loose/masks.sqlite").exists()
    for path in (world / "loose").rglob("*.json"):
        (world / "in1k/masks" / path.relative_to(world / "loose")).parent.mkdir(exist_ok=True)
        path.rename(world / "in1k/masks" / path.relative_to(world / "loose"))
    (world / "in1k/masks/masks.sqlite").unlink()
    words = f"segments check {world}/in1k --processes 1 --out {world}/offenders.txt".split()
    assert call(words, capsys)[0] == 1
    assert (world / "offenders.txt").read_text().startswith("class0/image_0.jpg\t")


ZIPS = {
    "text": b"no zip", "empty": b"",
    "cut": "cut", "noise in a member": "noise", "a member that leaves": "../x",
    "an absolute member": "/tmp/x", "a member without a name": ".",
    "a file that is a folder, too": "ADEChallengeData2016/images", "other content": "other/x",
}  # fmt: skip


@pytest.mark.parametrize("name", ZIPS)
def test_a_broken_archive_leaves_no_unfinished_folder(name, world, capsys):
    kind, archive = ZIPS[name], world / "ade/ADEChallengeData2016.zip"
    archive.parent.mkdir()
    if isinstance(kind, bytes):
        archive.write_bytes(kind)
    else:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            noise = np.random.default_rng(0).bytes(20_000)
            file.writestr("ADEChallengeData2016/images/training/a.jpg", noise)
            if kind not in ("cut", "noise"):
                file.writestr(kind, b"x")
        content = bytearray(archive.read_bytes())
        if kind == "cut":
            content = content[:9000]
        if kind == "noise":
            content[5000:5400] = bytes(400)
        archive.write_bytes(content)
    words = f"segmenter prepare ade20k {world}/ade --digest none --url http://127.0.0.1:9/x"
    code, _, err = call(words.split(), capsys)
    assert code in (1, 2), err
    assert "Traceback" not in err
    assert "Error: " in err
    assert [path.name for path in archive.parent.iterdir()] == [archive.name]


DATASETS = {
    "no classes": {"classes": None}, "one class": {"classes": ["a"]}, "classes of a number":
    {"classes": 7}, "an unknown dataset": {"classes": "NoSuchDataset"}, "images of text":
    {"images": "x"}, "an unknown split": {"images": {"test": "x"}}, "images of numbers":
    {"images": {"train": 7, "val": 8}}, "images of a list": {"images": {"train": [1], "val": [2]}},
    "a palette of text": {"palette": "red"}, "colours of text": {"palette": [["a", "b", "c"]] * 3},
    "colours out of range": {"palette": [[0, 0, 256]] * 3}, "too few colours": {"palette":
    [[0, 0, 0]]}, "colours of four": {"palette": [[0, 0, 0, 0]] * 3}, "a switch of text":
    {"reduce_zero_label": "yes"}, "a label of text": {"ignore_index": "none"}, "a label of 300":
    {"ignore_index": 300}, "a label of a class": {"ignore_index": 0}, "a label of true":
    {"ignore_index": True}, "a strange key": {"imagse": {}}, "a suffix of a list":
    {"image_suffix": [[".jpg"]]}, "an empty suffix": {"image_suffix": ""}, "no such suffix":
    {"image_suffix": ".tif"}, "no suffix": {"annotation_suffix": []}, "a base class": {"classes":
    "BaseSegDataset"}, "what is no dataset": {"classes": "LoadAnnotations"}, "NUL": {"name": "a\0b"},
    "a list of names that is missing": {"splits": {"train": "no.txt"}},
    "a name of a list": {"name": ["a"]}, "classes that repeat": {"classes": ["a", "a", "b"]},
    "nested classes": {"classes": [["a"], ["b"]]},
    "a palette of numbers": {"palette": 7}, "fractions of colours": {"palette": [[0.5, 1, 2]] * 3},
}  # fmt: skip


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("command", ["prepare check", "train"])
def test_a_wrong_dataset_file_is_named(name, command, world, capsys):
    path = world / "data/dataset.yml"
    content = yaml.safe_load(path.read_text())
    path.write_text(json.dumps({**content, **DATASETS[name]}))  # is YAML, too, without aliases
    words = ["segmenter", "prepare", "check", str(path)]
    if command == "train":  # and so says benchmark.py
        words = [*train_words(world), "--dry-run", "check"]
    check(Case(name, words, "dataset.yml"), world, capsys)
