"""Pictures of segmentations: overlays, legends, and the sheet that a run leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from common.files import mark, replacing, shortened
from segmenter.classes import Classes
from segmenter.data import WholeImages
from segmenter.evaluate import evaluating
from segmenter.inference import predict_classes
from segmenter.model import Segmenter

SHEET_IMAGES = 4
PANEL_WIDTH = 360
STRENGTH = 0.6  # of the classes' colours over the image
MARGIN = 8  # pixels
PHONE_SHARE = 30  # text is at least a thirtieth of the width high: 12 pixels on a phone
BACKGROUND, INK = (255, 255, 255), (20, 20, 20)


def overlay(image: np.ndarray, labels: np.ndarray, classes: Classes) -> np.ndarray:
    """[H, W, 3] uint8 RGB: the image, coloured by class; labels beyond the classes stay dark."""
    colours = np.zeros((256, 3), dtype=np.float32)  # black
    colours[: len(classes)] = classes.palette
    mixed = (1 - STRENGTH) * image + STRENGTH * colours[labels]
    return mixed.round().astype(np.uint8)


def with_legend(picture: np.ndarray, labels: Sequence[int], classes: Classes) -> Image.Image:
    """The picture with a strip below that names the given classes and shows their colours."""
    width = picture.shape[1]
    size = _text_size(width)
    line, font = 5 * size // 3, ImageFont.load_default(size)
    entries = [(label, classes.names[label]) for label in labels if label < len(classes)]
    columns = max(1, width // (10 * size))
    rows = max(1, -(-len(entries) // columns))
    sheet = Image.new("RGB", (width, picture.shape[0] + rows * line + 2 * MARGIN), BACKGROUND)
    sheet.paste(Image.fromarray(picture), (0, 0))
    draw = ImageDraw.Draw(sheet)
    step = width // columns
    for number, (label, name) in enumerate(entries):
        left = MARGIN + number % columns * step
        top = picture.shape[0] + MARGIN + number // columns * line
        colour = tuple(int(value) for value in classes.palette[label])
        draw.rectangle((left, top + 2, left + size, top + 2 + size), fill=colour, outline=INK)
        shown = _shortened(name, font, step - 2 * size - MARGIN)
        draw.text((left + 3 * size // 2, top), shown, fill=INK, font=font)
    return sheet


def draw_predictions(
    accelerator: Accelerator, model: Segmenter, images: WholeImages, classes: Classes, path: Path
) -> None:
    """Image, annotation and prediction of a few test images, one row each, with a legend."""
    chosen = np.linspace(0, len(images) - 1, min(SHEET_IMAGES, len(images))).round().astype(int)
    rows, present = [], set()
    for index in dict.fromkeys(chosen.tolist()):
        sample = images[index]
        if sample.unreadable:
            continue
        size = sample.labels.shape
        with evaluating(accelerator, model):
            (predicted,) = predict_classes(model, [sample.scaled], [size], images.protocol)
        photo = _resized(sample.scaled[0].permute(1, 2, 0).numpy(), size)
        labels, guess = sample.labels.numpy(), predicted.cpu().numpy()
        present |= {int(label) for label in np.unique(np.stack([labels, guess]))}
        panels = [photo, overlay(photo, labels, classes), overlay(photo, guess, classes)]
        height = max(1, round(size[0] * PANEL_WIDTH / size[1]))
        rows.append(np.hstack([_resized(panel, (height, PANEL_WIDTH)) for panel in panels]))
    body = np.vstack([_title_strip(("image", "annotation", "prediction")), *rows])
    save_image(with_legend(body, sorted(present), classes), path, "predictions")


def save_image(image: Image.Image, path: Path, kind: str) -> None:
    """As a PNG that is there as a whole or not at all, and bears the mark of its kind."""
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", mark(kind))
    with replacing(path) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=about)


def _title_strip(titles: Sequence[str]) -> np.ndarray:
    """What stands above a row of panels."""
    width = len(titles) * PANEL_WIDTH
    size = _text_size(width)
    strip = Image.new("RGB", (width, 5 * size // 3), BACKGROUND)
    draw, font = ImageDraw.Draw(strip), ImageFont.load_default(size)
    for number, title in enumerate(titles):
        draw.text((number * PANEL_WIDTH + MARGIN, size // 4), title, fill=INK, font=font)
    return np.asarray(strip)


def _text_size(width: int) -> int:
    """Height of text in pixels, on a sheet of this width."""
    return max(13, width // PHONE_SHARE)


def _resized(picture: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    image = Image.fromarray(picture).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _shortened(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    text = shortened(text, 120)
    while len(text) > 1 and font.getlength(text) > width:
        text = text[:-1]
    return text
