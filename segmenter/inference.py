"""Sliding windows over whole images, the windows of several images in one batch.

Shapes: K classes, H x W original pixels, h x w pixels at a scale of the protocol.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from segmenter.config import ProtocolConfig
from segmenter.model import Segmenter

MOST_WINDOWS = 32  # in one forward pass


@dataclass(frozen=True, kw_only=True)
class Window:
    """Where a window lies in an image of a group, in pixels."""

    image: int  # its number in the group
    top: int
    left: int
    height: int
    width: int


def predict_classes(
    model: Segmenter,
    images: Sequence[Sequence[Tensor]],
    sizes: Sequence[tuple[int, ...]],
    protocol: ProtocolConfig,
) -> Iterable[Tensor]:
    """Yield the class of every pixel, [H, W] uint8, image by image, where the model is.

    images: for each image its versions by scale, [3, h, w] uint8 RGB; sizes: original H and W.
    The result for an image depends on the group it is in only by rounding, so whoever wants equal
    numbers from several processes has to form the same groups.
    """
    if protocol.multi_scale:
        for versions, size in zip(images, sizes, strict=True):
            yield _multi_scale(model, versions, size, protocol).argmax(0).to(torch.uint8)
        return
    canvases = window_logits(model, [versions[0] for versions in images], protocol)
    for canvas, size in zip(canvases, sizes, strict=True):
        yield _resize(canvas, size).argmax(0).to(torch.uint8)


def _multi_scale(
    model: Segmenter, versions: Sequence[Tensor], size: tuple[int, ...], protocol: ProtocolConfig
) -> Tensor:
    """[K, H, W]: class probabilities summed over scales and flips, as the Segmenter paper does."""
    total = torch.zeros(model.shape.num_classes, *size, device=model.mean.device)
    for version in (version.to(total.device, non_blocking=True) for version in versions):
        both = [version, version.flip(-1)]  # in one batch
        for flipped, canvas in enumerate(window_logits(model, both, protocol)):
            probabilities = _resize(canvas, size).softmax(0)
            total += probabilities.flip(-1) if flipped else probabilities
    return total


def window_logits(
    model: Segmenter, images: Sequence[Tensor], protocol: ProtocolConfig
) -> list[Tensor]:
    """Class logits [K, h, w] of images [3, h, w], averaged where windows overlap."""
    canvases: list[Tensor | None] = [None] * len(images)
    for window, logits in patch_logits(model, images, protocol):
        # One window at a time: full-size logits of all of them would be the peak of memory.
        full = model.upsample(_as_batch(logits), window.height, window.width)[0]
        height, width = images[window.image].shape[-2:]
        canvas = canvases[window.image]
        if canvas is None:
            if (window.height, window.width) == (height, width):  # one window is all
                canvases[window.image] = full
                continue
            # The decoder's output has the classes innermost, which is what interpolation and
            # argmax over many classes like best: the canvas keeps that order in memory.
            canvas = full.new_zeros(height, width, len(full)).permute(2, 0, 1)
            canvases[window.image] = canvas
        cut(canvas, window).add_(full)
    return [_average(canvas, protocol) for canvas in canvases if canvas is not None]


def patch_logits(
    model: Segmenter, images: Sequence[Tensor], protocol: ProtocolConfig
) -> Iterator[tuple[Window, Tensor]]:
    """Each window over images [3, h, w] uint8 with its logits [K, h / P, w / P], by P pixels."""
    device = model.mean.device
    pixels = [model.normalise(image.to(device, non_blocking=True)) for image in images]
    # Windows of one size make a batch; only images smaller than a window have another size.
    by_size: dict[tuple[int, int], list[Window]] = defaultdict(list)
    for number, image in enumerate(pixels):
        for window in windows(number, image.shape[-2], image.shape[-1], protocol):
            by_size[window.height, window.width].append(window)
    for same_size in by_size.values():
        for first in range(0, len(same_size), MOST_WINDOWS):
            group = same_size[first : first + MOST_WINDOWS]
            batch = torch.stack([cut(pixels[window.image], window) for window in group])
            yield from zip(group, model.patch_logits(batch), strict=True)


def _average(canvas: Tensor, protocol: ProtocolConfig) -> Tensor:
    """Divide by the number of windows over each pixel."""
    side, counts, overlap = protocol.window_size, [], False
    for length in canvas.shape[-2:]:
        starts = _starts(length, protocol)
        overlap |= len(starts) > 1 and len(starts) * side > length
        count = torch.zeros(length, device=canvas.device)  # along one side
        for start in starts:
            count[start : start + side] += 1
        counts.append(count)
    rows, columns = counts
    return canvas.div_(rows[:, None] * columns) if overlap else canvas


def windows(image: int, height: int, width: int, protocol: ProtocolConfig) -> list[Window]:
    """The windows over an image; the last of a row or column ends at the border."""
    side = protocol.window_size
    return [
        Window(image=image, top=top, left=left, height=min(side, height), width=min(side, width))
        for top in _starts(height, protocol)
        for left in _starts(width, protocol)
    ]


def _starts(length: int, protocol: ProtocolConfig) -> list[int]:
    side, stride = protocol.window_size, protocol.window_stride
    last = max(0, length - side)  # an image smaller than a window is one window
    return [min(start, last) for start in range(0, last + stride, stride)]


def cut(image: Tensor, window: Window) -> Tensor:
    """The window's part of [..., h, w], a view."""
    bottom, right = window.top + window.height, window.left + window.width
    return image[..., window.top : bottom, window.left : right]


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
