"""The pretrained encoder as a plain 3-channel ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.layers import LayerNorm  # with MAE's eps of 1e-6
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common.files import check_output_file, is_marked, mark, replacing
from engine.checkpoint import load_weights, refuse_damaged
from engine.vit import IMAGE_CHANNELS, VISIBLE
from mae.checkpoint import load_checkpoint
from mae.config import ModelConfig, parse_group

KIND = "encoder"
ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
PROJECTION_WEIGHT, PROJECTION_BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"


def export_encoder(checkpoint_path: Path, out: Path) -> None:
    """Write the encoder of a checkpoint as .safetensors, or as .pth the way MAE publishes it.

    timm and MAE give an encoder's weights the same names. Raises ValueError if a path cannot be
    used.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"--out {out}: give a name that ends in .safetensors or .pth")
    check_output_file(out, reads=[checkpoint_path], is_own=is_marked(KIND))
    checkpoint = load_checkpoint(checkpoint_path, lazily=True, whole=False)
    weights = dict(_make_encoder(checkpoint, checkpoint_path).state_dict())
    with replacing(out) as unfinished:
        if out.suffix == ".pth":
            with unfinished.open("wb") as file:
                torch.save({"made_by": mark(KIND), "model": weights}, file)
        else:
            kept = ("model", "image_size", "patch_size", "mask_method", "coverage_ratio")
            about = {name: str(checkpoint["config"][name]) for name in kept}
            about["made_by"] = mark(KIND)
            about["epochs_completed"] = str(checkpoint["epochs_completed"])
            unfinished.write_bytes(save(weights, metadata=about))


def load_encoder(checkpoint_path: Path) -> VisionTransformer:
    """The encoder of a checkpoint as timm's ViT with 3 input channels, ready to embed images.

    Its `forward_features` takes normalised pixels [B, 3, H, W] and gives tokens [B, 1 + N, D].
    """
    return _make_encoder(load_checkpoint(checkpoint_path, whole=False), checkpoint_path).eval()


def _make_encoder(checkpoint: dict[str, Any], path: Path) -> VisionTransformer:
    """Raises ValueError if the checkpoint at `path` is damaged, or its weights do not fit."""
    weights = encoder_weights(checkpoint["model"], path)
    config = parse_group(ModelConfig, checkpoint["config"], path)
    size = config.encoder
    encoder = VisionTransformer(
        img_size=config.image_size, patch_size=config.patch_pixels, num_classes=0,
        embed_dim=size.width, depth=size.depth, num_heads=size.heads, norm_layer=LayerNorm,
    )  # fmt: skip
    load_weights(encoder, weights, path)
    return encoder


def encoder_weights(model: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The encoder's part of a state dict, with 3 input channels. Raises ValueError."""
    weights = {
        name: value.contiguous() for name, value in model.items() if name.startswith(ENCODER)
    }
    refuse_damaged(weights, path)
    kernel = weights.get(PROJECTION_WEIGHT)
    if kernel is None or kernel.dim() != 4 or PROJECTION_BIAS not in weights:
        raise ValueError(f"{path} holds no ViT encoder: {PROJECTION_WEIGHT} is missing")
    return fold_constant_channels(weights)


def fold_constant_channels(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put input channels beyond the image's, which are VISIBLE everywhere, into the bias.

    A constant input c under a kernel w adds c * sum(w) at every position, as a bias does, so the
    three-channel ViT has the same outputs.
    """
    kernel = weights[PROJECTION_WEIGHT]  # [D, C_in, P, P]
    constant = VISIBLE * kernel[:, IMAGE_CHANNELS:].double().sum(dim=(1, 2, 3))
    bias = weights[PROJECTION_BIAS]
    return {
        **weights,
        PROJECTION_WEIGHT: kernel[:, :IMAGE_CHANNELS].contiguous(),
        PROJECTION_BIAS: (bias.double() + constant).to(bias.dtype),
    }
