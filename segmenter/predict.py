"""Predictions: label maps and overlays of any images, and the sheet that a finetuning leaves.

labels = predict_image(load_segmenter(checkpoint), read_rgb(photo))
"""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont

from common.contact_sheet import (
    BACKGROUND,
    GAP,
    INK,
    contact_sheet,
    save_png,
    stacked,
    text_size,
)
from common.files import check_output_file, check_output_folder, is_marked, shortened
from common.images import Unreadable, load_image
from engine.devices import make_accelerator
from segmenter.config import ProtocolChanges, ScoringConfig
from segmenter.data import WholeImages, scaled_images
from segmenter.dataset import Classes
from segmenter.evaluate import evaluating
from segmenter.inference import predict_classes
from segmenter.labels import read_image
from segmenter.loading import LoadedSegmenter, load_segmenter
from segmenter.model import Segmenter

LABEL_MAP, OVERLAY, SHEET = "label-map", "overlay", "predictions"  # kinds of pictures
SHEET_IMAGES = 4
COLUMNS = ("image", "annotation", "prediction")
TILE_WIDTH = 360
STRENGTH = 0.6  # of the classes' colours over the image
LETTERS = 10  # that a column of the legend is wide, by the height of its text

logger = logging.getLogger(__name__)


@torch.inference_mode()
def predict_image(loaded: LoadedSegmenter, image: np.ndarray) -> np.ndarray:
    """The class of every pixel, [H, W] uint8, of an image [H, W, 3] uint8 RGB.

    Runs where the model is, with windows and scales as its protocol says.
    """
    scaled = scaled_images(image[..., ::-1], loaded.protocol)  # BGR, as mmcv wants it
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
        except ValueError as error:  # the others are predicted all the same
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
        is_folder = path.is_dir()
        paths += sorted(filter(Path.is_file, path.iterdir())) if is_folder else [path]
    for path in paths:
        load_image(path, decode=False)  # what is no image is refused before any work
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
            other = takers.setdefault(target, path)  # a.jpg and a.png have one stem
            if other is not path:
                raise ValueError(f"{other} and {path} would both become {target.name}")
            check_output_file(target, reads=reads, is_own=is_marked(kind), makes_folder=True)


def draw_predictions(
    accelerator: Accelerator, model: Segmenter, images: WholeImages, classes: Classes, path: Path
) -> None:
    """Image, annotation and prediction of a few test images, one row each, with a legend."""
    rows, present = [], set()
    chosen = np.linspace(0, len(images) - 1, min(SHEET_IMAGES, len(images))).round().astype(int)
    for index in chosen.tolist():
        sample = images[index]
        if sample.unreadable:
            continue
        height, width = sample.labels.shape
        with evaluating(accelerator, model):
            scaled = [sample.scaled]
            (predicted,) = predict_classes(model, scaled, [(height, width)], images.protocol)
        # The image at its own size again: what is shown is what was scored.
        photo = Image.fromarray(sample.scaled[0].permute(1, 2, 0).numpy())
        image = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))
        labels, guess = sample.labels.numpy(), predicted.cpu().numpy()
        # Both in one legend, so that what was missed is named, too.
        present |= {*np.unique(labels).tolist(), *np.unique(guess).tolist()}
        overlays = (overlay(image, numbers, classes) for numbers in (labels, guess))
        rows.append([(picture, "") for picture in (image, *overlays)])
    sheet = contact_sheet(rows, titles=COLUMNS, tile_width=TILE_WIDTH)
    save_png(with_legend(sheet, sorted(present), classes), path, SHEET)


def overlay(image: np.ndarray, labels: np.ndarray, classes: Classes) -> np.ndarray:
    """[H, W, 3] uint8 RGB: the image, coloured by class; labels beyond the classes stay dark."""
    colours = np.zeros((256, 3), dtype=np.float32)  # black
    colours[: len(classes)] = classes.palette
    mixed = (1 - STRENGTH) * image + STRENGTH * colours[labels]
    return mixed.round().astype(np.uint8)


def with_legend(picture: Image.Image, labels: Sequence[int], classes: Classes) -> Image.Image:
    """The picture, and below it the names and colours of the given classes."""
    size = text_size(picture.width)
    font, line = ImageFont.load_default(size), 5 * size // 3
    entries = [label for label in labels if label < len(classes)]
    columns = max(1, picture.width // (LETTERS * size))
    step = picture.width // columns
    rows = max(1, -(-len(entries) // columns))
    legend = Image.new("RGB", (picture.width, rows * line + 2 * GAP), BACKGROUND)
    draw = ImageDraw.Draw(legend)
    for number, label in enumerate(entries):
        left, top = GAP + number % columns * step, GAP + number // columns * line
        colour = tuple(classes.palette[label].tolist())
        draw.rectangle((left, top + 2, left + size, top + 2 + size), fill=colour, outline=INK)
        name = shortened(classes.names[label], 120)  # of a file of others: one line, printable
        while len(name) > 1 and font.getlength(name) > step - 2 * size - GAP:
            name = name[:-1]
        draw.text((left + 3 * size // 2, top), name, fill=INK, font=font)
    return stacked([picture, legend])
