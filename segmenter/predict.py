"""`predict`: label maps, overlays and attention maps of images of any size and mode."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageOps, UnidentifiedImageError

from segmenter.attention import draw_attention
from segmenter.data import scaled_images
from segmenter.drawing import overlay, save_image, with_legend
from segmenter.evaluate import evaluating
from segmenter.inference import predict_classes
from segmenter.loading import load_segmenter
from segmenter.scoring import changed_protocol

logger = logging.getLogger(__name__)


def predict_files(
    accelerator: Accelerator,
    checkpoint: Path,
    images: Sequence[Path],
    out: Path,
    *,
    changes: dict[str, Any],
    multi_scale: bool,
    attention: bool,
) -> None:
    """Write <stem>.png (labels) and <stem>_overlay.png for every image, and <stem>_attention.png.

    Label maps are numbered like the annotations that the model was trained on. Raises ValueError
    before anything is written if a file is missing, no image, or has another's name.
    """
    paths = list_images(images)
    loaded = load_segmenter(checkpoint)
    protocol = changed_protocol(loaded.protocol, changes, multi_scale)
    model = loaded.model.to(accelerator.device)
    out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        image = read_rgb(path)
        scaled = scaled_images(np.ascontiguousarray(image[..., ::-1]), protocol)
        with evaluating(accelerator, model):
            (predicted,) = predict_classes(
                model, [scaled], [image.shape[:2]], protocol, accelerator.device
            )
        labels = predicted.cpu().numpy()
        stored = labels + 1 if loaded.reduce_zero_label else labels
        save_image(Image.fromarray(stored), out / f"{path.stem}.png")
        present = np.unique(labels).tolist()
        sheet = with_legend(overlay(image, labels, loaded.classes), present, loaded.classes)
        save_image(sheet, out / f"{path.stem}_overlay.png")
        if attention:
            with evaluating(accelerator, model):
                sheet = draw_attention(
                    model, scaled[0].to(accelerator.device), labels, loaded.classes
                )
            save_image(sheet, out / f"{path.stem}_attention.png")
        logger.info("%s: %s", path, ", ".join(loaded.classes.names[label] for label in present))


def list_images(images: Sequence[Path]) -> list[Path]:
    """The files, and those in folders. Raises ValueError unless all can be opened and named."""
    paths: list[Path] = []
    for path in images:
        if path.is_dir():
            paths += sorted(file for file in path.iterdir() if file.is_file())
        else:
            paths.append(path)
    by_stem: dict[str, Path] = {}
    for path in paths:
        try:
            with Image.open(path):
                pass
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from error
        if path.stem in by_stem:
            raise ValueError(f"{by_stem[path.stem]} and {path} would both become {path.stem}.png")
        by_stem[path.stem] = path
    if not paths:
        raise ValueError("there are no images to predict")
    return paths


def read_rgb(path: Path) -> np.ndarray:
    """[H, W, 3] uint8 RGB of an image of any mode, upright. Raises ValueError."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I") or image.mode == "F":
                return _grey_to_rgb(np.asarray(image, dtype=np.float32))
            if image.mode in ("LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
            return np.array(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from error


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    """Grey of any range, as 16-bit and float files have it, stretched to 0-255."""
    low, high = float(grey.min()), float(grey.max())
    bytes_ = ((grey - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)
    return np.repeat(bytes_[..., None], 3, axis=-1)
