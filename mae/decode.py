"""Image files of any kind to RGB uint8 [3, H, W], and crops of them."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from mae.transforms import Crop, crop_image

JPEG_START = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
HEADER_BYTES = 1 << 16  # where a frame's size is looked for
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # markers before the size: baseline, extended, progressive
ORIENTATION, UPRIGHT = 0x0112, 1  # EXIF
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True, kw_only=True)
class CroppedImage:
    """pixels [3, size, size] uint8: a crop of an upright image of height x width pixels."""

    pixels: Tensor
    crop: Crop
    height: int
    width: int


def read_image(path: Path | str) -> Tensor:
    """Read an image file, whatever its suffix claims, as [3, H, W] uint8.

    Greyscale, palette, CMYK and 16-bit images are converted, transparency is dropped and the EXIF
    orientation is applied. Raises ValueError if the file is damaged or is no image.
    """
    return _decode(_read(path))


def read_crop(path: Path | str, choose_crop: Callable[[int, int], Crop], size: int) -> CroppedImage:
    """Read an image file, crop it as `choose_crop(height, width)` says, and resize the crop.

    Where the crop of a large JPEG is going to be shrunk by 2 or more, the file is decoded at 1/2,
    1/4 or 1/8 of its size, which takes a fraction of the time. Raises ValueError as `read_image`.
    """
    content = _read(path)
    if min(_jpeg_size(content)) >= 2 * size:
        try:
            reduced = _read_reduced(content, choose_crop, size)
        except PILLOW_ERRORS as error:
            raise ValueError(_reason(error)) from error
        if reduced is not None:
            return reduced
    image = _decode(content)
    height, width = image.shape[1:]
    crop = choose_crop(height, width)
    pixels = crop_image(image, crop, size)
    return CroppedImage(pixels=pixels, crop=crop, height=height, width=width)


def _read(path: Path | str) -> np.ndarray:
    """The bytes of a file, [L] uint8."""
    try:
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error


def _jpeg_size(content: np.ndarray) -> tuple[int, int]:
    """Height and width that a JPEG states, (0, 0) for any other file; much faster than Pillow."""
    start, at = bytes(content[:HEADER_BYTES]), 2
    while start.startswith(JPEG_START) and at + 9 <= len(start) and start[at] == 0xFF:
        if start[at + 1] in JPEG_FRAMES:
            return int.from_bytes(start[at + 5 : at + 7]), int.from_bytes(start[at + 7 : at + 9])
        at += 2 + int.from_bytes(start[at + 2 : at + 4])
    return 0, 0


def _read_reduced(
    content: np.ndarray, choose_crop: Callable[[int, int], Crop], size: int
) -> CroppedImage | None:
    """None if the image lies on its side, or the crop needs the full size.

    In that rare case `choose_crop` is called a second time.
    """
    with Image.open(io.BytesIO(content.tobytes())) as image:
        width, height = image.size
        crop = choose_crop(height, width)
        reduction = min(8, min(crop.height, crop.width) // size)
        if reduction < 2 or image.getexif().get(ORIENTATION, UPRIGHT) != UPRIGHT:
            return None
        image.draft("RGB", (width // reduction, height // reduction))
        reduction = round(width / image.width)  # draft knows powers of two only
        box = (
            crop.left / reduction,
            crop.top / reduction,
            (crop.left + crop.width) / reduction,
            (crop.top + crop.height) / reduction,
        )
        resized = _to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)
    pixels = pixels.flip(-1) if crop.flip else pixels
    return CroppedImage(pixels=pixels, crop=crop, height=height, width=width)


def _decode(content: np.ndarray) -> Tensor:
    # libjpeg fills the rest of a truncated file with grey and goes on; Pillow refuses it.
    if bytes(content[:3]) == JPEG_START and JPEG_END in bytes(content[-64:]):
        try:
            return decode_jpeg(
                torch.from_numpy(content), mode=ImageReadMode.RGB, apply_exif_orientation=True
            )
        except RuntimeError:
            pass  # CMYK and other rarities: Pillow knows more
    return _decode_with_pillow(content)


def _decode_with_pillow(content: np.ndarray) -> Tensor:
    try:
        with Image.open(io.BytesIO(content.tobytes())) as image:
            upright = ImageOps.exif_transpose(image)
            pixels = np.asarray(_to_rgb(upright))
    except PILLOW_ERRORS as error:
        raise ValueError(_reason(error)) from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    """What Pillow says, without the address of our buffer."""
    return (str(error) or type(error).__name__).replace(" <_io.BytesIO", "").split(" object at ")[0]


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; 16-bit values are scaled to 8 bits (Pillow alone would clip them)."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
