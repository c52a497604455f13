"""Weights of a plain ViT from a file: of this project, the official MAE release, timm, transformers
(ViT, ViTMAE, DINOv2), DINO and others, in the wrappings that trainings leave.

They come out by the official names of MAE, which are timm's, too. Shapes: D features, C channels,
P pixels per side of a patch, N patches, R registers.

    weights = read_vit_weights(path, ignored=("head.",))
    model.load_state_dict(resample_positions(weights, grid=14))
"""

import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from common.files import shortened
from engine.checkpoint import read_with_stand_ins, refuse_damaged
from engine.vit import IMAGE_CHANNELS, VISIBLE, VIT_SIZES

logger = logging.getLogger(__name__)

PROJECTION, PROJECTION_BIAS = "patch_embed.proj.weight", "patch_embed.proj.bias"
POSITIONS, CLASS_TOKEN, REGISTERS = "pos_embed", "cls_token", "reg_token"
# Under which of its names a file holds the weights; DINO's student is worse than its teacher.
WRAPPERS = ("model", "state_dict", "teacher", "module", "model_state_dict", "model_ema", "net", "network")
FINETUNED = {"classes", "palette", "protocol"}  # what our own finetunings hold beside the model
MOST_WRAPPERS = 4  # one in another: {"state_dict": {"model": ...}}
# transformers' name of the projection, which tells its files, and its others by ours. Its version 5
# calls the blocks of some models otherwise, in memory and perhaps in files.
HF_PROJECTION = "embeddings.patch_embeddings.projection.weight"
HF_NAMES = {
    r"^embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
    r"^embeddings\.position_embeddings$": POSITIONS,
    r"^embeddings\.(cls_token|mask_token|register_tokens)$": r"\1",
    r"^layernorm\.": "norm.",
    r"^(?:encoder\.)?layers?\.(\d+)\.": r"blocks.\1.",
    r"\.attention\.(?:attention\.)?(?:(q)uery|(k)ey|(v)alue|(q|k|v)_proj)\.": r".attn.\1\2\3\4.",
    r"\.attention\.(?:output\.dense|o_proj)\.": ".attn.proj.",
    r"\.layernorm_before\.": ".norm1.",
    r"\.layernorm_after\.": ".norm2.",
    r"\.intermediate\.dense\.": ".mlp.fc1.",
    r"(blocks\.\d+)\.output\.dense\.": r"\1.mlp.fc2.",
    r"\.layer_scale(\d)\.lambda1$": r".ls\1.gamma",
}
# The same of mmsegmentation's MAE backbone.
MMSEG_PROJECTION = "patch_embed.projection.weight"
MMSEG_NAMES = {
    r"^patch_embed\.projection\.": "patch_embed.proj.",
    r"^layers\.": "blocks.",
    r"^norm1\.": "norm.",
    r"\.ln(\d)\.": r".norm\1.",
    r"\.gamma_(\d)$": r".ls\1.gamma",
    r"\.ffn\.layers\.0\.0\.": ".mlp.fc1.",
    r"\.ffn\.layers\.1\.": ".mlp.fc2.",
}
# Of trainings of DINO and its successors, whose blocks may come in chunks.
OTHER_NAMES = {r"^register_tokens$": REGISTERS, r"^blocks\.\d+\.(\d+)\.": r"blocks.\1."}
# What a block's LayerScale multiplies: its two last layers.
SCALED = {"ls1.gamma": "attn.proj", "ls2.gamma": "mlp.fc2"}
# Beginnings of what belongs to classifiers and poolers, which no encoder needs.
CLASSIFIERS = ("head.", "head_drop", "fc_norm.", "pre_logits.", "pooler.")
MOST_NAMED = 3


class VitFacts(NamedTuple):
    """What weights say of their ViT."""

    model: str | None  # its name here, if it has one
    width: int
    depth: int
    in_channels: int
    patch_size: int
    grid: int  # patches per side that the position embeddings are stored for
    extra_tokens: int = 0  # beside the class token: registers, or DeiT's distillation token
    embeds_prefix: bool = True  # whether there are position embeddings of what is no patch


def read_vit_weights(path: Path, *, ignored: tuple[str, ...] = (), lazily: bool = False) -> dict[str, Tensor]:
    """The state dict of a file by the official names. Raises ValueError for any other file.

    Wrappings are taken off, one common prefix, too; LayerScale becomes part of the layer that it
    scales, which computes the same. ignored: beginnings of names that are left out.
    """
    content = read_with_stand_ins(path, lazily=lazily)
    if isinstance(content, dict) and content.keys() >= FINETUNED:  # its encoder has seen labels
        raise ValueError(f"{path} is a finetuned segmenter, not the encoder that it was made from")
    stored, tried = _unwrapped(content)
    weights = {str(name): weight for name, weight in stored.items() if isinstance(weight, Tensor)}
    prefix = _prefix(weights, path)
    inside = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    libraries = {HF_PROJECTION: HF_NAMES, MMSEG_PROJECTION: MMSEG_NAMES}
    own = next((names for projection, names in libraries.items() if projection in inside), {})
    named = {renamed_by(name, {**own, **OTHER_NAMES}): weight for name, weight in inside.items()}
    if PROJECTION not in named:
        found = ", ".join(map(shortened, sorted(map(str, stored))[:MOST_NAMED])) or "nothing"
        keys = f" under {'.'.join(tried)}" if tried else ""
        raise ValueError(
            f"{path} is not a checkpoint of a ViT encoder: it has no {PROJECTION}, under any prefix, nor "
            f"transformers' {HF_PROJECTION}; it holds {found}, ...{keys}. Other encoders come as "
            "timm:FOLDER, hf:FOLDER or FILE.py:FUNCTION"
        )
    if tried or prefix:
        others = len(weights) - len(inside)
        logger.info(
            "%s: weights under %s%s", path, ".".join([*tried, prefix + "*" if prefix else "*"]),
            f"; {others} of other names are left out" if others else "",
        )  # fmt: skip
    named = {name: weight for name, weight in named.items() if not name.startswith(ignored)}
    try:
        named = _class_position_moved(_scales_folded(_qkv_joined(named)))
    except (RuntimeError, IndexError) as error:  # torch's, about shapes that do not go together
        reason = shortened(str(error).splitlines()[0])
        raise ValueError(f"{path}: its weights do not fit together: {reason}") from None
    describe_vit(named, path)
    refuse_damaged(named, path)
    return named


def _unwrapped(content: Any) -> tuple[dict[Any, Any], list[str]]:
    """The innermost dictionary of weights, and the names by which it was found."""
    tried: list[str] = []
    for _ in range(MOST_WRAPPERS):
        is_dict = isinstance(content, dict)
        inner = next((k for k in WRAPPERS if is_dict and isinstance(content.get(k), dict)), "")
        if not inner:
            break
        content = content[inner]
        tried.append(inner)
    return content if isinstance(content, dict) else {}, tried


def _prefix(weights: Mapping[str, Tensor], path: Path) -> str:
    """What stands before the names of the ViT. Raises ValueError if there are several ViTs."""
    found = sorted(
        name.removesuffix(end)
        for name in weights
        for end in (PROJECTION, HF_PROJECTION, MMSEG_PROJECTION)
        if name == end or name.endswith(f".{end}")
    )
    if len(found) > 1:  # a student and its teacher, say: which is meant only the user knows
        names = ", ".join(f"{prefix}*" for prefix in found)
        raise ValueError(f"{path} holds several ViTs: {names}; save the one that is meant by itself")
    return found[0] if found else ""


def renamed_by(name: str, names: Mapping[str, str]) -> str:
    """A weight's name, each pattern replaced in turn."""
    for pattern, own in names.items():
        name = re.sub(pattern, own, name)
    return name


def _qkv_joined(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values as one layer, where they are three."""
    joined = dict(weights)
    for name in weights:
        before, is_one, kind = name.partition(".attn.q.")
        parts = [f"{before}.attn.{part}.{kind}" for part in "qkv"]
        if is_one and joined.keys() >= set(parts):
            joined[f"{before}.attn.qkv.{kind}"] = torch.cat([joined.pop(part) for part in parts])
    return joined


def _scales_folded(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """gamma * (W x + b) is (gamma * W) x + gamma * b: no LayerScale is left."""
    folded = {name: weight for name, weight in weights.items() if not name.endswith(tuple(SCALED))}
    for name, gamma in weights.items():
        block, _, end = name.partition(".ls")
        layer = f"{block}.{SCALED.get(f'ls{end}', '')}"
        kernel, bias = weights.get(f"{layer}.weight"), weights.get(f"{layer}.bias")
        if name.endswith(tuple(SCALED)) and kernel is not None and len(kernel) == len(gamma):
            # In double precision, so that there is one rounding.
            folded[f"{layer}.weight"] = (kernel.double() * gamma.double()[:, None]).to(kernel.dtype)
            if bias is not None:
                folded[f"{layer}.bias"] = (bias.double() * gamma.double()).to(bias.dtype)
    return folded


def _class_position_moved(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The class token's position as part of it, where registers stand between it and the patches.

    As timm has DINOv2 with registers (R of them), whose positions are of class token and patches.
    """
    token, positions, registers = (weights.get(n) for n in (CLASS_TOKEN, POSITIONS, REGISTERS))
    if token is None or positions is None or registers is None or positions.dim() != 3:
        return dict(weights)
    if not _side(positions.shape[1] - 1):  # none of the class token, or of registers, too
        return dict(weights)
    return {**weights, CLASS_TOKEN: token + positions[:, :1], POSITIONS: positions[:, 1:]}


def _side(patches: int) -> int:
    """Of a square of so many; 0 if there is none."""
    side = round(max(0, patches) ** 0.5)
    return side if side**2 == patches else 0


def describe_vit(weights: Mapping[str, Tensor], source: object) -> VitFacts:
    """What they say of their ViT. Raises ValueError about the source if they are of none."""
    kernel = weights.get(PROJECTION)
    if kernel is None or kernel.dim() != 4 or not kernel.numel():
        raise ValueError(f"{source} is not a checkpoint of a ViT encoder: it has no {PROJECTION}")
    stored, extra = (
        tokens.shape[1] if tokens.dim() == 3 and tokens.shape[::2] == (1, len(kernel)) else 0
        for tokens in (weights.get(name, kernel) for name in (POSITIONS, REGISTERS))
    )
    # Positions [1, N, D] of all tokens, or of patches alone; ViTs are pretrained on squares.
    embeds_prefix = bool(_side(stored - 1 - extra))
    grid = _side(stored - 1 - extra) or (_side(stored) if CLASS_TOKEN in weights else 0)
    if not grid:
        raise ValueError(
            f"{source} has no {POSITIONS} of a class token and a square of patches; encoders of "
            "another kind come as timm:FOLDER or hf:FOLDER"
        )
    width, channels, patch, _ = kernel.shape  # [D, C, P, P]
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    sizes = {(size.width, size.depth): name for name, size in reversed(VIT_SIZES.items())}
    model = sizes.get((width, depth))
    return VitFacts(model, width, depth, channels, patch, grid, extra, embeds_prefix)


def resample_positions(weights: Mapping[str, Tensor], grid: int) -> dict[str, Tensor]:
    """The same weights for a square of `grid` x `grid` patches: bicubic, as timm does it."""
    positions = weights[POSITIONS]
    prefix = positions.shape[1] - math.isqrt(positions.shape[1]) ** 2  # none, or few
    resampled = resample_abs_pos_embed(positions, [grid, grid], num_prefix_tokens=prefix)
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
