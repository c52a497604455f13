"""Checkpoint files: our own, and those that an encoder starts from (of MAE or timm)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

import engine.checkpoint
from engine.checkpoint import (
    Checkpoint,
    misfits,
    read_torch_file,
    refuse_damaged,
    resample_positions,
)
from engine.vit import IMAGE_CHANNELS, VIT_SIZES
from segmenter.config import EncoderConfig
from segmenter.encoder import POSITIONS, RELATIVE_POSITIONS, Encoder, EncoderShape


class DatasetFacts(TypedDict):
    """What a checkpoint keeps of its dataset."""

    name: str
    reduce_zero_label: bool


class FinetunedCheckpoint(Checkpoint):
    """What is needed to continue, and to evaluate and predict without the dataset."""

    shape: dict[str, Any]
    classes: list[str]
    palette: list[Colour]
    dataset: DatasetFacts
    protocol: dict[str, Any]


EMBEDDING = "patch_embed.proj.weight"
# Ignored on purpose: what pretraining alone needs, and classifiers.
IGNORED = ("mask_token", "decoder_", "preencoder.", "head.", "head_drop", "fc_norm.", "pre_logits.")
# May be missing, and then starts fresh: MAE files that end in an average pool have no final norm.
OPTIONAL = ("norm.weight", "norm.bias")
# Of UPerNet's encoder, as pretraining has none of them: they start without effect.
WITHOUT_EFFECT = (RELATIVE_POSITIONS, ".gamma")
Colour = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]


def load_checkpoint(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """Read what `train` saved onto the CPU. Raises ValueError if the file is none."""
    return engine.checkpoint.load_checkpoint(
        path, program="python -m segmenter train", shape=FinetunedCheckpoint, lazily=lazily
    )


def read_encoder_weights(path: Path, *, lazily: bool = False) -> dict[str, Tensor]:
    """Weights of a ViT by their official names. Raises ValueError for any other file."""
    content = read_torch_file(path, lazily=lazily)
    weights: Any = content.get("model", content) if isinstance(content, dict) else None
    kept = {
        str(name): weight
        for name, weight in (weights.items() if isinstance(weights, dict) else ())
        if isinstance(weight, Tensor) and not str(name).startswith(IGNORED)
    }
    if EMBEDDING not in kept or kept[EMBEDDING].dim() != 4:
        raise ValueError(f"{path} is not a checkpoint of a ViT encoder: it has no {EMBEDDING}")
    refuse_damaged(kept, path)
    return kept


def shape_of(weights: dict[str, Tensor], config: EncoderConfig, path: Path) -> EncoderShape:
    """What the weights say about their encoder. Raises ValueError if it is not the wanted one."""
    width, channels, patch = weights[EMBEDDING].shape[:3]
    if width != config.encoder.width:
        fitting = [name for name, size in VIT_SIZES.items() if size.width == width]
        hint = f"; it may be a {fitting[0]}" if fitting else ""
        raise ValueError(
            f"{path} is {width} wide, {config.model} is {config.encoder.width} wide{hint}"
        )
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
    positions = resample_positions(
        weights[POSITIONS], encoder.shape.grid, encoder.num_prefix_tokens
    )
    weights = {**weights, POSITIONS: positions}
    own = encoder.state_dict()
    if encoder.depths:
        weights = {n: weight for n, weight in weights.items() if not n.startswith(OPTIONAL)}
        own = {n: weight for n, weight in own.items() if not n.endswith(WITHOUT_EFFECT)}
    _check_fit(own, weights, path)
    encoder.load_state_dict(weights, strict=False)
    return [name for name in own if name not in weights]


def check_encoder_file(path: Path, config: EncoderConfig) -> None:
    """Raise ValueError unless `start_encoder` would take the file. Allocates no weights."""
    weights = read_encoder_weights(path, lazily=True)
    shape = shape_of(weights, config, path)
    with torch.device("meta"):
        _check_fit(Encoder(shape).state_dict(), weights, path)


def _check_fit(own: dict[str, Tensor], weights: dict[str, Tensor], path: Path) -> None:
    problems = misfits(own, weights, OPTIONAL)
    if problems:
        raise ValueError(f"{path} does not fit: {problems}")
