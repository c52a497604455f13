"""Files of weights: a run's checkpoints; official MAE files come in, plain 3-channel ViTs go out.

print(export_encoder(Path("OUT/checkpoint-50.pth"), Path("encoder.safetensors")))
encoder = load_encoder(Path("OUT/checkpoint-50.pth"))
"""

from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import TypedDict

import engine.checkpoint
from common.files import check_output_file, is_marked, mark, replacing
from common.formats import Count
from engine.checkpoint import Checkpoint, check_resumable, load_weights, refuse_damaged, refuse_misfits
from engine.vit import IMAGE_CHANNELS, IMAGE_MEAN, IMAGE_STD, VIT_SIZES
from engine.weights import PROJECTION, describe_vit, fold_channels, resample_positions
from mae.config import ModelConfig, PretrainConfig, parse_group
from mae.listing import Listing
from mae.model import MaskedAutoencoder

# Parts that an official file may lack: the decoder is in the `_full` files only.
OPTIONAL = ("decoder_", "mask_token", "preencoder.")
# Fixed sine-cosine embeddings: they are made for the size of the model, never taken over.
DECODER_POSITIONS = "decoder_pos_embed"
# Beginnings of the encoder's names; all else is pretraining's, a plugin's parts among it.
ENCODER = ("cls_token", "pos_embed", "patch_embed.", "blocks.", "norm.")
KIND = "encoder"


class TrainedImages(TypedDict):
    """How many images a run trains on, and the digest of their list."""

    count: Count
    digest: str


class WholeCheckpoint(Checkpoint):
    """What is needed to continue, and to draw without the dataset."""

    images: TrainedImages
    # images [B, 3, H, W] uint8 of every round's picture, and pattern [B, ...], what hides each.
    fixed_set: dict[str, Tensor]


# Reads a checkpoint of pretraining: load_checkpoint(path, lazily=False).
load_checkpoint = partial(
    engine.checkpoint.load_checkpoint, program="python -m mae pretrain", shape=WholeCheckpoint
)


def check_fixed_set(checkpoint: dict[str, Any], path: Path) -> None:
    """Raise ValueError unless the checkpoint at `path` holds what its rounds' pictures show."""
    side = checkpoint["config"].get("image_size")
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint["fixed_set"].items()}
    images, pattern = shapes.get("images", ()), shapes.get("pattern", ())
    if images[1:] != (IMAGE_CHANNELS, side, side) or not images[0] or pattern[:1] != images[:1]:
        raise ValueError(f"{path} is damaged: no set of images of {side} pixels and patterns: {shapes}")


def open_own_checkpoint(
    config: PretrainConfig, listing: Listing, path: Path, *, lazily: bool = False
) -> dict[str, Any]:
    """The checkpoint that this run continues.

    Raises ValueError if it cannot be read, or was made with other settings or another list of
    training images.
    """
    checkpoint = load_checkpoint(path, lazily=lazily)
    config.check_same(checkpoint["config"], path)
    check_fixed_set(checkpoint, path)
    trained = checkpoint["images"]
    if trained["digest"] != listing.digest:
        raise ValueError(
            f"the training images are not those of the checkpoint ({trained['count']} then, "
            f"{len(listing.train)} now, or other names); use another --output-dir"
        )
    if checkpoint["epochs_completed"] < config.epochs_this_round:
        check_resumable(checkpoint, path)
    return checkpoint


def start_from_official(model: MaskedAutoencoder, weights: dict[str, Tensor]) -> list[str]:
    """Copy official weights into the model; the parts that start fresh, in words. ValueError."""
    adapted, fresh = fit_official(model.state_dict(), weights)
    model.load_state_dict(adapted, strict=False)
    return fresh


def fit_official(own: dict[str, Tensor], weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Official weights in the shapes of a model's state dict, and the parts that start fresh."""
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


def export_encoder(checkpoint_path: Path, out: Path) -> str:
    """Write the encoder of a checkpoint as .safetensors, or as .pth the way MAE publishes it.

    Returns the line of Python that loads it with timm. Raises ValueError if a path cannot be used.
    """
    if out.suffix not in (".safetensors", ".pth"):
        raise ValueError(f"--out {out}: give a name that ends in .safetensors or .pth")
    check_output_file(out, reads=[checkpoint_path], is_own=is_marked(KIND))
    # Lazily: of a checkpoint with its decoder a good part is never read.
    checkpoint = load_checkpoint(checkpoint_path, lazily=True)
    config = parse_group(ModelConfig, checkpoint["config"], checkpoint_path)
    weights = dict(make_encoder(checkpoint["model"], config, checkpoint_path).state_dict())
    kept = ("model", "image_size", "patch_size", "mask_method", "coverage_ratio")
    about = {name: str(checkpoint["config"][name]) for name in kept}
    about |= {"made_by": mark(KIND), "epochs_completed": str(checkpoint["epochs_completed"])}
    with replacing(out) as unfinished:
        if out.suffix == ".pth":
            with unfinished.open("wb") as file:
                torch.save({"made_by": mark(KIND), "model": weights}, file)
        else:
            unfinished.write_bytes(save(weights, metadata=about))
    return _timm_line(config, out)


def _timm_line(config: ModelConfig, path: Path) -> str:
    """The line of Python that makes the exported ViT at `path`, and knows its pixels."""
    name, values = timm_arguments(config)
    overlay = values.pop("pretrained_cfg_overlay")
    values |= {"checkpoint_path": str(path), "pretrained_cfg_overlay": overlay}
    given = ", ".join(f"{key}={value!r}" for key, value in values.items())
    return f"timm.create_model({name!r}, {given})"


def timm_arguments(config: ModelConfig) -> tuple[str, dict[str, Any]]:
    """Name and arguments by which `timm.create_model` makes the encoder, without its weights."""
    values: dict[str, Any] = {"img_size": config.image_size, "patch_size": config.patch_pixels}
    name, size = config.encoder.timm_name, config.encoder
    if name is None:  # a plugin's: any plain ViT of timm takes other sizes
        name = VIT_SIZES["vit_base"].timm_name
        values |= {"embed_dim": size.width, "depth": size.depth, "num_heads": size.heads}
    # timm's own ViTs are for another mean and deviation; its transforms take them from here.
    pixels = {"input_size": (IMAGE_CHANNELS, *[config.image_size] * 2)}
    # As our own scoring scales images; timm's default is bicubic.
    overlay = {**pixels, "mean": IMAGE_MEAN, "std": IMAGE_STD, "interpolation": "bilinear"}
    assert name is not None
    return name, {**values, "num_classes": 0, "pretrained_cfg_overlay": overlay}


def load_encoder(checkpoint_path: Path) -> VisionTransformer:
    """The encoder of a checkpoint as timm's ViT with 3 input channels, ready to embed images."""
    # Its `forward_features` takes normalised pixels [B, 3, H, W] and gives tokens [B, 1 + N, D].
    checkpoint = load_checkpoint(checkpoint_path)
    config = parse_group(ModelConfig, checkpoint["config"], checkpoint_path)
    return make_encoder(checkpoint["model"], config, checkpoint_path).eval()


def make_encoder(stored: dict[str, Tensor], config: ModelConfig, path: Path) -> VisionTransformer:
    """Raises ValueError about the file at `path` if its weights are damaged, or do not fit."""
    weights = {name: weight for name, weight in stored.items() if name.startswith(ENCODER)}
    describe_vit(weights, path)
    refuse_damaged(weights, path)
    name, values = timm_arguments(config)
    encoder = timm.create_model(name, **values)
    assert isinstance(encoder, VisionTransformer)
    load_weights(encoder, fold_channels(weights), path)
    return encoder
