"""`predict`: label maps and overlays of images of any size and mode.

labels = predict_image(load_segmenter(checkpoint), read_rgb(photo))
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.contact_sheet import save_png
from common.files import check_output_folder, check_replaceable, is_marked
from common.images import load_image
from common.samples import Unreadable
from engine.devices import make_accelerator
from segmenter.config import ProtocolChanges, ScoringConfig
from segmenter.data import scaled_images
from segmenter.drawing import overlay, with_legend
from segmenter.evaluate import evaluating
from segmenter.inference import predict_classes
from segmenter.labels import read_image
from segmenter.loading import LoadedSegmenter, load_segmenter

LABEL_MAP, OVERLAY = "label-map", "overlay"  # kinds of pictures

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
    changes: ProtocolChanges,
    devices: ScoringConfig,
) -> None:
    """Write <stem>.png (labels) and <stem>_overlay.png for every image, of folders for each file.

    Label maps are numbered like the annotations that the model was trained on. Raises ValueError
    before anything is written if a file is missing, no image, has another's name, or a picture
    would replace what this command did not make; RuntimeError at the end if images are damaged.
    """
    accelerator = make_accelerator(devices)
    paths = list_images(images)
    _check_outputs(paths, out, [checkpoint, *paths], [path for path in images if path.is_dir()])
    loaded = load_segmenter(checkpoint)
    loaded = dataclasses.replace(loaded, protocol=changes.applied_to(loaded.protocol))
    model, classes = loaded.model.to(accelerator.device), loaded.classes
    out.mkdir(parents=True, exist_ok=True)
    unreadable = Unreadable()
    for path in paths:
        try:
            image = read_image(path)
        except ValueError as error:
            unreadable.note([str(error)])
            continue
        with evaluating(accelerator, model):
            labels = predict_image(loaded, image)
        stored = labels + 1 if loaded.reduce_zero_label else labels
        present = np.unique(labels).tolist()
        picture = Image.fromarray(overlay(image, labels, classes))
        made = Image.fromarray(stored), with_legend(picture, present, classes)
        for (target, kind), content in zip(_outputs(path, out).items(), made, strict=True):
            save_png(content, target, kind)
        logger.info("%s: %s", path, ", ".join(classes.names[label] for label in present))
    if unreadable.texts:
        raise RuntimeError(f"{len(unreadable.texts)} of {len(paths)} images could not be read")


def list_images(images: Sequence[Path]) -> list[Path]:
    """The files, and those in folders. Raises ValueError unless all can be opened."""
    paths: list[Path] = []
    for path in images:
        found = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else None
        paths += [path] if found is None else found
    for path in paths:
        load_image(path, decode=False)
    if not paths:
        raise ValueError("there are no images to predict")
    return paths


def _outputs(path: Path, out: Path) -> dict[Path, str]:
    """Label map and overlay of an image, with the kinds of picture they are."""
    return {out / f"{path.stem}.png": LABEL_MAP, out / f"{path.stem}_overlay.png": OVERLAY}


def _check_outputs(
    paths: Sequence[Path], out: Path, reads: Sequence[Path], folders: Sequence[Path]
) -> None:
    """Raise ValueError if a picture would take the place of another, or of what is not ours."""
    check_output_folder(out, "--out", reads=folders)
    takers: dict[Path, Path] = {}
    for path in paths:
        for target, kind in _outputs(path, out).items():
            other = takers.setdefault(target, path)
            if other is not path:
                raise ValueError(f"{other} and {path} would both become {target.name}")
            check_replaceable(target, "--out", reads=reads, is_own=is_marked(kind))
