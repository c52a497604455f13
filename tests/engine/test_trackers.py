"""--log-with: every value of log.txt reaches a tracker once, also after a kill."""

import json

import pytest

from common.formats import read_log
from engine.config import TrainingConfig
from engine.logbook import Logbook, check_trackers
from tests.tensorboard_events import scalars


def open_logbook(folder, epochs_completed, names=("tensorboard",)):
    return Logbook(
        TrainingConfig(output_dir=folder, log_with=names), {"model": "vit_tiny", "clip_grad": None},
        epochs_completed=epochs_completed, epochs_total=5, images_per_epoch=8,
    )  # fmt: skip


def test_tensorboard_has_every_value_of_the_log_once(tmp_path):
    logbook = open_logbook(tmp_path, 0)
    for epoch in (1, 2, 3):
        logbook.add_epoch({"epoch": epoch, "train_loss": 1 / epoch, "val_loss": None})
        logbook.saved(epoch)
    logbook.close("done")
    assert scalars(tmp_path) == {"train_loss": [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3, abs=1e-4))]}
    assert [record["epoch"] for record in read_log(tmp_path / "log.txt")] == [1, 2, 3]


def test_an_epoch_whose_checkpoint_was_not_saved_is_told_once_when_it_was_made_again(tmp_path):
    logbook = open_logbook(tmp_path, 0)
    logbook.add_epoch({"epoch": 1, "train_loss": 1.0})
    logbook.saved(1)
    logbook.add_epoch({"epoch": 2, "train_loss": 7.0})  # and killed before its checkpoint
    for tracker in logbook.trackers.trackers.values():
        tracker.finish()
    logbook = open_logbook(tmp_path, 1)
    logbook.add_epoch({"epoch": 2, "train_loss": 0.5})
    logbook.saved(2)
    logbook.close("done")
    assert scalars(tmp_path) == {"train_loss": [(1, 1.0), (2, 0.5)]}


def test_an_epoch_that_was_saved_but_not_told_is_told_by_the_next_call(tmp_path):
    logbook = open_logbook(tmp_path, 0)
    logbook.add_epoch({"epoch": 1, "train_loss": 1.0})  # checkpoint saved, killed before `saved`
    for tracker in logbook.trackers.trackers.values():
        tracker.finish()
    open_logbook(tmp_path, 1).close("done")
    assert scalars(tmp_path) == {"train_loss": [(1, 1.0)]}


def test_a_run_without_trackers_leaves_none(tmp_path):
    logbook = open_logbook(tmp_path, 0, names=("none",))
    logbook.add_epoch({"epoch": 1, "train_loss": 1.0})
    logbook.saved(1)
    logbook.close("stopped")
    assert not (tmp_path / "tensorboard").exists()
    assert json.loads((tmp_path / "progress.json").read_text())["state"] == "stopped"


def test_a_tracker_that_is_missing_or_unknown_is_named_before_any_work():
    check_trackers(["none"])
    check_trackers(["tensorboard"])
    with pytest.raises(ValueError, match=r"--log-with is 'wandbb'; choose of .*wandb"):
        check_trackers(["wandbb"])
    with pytest.raises(ValueError, match=r"--log-with dvclive: the package is missing"):
        check_trackers(["tensorboard", "dvclive"])
