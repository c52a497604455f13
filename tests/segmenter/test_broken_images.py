"""An image that is met broken in the middle of the work ends it in one line."""

import shutil

import pytest

from tests.segmenter.boxes import train_arguments


@pytest.fixture
def broken(own_dataset):
    """An image whose header is sound, so that it is met by whoever decodes it."""
    for split in ("training/004", "validation/101"):
        path = own_dataset.parent / f"images/{split}.jpg"
        path.write_bytes(path.read_bytes()[:400])
    return own_dataset


@pytest.mark.parametrize("workers", [0, 2])
def test_training_names_the_image_in_one_line(broken, tmp_path, command, workers):
    outcome = command(*train_arguments(broken, tmp_path / "run", batch_size=7, workers=workers))
    assert outcome.code == 2
    (line,) = [line for line in outcome.err.splitlines() if "Error" in line]
    assert line.startswith(f"Error: {broken.parent}/images/training/004.jpg")
    assert "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1] == line


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluating_names_the_image_in_one_line(broken, finished, tmp_path, command, workers):
    shutil.copy(finished / "best.pth", tmp_path)
    outcome = command(
        "evaluate", tmp_path / "best.pth", "--dataset", broken, "--device", "cpu",
        "--workers", workers, "--save-predictions", tmp_path / "predictions",
    )  # fmt: skip
    assert outcome.code == 2
    assert outcome.err.startswith(f"Error: {broken.parent}/images/validation/101.jpg")
    assert len(outcome.err.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "data"] == ["best.pth"]
