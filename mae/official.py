"""Start from an official MAE checkpoint (`--init`), with or without its decoder."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from mae.checkpoint import read_torch_file
from mae.config import IMAGE_CHANNELS
from mae.model import MaskedAutoencoder

logger = logging.getLogger(__name__)

EMBEDDING = "patch_embed.proj.weight"
# Parts that an official file may lack: the decoder is in the `_full` files only.
OPTIONAL = ("decoder_", "mask_token", "preencoder.")
# Fixed sine-cosine embeddings: they are made for the size of the model, never taken over.
DECODER_POSITIONS = "decoder_pos_embed"


def read_official_weights(path: Path, *, lazily: bool = False) -> dict[str, Tensor]:
    """The state dict of an official file, `{"model": ...}`. Raises ValueError for anything else."""
    content = read_torch_file(path, lazily=lazily)
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or EMBEDDING not in weights:
        raise ValueError(f"{path} is not an MAE checkpoint: it has no {EMBEDDING} under 'model'")
    return weights


def start_from_official(model: MaskedAutoencoder, weights: dict[str, Tensor]) -> list[str]:
    """Copy official weights into the model; return the parts that start fresh, in words.

    Raises ValueError that lists whatever does not fit.
    """
    adapted, fresh = fit_official(model.state_dict(), weights)
    model.load_state_dict(adapted, strict=False)
    return fresh


def fit_official(
    own: dict[str, Tensor], weights: dict[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Official weights in the shapes of the model's state dict, and the parts that start fresh.

    Position embeddings are resampled when the number of patches differs. A fourth input channel
    starts from 0, so that the model begins as the official one. Raises ValueError that lists
    whatever does not fit.
    """
    adapted = {name: weight for name, weight in weights.items() if name != DECODER_POSITIONS}
    own = {name: weight for name, weight in own.items() if name != DECODER_POSITIONS}
    fresh: list[str] = []
    if "pos_embed" in adapted and adapted["pos_embed"].shape[1] != own["pos_embed"].shape[1]:
        adapted["pos_embed"] = resample_positions(adapted["pos_embed"], own["pos_embed"].shape[1])
        logger.info("position embeddings resampled to %d patches", own["pos_embed"].shape[1] - 1)
    new_channels = own[EMBEDDING].shape[1] - adapted[EMBEDDING].shape[1]
    if new_channels > 0 and adapted[EMBEDDING].shape[1] == IMAGE_CHANNELS:
        adapted[EMBEDDING] = F.pad(adapted[EMBEDDING], (0, 0, 0, 0, 0, new_channels))
        fresh.append(f"{EMBEDDING} of input channel {IMAGE_CHANNELS + 1} (zeros)")
    problems = _misfits(own, adapted)
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"the checkpoint does not fit: {'; '.join(problems[:5])}{more}")
    return adapted, fresh + sorted({name.split(".")[0] for name in own if name not in adapted})


def _misfits(own: dict[str, Tensor], adapted: dict[str, Tensor]) -> list[str]:
    problems = [f"{name} is not part of the model" for name in adapted if name not in own]
    for name, parameter in own.items():
        if name not in adapted:
            if not name.startswith(OPTIONAL):
                problems.append(f"{name} is missing")
        elif adapted[name].shape != parameter.shape:
            have, want = tuple(adapted[name].shape), tuple(parameter.shape)
            problems.append(f"{name} is {have} instead of {want}")
    return problems


def resample_positions(positions: Tensor, length: int) -> Tensor:
    """[1, 1 + N, D] to [1, length, D] by bicubic interpolation; the class token's stays."""
    old_side = round((positions.shape[1] - 1) ** 0.5)
    new_side = round((length - 1) ** 0.5)
    grid = positions[:, 1:].reshape(1, old_side, old_side, -1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(grid, (new_side, new_side), mode="bicubic", antialias=True)
    patches = resized.permute(0, 2, 3, 1).reshape(1, new_side**2, -1)
    return torch.cat([positions[:, :1].float(), patches], dim=1)
