"""Models for scoring and predicting: checkpoints of `train`, those of the Segmenter release, and
those of mmsegmentation's UPerNet on MAE.

    loaded = load_segmenter(Path("eval_output/patches_50/best.pth"))
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from pydantic import Field
from torch import Tensor

import engine.checkpoint
from common.files import read_text
from common.formats import parse_value, parsed, parsed_plain
from engine.checkpoint import (
    Checkpoint,
    load_weights,
    read_torch_file,
    read_with_stand_ins,
    refuse_damaged,
)
from engine.weights import MMSEG_NAMES, describe_vit, renamed_by
from segmenter.config import ProtocolConfig, recipe_values
from segmenter.dataset import DESCRIPTIONS, Classes, read_classes, read_description
from segmenter.model import Segmenter, SegmenterShape

VARIANT = "variant.yml"  # beside the weights of the release: how they were trained
RELEASE_NORM_EPS = 1e-5  # of its layer norms; MAE's is 1e-6
# Of the release's encoders: the classifier they came with.
RELEASE_IGNORED = ("encoder.head.", "encoder.head_dist.", "encoder.pre_logits.")
RELEASE_NORMALIZATION = {"vit": "half", "deit": "imagenet"}

MMSEG_CLASSIFIER = "decode_head.conv_seg.weight"  # tells a checkpoint of mmsegmentation's UPerNet
MMSEG_IGNORED = "relative_position_index"  # follows from the grid

# What looking for something in a file of another kind, or with other values, may raise.
WRONG_CONTENT = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)

Colour = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]


class FinetunedCheckpoint(Checkpoint):
    """What is needed to continue, and to evaluate and predict without the dataset."""

    shape: dict[str, Any]
    classes: list[str]
    palette: list[Colour]
    dataset: dict[str, Any]
    protocol: dict[str, Any]


# Reads what `train` saved: load_checkpoint(path, lazily=False).
load_checkpoint = partial(
    engine.checkpoint.load_checkpoint, program="python -m segmenter train", shape=FinetunedCheckpoint
)


class LoadedSegmenter(NamedTuple):
    """A model, ready to evaluate, with what belongs to it."""

    model: Segmenter
    classes: Classes
    protocol: ProtocolConfig
    reduce_zero_label: bool  # label files begin with 1, as ADE20K's do


def load_segmenter(path: Path) -> LoadedSegmenter:
    """A trained model, ours, of the Segmenter release or of mmsegmentation. Raises ValueError."""
    if (path.parent / VARIANT).is_file():
        return _load_release(path)
    content = read_with_stand_ins(path)
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if isinstance(weights, dict) and MMSEG_CLASSIFIER in weights:
        return _load_mmseg(weights, content.get("meta") or {}, path)
    checkpoint = load_checkpoint(path)
    names, palette = tuple(checkpoint["classes"]), np.array(checkpoint["palette"], dtype=np.uint8)
    model = _model(checkpoint["shape"], checkpoint["model"], path)
    if not model.shape.num_classes == len(names) == len(palette):
        raise ValueError(f"{path}: its classes, their colours and its weights do not fit together")
    try:
        protocol = ProtocolConfig.from_described(checkpoint["protocol"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    first_is_none = parsed(bool, checkpoint["dataset"].get("reduce_zero_label"), f"{path}: reduce_zero_label")
    return LoadedSegmenter(model, Classes(names, palette), protocol, first_is_none)


def _model(shape: dict[str, Any], weights: dict[str, Tensor], path: Path) -> Segmenter:
    """Raises ValueError if the shape is none, or if the weights do not fit or are damaged."""
    model = Segmenter(parsed_plain(SegmenterShape, shape, f"{path}: shape"))
    load_weights(model, weights, path)
    refuse_damaged(weights, path)
    return model.eval()


def _load_release(path: Path) -> LoadedSegmenter:
    """checkpoint.pth of the Segmenter release, and variant.yml beside it."""
    # Its tuples are the one thing in it that is no plain YAML.
    text = read_text(path.parent / VARIANT).replace("!!python/tuple", "")
    variant, content = parse_value(text, str(path.parent / VARIANT)), read_torch_file(path)
    try:
        net, scored, data = (variant[f"{part}_kwargs"] for part in ("net", "inference", "dataset"))
        normalization = RELEASE_NORMALIZATION[net["normalization"]]
        weights = {  # timm calls DeiT's distillation token a register
            name.replace("encoder.dist_token", "encoder.reg_token"): weight
            for name, weight in content["model"].items()
            if not name.startswith(RELEASE_IGNORED)
        }
        encoder = _encoder_shape(weights, int(bool(net.get("distilled", False))))
        shape = {
            "encoder": {**encoder, "norm_eps": RELEASE_NORM_EPS},
            "decoder": "linear" if "linear" in net["decoder"]["name"] else "mask_transformer",
            "decoder_layers": net["decoder"].get("n_layers", 0),
            "num_classes": net["n_cls"], "normalization": normalization,
        }  # fmt: skip
        sizes = {name: scored[name] for name in ("window_size", "window_stride")}
        sizes |= {"image_size": scored["im_size"], "crop_size": data["crop_size"]}
        protocol = ProtocolConfig.from_described({**sizes, "normalization": normalization})
        description = read_description(DESCRIPTIONS / f"{data['dataset']}.yml")
    except WRONG_CONTENT as error:
        raise ValueError(f"{path} and its {VARIANT} are no Segmenter: {error}") from error
    model, classes = _model(shape, weights, path), read_classes(description)
    return LoadedSegmenter(model, classes, protocol, description.reduce_zero_label)


def _encoder_shape(weights: dict[str, Tensor], extra_tokens: int = 0) -> dict[str, Any]:
    """Of `EncoderShape`, what the weights of a whole model say. Raises one of WRONG_CONTENT."""
    parts = {name.partition("encoder.")[2]: weight for name, weight in weights.items()}
    found = describe_vit(parts, "it")
    if found.model is None:
        raise KeyError(f"no model here is {found.width} wide and {found.depth} deep")
    values = {name: getattr(found, name) for name in ("model", "patch_size", "in_channels", "grid")}
    return {**values, "extra_tokens": extra_tokens}


def _load_mmseg(stored: dict[str, Tensor], meta: dict[str, Any], path: Path) -> LoadedSegmenter:
    """The state dict of mmsegmentation's UPerNet on MAE, and its meta."""
    try:
        weights = {
            our_name(name): weight
            for name, weight in stored.items()
            if isinstance(weight, Tensor) and not name.endswith(MMSEG_IGNORED)
        }
        encoder, num_classes = _encoder_shape(weights), len(stored[MMSEG_CLASSIFIER])
        shape = {
            "encoder": encoder, "decoder": "upernet", "decoder_layers": 0,
            "num_classes": num_classes, "normalization": "imagenet",
        }  # fmt: skip
        # How it was scored the file does not say: as the recipe does, at the size of its positions.
        recipe, side = recipe_values("upernet"), encoder["grid"] * encoder["patch_size"]
        sizes = dict.fromkeys(("image_size", "crop_size", "window_size"), side)
        stride = side * recipe["window_stride"] // recipe["window_size"]
        protocol = ProtocolConfig.from_described({**recipe, **sizes, "window_stride": stride})
        classes, reduce_zero_label = _mmseg_classes(meta, num_classes)
    except WRONG_CONTENT as error:
        raise ValueError(f"{path} is no UPerNet on MAE of mmsegmentation: {error}") from None
    return LoadedSegmenter(_model(shape, weights, path), classes, protocol, reduce_zero_label)


def our_name(name: str) -> str:
    """The name here of a weight of mmsegmentation's UPerNet."""
    part, _, rest = name.partition(".")
    return f"encoder.{renamed_by(rest, MMSEG_NAMES)}" if part == "backbone" else f"decoder.{name}"


def _mmseg_classes(meta: dict[str, Any], num_classes: int) -> tuple[Classes, bool]:
    """Classes by their names in the meta, else by their number; and whether label 0 is none."""
    facts = meta.get("dataset_meta") or {"classes": meta.get("CLASSES")}  # of versions before 1.0
    names = tuple(map(str, facts.get("classes") or ()))
    for description in map(read_description, sorted(DESCRIPTIONS.glob("*.yml"))):
        classes = read_classes(description)
        if description.num_classes == num_classes and names in ((), classes.names):
            return classes, description.reduce_zero_label
    if len(names) != num_classes:
        raise ValueError(f"it has {num_classes} classes, but not their names in its meta")
    # Of any of them, for a palette where the meta has none.
    own = dataclasses.replace(
        description, classes=names, reduce_zero_label=False,
        palette=tuple(map(tuple, facts.get("palette") or ())),
    )  # fmt: skip
    return read_classes(own), False
