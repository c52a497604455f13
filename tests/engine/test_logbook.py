"""What a run tells of itself while it goes."""

import json
from pathlib import Path

import pytest

from common.step_files import PROGRESS
from engine.config import TrainingConfig
from engine.logbook import Logbook


def open_logbook(folder: Path) -> Logbook:
    config = TrainingConfig(output_dir=folder, log_with=("none",))
    return Logbook(config, {}, epochs_completed=0, epochs_total=4, images_per_epoch=100)


def test_the_time_left_is_that_of_the_epochs_left(tmp_path: Path) -> None:
    logbook = open_logbook(tmp_path)
    logbook.advance(1.5, images=50, seconds=10.0)  # this call began in the middle of an epoch
    logbook.close("stopped")
    told = json.loads((tmp_path / PROGRESS).read_text())
    assert (told["state"], told["epoch"], told["images_per_second"]) == ("stopped", 1.5, 5.0)
    assert told["seconds_left"] == 2.5 * 100 / 5


def test_before_the_first_step_no_time_is_told(tmp_path: Path) -> None:
    open_logbook(tmp_path).close("failed")
    assert json.loads((tmp_path / PROGRESS).read_text())["seconds_left"] is None


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e31, "high"])
def test_what_could_not_be_read_again_is_not_logged(tmp_path: Path, value: object) -> None:
    logbook = open_logbook(tmp_path)
    logbook.add_epoch({"epoch": 1, "train_loss": 0.5, "val_loss": None})
    with pytest.raises(RuntimeError, match=r"epoch 2: val_loss.*the last checkpoint is from before"):
        logbook.add_epoch({"epoch": 2, "val_loss": value})
    assert open_logbook(tmp_path).records == []  # no checkpoint: all is trained again
    assert len(logbook.records) == 1
