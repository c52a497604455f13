"""The pretrained encoder as a plain 3-channel ViT: a file for others, or timm's model here.

print(export_encoder(Path("OUT/checkpoint-50.pth"), Path("encoder.safetensors")))
encoder = load_encoder(Path("OUT/checkpoint-50.pth"))
"""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from timm.layers import LayerNorm  # with MAE's eps of 1e-6
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from common.files import check_output_file, is_marked, mark, replacing
from engine.checkpoint import load_weights
from engine.vit import IMAGE_CHANNELS, IMAGE_MEAN, IMAGE_STD, VIT_SIZES
from engine.weights import check_vit_weights, fold_channels
from mae.checkpoint import load_checkpoint
from mae.config import ModelConfig, parse_group

KIND = "encoder"
# Beginnings of the encoder's names; all else is pretraining's, a plugin's parts among it.
ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")


def export_encoder(checkpoint_path: Path, out: Path) -> str:
    """Write the encoder of a checkpoint as .safetensors, or as .pth the way MAE publishes it.

    Returns the line of Python that loads it with timm. Raises ValueError if a path cannot be used.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"--out {out}: give a name that ends in .safetensors or .pth")
    check_output_file(out, reads=[checkpoint_path], is_own=is_marked(KIND))
    # Lazily: of a checkpoint with its decoder a good part is never read.
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
    return timm_line(parse_group(ModelConfig, checkpoint["config"], checkpoint_path), out)


def timm_line(config: ModelConfig, path: Path) -> str:
    """The line of Python that makes the exported ViT at `path`, and knows its pixels."""
    values: dict[str, Any] = {"img_size": config.image_size, "patch_size": config.patch_pixels}
    name, size = config.encoder.timm_name, config.encoder
    if name is None:  # a plugin's: any plain ViT of timm takes other sizes
        name = VIT_SIZES["vit_base"].timm_name
        values |= {"embed_dim": size.width, "depth": size.depth, "num_heads": size.heads}
    values |= {"num_classes": 0, "checkpoint_path": str(path)}
    # timm's own ViTs are for another mean and deviation; its transforms take them from here.
    pixels = {"input_size": (IMAGE_CHANNELS, *[config.image_size] * 2)}
    values["pretrained_cfg_overlay"] = {**pixels, "mean": IMAGE_MEAN, "std": IMAGE_STD}
    given = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return f"timm.create_model({name!r}, {given})"


def load_encoder(checkpoint_path: Path) -> VisionTransformer:
    """The encoder of a checkpoint as timm's ViT with 3 input channels, ready to embed images.

    Its `forward_features` takes normalised pixels [B, 3, H, W] and gives tokens [B, 1 + N, D].
    """
    return _make_encoder(load_checkpoint(checkpoint_path, whole=False), checkpoint_path).eval()


def _make_encoder(checkpoint: dict[str, Any], path: Path) -> VisionTransformer:
    """Raises ValueError if the checkpoint at `path` is damaged, or its weights do not fit."""
    stored: dict[str, Tensor] = checkpoint["model"]
    weights = {name: weight for name, weight in stored.items() if name.startswith(ENCODER)}
    check_vit_weights(weights, path)
    config = parse_group(ModelConfig, checkpoint["config"], path)
    size = config.encoder
    encoder = VisionTransformer(
        img_size=config.image_size, patch_size=config.patch_pixels, num_classes=0,
        embed_dim=size.width, depth=size.depth, num_heads=size.heads, norm_layer=LayerNorm,
    )  # fmt: skip
    load_weights(encoder, fold_channels(weights), path)
    return encoder
