"""fp16 by torch's autocast on CPUs, with the scaling of the loss that GPUs without bf16 need."""

import math
from functools import cache

import numpy as np
import pytest
import torch

from tests.mae.conftest import (
    assert_same_weights,
    make_config,
    pack_segments,
    read_epochs,
    write_image,
    write_segments,
)

FP16 = {"precision": "fp16", "patch_size": 8, "val_images": 0, "log_with": ("none",)}


@pytest.fixture(scope="module")
def many_images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("many"), np.random.default_rng(0)
    for number in range(100):
        write_image(folder / f"train/{number:02}.jpg", rng)
        write_segments(folder / f"masks/{number:02}.json", rng)
    pack_segments(folder / "masks")
    return folder


@pytest.fixture(scope="module")
def losses_of(many_images, tmp_path_factory, processes):
    """Mean losses of the epochs of a method at a precision: 200 steps, made once."""

    @cache
    def losses_of(method, precision):
        out = tmp_path_factory.mktemp(f"{method}-{precision}")
        options = FP16 | {
            # Of patches, a step is two passes.
            "mask_method": method, "effective_batch_size": 2, "batch_size": 1 if method == "patches" else 2,
            "base_lr": 5e-3,
            "clip_grad": 1.0, "precision": precision,
        }  # fmt: skip
        assert processes.run(make_config(many_images, out, **options)) == [0]
        return [record["train_loss"] for record in read_epochs(out)]

    return losses_of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "lower"),
    [
        ("patches", "fp16"), ("four_channels", "fp16"), ("preencoder", "fp16"),
        ("four_channels", "bf16-residual"), ("patches", "float8"),
    ],
)  # fmt: skip
def test_losses_of_200_steps_are_those_of_fp32(losses_of, method, lower):
    if lower == "float8":
        pytest.importorskip("torchao")
    exact, found = losses_of(method, "fp32"), losses_of(method, lower)
    assert found == pytest.approx(exact, rel=0.01)
    assert found != exact
    assert exact[-1] < 0.95 * exact[0]


def _too_large_a_scale(rank):
    from engine import update

    update.FIRST_SCALE = 2.0**40


@pytest.mark.slow
def test_real_overflows_are_skipped_until_the_scale_fits(in1k_dir, tmp_path, processes):
    config = make_config(in1k_dir, tmp_path, **FP16)
    assert processes.run(config, sabotage=_too_large_a_scale) == [0]
    records = read_epochs(tmp_path)
    skipped, scale = records[-1]["skipped_steps"], records[-1]["loss_scale"]
    assert 5 < skipped <= 12
    assert scale == 2.0 ** (40 - skipped)
    assert all(math.isfinite(record["train_loss"]) for record in records)
    kept = torch.load(tmp_path / "last.pth", weights_only=True)
    assert kept["loss_scaling"]["skipped_steps"] == skipped
    assert all(state["step"] == 12 - skipped for state in kept["optimizer"]["state"].values())


def test_rounds_in_fp16_are_one_run(in1k_dir, tmp_path, processes):
    """Also on two processes, which have to agree on the scale."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = FP16 | {"batch_size": 4}
    for folder, stops in ((whole, (4,)), (cut, (2, 4))):
        for stop in stops:
            config = make_config(in1k_dir, folder, stop_after=stop, **options)
            assert processes.run(config, processes=2, sabotage=_too_large_a_scale) == [0, 0]
    assert read_epochs(cut) == read_epochs(whole)
    assert_same_weights(cut / "checkpoint-4.pth", whole / "checkpoint-4.pth")
    kept = [torch.load(folder / "last.pth", weights_only=True) for folder in (whole, cut)]
    assert kept[0]["loss_scaling"] == kept[1]["loss_scaling"]


def _poison_the_seventh_step(rank):
    from mae.model import MaskedAutoencoder

    forward, calls = MaskedAutoencoder.forward, []

    def poisoned(self, images, pattern):
        calls.append(1)
        return forward(self, images, pattern) * (math.nan if len(calls) == 7 else 1)

    MaskedAutoencoder.forward = poisoned


def test_a_loss_that_is_not_finite_is_no_overflow(in1k_dir, tmp_path, processes):
    config = make_config(in1k_dir, tmp_path, **FP16)
    assert processes.run(config, sabotage=_poison_the_seventh_step) == [1]
    message = (tmp_path / "error-0.txt").read_text()
    assert "not finite on process 0, step 1 of 3 in epoch 3" in message
    kept = torch.load(tmp_path / "last.pth", weights_only=True)
    assert (kept["epochs_completed"], kept["loss_scaling"]["skipped_steps"]) == (2, 0)
