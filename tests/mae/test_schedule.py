"""The learning rate belongs to the whole run."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae.config import MethodConfig, ModelConfig, OptimisationConfig, make_method
from mae.model import MaskedAutoencoder, training_flops
from mae.schedule import learning_rate, make_batch_plan

RUN = OptimisationConfig(
    epochs=10, warmup_fraction=0.1, base_lr=1e-3, min_lr=1e-5, effective_batch_size=512
)


def test_rate_rises_linearly_then_falls_as_half_a_cosine():
    peak = 1e-3 * 512 / 256
    assert RUN.learning_rate == peak
    assert learning_rate(RUN, 0.0) == 0
    assert learning_rate(RUN, 0.05) == pytest.approx(peak / 2)
    assert learning_rate(RUN, 0.1) == pytest.approx(peak)
    assert learning_rate(RUN, 0.55) == pytest.approx((peak + 1e-5) / 2)
    assert learning_rate(RUN, 1.0) == pytest.approx(1e-5)
    quarter = 1e-5 + (peak - 1e-5) * 0.5 * (1 + math.cos(math.pi / 4))
    assert learning_rate(RUN, 0.1 + 0.9 / 4) == pytest.approx(quarter)


def test_no_warmup_starts_at_the_peak():
    assert learning_rate(OptimisationConfig(warmup_fraction=0.0), 0.0) == pytest.approx(2.4e-3)


@pytest.mark.parametrize(
    ("effective", "processes", "batch_size", "accumulation", "micro"),
    [
        (4096, 8, 64, 8, 64),
        (4096, 64, 64, 1, 64),
        (96, 1, 64, 2, 48),
        (10, 2, 3, 5, 1),
        (7, 1, 4, 7, 1),
    ],
)
def test_accumulation_follows_from_the_effective_batch(
    effective, processes, batch_size, accumulation, micro
):
    run = OptimisationConfig(effective_batch_size=effective)
    plan = make_batch_plan(run, num_images=10000, processes=processes, batch_size=batch_size)
    assert (plan.accumulation_steps, plan.micro_batch_size) == (accumulation, micro)


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="at most 100"):
        make_batch_plan(RUN, num_images=100, processes=1, batch_size=64)
    with pytest.raises(ValueError, match="multiple of 3"):
        make_batch_plan(RUN, num_images=1000, processes=3, batch_size=64)


@pytest.mark.parametrize("mask_method", ["patches", "segments"])
def test_training_flops_are_what_torch_counts(mask_method):
    """Up to the patch embedding's and the class token's small change."""
    config = ModelConfig(model="vit_tiny", image_size=64, patch_size=8, decoder_depth=2)
    method = make_method(MethodConfig(mask_method=mask_method), config)
    model = MaskedAutoencoder(config, method)
    visible = torch.randint(0, 2, (1, 64, 64), dtype=torch.uint8)
    pattern = torch.rand(1, 64) if mask_method == "patches" else visible
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(images, pattern).sum().backward()
    assert training_flops(config, method) == pytest.approx(counter.get_total_flops(), rel=0.03)
