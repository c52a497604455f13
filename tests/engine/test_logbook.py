"""What a run tells of itself while it goes."""

import json
from pathlib import Path

from common.step_files import PROGRESS
from engine.logbook import Progress


def test_the_time_left_is_that_of_the_epochs_left(tmp_path: Path) -> None:
    progress = Progress(tmp_path, epochs_total=4, images_per_epoch=100)
    progress.advance(1.5, images=50, seconds=10.0)  # this call began in the middle of an epoch
    progress.close("stopped")
    told = json.loads((tmp_path / PROGRESS).read_text())
    assert (told["state"], told["epoch"], told["images_per_second"]) == ("stopped", 1.5, 5.0)
    assert told["seconds_left"] == 2.5 * 100 / 5


def test_before_the_first_step_no_time_is_told(tmp_path: Path) -> None:
    Progress(tmp_path, epochs_total=4, images_per_epoch=100).close("failed")
    assert json.loads((tmp_path / PROGRESS).read_text())["seconds_left"] is None
