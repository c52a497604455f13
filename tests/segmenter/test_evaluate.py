"""Scores and predictions of checkpoints and of stored label maps."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from segmenter.dataset import quiet_imports
from tests.segmenter.boxes import IGNORE


@pytest.fixture(scope="module")
def scored(dataset, finished, tmp_path_factory):
    """Scores of the finished run with their stored predictions."""
    from tests.segmenter.boxes import call

    folder = tmp_path_factory.mktemp("scored")
    outcome = call(
        "evaluate", finished / "checkpoint.pth", "--dataset", dataset, "--device", "cpu",
        "--workers", "0", "--eval-batch-size", "1", "--save-predictions", folder / "predictions",
        "--out", folder / "scores.json",
    )  # fmt: skip
    assert outcome.code == 0
    return folder


def scores_of(folder):
    return json.loads((folder / "scores.json").read_text())


def test_a_checkpoint_scores_as_it_did_in_training(scored, finished):
    result = json.loads((finished / "result.json").read_text())
    scores = scores_of(scored)
    for key in ("pixel_accuracy", "mean_accuracy", "mean_iou", "class_iou", "protocol"):
        assert scores[key] == result[key]


def test_scores_equal_mmsegmentations_metric_on_the_stored_predictions(scored, dataset):
    with quiet_imports():
        from mmseg.evaluation import IoUMetric
    metric = IoUMetric(ignore_index=IGNORE, iou_metrics=["mIoU"])
    metric.dataset_meta = {"classes": ["ground", "box", "sky"]}
    for path in sorted((scored / "predictions").iterdir()):
        labels = Image.open(dataset.parent / "annotations/validation" / path.name)
        predicted = np.array(Image.open(path))
        sample = {
            "pred_sem_seg": {"data": torch.from_numpy(predicted)},
            "gt_sem_seg": {"data": torch.from_numpy(np.array(labels))},
        }
        metric.process({}, [sample])
    expected = metric.compute_metrics(metric.results)
    scores = scores_of(scored)
    assert scores["mean_iou"] == pytest.approx(expected["mIoU"], abs=0.006)  # they round
    assert scores["pixel_accuracy"] == pytest.approx(expected["aAcc"], abs=0.006)


def test_stored_predictions_score_the_same(scored, dataset, command, tmp_path):
    outcome = command(
        "evaluate", "--predictions", scored / "predictions", "--dataset", dataset,
        "--out", tmp_path / "scores.json",
    )  # fmt: skip
    assert outcome.code == 0
    assert scores_of(tmp_path)["class_iou"] == scores_of(scored)["class_iou"]
    assert "mean iou" in outcome.out


def test_ade20k_against_its_own_annotations_is_exactly_100(ade20k, command, tmp_path):
    outcome = command(
        "evaluate", "--predictions", ade20k / "annotations/validation", "--dataset", ade20k,
        "--out", tmp_path / "scores.json",
    )  # fmt: skip
    assert outcome.code == 0
    scores = scores_of(tmp_path)
    assert scores["mean_iou"] == scores["mean_accuracy"] == scores["pixel_accuracy"] == 100
    assert len(scores["class_iou"]) == 150
    assert set(scores["class_iou"].values()) == {100, None}


def test_multi_scale_and_other_windows_stand_in_the_protocol(finished, dataset, command, tmp_path):
    outcome = command(
        "evaluate", finished / "checkpoint.pth", "--dataset", dataset, "--device", "cpu",
        "--workers", "0", "--multi-scale", "--window-stride", "32", "--out", tmp_path / "s.json",
    )  # fmt: skip
    assert outcome.code == 0
    protocol = json.loads((tmp_path / "s.json").read_text())["protocol"]
    assert protocol["scales"] == [0.5, 0.75, 1.0, 1.25, 1.5, 1.75]
    assert protocol["flip"]
    assert protocol["window_stride"] == 32


def test_images_of_every_mode_and_size_are_predicted(finished, command, tmp_path):
    rng = np.random.default_rng(0)
    sources = {
        "grey.png": Image.fromarray(rng.integers(0, 255, (30, 50), dtype=np.uint8)),
        "alpha.png": Image.fromarray(rng.integers(0, 255, (33, 31, 4), dtype=np.uint8)),
        "deep.png": Image.fromarray(rng.integers(0, 65535, (20, 90)).astype(np.uint16)),
        "cmyk.jpg": Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).convert("CMYK"),
        "palette.gif": Image.fromarray(rng.integers(0, 255, (17, 23, 3), dtype=np.uint8)).convert("P"),
        "pixel.png": Image.new("1", (1, 1)),
    }
    for name, image in sources.items():
        image.save(tmp_path / name)
    files = [tmp_path / name for name in sources]
    out = tmp_path / "out"
    outcome = command("predict", finished / "best.pth", *files, "--out", out, "--device", "cpu")
    assert outcome.code == 0
    for path in files:
        labels = np.array(Image.open(out / f"{path.stem}.png"))
        assert labels.shape == Image.open(path).size[::-1]
        assert labels.max() < 3
        overlay = Image.open(out / f"{path.stem}_overlay.png")
        assert overlay.width == labels.shape[1]
        assert overlay.height > labels.shape[0]  # the legend
