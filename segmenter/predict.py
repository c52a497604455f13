"""`predict`: label maps and overlays of images of any size and mode."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.devices import make_accelerator
from common.images import read_rgb
from common.options import OptionGroup
from segmenter.config import ScoringConfig
from segmenter.data import scaled_images
from segmenter.drawing import overlay, save_image, with_legend
from segmenter.evaluate import evaluating
from segmenter.inference import predict_classes
from segmenter.labels import open_image
from segmenter.loading import LoadedSegmenter, load_segmenter
from segmenter.scoring import changed_protocol

logger = logging.getLogger(__name__)


@torch.inference_mode()
def predict_image(loaded: LoadedSegmenter, image: np.ndarray) -> np.ndarray:
    """The class of every pixel, [H, W] uint8, of an image [H, W, 3] uint8 RGB.

    Runs where the model is, with windows and scales as its protocol says.
    """
    scaled = scaled_images(image[..., ::-1], loaded.protocol)
    (classes,) = predict_classes(loaded.model, [scaled], [image.shape[:2]], loaded.protocol)
    return classes.cpu().numpy()


def predict_files(
    checkpoint: Path,
    images: Sequence[Path],
    out: Path,
    changes: OptionGroup,
    devices: ScoringConfig,
) -> None:
    """Write <stem>.png (labels) and <stem>_overlay.png for every image.

    changes: `ProtocolChanges`, in place of the checkpoint's protocol.
    Label maps are numbered like the annotations that the model was trained on. Raises ValueError
    before anything is written if a file is missing, no image, or has another's name.
    """
    accelerator = make_accelerator(devices)
    paths, loaded = list_images(images), load_segmenter(checkpoint)
    loaded = dataclasses.replace(loaded, protocol=changed_protocol(loaded.protocol, changes))
    model, classes = loaded.model.to(accelerator.device), loaded.classes
    out.mkdir(parents=True, exist_ok=True)
    for path in paths:
        image = read_rgb(path)
        with evaluating(accelerator, model):
            labels = predict_image(loaded, image)
        stored = labels + 1 if loaded.reduce_zero_label else labels
        save_image(Image.fromarray(stored), out / f"{path.stem}.png")
        present = np.unique(labels).tolist()
        sheet = with_legend(overlay(image, labels, classes), present, classes)
        save_image(sheet, out / f"{path.stem}_overlay.png")
        logger.info("%s: %s", path, ", ".join(classes.names[label] for label in present))


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
        with open_image(path):
            pass
        if path.stem in by_stem:
            raise ValueError(f"{by_stem[path.stem]} and {path} would both become {path.stem}.png")
        by_stem[path.stem] = path
    if not paths:
        raise ValueError("there are no images to predict")
    return paths
