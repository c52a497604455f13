"""What encoder and decoder attend to, drawn over the image.

Shapes: T tokens, h x w patches, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from segmenter.data import Classes
from segmenter.decoder import MaskTransformer
from segmenter.drawing import PANEL_WIDTH, panel_row, title_strip
from segmenter.model import Segmenter

MOST_CLASSES = 6
COLUMNS = 3
STRENGTH = 0.65


def attention_maps(model: Segmenter, image: Tensor, classes: Sequence[int]) -> dict[str, Tensor]:
    """Maps [h, w] that sum to 1, mean over heads, by what attends.

    "encoder block N": the class token, in the first, middle and last block; "decoder K": class
    K's embedding in the last block of a mask transformer. image [3, H, W] uint8 RGB.
    """
    patch = model.shape.encoder.patch_size
    rows, columns = (-(-side // patch) for side in image.shape[-2:])
    last = len(model.encoder.blocks) - 1
    watched: dict[str, nn.Module] = {
        f"encoder block {number + 1}": model.encoder.blocks[number]
        for number in sorted({0, last // 2, last})
    }
    decoder = model.decoder
    if isinstance(decoder, MaskTransformer):
        watched["decoder"] = decoder.blocks[-1]
    with _recorded(watched) as weights:
        model.patch_logits(model.normalise(image[None]))
    prefix = model.encoder.num_prefix_tokens
    maps = {name: weight[0, prefix:] for name, weight in weights.items() if name != "decoder"}
    for label in classes if "decoder" in weights else []:
        maps[f"decoder {label}"] = weights["decoder"][rows * columns + label, : rows * columns]
    return {name: (row / row.sum()).reshape(rows, columns) for name, row in maps.items()}


@contextlib.contextmanager
def _recorded(blocks: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Fill a dict with the attention [T, T] of timm blocks (mean over heads) as they run."""
    weights: dict[str, Tensor] = {}
    handles = [
        block.attn.register_forward_pre_hook(partial(_record, weights, name))  # type: ignore[operator,union-attr]
        for name, block in blocks.items()
    ]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


def _record(
    weights: dict[str, Tensor], name: str, attention: Any, inputs: tuple[Tensor, ...]
) -> None:
    """Compute attention from the input of a timm Attention, whose fused kernel does not tell."""
    tokens = inputs[0][:1]
    qkv = attention.qkv(tokens).float().unflatten(-1, (3, attention.num_heads, -1))
    query, key, _ = qkv.permute(2, 0, 3, 1, 4)  # each [1, heads, T, features]
    scores = query @ key.transpose(-2, -1) * attention.scale
    weights[name] = scores.softmax(-1).mean(1)[0]


def draw_attention(
    model: Segmenter, image: Tensor, labels: np.ndarray, classes: Classes
) -> Image.Image:
    """A sheet of the image and its attention maps. labels [H, W]: what was predicted."""
    counts = np.bincount(labels.ravel(), minlength=len(classes))
    largest = [int(label) for label in np.argsort(-counts)[:MOST_CLASSES] if counts[label]]
    maps = attention_maps(model, image, largest)
    photo = image.permute(1, 2, 0).cpu().numpy()
    panels = [("image", photo)]
    for name, values in maps.items():
        kind, _, label = name.partition(" ")
        title = f"decoder: {classes.names[int(label)]}" if kind == "decoder" else name
        panels.append((title, _heat(photo, values)))
    return _sheet(panels)


def _heat(photo: np.ndarray, values: Tensor) -> np.ndarray:
    """[H, W, 3] uint8: the map over the image, from dark (least) to bright (most)."""
    from matplotlib import colormaps

    size = photo.shape[:2]
    scaled = F.interpolate(values[None, None].float(), size, mode="bilinear")[0, 0].cpu()
    scaled = (scaled - scaled.min()) / (scaled.max() - scaled.min()).clamp(min=1e-12)
    colours = colormaps["inferno"](scaled.numpy())[..., :3] * 255
    return ((1 - STRENGTH) * photo + STRENGTH * colours).round().astype(np.uint8)


def _sheet(panels: list[tuple[str, np.ndarray]]) -> Image.Image:
    width, rows = COLUMNS * PANEL_WIDTH, []
    for first in range(0, len(panels), COLUMNS):
        titles, pictures = zip(*panels[first : first + COLUMNS], strict=True)
        row = panel_row(pictures)
        rest = ((0, 0), (0, width - row.shape[1]), (0, 0))
        rows += [title_strip(titles, width), np.pad(row, rest, constant_values=255)]
    return Image.fromarray(np.vstack(rows))
