"""Crops: which box of an image is taken, and reading it; its segments are cut and resized alike.

Of an upright JPEG no more is decoded than the crop needs. Everything else, and whatever looks
damaged, goes through the reader of the whole project (common/images.py). Images are uint8 [C, H, W].
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from common.images import (
    GREY_OR_COLOUR,
    ImagePath,
    JpegHeader,
    decode_rgb,
    jpeg_header,
    load_image,
    read_content,
    refuse_huge,
)
from segments.segment import Segment, decode_at

CROP_AREA = (0.2, 1.0)  # of the image, as MAE crops
CROP_ASPECT = (3 / 4, 4 / 3)  # width / height
CROP_TRIES = 10
ImageSize = tuple[int, int]  # height and width
CENTRE_CROP = 224 / 256  # of the shorter side, the usual crop for held-out images
FILL = 128  # of all three colours: coefficients of 0


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A box in pixels of the image, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


@dataclass(frozen=True, kw_only=True)
class CroppedImage:
    """pixels [3, size, size] uint8: a crop of an upright image of height x width pixels."""

    pixels: Tensor
    crop: Crop
    height: int
    width: int


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


def _centred(height: int, width: int, box_height: int, box_width: int, flip: bool) -> Crop:
    top, left = (height - box_height) // 2, (width - box_width) // 2
    return Crop(top=top, left=left, height=box_height, width=box_width, flip=flip)


def read_crop(path: ImagePath, choose_crop: Callable[[int, int], Crop], size: int) -> CroppedImage:
    """Read an image file, crop it as `choose_crop(height, width)` says, and resize the crop.

    Of an upright JPEG no rows below the crop are decoded, and where it is going to be shrunk by 2
    or more, only 1/2, 1/4 or 1/8 of the size. Raises ValueError as `decode_rgb`.
    """
    content = bytearray(read_content(path))
    header = jpeg_header(content)
    if header is not None and header.is_upright and header.channels in GREY_OR_COLOUR:
        refuse_huge(header.height, header.width)  # by what it claims: before anything is decoded
        crop = choose_crop(header.height, header.width)
        pixels = _decode_crop(content, header, crop, size)
        if pixels is not None:
            return CroppedImage(pixels=pixels, crop=crop, height=header.height, width=header.width)
    image = torch.from_numpy(decode_rgb(content)).permute(2, 0, 1)
    height, width = image.shape[1:]
    crop = choose_crop(height, width)  # a second time where only this decoder could
    pixels = crop_image(image, crop, size)
    return CroppedImage(pixels=pixels, crop=crop, height=height, width=width)


def _decode_crop(content: bytearray, header: JpegHeader, crop: Crop, size: int) -> Tensor | None:
    """The crop as [3, size, size] uint8; None if `decode_rgb` has to read or judge the file."""
    reduction = min(8, min(crop.height, crop.width) // size)
    if reduction >= 2:
        return _decode_reduced(content, header, crop, size, reduction)
    # A decoder that believes the image to be lower stops early. Interpolating the colours of a
    # row takes one row more.
    rows = min(header.height, crop.top + crop.height + 1)
    content[header.height_at : header.height_at + 2] = rows.to_bytes(2)
    try:
        # "Not strict", because the data that is left over would count as damage.
        image = simplejpeg.decode_jpeg(content, "RGB", strict=False)
    except ValueError:
        return None
    finally:
        content[header.height_at : header.height_at + 2] = header.height.to_bytes(2)
    if image.shape != (rows, header.width, 3) or _ends_grey(image):
        return None
    return crop_image(torch.from_numpy(image).permute(2, 0, 1), crop, size)


def _ends_grey(image: np.ndarray) -> bool:
    """Whether the last row is the grey with which libjpeg fills what a damaged file lacks."""
    return bool((image[-1] == FILL).all())


def _decode_reduced(
    content: bytearray, header: JpegHeader, crop: Crop, size: int, reduction: int
) -> Tensor | None:
    # libjpeg then computes fewer pixels of each 8 x 8 block from its lowest frequencies.
    draft = header.width // reduction, header.height // reduction
    image = load_image(content, draft=draft)
    reduction = round(header.width / image.width)  # draft knows powers of two only
    left, top = crop.left / reduction, crop.top / reduction
    box = (left, top, left + crop.width / reduction, top + crop.height / reduction)
    whole = image.convert("RGB")
    if _ends_grey(np.asarray(whole)):
        return None
    resized = whole.resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)
    return pixels.flip(-1) if crop.flip else pixels


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
