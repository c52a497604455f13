"""Layer-wise rates and weight decay, parameter by parameter."""

import dataclasses

import pytest
import torch

from engine.update import GuardedUpdate
from engine.vit import VIT_SIZES, VitSize
from segmenter.config import OptimisationConfig
from segmenter.encoder import EncoderShape
from segmenter.finetune import make_optimizer
from segmenter.model import Segmenter, SegmenterShape

ADAMW = OptimisationConfig(
    epochs=1, batch_size=1, optimizer="adamw", lr=1e-3, momentum=0.9, weight_decay=0.05,
    layer_decay=0.5, schedule="cosine", poly_power=1.0, min_lr=0.0, warmup_fraction=0.0,
    eval_every=1,
)  # fmt: skip
# Two encoder blocks: the rate doubles from the embeddings to the first block, to the second, to
# the final norm, with which the decoder goes. A vector and an embedding do not decay.
BLOCK = {
    "norm1.weight": 0, "norm1.bias": 0, "attn.qkv.weight": 0.05, "attn.qkv.bias": 0,
    "attn.proj.weight": 0.05, "attn.proj.bias": 0, "norm2.weight": 0, "norm2.bias": 0,
    "mlp.fc1.weight": 0.05, "mlp.fc1.bias": 0, "mlp.fc2.weight": 0.05, "mlp.fc2.bias": 0,
}  # fmt: skip
BY_HAND = {
    "encoder.cls_token": (0.125, 0), "encoder.reg_token": (0.125, 0),
    "encoder.pos_embed": (0.125, 0), "encoder.patch_embed.proj.weight": (0.125, 0.05),
    "encoder.patch_embed.proj.bias": (0.125, 0),
    **{f"encoder.blocks.0.{name}": (0.25, decay) for name, decay in BLOCK.items()},
    **{f"encoder.blocks.1.{name}": (0.5, decay) for name, decay in BLOCK.items()},
    "encoder.norm.weight": (1, 0), "encoder.norm.bias": (1, 0),
    "decoder.cls_emb": (1, 0), "decoder.proj_patch": (1, 0.05), "decoder.proj_classes": (1, 0.05),
    **{f"decoder.blocks.0.{name}": (1, decay) for name, decay in BLOCK.items()},
    "decoder.proj_dec.weight": (1, 0.05), "decoder.proj_dec.bias": (1, 0),
    "decoder.decoder_norm.weight": (1, 0), "decoder.decoder_norm.bias": (1, 0),
    "decoder.mask_norm.weight": (1, 0), "decoder.mask_norm.bias": (1, 0),
}  # fmt: skip


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setitem(VIT_SIZES, "vit_two", VitSize(width=16, depth=2, heads=2, patch_size=8))
    encoder = EncoderShape(model="vit_two", patch_size=8, in_channels=4, grid=2, extra_tokens=1)
    shape = SegmenterShape(
        encoder=encoder, decoder="mask_transformer", decoder_layers=1, num_classes=3,
        normalization="imagenet",
    )  # fmt: skip
    return Segmenter(shape)


def groups_by_name(model, optimisation):
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = make_optimizer(model, optimisation).param_groups
    return [(group, [names[parameter] for parameter in group["params"]]) for group in groups]


def test_every_parameter_has_the_rate_and_decay_a_hand_computes(model):
    found = {
        name: (group["lr_scale"], group["weight_decay"])
        for group, names in groups_by_name(model, ADAMW)
        for name in names
    }
    assert found == BY_HAND


def test_a_group_is_a_pair_of_values_in_the_order_of_the_model(model):
    """Optimizer states of checkpoints are stored by group and place."""
    groups = groups_by_name(model, ADAMW)
    expected: dict[tuple[float, float], list[str]] = {}
    for name, _ in model.named_parameters():
        expected.setdefault(BY_HAND[name], []).append(name)
    assert [names for _, names in groups] == list(expected.values())
    assert [(g["lr_scale"], g["weight_decay"]) for g, _ in groups] == list(expected)


def test_one_rate_and_no_decay_make_one_group(model):
    plain = dataclasses.replace(ADAMW, optimizer="sgd", layer_decay=1.0, weight_decay=0.0)
    ((group, names),) = groups_by_name(model, plain)
    assert names == [name for name, _ in model.named_parameters()]
    assert (group["lr_scale"], group["weight_decay"]) == (1.0, 0.0)


def test_the_schedules_rate_is_scaled_by_group(model):
    optimizer = make_optimizer(model, ADAMW)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    update = GuardedUpdate(optimizer, None, scales_loss=False)
    update.step(torch.tensor(0.5), torch.tensor(1.0), 0.8)
    assert {group["lr_scale"]: group["lr"] for group in optimizer.param_groups} == {
        0.125: 0.1, 0.25: 0.2, 0.5: 0.4, 1.0: 0.8,
    }  # fmt: skip
    assert isinstance(optimizer, torch.optim.AdamW)
