"""What a run tells of itself while it goes."""

import json
from pathlib import Path

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
