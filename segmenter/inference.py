"""Sliding windows over whole images, the windows of several images in one batch.

Shapes: K classes, H x W original pixels, h x w pixels at a scale of the protocol.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from segmenter.config import ProtocolConfig
from segmenter.model import Segmenter

MOST_WINDOWS = 32  # in one forward pass


class Window(NamedTuple):
    """Where a window lies in an image of a group: the image's number, and its pixels."""

    image: int
    rows: slice
    columns: slice


def predict_classes(
    model: Segmenter, images: Sequence[Sequence[Tensor]], sizes: Sequence[tuple[int, ...]],
    protocol: ProtocolConfig,
) -> Iterable[Tensor]:  # fmt: skip
    """Yield the class of every pixel, [H, W] uint8, image by image, where the model is.

    images: for each image its versions by scale, [3, h, w] uint8 RGB; sizes: original H and W.
    The result for an image depends on the group it is in only by rounding, so whoever wants equal
    numbers from several processes has to form the same groups.
    """
    if not protocol.multi_scale:
        canvases = window_logits(model, [versions[0] for versions in images], protocol)
        for canvas, size in zip(canvases, sizes, strict=True):
            yield _resize(canvas, size).argmax(0).to(torch.uint8)
        return
    for versions, size in zip(images, sizes, strict=True):
        # Class probabilities summed over scales and flips, as the Segmenter paper does.
        total = torch.zeros(model.shape.num_classes, *size, device=model.mean.device)
        for version in (version.to(total.device, non_blocking=True) for version in versions):
            both = [version, version.flip(-1)]  # in one batch
            for flipped, canvas in enumerate(window_logits(model, both, protocol)):
                probabilities = _resize(canvas, size).softmax(0)
                total += probabilities.flip(-1) if flipped else probabilities
        yield total.argmax(0).to(torch.uint8)


def window_logits(
    model: Segmenter, images: Sequence[Tensor], protocol: ProtocolConfig
) -> list[Tensor]:
    """Class logits [K, h, w] of images [3, h, w], averaged where windows overlap."""
    canvases: dict[int, Tensor] = {}
    for (image, rows, columns), logits in patch_logits(model, images, protocol):
        # One window at a time: full-size logits of all of them would be the peak of memory.
        height, width = rows.stop - rows.start, columns.stop - columns.start
        full = model.upsample(_as_batch(logits), height, width)[0]
        size = images[image].shape[-2:]
        if size == (height, width):  # one window is all
            canvases[image] = full
            continue
        if image not in canvases:
            # The decoder's output has the classes innermost, which is what interpolation and
            # argmax over many classes like best: the canvas keeps that order in memory.
            canvases[image] = full.new_zeros(*size, len(full)).permute(2, 0, 1)
        canvases[image][:, rows, columns].add_(full)
    return [_average(canvases[image], protocol) for image in range(len(images))]


def _average(canvas: Tensor, protocol: ProtocolConfig) -> Tensor:
    """Divide by the number of windows over each pixel."""
    rows, columns = counts = [torch.zeros(side, device=canvas.device) for side in canvas.shape[-2:]]
    for count in counts:
        for span in spans(len(count), protocol):
            count[span] += 1
    return canvas.div_(rows[:, None] * columns)


def patch_logits(
    model: Segmenter, images: Sequence[Tensor], protocol: ProtocolConfig
) -> Iterator[tuple[Window, Tensor]]:
    """Each window over images [3, h, w] uint8 with its logits [K, h / P, w / P], by P pixels."""
    # Windows of one size make a batch; only images smaller than a window have another size.
    by_size: dict[torch.Size, list[tuple[Window, Tensor]]] = defaultdict(list)
    for number, image in enumerate(images):
        pixels = model.normalise(image.to(model.mean.device, non_blocking=True))
        height, width = pixels.shape[-2:]
        for rows, columns in product(spans(height, protocol), spans(width, protocol)):
            part = pixels[:, rows, columns]
            by_size[part.shape].append((Window(number, rows, columns), part))
    for same_size in by_size.values():
        for first in range(0, len(same_size), MOST_WINDOWS):
            windows, parts = zip(*same_size[first : first + MOST_WINDOWS], strict=True)
            yield from zip(windows, model.patch_logits(torch.stack(parts)), strict=True)


def spans(length: int, protocol: ProtocolConfig) -> list[slice]:
    """The windows along a side of so many pixels; the last one ends at the border."""
    side, stride = protocol.window_size, protocol.window_stride
    last = max(0, length - side)  # an image smaller than a window is one window
    starts = [min(start, last) for start in range(0, last + stride, stride)]
    return [slice(start, min(start + side, length)) for start in starts]


def _resize(canvas: Tensor, size: tuple[int, ...]) -> Tensor:
    """[K, h, w] to [K, H, W]."""
    if canvas.shape[-2:] == size:
        return canvas
    return F.interpolate(_as_batch(canvas), size, mode="bilinear", align_corners=False)[0]


def _as_batch(canvas: Tensor) -> Tensor:
    """[K, h, w] to [1, K, h, w] with strides that torch recognises as classes-innermost.

    Plain `canvas[None]` has not, and interpolation then copies its whole output.
    """
    return canvas.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
