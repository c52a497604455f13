"""Rate, batch and cost of pretraining."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mae.check import plan_batches
from mae.config import MethodConfig, ModelConfig, OptimisationConfig, make_method, training_flops
from mae.model import MaskedAutoencoder
from mae.pretrain import make_optimizer
from tests.mae.conftest import make_config

RATES = {"epochs": 10, "warmup_fraction": 0.1, "base_lr": 1e-3, "min_lr": 1e-5}


def test_the_peak_follows_from_the_effective_batch():
    run = OptimisationConfig(**RATES, effective_batch_size=512)
    assert run.learning_rate == run.rate_at(0.1) == pytest.approx(1e-3 * 512 / 256)
    assert run.rate_at(0.55) == pytest.approx((2e-3 + 1e-5) / 2)
    assert run.rate_at(1.0) == pytest.approx(1e-5)


def plan(effective, images, processes, batch_size="auto"):
    options = {"effective_batch_size": effective, "batch_size": batch_size}
    return plan_batches(make_config("in1k", "out", **options), images, processes)


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
def test_accumulation_follows_from_the_effective_batch(effective, processes, batch_size, accumulation, micro):
    found = plan(effective, 10000, processes, batch_size)
    assert (found.accumulation_steps, found.micro_batch_size) == (accumulation, micro)


def test_impossible_batches_are_refused():
    with pytest.raises(ValueError, match="at most 100"):
        plan(512, 100, 1)
    with pytest.raises(ValueError, match="multiple of 3"):
        plan(512, 1000, 3)


def test_matrices_decay_and_biases_norms_and_tokens_do_not():
    """AdamW as He et al. (2022) use it, table 8."""
    config = ModelConfig(model="vit_tiny", image_size=32, decoder_depth=1)
    model = MaskedAutoencoder(config, make_method(MethodConfig(mask_method="patches"), config))
    optimizer = make_optimizer(model, OptimisationConfig(weight_decay=0.07))
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert parameter not in decays, name
        else:
            is_matrix = name.endswith("weight") and parameter.dim() > 1
            is_token = name in ("cls_token", "mask_token")
            assert decays[parameter] == (0.07 if is_matrix or is_token else 0), name


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


def test_the_preencoder_costs_what_torch_counts_of_its_convolution():
    config = ModelConfig(model="vit_tiny", image_size=64, patch_size=8, decoder_depth=2)
    with_it, without = (
        make_method(MethodConfig(mask_method=name), config) for name in ("preencoder", "segments")
    )
    with FlopCounterMode(display=False) as counter:
        MaskedAutoencoder(config, with_it).preencoder(torch.zeros(1, 4, 64, 64))
    added = training_flops(config, with_it) - training_flops(config, without)
    assert added == 3 * counter.get_total_flops() > 0
