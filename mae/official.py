"""Start from an official MAE checkpoint (`--init`), with or without its decoder."""

from __future__ import annotations

import logging
from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from engine.checkpoint import misfits, read_torch_file, refuse_damaged, resample_positions
from engine.vit import IMAGE_CHANNELS
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
    known = isinstance(weights, dict) and all(isinstance(w, Tensor) for w in weights.values())
    if not known or weights is None or EMBEDDING not in weights or weights[EMBEDDING].dim() != 4:
        raise ValueError(f"{path} is not an MAE checkpoint: it has no {EMBEDDING} under 'model'")
    refuse_damaged(weights, path)
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
    num_patches = own["pos_embed"].shape[1] - 1
    if "pos_embed" in adapted and adapted["pos_embed"].shape[1] != num_patches + 1:
        adapted["pos_embed"] = resample_positions(adapted["pos_embed"], round(num_patches**0.5))
        logger.info("position embeddings resampled to %d patches", num_patches)
    new_channels = own[EMBEDDING].shape[1] - adapted[EMBEDDING].shape[1]
    if new_channels > 0 and adapted[EMBEDDING].shape[1] == IMAGE_CHANNELS:
        adapted[EMBEDDING] = F.pad(adapted[EMBEDDING], (0, 0, 0, 0, 0, new_channels))
        fresh.append(f"{EMBEDDING} of input channel {IMAGE_CHANNELS + 1} (zeros)")
    problems = misfits(own, adapted, OPTIONAL)
    if problems:
        raise ValueError(f"the checkpoint does not fit: {problems}")
    return adapted, fresh + sorted({name.split(".")[0] for name in own if name not in adapted})
