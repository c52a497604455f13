"""Models for scoring and predicting: checkpoints of `train`, those of the Segmenter release, and
those of mmsegmentation's UPerNet on MAE."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from typing_extensions import TypedDict

import engine.checkpoint
from common.files import read_text
from common.options import make
from engine.checkpoint import (
    Checkpoint,
    load_weights,
    read_torch_file,
    refuse_damaged,
    refuse_misfits,
)
from engine.weights import describe_vit
from segmenter.config import ProtocolConfig, recipe_values
from segmenter.dataset import DESCRIPTIONS, Classes, read_classes, read_description
from segmenter.model import Segmenter, SegmenterShape

Colour = Annotated[list[Annotated[int, Field(ge=0, le=255)]], Field(min_length=3, max_length=3)]
VARIANT = "variant.yml"  # beside the weights of the release: how they were trained
RELEASE_NORM_EPS = 1e-5
# Of the release's encoders: the classifier they came with.
RELEASE_IGNORED = ("encoder.head.", "encoder.head_dist.", "encoder.pre_logits.")
NORMALIZATION_NAMES: dict[str, Literal["half", "imagenet"]] = {"vit": "half", "deit": "imagenet"}

# What tells a checkpoint of mmsegmentation's UPerNet, and its names by ours.
MMSEG_CLASSIFIER = "decode_head.conv_seg.weight"
MMSEG_NAMES = {
    r"^(neck|decode_head|auxiliary_head)\.": r"decoder.\1.",
    r"^backbone\.layers\.": "encoder.blocks.",
    r"^backbone\.": "encoder.",
    r"\.patch_embed\.projection\.": ".patch_embed.proj.",
    r"\.ln(\d)\.": r".norm\1.",
    r"\.gamma_(\d)$": r".ls\1.gamma",
    r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.ffn\.layers\.1\.": ".mlp.fc2.",
}
MMSEG_IGNORED = "relative_position_index"  # follows from the grid

# What looking for something in a file of another kind may raise.
WRONG_CONTENT = (KeyError, TypeError, ValueError, AttributeError, IndexError)


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
    state: dict[str, Any]


def load_checkpoint(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """Read what `train` saved onto the CPU. Raises ValueError if the file is none."""
    return engine.checkpoint.load_checkpoint(
        path, program="python -m segmenter train", shape=FinetunedCheckpoint, lazily=lazily
    )


@dataclass(frozen=True, kw_only=True)
class LoadedSegmenter:
    """A model with what belongs to it: classes, protocol, and the numbering of its label files."""

    model: Segmenter
    classes: Classes
    protocol: ProtocolConfig
    reduce_zero_label: bool


def load_segmenter(path: Path) -> LoadedSegmenter:
    """A trained model, ours, of the Segmenter release or of mmsegmentation. Raises ValueError."""
    if (path.parent / VARIANT).is_file():
        return _load_release(path)
    content = _read_with_stand_ins(path)
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if isinstance(weights, dict) and MMSEG_CLASSIFIER in weights:
        return _load_mmseg(weights, content.get("meta") or {}, path)
    checkpoint = load_checkpoint(path)
    shape = SegmenterShape.from_plain(checkpoint["shape"], path)
    if not shape.num_classes == len(checkpoint["classes"]) == len(checkpoint["palette"]):
        raise ValueError(f"{path}: its classes, their colours and its weights do not fit together")
    model = Segmenter(shape)
    load_weights(model, checkpoint["model"], path)
    try:
        protocol = ProtocolConfig.from_described(checkpoint["protocol"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return LoadedSegmenter(
        model=model.eval(),
        classes=Classes(
            names=tuple(checkpoint["classes"]),
            palette=np.array(checkpoint["palette"], dtype=np.uint8),
        ),
        protocol=protocol,
        reduce_zero_label=checkpoint["dataset"]["reduce_zero_label"],
    )


# The Segmenter release: checkpoint.pth, and beside it variant.yml.


def _load_release(path: Path) -> LoadedSegmenter:
    variant_path = path.parent / VARIANT
    variant, content = _read_variant(variant_path), read_torch_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} holds no weights under 'model'")
    weights = {  # timm calls DeiT's distillation token a register
        name.replace("encoder.dist_token", "encoder.reg_token"): weight
        for name, weight in content["model"].items()
        if not name.startswith(RELEASE_IGNORED)
    }
    try:
        shape, protocol, dataset_name = _understand(variant, weights, path)
    except WRONG_CONTENT as error:
        raise ValueError(f"{variant_path} does not describe a Segmenter: {error}") from error
    description = read_description(DESCRIPTIONS / f"{dataset_name}.yml")
    return LoadedSegmenter(
        model=_filled(shape, weights, path, f"does not fit its {VARIANT}"),
        classes=read_classes(description),
        protocol=protocol,
        reduce_zero_label=description.reduce_zero_label,
    )


def _understand(
    variant: dict[str, Any], weights: dict[str, Tensor], path: Path
) -> tuple[SegmenterShape, ProtocolConfig, str]:
    """Shape, protocol and dataset name of a release. Raises one of WRONG_CONTENT."""
    net, inference, data = (variant[f"{part}_kwargs"] for part in ("net", "inference", "dataset"))
    extra_tokens = int(bool(net.get("distilled", False)))
    normalization = NORMALIZATION_NAMES[net["normalization"]]
    decoder = net["decoder"]
    shape = {
        "encoder": {
            **_encoder_values(weights, 1 + extra_tokens),
            "extra_tokens": extra_tokens,
            "norm_eps": RELEASE_NORM_EPS,
        },
        "decoder": "linear" if "linear" in decoder["name"] else "mask_transformer",
        "decoder_layers": decoder.get("n_layers", 0),
        "num_classes": net["n_cls"],
        "normalization": normalization,
    }
    protocol = ProtocolConfig(
        image_size=inference["im_size"],
        crop_size=data["crop_size"],
        window_size=inference["window_size"],
        window_stride=inference["window_stride"],
        normalization=normalization,
    )
    return SegmenterShape.from_plain(shape, path), protocol, data["dataset"]


def _encoder_values(weights: dict[str, Tensor], prefix_tokens: int = 1) -> dict[str, Any]:
    """Of `EncoderShape`, what the weights of a whole model say. Raises one of WRONG_CONTENT."""
    encoder = {
        name.removeprefix("encoder."): weight
        for name, weight in weights.items()
        if name.startswith("encoder.")
    }
    found = describe_vit(encoder, "it", prefix_tokens=prefix_tokens)
    if found.model is None:
        raise KeyError(f"no model here is {found.width} wide and {found.depth} deep")
    return {
        "model": found.model, "patch_size": found.patch_size, "in_channels": found.in_channels,
        "grid": found.grid,
    }  # fmt: skip


def _filled(
    shape: SegmenterShape, weights: dict[str, Tensor], path: Path, otherwise: str
) -> Segmenter:
    """A model with weights from elsewhere. Raises ValueError, with the word `otherwise`."""
    model = Segmenter(shape)
    refuse_misfits(model.state_dict(), weights, f"{path} {otherwise}")
    refuse_damaged(weights, path)
    model.load_state_dict(weights)
    return model.eval()


class _VariantLoader(yaml.SafeLoader):
    """Reads the tuples that the release wrote."""


_VariantLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple",
    yaml.SafeLoader.construct_sequence,  # type: ignore[type-var]
)


def _read_variant(path: Path) -> dict[str, Any]:
    try:
        content = yaml.load(read_text(path), _VariantLoader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is not a YAML file: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not describe a Segmenter")
    return content


# MAE with UPerNet as mmsegmentation stores it: a state dict, and a meta about its dataset.


class _StandIn:
    """Takes the place of an object that is not needed; does nothing with what it is given."""

    def __init__(self, *given: Any) -> None: ...

    __setstate__ = __init__


def _read_with_stand_ins(path: Path) -> Any:
    """What a file holds; stand-ins for all but tensors and plain values, so no code of it runs.

    mmengine stores its message hub, objects of its own and of numpy, beside the weights.
    """
    names: list[str] = []
    with contextlib.suppress(Exception):  # what is wrong with the file, reading it will say
        names = get_unsafe_globals_in_checkpoint(path)
    with safe_globals([(_StandIn, name) for name in names]):
        return read_torch_file(path, lazily=True)


def _load_mmseg(stored: dict[str, Tensor], meta: dict[str, Any], path: Path) -> LoadedSegmenter:
    no_upernet = "is no UPerNet on MAE of mmsegmentation"
    try:
        weights = {
            _mmseg_name(name): weight
            for name, weight in stored.items()
            if isinstance(weight, Tensor) and not name.endswith(MMSEG_IGNORED)
        }
        encoder, num_classes = _encoder_values(weights), len(stored[MMSEG_CLASSIFIER])
        classes, reduce_zero_label = _mmseg_classes(meta, num_classes)
    except WRONG_CONTENT as error:
        raise ValueError(f"{path} {no_upernet}: {error}") from None
    shape = {
        "encoder": encoder, "decoder": "upernet", "decoder_layers": 0, "num_classes": num_classes,
        "normalization": "imagenet",
    }  # fmt: skip
    # The file does not say how it was scored: as the recipe does, at the size it was made for.
    recipe, side = recipe_values("upernet"), encoder["grid"] * encoder["patch_size"]
    stride = side * recipe["window_stride"] // recipe["window_size"]
    sizes = dict.fromkeys(("image_size", "crop_size", "window_size"), side)
    return LoadedSegmenter(
        model=_filled(SegmenterShape.from_plain(shape, path), weights, path, no_upernet),
        classes=classes,
        protocol=make(ProtocolConfig, {**recipe, **sizes, "window_stride": stride}),
        reduce_zero_label=reduce_zero_label,
    )


def _mmseg_name(name: str) -> str:
    for pattern, own in MMSEG_NAMES.items():
        name = re.sub(pattern, own, name)
    return name


def _mmseg_classes(meta: dict[str, Any], num_classes: int) -> tuple[Classes, bool]:
    """Classes by their names in the meta, else by their number; and whether label 0 is none."""
    facts = meta.get("dataset_meta") or {"classes": meta.get("CLASSES")}  # of versions before 1.0
    names = facts.get("classes")
    descriptions = [read_description(file) for file in sorted(DESCRIPTIONS.glob("*.yml"))]
    for description in descriptions:
        classes = read_classes(description)
        if len(classes) == num_classes and (not names or tuple(names) == classes.names):
            return classes, description.reduce_zero_label
    if not names or len(names) != num_classes:
        raise ValueError(f"it has {num_classes} classes, but not their names in its meta")
    own = dataclasses.replace(
        descriptions[0], classes=tuple(map(str, names)), reduce_zero_label=False,
        palette=tuple(map(tuple, facts.get("palette") or ())),
    )  # fmt: skip
    return read_classes(own), False
