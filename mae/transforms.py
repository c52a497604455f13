"""Crop, flip and resize of an image together with its segment. Images are uint8 [C, H, W]."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from segments.segment import Segment, decode_at

CROP_AREA = (0.2, 1.0)  # of the image, as MAE crops
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height
CROP_TRIES = 10
ImageSize = tuple[int, int]  # height and width
CENTRE_CROP = 224 / 256  # of the shorter side, the usual crop for held-out images


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A box in pixels of the image, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def random_crop(rng: np.random.Generator, height: int, width: int) -> Crop:
    """A box of random area and shape, half of them mirrored (Szegedy et al. 2014).

    Falls back to the largest centred box of an allowed shape when ten tries do not fit.
    """
    flip, *numbers = rng.random(1 + 4 * CROP_TRIES).tolist()  # one call: numpy's are slow to enter
    low, high = math.log(CROP_ASPECT[0]), math.log(CROP_ASPECT[1])
    for at in range(0, len(numbers), 4):
        # Uniform in area and place; uniform in the logarithm of the shape, so that w:h is as
        # likely as h:w.
        in_area, in_aspect, in_rows, in_columns = numbers[at : at + 4]
        area = height * width * (CROP_AREA[0] + in_area * (CROP_AREA[1] - CROP_AREA[0]))
        aspect = math.exp(low + in_aspect * (high - low))
        box_width = round(math.sqrt(area * aspect))
        box_height = round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            return Crop(
                top=int(in_rows * (height - box_height + 1)),
                left=int(in_columns * (width - box_width + 1)),
                height=box_height,
                width=box_width,
                flip=flip < 0.5,
            )
    box_width = min(width, max(1, round(height * CROP_ASPECT[1])))
    box_height = min(height, max(1, round(width / CROP_ASPECT[0])))
    return _centred(height, width, box_height, box_width, flip < 0.5)


def centre_crop(height: int, width: int) -> Crop:
    """The middle square of an image, for held-out loss and pictures: no chance in it."""
    side = max(1, round(min(height, width) * CENTRE_CROP))
    return _centred(height, width, side, side, False)


def crop_image(image: Tensor, crop: Crop, size: int) -> Tensor:
    """Cut a box out of [C, H, W] uint8 and resize it (bicubic, antialiased) to [C, size, size]."""
    rows = slice(crop.top, crop.top + crop.height)
    columns = slice(crop.left, crop.left + crop.width)
    # As decoders leave pixels, the channel fastest: torch resizes those a third faster.
    box = image[None, :, rows, columns].contiguous(memory_format=torch.channels_last)
    resized = F.interpolate(box, (size, size), mode="bicubic", antialias=True)[0]
    return resized.flip(-1) if crop.flip else resized


def crop_segment(segment: np.ndarray, crop: Crop, size: int, image: ImageSize) -> np.ndarray:
    """The same for a segment [H, W] uint8, by nearest neighbour, so that it stays binary.

    image: height and width of what the crop is a box of; a segment of another size is stretched.
    """
    rows, columns = _pixels(crop, size, image, segment.shape)
    if crop.flip:
        columns = columns[::-1]
    # Whole columns first: run lengths decode column by column, so that they lie together.
    return np.ascontiguousarray(segment.T[columns][:, rows].T)


def crop_segments(segments: Sequence[Segment], crop: Crop, size: int, image: ImageSize) -> np.ndarray:
    """The same for all segments of one image at once, where few points will do: [M, size, size]."""
    rows, columns = _pixels(crop, size, image, (segments[0].height, segments[0].width))
    cut = decode_at(segments, rows, columns)
    return cut[..., ::-1] if crop.flip else cut


def _pixels(
    crop: Crop, size: int, image: ImageSize, segment: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns [size] of a segment that lie under the pixels of a crop."""
    rows = 2 * (crop.top + _nearest(crop.height, size)) + 1  # twice the middle of a pixel
    columns = 2 * (crop.left + _nearest(crop.width, size)) + 1
    return rows * segment[0] // (2 * image[0]), columns * segment[1] // (2 * image[1])


def _nearest(length: int, size: int) -> np.ndarray:
    """Source pixel under the centre of each of `size` target pixels."""
    return ((np.arange(size) + 0.5) * (length / size)).astype(np.int64)


def _centred(height: int, width: int, box_height: int, box_width: int, flip: bool) -> Crop:
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return Crop(top=top, left=left, height=box_height, width=box_width, flip=flip)
