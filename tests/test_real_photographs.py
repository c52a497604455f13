"""The whole alternation on real photographs and street scenes, small enough for two CPU cores."""

import csv
import json
import math
from pathlib import Path

import pytest
import yaml
from PIL import Image

import mae.cli
import segmenter.cli
from tests import toy
from tests.pipeline.programs import REPO_ROOT, run_benchmark

DATA = REPO_ROOT.parent / "shared" / "data"
PLANNED = ["segment_patches"]  # the others are run here, without processes of their own
METHODS = ["patches", "segments", "four_channels", "preencoder", *PLANNED]
PRETRAIN = {
    "image_size": 64, "patch_size": 16, "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2,
    "batch_size": 8, "effective_batch_size": 8, "base_lr": 1.0e-3, "workers": 0,
}  # fmt: skip
FINETUNE = {
    "recipe": "fast", "epochs": 1, "batch_size": 2, "image_size": 64, "crop_size": 64,
    "window_size": 64, "window_stride": 64, "workers": 0,
}  # fmt: skip
MODEL = {"plugin": str(toy.PLUGIN), "model": "vit_toy"}
PLAN = {
    **MODEL, "num_gpus": 0, "pretrain_epochs": 2, "eval_freq": 2, "baselines": "none",
    "probe_freq": 0, "pretrain": PRETRAIN, "finetune": FINETUNE,
}  # fmt: skip

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
    (folder / "config.yml").write_text(yaml.safe_dump(PLAN))
    return folder


@pytest.fixture(scope="module")
def output(data: Path) -> Path:
    """The output directory of a method, pretrained for two epochs and scored."""
    done = run_benchmark(
        *("--config", data / "config.yml", "--in1k-dir", data / "in1k"),
        *("--eval-dataset", data / "dataset.yml", "--mask_method", ",".join(PLANNED)),
        *("--output_dir", data / "output"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return data / "output"


def test_the_segments_are_packed_and_the_table_has_a_row_per_method(data: Path, output: Path) -> None:
    assert (data / "in1k/masks/masks.sqlite").is_file()
    with (output / "results.csv").open() as file:
        finetuned = [r for r in csv.DictReader(file) if (r["row"], r["measure"]) == ("score", "finetuning")]
    rows = [(row["method"], int(row["epochs"])) for row in finetuned]
    assert rows == [(method, 2) for method in PLANNED]
    assert (output / "report.html").is_file()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_logs_finite_losses_is_drawn_and_scored_on_the_eleven_classes(
    method: str, data: Path, output: Path
) -> None:
    pretrained, scored = output / f"pretrain_output/{method}", output / f"eval_output/{method}_2"
    if method not in PLANNED:
        paths = {"in1k_dir": data / "in1k", "output_dir": pretrained, "mask_method": method}
        call(mae.cli.main, "pretrain", {**MODEL, **PRETRAIN, **paths, "epochs": 2})
        paths = {"dataset": data / "dataset.yml", "output_dir": scored}
        init = {"init": pretrained / "checkpoint-2.pth"}
        call(segmenter.cli.main, "train", {**MODEL, **FINETUNE, **paths, **init})
    epochs = [json.loads(line) for line in (pretrained / "log.txt").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2]
    assert all(math.isfinite(epoch["train_loss"]) for epoch in epochs)
    with Image.open(pretrained / "reconstructions-2.png") as picture:
        assert min(picture.size) > 100
    result = json.loads((scored / "result.json").read_text())
    assert 0 <= result["mean_iou"] <= 100
    assert len(result["class_iou"]) == 11
    assert (scored / "predictions.png").is_file()


def call(main, command: str, options: dict[str, object]) -> None:
    """The command, in this process."""
    words = [f"--{name}={value}" for name, value in options.items()]
    with pytest.raises(SystemExit) as end:
        main([command, *words, "--device=cpu"])
    assert end.value.code == 0
