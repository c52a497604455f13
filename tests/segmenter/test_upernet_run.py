"""Runs with UPerNet, from start to scores and pictures."""

import json

import pytest
import torch

from engine import trainer
from engine.vit import VIT_SIZES, VitSize
from segmenter.check import check_run
from segmenter.dataset import read_description
from tests.segmenter.boxes import call, config_of, train_arguments
from tests.segmenter.boxes import run as run_in

NANO = VitSize(width=8, depth=4, heads=2, patch_size=8)


@pytest.fixture(autouse=True)
def nano(monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "nano", NANO)


RUN = {
    "model": "nano", "recipe": "upernet", "decoder": "upernet", "batch_size": 4, "epochs": 3,
}  # fmt: skip


@pytest.fixture
def run(dataset, tmp_path):
    assert call(*train_arguments(dataset, tmp_path / "run", **RUN)).code == 0
    return tmp_path / "run"


def test_a_run_is_trained_scored_and_drawn_from_its_file(dataset, run, tmp_path, command):
    result = json.loads((run / "result.json").read_text())
    assert result["recipe"]["decoder"] == "upernet"
    options = ["--device", "cpu", "--workers", "0"]
    out = tmp_path / "scores.json"
    assert command(
        "evaluate", run / "best.pth", "--dataset", dataset, *options, "--eval-batch-size", "1",
        "--out", out,
    ).code == 0  # fmt: skip
    assert json.loads(out.read_text())["mean_iou"] == result["best_mean_iou"]
    scales = ["--multi-scale", "--window-size", "48"]  # windows smaller and larger than the crop
    assert command("evaluate", run / "best.pth", "--dataset", dataset, *options, *scales).code == 0
    image = dataset.parent / "images/validation/100.jpg"
    assert command("predict", run / "best.pth", image, "--out", tmp_path / "pictures").code == 0
    assert (tmp_path / "pictures/100.png").exists()


def test_the_size_of_a_checkpoint_counts_the_decoder(dataset, run, tmp_path):
    config = config_of(train_arguments(dataset, tmp_path / "other", **RUN))
    facts = check_run(config, read_description(dataset), processes=1)
    size = sum(w.numel() for w in torch.load(run / "best.pth", weights_only=True)["model"].values())
    assert facts.checkpoint_bytes == pytest.approx(3 * 4 * size, rel=0.1)


def test_a_run_that_stopped_goes_on_with_its_running_means(dataset, run, tmp_path, monkeypatch):
    finish = trainer._finish_epoch
    monkeypatch.setattr(trainer, "_finish_epoch", lambda *arguments: finish(*arguments) and False)
    arguments = train_arguments(dataset, tmp_path / "again", **RUN)
    assert call(*arguments).code == 75
    monkeypatch.undo()
    monkeypatch.setitem(VIT_SIZES, "nano", NANO)
    assert call(*arguments).code == 0
    files = [torch.load(f / "checkpoint.pth", weights_only=True) for f in (run, tmp_path / "again")]
    for name, weight in files[0]["model"].items():
        assert torch.equal(weight, files[1]["model"][name]), name


def test_an_image_alone_is_refused(dataset, tmp_path, command):
    for change in ({"batch_size": 1}, {"device_batch_size": 1}, {"device_batch_size": 3}):
        outcome = command(*train_arguments(dataset, tmp_path / "run", **{**RUN, **change}))
        assert outcome.code == 2
        assert "leaves an image alone, which --decoder upernet cannot train on" in outcome.err
        assert not (tmp_path / "run").exists()


def test_no_gpu_decides_over_how_many_images_the_norms_are(dataset, tmp_path, command):
    outcome = command(*train_arguments(dataset, tmp_path / "run", **{**RUN, "device_batch_size": "auto"}))
    assert outcome.code == 2
    assert "--device-batch-size auto would let the GPU decide what --decoder upernet" in outcome.err


@pytest.mark.slow
def test_two_processes_score_the_weights_that_are_saved(dataset, tmp_path):
    """On CPUs each has its own running means; DistributedDataParallel finds no idle parameter."""
    arguments = train_arguments(dataset, tmp_path / "two", **{**RUN, "model": "vit_tiny"})
    run_in(arguments, tmp_path / "output.txt", processes=2)
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert call(
        "evaluate", tmp_path / "two/checkpoint.pth", "--dataset", dataset, "--device", "cpu",
        "--workers", "0", "--eval-batch-size", "1", "--out", tmp_path / "one.json",
    ).code == 0  # fmt: skip
    alone = json.loads((tmp_path / "one.json").read_text())
    assert alone["class_iou"] == result["class_iou"]
