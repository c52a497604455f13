"""Models for scoring and predicting: checkpoints of `train`, and those of the Segmenter release."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from torch import Tensor

from common.checkpoint import load_weights, misfits, read_torch_file, refuse_damaged
from common.files import read_text
from common.parsed import parsed_plain
from common.vit import VIT_SIZES
from segmenter.checkpoint import load_checkpoint
from segmenter.classes import Classes, read_classes
from segmenter.config import ProtocolConfig
from segmenter.dataset import DESCRIPTIONS, read_description
from segmenter.encoder import EncoderShape
from segmenter.model import Segmenter, SegmenterShape

VARIANT = "variant.yml"  # beside the weights of the release: how they were trained
RELEASE_NORM_EPS = 1e-5
# Of the release's encoders: the classifier they came with.
RELEASE_IGNORED = ("encoder.head.", "encoder.head_dist.", "encoder.pre_logits.")
NORMALIZATION_NAMES: dict[str, Literal["half", "imagenet"]] = {"vit": "half", "deit": "imagenet"}


@dataclass(frozen=True, kw_only=True)
class LoadedSegmenter:
    """A model with what belongs to it: classes, protocol, and the numbering of its label files."""

    model: Segmenter
    classes: Classes
    protocol: ProtocolConfig
    reduce_zero_label: bool


def load_segmenter(path: Path) -> LoadedSegmenter:
    """A trained model, ours or of the Segmenter release. Raises ValueError."""
    if (path.parent / VARIANT).is_file():
        return _load_release(path)
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
    model = Segmenter(shape)
    weights = {  # timm calls DeiT's distillation token a register
        name.replace("encoder.dist_token", "encoder.reg_token"): weight
        for name, weight in content["model"].items()
        if not name.startswith(RELEASE_IGNORED)
    }
    problems = misfits(model.state_dict(), weights, optional=())
    if problems:
        raise ValueError(f"{path} does not fit its {VARIANT}: {problems}")
    refuse_damaged(weights, path)
    model.load_state_dict(weights)
    description = read_description(DESCRIPTIONS / f"{dataset_name}.yml")
    return LoadedSegmenter(
        model=model.eval(),
        classes=read_classes(description),
        protocol=protocol,
        reduce_zero_label=description.reduce_zero_label,
    )


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
    protocol = ProtocolConfig(
        image_size=inference["im_size"],
        crop_size=variant["dataset_kwargs"]["crop_size"],
        window_size=inference["window_size"],
        window_stride=inference["window_stride"],
        normalization=normalization,
    )
    return shape, protocol, variant["dataset_kwargs"]["dataset"]


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
