"""Weights of a ViT from a file: of this project, of the official MAE release, or of timm.

All three give them the same names. Shapes: D features, C channels, P pixels per side of a patch,
N patches.

    weights = read_vit_weights(path, ignored=("head.",))
    model.load_state_dict(resample_positions(weights, grid=14))
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from engine.checkpoint import read_torch_file, refuse_damaged
from engine.vit import IMAGE_CHANNELS, VISIBLE, VIT_SIZES

logger = logging.getLogger(__name__)

PROJECTION, PROJECTION_BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"
POSITIONS = "pos_embed"


class VitFacts(NamedTuple):
    """What weights say of their ViT."""

    model: str | None  # its name here, if it has one
    width: int
    depth: int
    in_channels: int
    patch_size: int
    grid: int  # patches per side that the position embeddings are stored for


def read_vit_weights(path: Path, *, ignored: tuple[str, ...] = (), lazily: bool = False) -> dict[str, Tensor]:
    """The state dict of a file, by itself or under 'model'. Raises ValueError for any other file.

    ignored: beginnings of names that are left out.
    """
    content = read_torch_file(path, lazily=lazily)
    # MAE puts them under 'model', timm nowhere; a release may hold plain values beside them.
    stored = content.get("model", content) if isinstance(content, dict) else None
    weights = {
        str(name): weight
        for name, weight in (stored.items() if isinstance(stored, dict) else ())
        if isinstance(weight, Tensor) and not str(name).startswith(ignored)
    }
    describe_vit(weights, path)
    refuse_damaged(weights, path)
    return weights


def describe_vit(weights: Mapping[str, Tensor], source: object, *, prefix_tokens: int = 1) -> VitFacts:
    """What they say of their ViT. Raises ValueError about the source if they are of none.

    prefix_tokens: before the patches, the class token among them.
    """
    kernel, positions = weights.get(PROJECTION), weights.get(POSITIONS)
    if kernel is None or kernel.dim() != 4 or not kernel.numel():
        raise ValueError(f"{source} is not a checkpoint of a ViT encoder: it has no {PROJECTION}")
    patches = 0  # [1, prefix + N, D]
    if positions is not None and positions.dim() == 3 and positions.shape[::2] == (1, len(kernel)):
        patches = max(0, positions.shape[1] - prefix_tokens)
    grid = round(patches**0.5)  # ViTs of MAE and timm are pretrained on squares
    if not grid or grid**2 != patches:
        raise ValueError(f"{source} has no {POSITIONS} of a class token and a square of patches")
    width, channels, patch, _ = kernel.shape  # [D, C, P, P]
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    sizes = {(size.width, size.depth): name for name, size in reversed(VIT_SIZES.items())}
    return VitFacts(sizes.get((width, depth)), width, depth, channels, patch, grid)


def resample_positions(weights: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """The same weights for a square of `grid` x `grid` patches: bicubic, as timm does it."""
    positions = weights[POSITIONS]
    resampled = resample_abs_pos_embed(positions, [grid, grid], num_prefix_tokens=1)
    if resampled.shape != positions.shape:
        logger.info("position embeddings resampled to %d patches", grid**2)
    return {**weights, POSITIONS: resampled}


def fold_channels(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same for an image alone: channels beyond it, VISIBLE everywhere, go into the bias."""
    # A constant input c under a kernel w adds c * sum(w) at every position, as a bias does, so the
    # three-channel ViT has the same outputs.
    kernel, bias = weights[PROJECTION], weights[PROJECTION_BIAS]  # [D, C, P, P], [D]
    # In double precision: a rounding here would be the same error at every position.
    constant = VISIBLE * kernel[:, IMAGE_CHANNELS:].double().sum(dim=(1, 2, 3))
    return {
        **weights,
        PROJECTION: kernel[:, :IMAGE_CHANNELS].contiguous(),
        PROJECTION_BIAS: (bias.double() + constant).to(bias.dtype),
    }
