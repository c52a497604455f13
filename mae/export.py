"""The pretrained encoder as a plain 3-channel ViT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mae.checkpoint import load_checkpoint
from mae.config import IMAGE_CHANNELS
from mae.masking import VISIBLE
from mae.paths import beside

ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
PROJECTION_WEIGHT, PROJECTION_BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"


def export_encoder(checkpoint_path: Path, out: Path, naming: str) -> None:
    """Write the encoder of a checkpoint as .safetensors, or as .pth the way MAE publishes it.

    naming: timm or official. MAE is built on timm, so both give an encoder the same names; they
    are told apart in the metadata. Raises ValueError if a path cannot be used.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"--out {out}: give a name that ends in .safetensors or .pth")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: {out.absolute().parent} is not a folder")
    checkpoint = load_checkpoint(checkpoint_path, lazily=True)
    weights = encoder_weights(checkpoint["model"])
    unfinished = beside(out)
    if out.suffix == ".pth":
        torch.save({"model": weights}, unfinished)
    else:
        save_file(weights, unfinished, metadata=_metadata(checkpoint, naming))
    unfinished.replace(out)


def encoder_weights(model: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's part of a state dict, with 3 input channels."""
    weights = {
        name: value.contiguous() for name, value in model.items() if name.startswith(ENCODER)
    }
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


def _metadata(checkpoint: dict[str, Any], naming: str) -> dict[str, str]:
    config = checkpoint["config"]
    kept = ("model", "image_size", "patch_size", "mask_method", "coverage_ratio")
    values = {name: str(config[name]) for name in kept}
    return {**values, "naming": naming, "epochs_completed": str(checkpoint["epochs_completed"])}
