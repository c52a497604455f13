"""An image that is met broken in the middle of the work ends it in one line."""

import multiprocessing
import shutil

import pytest

import segmenter.labels
import segmenter.scoring
from tests.segmenter.boxes import train_arguments


@pytest.fixture
def broken(own_dataset, monkeypatch):
    """Images that no check has looked at, as in a dataset of more than MOST_CHECKED pairs."""
    monkeypatch.setattr(segmenter.labels, "MOST_CHECKED", 1)
    monkeypatch.setattr(segmenter.scoring, "MOST_CHECKED", 1)
    for name in ("training/004.jpg", "validation/101.jpg"):
        (own_dataset.parent / "images" / name).write_bytes(b"no image")
    return own_dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_training_names_the_image_in_one_line(broken, tmp_path, command, workers):
    outcome = command(*train_arguments(broken, tmp_path / "run", batch_size=7, workers=workers))
    assert outcome.code == 2
    image = broken.parent / "images/training/004.jpg"
    assert outcome.err.splitlines()[-1].startswith(f"Error: {image} or its annotation cannot be")
    assert outcome.err.count("Error") == 1
    assert "Traceback" not in outcome.err
    assert multiprocessing.active_children() == []  # Python would wait for them for ever


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluating_names_the_image_in_one_line(broken, finished, tmp_path, command, workers):
    shutil.copy(finished / "best.pth", tmp_path)
    outcome = command(
        "evaluate", tmp_path / "best.pth", "--dataset", broken, "--device", "cpu",
        "--workers", workers, "--save-predictions", tmp_path / "predictions",
    )  # fmt: skip
    assert outcome.code == 2
    image = broken.parent / "images/validation/101.jpg"
    assert outcome.err.startswith(f"Error: {image} or its annotation cannot be read")
    assert outcome.err.count("\n") == 1
    assert multiprocessing.active_children() == []
    assert {path.name for path in tmp_path.iterdir()} == {"best.pth", "data"}
