"""Image files of any kind to RGB uint8 [3, H, W], and crops of them."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

from mae.transforms import Crop, crop_image

JPEG_START = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # markers before the size: baseline, extended, progressive
JPEG_APP1, EXIF_START = 0xE1, b"Exif\0\0"
ORIENTATION, UPRIGHT = 0x0112, 1  # EXIF
PILLOW_ERRORS = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True, kw_only=True)
class CroppedImage:
    """pixels [3, size, size] uint8: a crop of an upright image of height x width pixels."""

    pixels: Tensor
    crop: Crop
    height: int
    width: int


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Size in pixels of an upright JPEG, and where in the file its height stands, in two bytes."""

    height: int
    width: int
    height_at: int


def read_image(path: Path | str) -> Tensor:
    """Read an image file, whatever its suffix claims, as [3, H, W] uint8.

    Greyscale, palette, CMYK and 16-bit images are converted, transparency is dropped and the EXIF
    orientation is applied. Raises ValueError if the file is damaged or is no image.
    """
    return _decode(_read(path))


def read_crop(path: Path | str, choose_crop: Callable[[int, int], Crop], size: int) -> CroppedImage:
    """Read an image file, crop it as `choose_crop(height, width)` says, and resize the crop.

    Of an upright JPEG no more is decoded than the crop needs: no rows below it, and where it is
    going to be shrunk by 2 or more, only 1/2, 1/4 or 1/8 of the size. Raises ValueError as
    `read_image`.
    """
    content = _read(path)
    frame = _upright_frame(content)
    if frame is not None:
        crop = choose_crop(frame.height, frame.width)
        pixels = _decode_crop(content, frame, crop, size)
        if pixels is not None:
            return CroppedImage(pixels=pixels, crop=crop, height=frame.height, width=frame.width)
    image = _decode(content)
    height, width = image.shape[1:]
    crop = choose_crop(height, width)  # a second time where only these decoders could
    pixels = crop_image(image, crop, size)
    return CroppedImage(pixels=pixels, crop=crop, height=height, width=width)


def _read(path: Path | str) -> bytearray:
    try:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123, read for every sample
            return bytearray(file.read())
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error


def _upright_frame(content: bytearray) -> _Frame | None:
    """What the header of a complete JPEG states; None if that lies on its side, or is CMYK.

    None for any other file, too. Walks from marker to marker, much faster than Pillow.
    """
    if not _is_complete_jpeg(content):
        return None
    at = len(JPEG_START) - 1
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4])
        if marker in JPEG_FRAMES:
            height, width = (int.from_bytes(content[n : n + 2]) for n in (at + 5, at + 7))
            usual = height * width > 0 and content[at + 9] in (1, 3)  # colours
            return _Frame(height=height, width=width, height_at=at + 5) if usual else None
        if marker == JPEG_APP1 and not _is_upright(bytes(content[at + 4 : at + 2 + length])):
            return None
        at += 2 + length
    return None


def _is_complete_jpeg(content: bytearray) -> bool:
    """libjpeg fills the rest of a truncated file with grey and goes on; Pillow refuses it."""
    return content.startswith(JPEG_START) and JPEG_END in content[-64:]


def _is_upright(block: bytes) -> bool:
    """Whether an APP1 block is something else than EXIF, or EXIF of an upright image."""
    if not block.startswith(EXIF_START):
        return True
    exif = Image.Exif()
    try:
        exif.load(block)
    except PILLOW_ERRORS:
        return False  # whatever the other decoders make of it
    return exif.get(ORIENTATION, UPRIGHT) == UPRIGHT


def _decode_crop(content: bytearray, frame: _Frame, crop: Crop, size: int) -> Tensor | None:
    """The crop as [3, size, size] uint8; None if only the other decoders can read the file."""
    reduction = min(8, min(crop.height, crop.width) // size)
    if reduction >= 2:
        return _decode_reduced(content, crop, size, reduction)
    # A decoder that believes the image to be lower stops early. Interpolating the colours of a
    # row takes one row more.
    rows = min(frame.height, crop.top + crop.height + 1)
    content[frame.height_at : frame.height_at + 2] = rows.to_bytes(2)
    try:
        # "Not strict", because the data that is left over would count as damage.
        image = simplejpeg.decode_jpeg(content, "RGB", strict=False)
    except ValueError:
        content[frame.height_at : frame.height_at + 2] = frame.height.to_bytes(2)
        return None
    return crop_image(torch.from_numpy(image).permute(2, 0, 1), crop, size)


def _decode_reduced(content: bytearray, crop: Crop, size: int, reduction: int) -> Tensor:
    try:
        with Image.open(io.BytesIO(content)) as image:
            width = image.width
            image.draft("RGB", (width // reduction, image.height // reduction))
            reduction = round(width / image.width)  # draft knows powers of two only
            box = (
                crop.left / reduction,
                crop.top / reduction,
                (crop.left + crop.width) / reduction,
                (crop.top + crop.height) / reduction,
            )
            resized = _to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
    except PILLOW_ERRORS as error:
        raise ValueError(_reason(error)) from error
    pixels = torch.from_numpy(np.asarray(resized).copy()).permute(2, 0, 1)
    return pixels.flip(-1) if crop.flip else pixels


def _decode(content: bytearray) -> Tensor:
    if _is_complete_jpeg(content):
        try:
            encoded = torch.frombuffer(content, dtype=torch.uint8)
            return decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        except RuntimeError:
            pass  # CMYK and other rarities: Pillow knows more
    return _decode_with_pillow(content)


def _decode_with_pillow(content: bytearray) -> Tensor:
    try:
        with Image.open(io.BytesIO(content)) as image:
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
