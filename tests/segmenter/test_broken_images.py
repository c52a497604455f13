"""A broken image in the middle of the work: named, skipped, counted; too many end it."""

import json
import multiprocessing
import shutil

import numpy as np
import pytest
from PIL import Image

import segmenter.check
import segmenter.evaluate
from common.formats import read_log
from tests.segmenter.boxes import train_arguments


@pytest.fixture
def break_images(own_dataset, monkeypatch):
    """Breaks images that no check has looked at, as in a dataset of more than MOST_CHECKED."""
    monkeypatch.setattr(segmenter.check, "MOST_CHECKED", 1)
    monkeypatch.setattr(segmenter.evaluate, "MOST_CHECKED", 1)

    def write(*names):
        for name in names:
            (own_dataset.parent / "images" / name).write_bytes(b"no image")
        return own_dataset

    return write


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_without_one_image(break_images, tmp_path, command, caplog, workers):
    dataset = break_images("training/004.jpg", "validation/101.jpg")
    outcome = command(*train_arguments(dataset, tmp_path / "run", workers=workers))
    assert outcome.code == 0
    for name in ("training/004.jpg", "validation/101.jpg"):
        image = dataset.parent / "images" / name
        assert f"skipped an unreadable image: {image} cannot be read" in caplog.text
    assert [r["unreadable_images"] for r in read_log(tmp_path / "run/log.txt")] == [1, 1]
    assert json.loads((tmp_path / "run/result.json").read_text())["unreadable_images"] == 1


def test_a_label_that_is_no_class_never_gets_to_the_device(break_images, tmp_path, command, caplog):
    """There it would end in an assertion that names nothing."""
    folder = break_images().parent / "annotations"
    for name in ("training/004.png", "validation/101.png"):
        Image.fromarray(np.full_like(np.array(Image.open(folder / name)), 77)).save(folder / name)
    outcome = command(*train_arguments(folder.parent / "dataset.yml", tmp_path / "run"))
    assert outcome.code == 0
    for name in ("training/004.png", "validation/101.png"):
        assert f"{folder / name} holds label 77, which is none of 0 to" in caplog.text
    assert [r["unreadable_images"] for r in read_log(tmp_path / "run/log.txt")] == [1, 1]


@pytest.mark.parametrize("workers", [0, 2])
def test_training_ends_when_they_are_too_many(break_images, tmp_path, command, workers):
    dataset = break_images("training/002.jpg", "training/004.jpg")
    outcome = command(*train_arguments(dataset, tmp_path / "run", batch_size=7, workers=workers))
    assert outcome.code == 1
    assert "2 of 7 images are unreadable (more than 1%): " in outcome.err
    assert outcome.err.count("Error") == 1
    assert multiprocessing.active_children() == []  # Python would wait for them for ever
    assert not (tmp_path / "run/checkpoint.pth").exists()


def evaluate(command, checkpoint, dataset, folder, workers):
    return command(
        "evaluate", checkpoint, "--dataset", dataset, "--device", "cpu", "--workers", workers,
        "--save-predictions", folder / "predictions", "--out", folder / "scores.json",
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluating_goes_on_without_one_image(break_images, finished, tmp_path, command, workers):
    dataset = break_images("validation/101.jpg")
    outcome = evaluate(command, finished / "best.pth", dataset, tmp_path, workers)
    assert outcome.code == 0
    assert json.loads((tmp_path / "scores.json").read_text())["unreadable_images"] == 1
    assert {path.name for path in (tmp_path / "predictions").iterdir()} == {"100.png", "102.png"}


def test_evaluating_ends_when_they_are_too_many(break_images, finished, tmp_path, command):
    shutil.copy(finished / "best.pth", tmp_path)
    dataset = break_images("validation/101.jpg", "validation/102.jpg")
    outcome = evaluate(command, tmp_path / "best.pth", dataset, tmp_path, 2)
    assert outcome.code == 1
    assert "2 of 3 images are unreadable" in outcome.err
    assert multiprocessing.active_children() == []
    assert {path.name for path in tmp_path.iterdir()} == {"best.pth", "data"}
