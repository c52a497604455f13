"""The whole alternation on real photographs and street scenes, small enough for two CPU cores."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
METHODS = ["patches", "segments", "four_channels", "preencoder", "segment_patches"]
CONFIG = """
model: vit_tiny
num_gpus: 0
pretrain_epochs: 2
eval_freq: 2
baselines: none
probe_freq: 0
overlap: true
pretrain: {image_size: 64, patch_size: 16, decoder_width: 32, decoder_depth: 1, decoder_heads: 2,
           batch_size: 8, effective_batch_size: 8, base_lr: 1.0e-3, workers: 0}
finetune: {recipe: fast, epochs: 1, batch_size: 2, image_size: 64, crop_size: 64, window_size: 64,
           window_stride: 64, workers: 0}
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DATA.is_dir(), reason="the real images in ../shared/data are missing"),
]


def link_some(source: Path, target: Path, pattern: str, count: int) -> None:
    """Link the first files below `source` that match, keeping their folders."""
    for path in sorted(source.rglob(pattern))[:count]:
        link = target / path.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 photographs with segments, 4 street scenes to train on and 3 to score."""
    folder = tmp_path_factory.mktemp("data")
    link_some(DATA / "imagenet-sample/train", folder / "in1k/train", "*.JPEG", 16)
    link_some(DATA / "imagenet-sample/masks-amg-rle", folder / "in1k/masks", "*.json", 16)
    camvid = DATA / "camvid-sample"
    for kind, pattern in (("images", "*.jpg"), ("annotations", "*.png")):
        link_some(camvid / kind / "training", folder / kind / "training", pattern, 4)
        link_some(camvid / kind / "validation", folder / kind / "validation", pattern, 3)
    (folder / "dataset.yml").write_text((camvid / "dataset.yml").read_text())
    (folder / "config.yml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def output(data: Path) -> Path:
    """The output directory of every method, pretrained for two epochs and scored."""
    command = [sys.executable, str(ROOT / "benchmark.py"), "--config", str(data / "config.yml")]
    command += ["--in1k-dir", str(data / "in1k"), "--eval-dataset", str(data / "dataset.yml")]
    command += ["--mask_method", ",".join(METHODS), "--output_dir", str(data / "output")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return data / "output"


def test_the_segments_are_packed_before_they_are_trained_on(data: Path, output: Path) -> None:
    assert (data / "in1k/masks/masks.sqlite").is_file()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_logs_finite_losses_and_draws_its_reconstructions(
    method: str, output: Path
) -> None:
    folder = output / "pretrain_output" / method
    epochs = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert all(math.isfinite(epoch["train_loss"]) for epoch in epochs)
    assert (folder / "checkpoint-2.pth").is_file()
    with Image.open(folder / "reconstructions-2.png") as picture:
        assert min(picture.size) > 100


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_scored_on_the_eleven_classes(method: str, output: Path) -> None:
    folder = output / "eval_output" / f"{method}_2"
    result = json.loads((folder / "result.json").read_text())
    assert 0 <= result["mean_iou"] <= 100
    assert len(result["class_iou"]) == 11
    assert (folder / "predictions.png").is_file()


def test_the_table_has_a_row_per_method(output: Path) -> None:
    with (output / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], int(row["epochs"])) for row in rows] == [
        (method, 2) for method in METHODS
    ]
    assert (output / "report.html").is_file()
