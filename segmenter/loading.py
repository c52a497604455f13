"""Models for scoring and predicting: checkpoints of `train`, those of the Segmenter release, and
those of mmsegmentation's UPerNet on MAE."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from common.files import read_text
from common.parsed import parsed_plain
from engine.checkpoint import load_weights, misfits, read_torch_file, refuse_damaged
from engine.vit import VIT_SIZES
from segmenter.checkpoint import load_checkpoint
from segmenter.classes import Classes, read_classes
from segmenter.config import ProtocolConfig, recipe_values
from segmenter.dataset import DESCRIPTIONS, read_description
from segmenter.encoder import POSITIONS, EncoderShape
from segmenter.model import Segmenter, SegmenterShape

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
    return LoadedSegmenter(
        model=model.eval(),
        classes=Classes(
            names=tuple(checkpoint["classes"]),
            palette=np.array(checkpoint["palette"], dtype=np.uint8),
        ),
        protocol=_protocol(checkpoint["protocol"], path),
        reduce_zero_label=checkpoint["dataset"]["reduce_zero_label"],
    )


def _protocol(described: dict[str, Any], path: Path) -> ProtocolConfig:
    try:
        return ProtocolConfig.from_described(described)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _load_release(path: Path) -> LoadedSegmenter:
    """checkpoint.pth of the Segmenter release and the variant.yml beside it."""
    variant = _read_variant(path.parent / VARIANT)
    content = read_torch_file(path)
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} holds no weights under 'model'")
    try:
        shape, protocol, dataset_name = _understand(variant, content["model"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{path.parent / VARIANT} does not describe a Segmenter: {error}"
        ) from error
    shape = parsed_plain(SegmenterShape, dataclasses.asdict(shape), str(path.parent / VARIANT))
    weights = {  # timm calls DeiT's distillation token a register
        name.replace("encoder.dist_token", "encoder.reg_token"): weight
        for name, weight in content["model"].items()
        if not name.startswith(RELEASE_IGNORED)
    }
    model = _filled(shape, weights, path, f"does not fit its {VARIANT}")
    description = read_description(DESCRIPTIONS / f"{dataset_name}.yml")
    return LoadedSegmenter(
        model=model,
        classes=read_classes(description),
        protocol=protocol,
        reduce_zero_label=description.reduce_zero_label,
    )


def _filled(
    shape: SegmenterShape, weights: dict[str, Tensor], path: Path, otherwise: str
) -> Segmenter:
    """A model with weights from elsewhere. Raises ValueError, with the word `otherwise`."""
    model = Segmenter(shape)
    problems = misfits(model.state_dict(), weights, optional=())
    if problems:
        raise ValueError(f"{path} {otherwise}: {problems}")
    refuse_damaged(weights, path)
    model.load_state_dict(weights)
    return model.eval()


def _understand(
    variant: dict[str, Any], weights: dict[str, Tensor]
) -> tuple[SegmenterShape, ProtocolConfig, str]:
    """Shape, protocol and dataset name of a release. Raises KeyError if something is missing."""
    net, inference = variant["net_kwargs"], variant["inference_kwargs"]
    extra_tokens = int(bool(net.get("distilled", False)))
    tokens = weights["encoder.pos_embed"].shape[1] - 1 - extra_tokens
    encoder = EncoderShape(
        model=_model_name(net),
        patch_size=net["patch_size"],
        in_channels=weights["encoder.patch_embed.proj.weight"].shape[1],
        grid=round(tokens**0.5),
        extra_tokens=extra_tokens,
        norm_eps=RELEASE_NORM_EPS,
    )
    decoder = net["decoder"]
    normalization = NORMALIZATION_NAMES[net["normalization"]]
    shape = SegmenterShape(
        encoder=encoder,
        decoder="linear" if "linear" in decoder["name"] else "mask_transformer",
        decoder_layers=decoder.get("n_layers", 0),
        num_classes=net["n_cls"],
        normalization=normalization,
    )
    protocol = ProtocolConfig.from_described(
        {
            "image_size": inference["im_size"],
            "crop_size": variant["dataset_kwargs"]["crop_size"],
            "window_size": inference["window_size"],
            "window_stride": inference["window_stride"],
            "normalization": normalization,
        }
    )
    return shape, protocol, variant["dataset_kwargs"]["dataset"]


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
    """A checkpoint of mmsegmentation's MAE with UPerNet, by its state dict and its meta."""
    no_upernet = "is no UPerNet on MAE of mmsegmentation"
    try:
        weights = {
            _mmseg_name(name): weight
            for name, weight in stored.items()
            if isinstance(weight, Tensor) and not name.endswith(MMSEG_IGNORED)
        }
        blocks = {name.split(".")[2] for name in weights if name.startswith("encoder.blocks.")}
        width, channels, patch = weights["encoder.patch_embed.proj.weight"].shape[:3]
        model = _model_name({"d_model": width, "n_layers": len(blocks)})
        grid = round((weights[f"encoder.{POSITIONS}"].shape[1] - 1) ** 0.5)
        num_classes = len(stored[MMSEG_CLASSIFIER])
        classes, reduce_zero_label = _mmseg_classes(meta, num_classes)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} {no_upernet}: {error}") from None
    encoder = {"model": model, "patch_size": patch, "in_channels": channels, "grid": grid}
    shape = {
        "encoder": encoder, "decoder": "upernet", "decoder_layers": 0, "num_classes": num_classes,
        "normalization": "imagenet",
    }  # fmt: skip
    recipe, side = recipe_values("upernet"), grid * patch
    stride = side * recipe["window_stride"] // recipe["window_size"]
    sizes = dict.fromkeys(("image_size", "crop_size", "window_size"), side)
    return LoadedSegmenter(
        model=_filled(SegmenterShape.from_plain(shape, path), weights, path, no_upernet),
        classes=classes,
        protocol=_protocol({**recipe, **sizes, "window_stride": stride}, path),
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


def _model_name(net: dict[str, Any]) -> str:
    for name, size in VIT_SIZES.items():
        if (size.width, size.depth) == (net["d_model"], net["n_layers"]):
            return name
    raise KeyError(f"no model here is {net['d_model']} wide and {net['n_layers']} deep")


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
