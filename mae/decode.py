"""Crops of image files: of an upright JPEG no more is decoded than the crop needs.

Everything else, and whatever looks damaged, goes through the reader of the whole project
(common/images.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from common.files import read_bytes
from common.images import (
    GREY_OR_COLOUR,
    JpegHeader,
    decode_rgb,
    jpeg_header,
    load_image,
    refuse_huge,
)
from mae.transforms import Crop, crop_image

FILL = 128  # of all three colours: coefficients of 0


@dataclass(frozen=True, kw_only=True)
class CroppedImage:
    """pixels [3, size, size] uint8: a crop of an upright image of height x width pixels."""

    pixels: Tensor
    crop: Crop
    height: int
    width: int


def read_crop(path: Path | str, choose_crop: Callable[[int, int], Crop], size: int) -> CroppedImage:
    """Read an image file, crop it as `choose_crop(height, width)` says, and resize the crop.

    Of an upright JPEG no rows below the crop are decoded, and where it is going to be shrunk by 2
    or more, only 1/2, 1/4 or 1/8 of the size. Raises ValueError as `decode_rgb`.
    """
    content = bytearray(read_bytes(path))
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
