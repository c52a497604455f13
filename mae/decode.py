"""Image files of any kind to RGB uint8 [3, H, W]."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg

JPEG_START = b"\xff\xd8\xff"
JPEG_END = b"\xff\xd9"


def read_image(path: Path) -> Tensor:
    """Read an image file, whatever its suffix claims, as [3, H, W] uint8.

    Greyscale, palette, CMYK and 16-bit images are converted, transparency is dropped and the EXIF
    orientation is applied. Raises ValueError if the file is damaged or is no image.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    # libjpeg fills the rest of a truncated file with grey and goes on; Pillow refuses it.
    if content.startswith(JPEG_START) and JPEG_END in content[-64:]:
        try:
            return _decode_jpeg(content)
        except RuntimeError:
            pass  # CMYK and other rarities: Pillow knows more
    return _decode_with_pillow(content)


def _decode_jpeg(content: bytes) -> Tensor:
    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)  # torch wants it writable
    return decode_jpeg(encoded, mode=ImageReadMode.RGB, apply_exif_orientation=True)


def _decode_with_pillow(content: bytes) -> Tensor:
    try:
        with Image.open(io.BytesIO(content)) as image:
            upright = ImageOps.exif_transpose(image)
            pixels = np.asarray(_to_rgb(upright))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(reason.replace(" <_io.BytesIO", "").split(" object at ")[0]) from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB; 16-bit values are scaled to 8 bits (Pillow alone would clip them)."""
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray((values / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")
