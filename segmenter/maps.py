"""What encoders of others return, as maps: timm's, transformers' and those of a Python file.

Shapes: B images, H x W pixels, C channels, maps [B, C, h, w], of stride H / h.
"""

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segmenter.encoder import depths_of

LEVELS = 4  # of UPerNet's pyramid


def stride_of(model: Any, library: str, told: Mapping[str, Any]) -> int:
    """Of its last map, in pixels."""
    if library == "python":
        return int(told["stride"])
    if library == "timm":
        return int(model.feature_info[-1]["reduction"])
    patch = getattr(model.config, "patch_size", None)
    patch = patch[0] if isinstance(patch, list | tuple) else patch
    if not isinstance(patch, int):
        raise ValueError(f"transformers' {type(model).__name__} gives no patch tokens of images")
    # Each stage but the first halves the map.
    return patch * 2 ** (len(getattr(model.config, "depths", None) or [1]) - 1)


def _is_any_size(model: Any) -> bool:
    """Whether it takes images of any size as it is."""
    embedding = getattr(model, "patch_embed", None)
    is_strict = getattr(embedding, "strict_img_size", False) and not getattr(model, "dynamic_img_size", False)
    return not (is_strict and hasattr(model, "set_input_size"))


def set_size(model: Any, side: int) -> None:
    """timm's own way for what is made for one size: position embeddings and biases are resampled."""
    if not _is_any_size(model):
        model.set_input_size(img_size=(side, side))


def _at_size(model: Any, images: Tensor, side: int) -> Any:
    """The model for the images' size: a copy of one that was made for another."""
    if _is_any_size(model) or images.shape[-2:] == (side, side):
        return model
    copied = copy.deepcopy(model)  # rare: of windows at the edge of what is smaller than a window
    copied.set_input_size(img_size=tuple(images.shape[-2:]))
    return copied.to(images.device)


def last_map(model: Any, library: str, images: Tensor, side: int) -> Tensor:
    """Its final patch tokens as a map, after its last norm. side: pixels that it was made for."""
    if library == "timm":
        model = _at_size(model, images, side)
        given: dict[str, Any] = {"indices": 1, "intermediates_only": True}
        try:
            return model.forward_intermediates(images, norm=True, **given)[-1]
        except AssertionError:  # Hiera has no norm of a map
            return model.forward_intermediates(images, **given)[-1]
    if library == "python":
        return _as_map(_listed(model(images))[-1], images)
    return _as_map(_hf_outputs(model, images).last_hidden_state, images, model)


def all_maps(model: Any, library: str, images: Tensor, side: int) -> list[Tensor]:
    """The maps after each block or stage."""
    if library == "timm":
        return _at_size(model, images, side).forward_intermediates(images, intermediates_only=True)
    if library == "python":
        return [_as_map(one, images) for one in _listed(model(images))]
    outputs = _hf_outputs(model, images)
    maps = outputs.get("reshaped_hidden_states")  # of Swin and its like
    maps = list(maps or [_as_map(one, images, model) for one in outputs.hidden_states])
    # The first is what goes into the first block. Swin's stages end with halving the map: its embedding
    # is all that is left of its finest one.
    return maps[1:] if len({one.shape[-1] for one in maps[1:]}) in (1, LEVELS) else maps


def _listed(found: Any) -> list[Tensor]:
    return list(found) if isinstance(found, list | tuple) else [found]


def _hf_outputs(model: Any, images: Tensor) -> Any:
    """transformers' outputs, with what it takes to have all tokens of an image of any size."""
    known, given = inspect.signature(model.forward).parameters, dict[str, Any]()
    if "interpolate_pos_encoding" in known:
        given["interpolate_pos_encoding"] = True
    if "noise" in known:  # ViTMAE orders the tokens by it: as they are
        patch = stride_of(model, "hf", {})
        patches = (images.shape[-2] // patch) * (images.shape[-1] // patch)
        given["noise"] = torch.arange(patches, device=images.device).float().expand(len(images), -1)
    return model(pixel_values=images, output_hidden_states=True, return_dict=True, **given)


def _as_map(tokens: Tensor, images: Tensor, model: Any = None) -> Tensor:
    """[B, prefix + h * w, C] to [B, C, h, w]: class token and registers come first."""
    if tokens.dim() == 4:
        return tokens
    height, width = images.shape[-2:]
    if model is not None and (stride := stride_of(model, "hf", {})):
        rows, columns = height // stride, width // stride
    else:  # what is square, or as oblong as the image
        rows = round((tokens.shape[1] * height / width) ** 0.5)
        columns = tokens.shape[1] // max(1, rows)
    if tokens.dim() != 3 or tokens.shape[1] < rows * columns:
        raise ValueError(f"it gives no patch tokens of an image, but {list(tokens.shape)}")
    return tokens[:, tokens.shape[1] - rows * columns :].transpose(1, 2).unflatten(2, (rows, columns))


def pyramid_levels(strides: list[int]) -> list[int]:
    """Which maps make a pyramid: the last of each stage, or four depths of a plain ViT."""
    ends = [n for n, stride in enumerate(strides) if n + 1 == len(strides) or strides[n + 1] != stride]
    if len(ends) > 1:
        return ends[-LEVELS:]
    return depths_of(len(strides)) if len(strides) != LEVELS else list(range(LEVELS))
