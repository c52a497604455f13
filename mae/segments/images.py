"""Reading photographs as people see them."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def read_rgb(path: Path) -> np.ndarray:
    """All pixels as [H, W, 3] uint8, upright (EXIF orientation applied).

    Raises ValueError, naming the file, if it is damaged or no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except OSError as error:
        reason = error.strerror or str(error).split(" '")[0]
        raise ValueError(f"{path}: cannot be read: {reason}") from None
    except (SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
