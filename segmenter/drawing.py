"""Pictures of segmentations: overlays, legends, and the sheet that a run leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont

from common.contact_sheet import (
    BACKGROUND,
    GAP,
    INK,
    Tile,
    contact_sheet,
    save_png,
    stacked,
    text_size,
)
from common.files import shortened
from segmenter.data import WholeImages
from segmenter.dataset import Classes
from segmenter.evaluate import evaluating
from segmenter.inference import predict_classes
from segmenter.model import Segmenter

SHEET_IMAGES = 4
COLUMNS = ("image", "annotation", "prediction")
TILE_WIDTH = 360
STRENGTH = 0.6  # of the classes' colours over the image
LETTERS = 10  # that a column of the legend is wide, by the height of its text


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
        photo = Image.fromarray(sample.scaled[0].permute(1, 2, 0).numpy())
        image = np.asarray(photo.resize((width, height), Image.Resampling.BILINEAR))
        labels, guess = sample.labels.numpy(), predicted.cpu().numpy()
        present |= {*np.unique(labels).tolist(), *np.unique(guess).tolist()}
        overlays = (overlay(image, numbers, classes) for numbers in (labels, guess))
        rows.append([Tile(image), *map(Tile, overlays)])
    sheet = contact_sheet(rows, titles=COLUMNS, tile_width=TILE_WIDTH)
    save_png(with_legend(sheet, sorted(present), classes), path, "predictions")


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
