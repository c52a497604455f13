"""Start from an official MAE checkpoint (`--init`), with or without its decoder."""

from pathlib import Path

from torch import Tensor
from torch.nn import functional as F

from engine.checkpoint import refuse_misfits
from engine.vit import IMAGE_CHANNELS
from engine.weights import PROJECTION, describe_vit, read_vit_weights, resample_positions
from mae.model import MaskedAutoencoder

# Parts that an official file may lack: the decoder is in the `_full` files only.
OPTIONAL = ("decoder_", "mask_token", "preencoder.")
# Fixed sine-cosine embeddings: they are made for the size of the model, never taken over.
DECODER_POSITIONS = "decoder_pos_embed"


def read_official_weights(path: Path, *, lazily: bool = False) -> dict[str, Tensor]:
    """The state dict of an official file. Raises ValueError for anything else."""
    weights = read_vit_weights(path, "an MAE checkpoint", lazily=lazily)
    describe_vit(weights, path)
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

    Raises ValueError that lists whatever does not fit.
    """
    own = {name: weight for name, weight in own.items() if name != DECODER_POSITIONS}
    adapted = {name: weight for name, weight in weights.items() if name != DECODER_POSITIONS}
    # The grid of the model, [1, 1 + grid * grid, D]: bicubic, as timm resamples for another size.
    adapted = resample_positions(adapted, round((own["pos_embed"].shape[1] - 1) ** 0.5))
    fresh = []
    kernel, channels = weights[PROJECTION], own[PROJECTION].shape[1]
    if channels > kernel.shape[1] == IMAGE_CHANNELS:
        # From 0, the new channel changes nothing: the model begins as the official one.
        adapted[PROJECTION] = F.pad(kernel, (0, 0, 0, 0, 0, channels - IMAGE_CHANNELS))
        fresh.append(f"{PROJECTION} of input channel {IMAGE_CHANNELS + 1} (zeros)")
    refuse_misfits(own, adapted, "the checkpoint does not fit", OPTIONAL)
    return adapted, fresh + sorted({name.split(".")[0] for name in own if name not in adapted})
