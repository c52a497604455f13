"""--dry-run time: real steps are timed, nothing is written."""

import json

import pytest

from segmenter import evaluate
from segmenter.data import WholeImages
from tests.segmenter.boxes import train_arguments

KEYS = {
    "setup_seconds", "epoch_seconds", "evaluation_seconds", "evaluations", "epochs",
    "images_per_second",
}  # fmt: skip


@pytest.mark.parametrize(("epochs", "schedule"), [(5, "cosine"), (1, "poly")])
def test_seconds_are_told_and_nothing_is_written(dataset, tmp_path, command, epochs, schedule):
    arguments = train_arguments(dataset, tmp_path / "run", epochs=epochs, eval_every=2, schedule=schedule)
    outcome = command(*arguments, "--dry-run", "time")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    assert set(told) == KEYS
    assert (told["epochs"], told["evaluations"]) == (epochs, -(-epochs // 2))
    assert min(told[name] for name in KEYS) > 0
    assert told["images_per_second"] == pytest.approx(6 / told["epoch_seconds"])
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_there_is_left_alone(dataset, finished, command):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    assert command(*train_arguments(dataset, finished), "--dry-run", "time").code == 0
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def test_as_many_images_are_timed_as_asked_for_from_all_over_the_set(monkeypatch):
    timed = []
    monkeypatch.setattr(evaluate, "evaluate_model", lambda _, __, images, ___: timed.append(images.pairs))
    for count in (3, 30):
        evaluate.evaluate_some(None, None, WholeImages(None, range(30), None, "bilinear"), None, count)
    some, whole = map(list, timed)
    assert len(some) == 3 and some[0] < 10 <= some[1] < 20 <= some[2]
    assert whole == list(range(30))
