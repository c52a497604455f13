"""Start the encoder from a checkpoint: of MAE pretraining, official or ours, or of timm."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segmenter.checkpoint import read_torch_file
from segmenter.config import VIT_SIZES, ModelConfig
from segmenter.encoder import IMAGE_CHANNELS, POSITIONS, Encoder, EncoderShape, resample_positions

logger = logging.getLogger(__name__)

EMBEDDING = "patch_embed.proj.weight"
# Ignored on purpose: what pretraining alone needs, and classifiers.
IGNORED = ("mask_token", "decoder_", "preencoder.", "head.", "head_drop", "fc_norm.", "pre_logits.")
# May be missing, and then starts fresh: MAE files that end in an average pool have no final norm.
OPTIONAL = ("norm.weight", "norm.bias")
MOST_NAMED = 5


def read_encoder_weights(path: Path, *, lazily: bool = False) -> dict[str, Tensor]:
    """Weights of a ViT by their official names. Raises ValueError for any other file."""
    content = read_torch_file(path, lazily=lazily)
    weights: Any = content.get("model", content) if isinstance(content, dict) else None
    if not isinstance(weights, dict) or EMBEDDING not in weights:
        raise ValueError(f"{path} is not a checkpoint of a ViT encoder: it has no {EMBEDDING}")
    return {
        name: weight
        for name, weight in weights.items()
        if isinstance(weight, Tensor) and not name.startswith(IGNORED)
    }


def shape_of(weights: dict[str, Tensor], config: ModelConfig, path: Path) -> EncoderShape:
    """What the weights say about their encoder. Raises ValueError if it is not the wanted one."""
    width, channels, patch = weights[EMBEDDING].shape[:3]
    size = VIT_SIZES[config.model]
    if width != size.width:
        fitting = [name for name, other in VIT_SIZES.items() if other.width == width]
        hint = f"; it may be a {fitting[0]}" if fitting else ""
        raise ValueError(f"{path} is {width} wide, {config.model} is {size.width} wide{hint}")
    if config.patch_size not in (None, patch):
        raise ValueError(
            f"{path} has patches of {patch} pixels, --patch-size is {config.patch_size}"
        )
    if channels not in (IMAGE_CHANNELS, IMAGE_CHANNELS + 1):
        raise ValueError(f"{path} has {channels} input channels; 3 or 4 are possible")
    tokens = weights[POSITIONS].shape[1] - 1 if POSITIONS in weights else 0
    grid = round(tokens**0.5)
    if grid**2 != tokens or not tokens:
        raise ValueError(f"{path} has no {POSITIONS} of a class token and a square grid of patches")
    return EncoderShape(model=config.model, patch_size=patch, in_channels=channels, grid=grid)


def start_encoder(encoder: Encoder, weights: dict[str, Tensor], path: Path) -> list[str]:
    """Copy the weights; return the names of those that start fresh.

    Position embeddings are resampled to the encoder's grid. Raises ValueError that lists whatever
    is missing, left over or of another shape.
    """
    weights = dict(weights)
    weights[POSITIONS] = resample_positions(
        weights[POSITIONS], encoder.shape.grid, encoder.num_prefix_tokens
    )
    own = encoder.state_dict()
    problems = misfits(own, weights, OPTIONAL)
    if problems:
        raise ValueError(f"{path} does not fit: {problems}")
    encoder.load_state_dict(weights, strict=False)
    return [name for name in own if name not in weights]


def misfits(own: dict[str, Tensor], weights: dict[str, Tensor], optional: tuple[str, ...]) -> str:
    """What keeps weights from being loaded, in words; empty if nothing does."""
    problems = [f"{name} is not part of the model" for name in weights if name not in own]
    for name, parameter in own.items():
        if name not in weights:
            if name not in optional:
                problems.append(f"{name} is missing")
        elif weights[name].shape != parameter.shape:
            have, want = tuple(weights[name].shape), tuple(parameter.shape)
            problems.append(f"{name} is {have} instead of {want}")
    more = f" and {len(problems) - MOST_NAMED} more" if len(problems) > MOST_NAMED else ""
    return "; ".join(problems[:MOST_NAMED]) + more


def check_encoder_file(path: Path, config: ModelConfig) -> None:
    """Raise ValueError unless `start_encoder` would take the file. Allocates no weights."""
    weights = read_encoder_weights(path, lazily=True)
    shape = shape_of(weights, config, path)
    with torch.device("meta"):
        encoder = Encoder(shape)
    problems = misfits(encoder.state_dict(), weights, OPTIONAL)
    if problems:
        raise ValueError(f"{path} does not fit: {problems}")
