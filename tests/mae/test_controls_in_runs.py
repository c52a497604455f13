"""Every method trains with every source of segments, and nothing that is cut changes a run."""

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mae.cli import main
from mae.config import make_method, training_flops
from mae.masking import METHODS
from mae.weights import load_checkpoint
from tests.mae.conftest import SMALL_RUN, assert_same_weights, make_config, read_epochs

SOURCES = ["own", "borrowed", "blob", "block"]
WITH_SEGMENTS = [name for name, method in METHODS.items() if method.uses_segments]


def call(*arguments):
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    assert caught.value.code == 0


@pytest.mark.parametrize("mask_method", WITH_SEGMENTS)
@pytest.mark.parametrize("segments_from", SOURCES)
def test_every_method_trains_and_is_drawn(in1k_dir, tmp_path, mask_method, segments_from):
    config, out = tmp_path / "small.yml", tmp_path / "out"
    options = {**SMALL_RUN, "in1k_dir": str(in1k_dir), "mask_method": mask_method, "epochs": 1}
    config.write_text(yaml.safe_dump(options))
    call("pretrain", "--config", config, "--output-dir", out, "--segments-from", segments_from)
    (record,) = read_epochs(out)
    assert 0 < record["train_loss"] < 10
    assert 0 < record["val_loss"] < 10
    checkpoint = load_checkpoint(out / "checkpoint-1.pth")
    assert checkpoint["config"]["segments_from"] == segments_from
    photo = in1k_dir / "train/class1/image_4.jpg"
    call("reconstruct", out / "checkpoint-1.pth", photo, "--masks-dir", in1k_dir / "masks",
         "--out", tmp_path / "photo.png")  # fmt: skip
    for path in (tmp_path / "photo.png", out / "reconstructions-1.png"):
        with Image.open(path) as picture:
            assert np.asarray(picture.convert("L")).std() > 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mask_method", "segments_from"),
    [("segments", "blob"), ("segment_patches", "borrowed")],
)
def test_rounds_workers_and_processes_change_nothing(
    in1k_dir, tmp_path, processes, mask_method, segments_from
):
    one, rounds, two = (tmp_path / name for name in ("one", "rounds", "two"))
    options = {"mask_method": mask_method, "segments_from": segments_from, "epochs": 2}
    assert processes.run(make_config(in1k_dir, one, batch_size=2, **options)) == [0]
    for stop_after in (1, 2):
        config = make_config(in1k_dir, rounds, batch_size=2, workers=2, stop_after=stop_after, **options)
        assert processes.run(config) == [0]
    assert read_epochs(rounds) == read_epochs(one)
    assert_same_weights(rounds / "checkpoint-2.pth", one / "checkpoint-2.pth")

    assert processes.run(make_config(in1k_dir, two, batch_size=2, **options), processes=2) == [0, 0]
    for mine, theirs in zip(read_epochs(one), read_epochs(two), strict=True):
        assert theirs == {name: pytest.approx(value, rel=1e-4) for name, value in mine.items()}
    a, b = (torch.load(run / "last.pth", weights_only=True) for run in (one, two))
    assert torch.equal(a["fixed_set"]["pattern"], b["fixed_set"]["pattern"])


def test_a_run_goes_on_only_with_the_same_segments(in1k_dir, tmp_path, capsys):
    from mae.pretrain import pretrain

    assert pretrain(make_config(in1k_dir, tmp_path, epochs=2, stop_after=1))
    with pytest.raises(ValueError, match="segments_from: own -> blob"):
        pretrain(make_config(in1k_dir, tmp_path, epochs=2, segments_from="blob"))


def test_the_log_says_what_was_spent_so_far(in1k_dir, tmp_path):
    from mae.pretrain import pretrain

    config = make_config(in1k_dir, tmp_path, epochs=2)
    assert pretrain(config)
    of_image = training_flops(config.model, make_method(config.method, config.model))
    spent = [record["train_flops"] for record in read_epochs(tmp_path)]
    assert spent == [24 * of_image, 2 * 24 * of_image]
