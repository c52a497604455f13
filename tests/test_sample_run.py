"""The sample run of `./run_benchmark.sh` has to show learning, before and after the hand-over."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.pipeline.programs import REPO_ROOT, run_benchmark

FALL_OF_THE_LOSS = 0.30
TIMES_THE_BASELINE = 3


def majority_mean_iou(dataset_yml: Path) -> float:
    """Mean IoU in percent of calling every test pixel the most frequent class among them."""
    folder = dataset_yml.parent / yaml.safe_load(dataset_yml.read_text())["annotations"]["val"]
    labels = [np.asarray(Image.open(path)).ravel() for path in folder.glob("*.png")]
    pixels = np.bincount(np.concatenate(labels))
    # The union of that class is every pixel; the others have an IoU of 0.
    return 100 * pixels.max() / pixels.sum() / np.count_nonzero(pixels)


@pytest.mark.slow
def test_the_sample_run_shows_learning(tmp_path: Path) -> None:
    done = run_benchmark("--config", REPO_ROOT / "configs/sample.yml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    dataset = tmp_path / "sample/segmentation/dataset.yml"

    [log] = (tmp_path / "output/pretrain_output").glob("*/log.txt")
    losses = [json.loads(line)["train_loss"] for line in log.read_text().splitlines()]
    assert losses[-1] <= (1 - FALL_OF_THE_LOSS) * losses[0], losses

    results = (tmp_path / "output/eval_output").glob("*/result.json")
    scores = {path.parent.name: json.loads(path.read_text())["mean_iou"] for path in results}
    assert scores["four_channels_6"] >= TIMES_THE_BASELINE * majority_mean_iou(dataset), scores
