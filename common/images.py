"""Image files: which there are, and how people see them."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm"}


def find_images(folder: Path) -> list[str]:
    """Image files below a folder, at any depth, as sorted posix paths relative to it.

    Links to folders are followed. Raises ValueError if the folder is missing or holds no image.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; images are expected there")
    found = sorted(path for path in relative_files(folder) if _is_image(path))
    if not found:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise ValueError(f"no image below {folder} (looked for {known})")
    return found


def relative_files(folder: Path) -> set[str]:
    """Files below a folder, at any depth, links to folders followed, as relative posix paths."""
    files: set[str] = set()
    for parent, _, names in os.walk(folder, followlinks=True):
        relative = Path(parent).relative_to(folder).as_posix()
        prefix = "" if relative == "." else f"{relative}/"
        files.update(f"{prefix}{name}" for name in names)
    return files


def _is_image(path: str) -> bool:
    name = path.rpartition("/")[2]
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122


def read_rgb(path: Path) -> np.ndarray:
    """All pixels as [H, W, 3] uint8, upright (EXIF orientation applied), whatever the mode.

    Raises ValueError, naming the file, if it is damaged or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I") or image.mode == "F":
                return _grey_to_rgb(np.asarray(image, dtype=np.float32))
            if image.mode in ("LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error).split(" '")[0]
        raise ValueError(f"{path} cannot be read as an image: {reason}") from None


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    """Grey of any range, as 16-bit and float files have it, stretched to 0-255."""
    low, high = float(grey.min()), float(grey.max())
    stretched = ((grey - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)
    return np.repeat(stretched[..., None], 3, axis=-1)
