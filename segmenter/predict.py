"""Predictions: label maps and overlays of any images, and the sheet that a finetuning leaves.

labels = predict_image(load_segmenter(checkpoint), read_rgb(photo))
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image

from common.contact_sheet import GAP, contact_sheet, save_png, stacked, text_size
from common.files import check_output_file, check_output_folder, is_marked
from common.images import Unreadable, evenly_spread, load_image
from engine.config import DeviceConfig
from engine.devices import make_accelerator
from segmenter.data import WholeImages, scaled_images
from segmenter.dataset import Classes
from segmenter.evaluate import evaluating, predict_classes
from segmenter.labels import read_image
from segmenter.loading import LoadedSegmenter, load_segmenter
from segmenter.model import Segmenter
from segmenter.use_config import ProtocolChanges

# What follows an image's name in those of its pictures, and what kind of picture it is.
KINDS = {"": "label-map", "_overlay": "overlay"}
SHEET, SHEET_IMAGES = "predictions", 4
STRENGTH = 0.6  # of the classes' colours over the image

logger = logging.getLogger(__name__)


@torch.inference_mode()
def predict_image(loaded: LoadedSegmenter, image: np.ndarray) -> np.ndarray:
    """The class of every pixel, [H, W] uint8, of an image [H, W, 3] uint8 RGB."""
    scaled = scaled_images(image, loaded.protocol, loaded.model.interpolation)
    (classes,) = predict_classes(loaded.model, [scaled], [image.shape[:2]], loaded.protocol)
    return classes.cpu().numpy()


def predict_files(
    checkpoint: Path, images: Sequence[Path], out: Path, changes: ProtocolChanges, devices: DeviceConfig
) -> None:
    """Write <stem>.png (labels) and <stem>_overlay.png for every image, of folders for each file.

    Label maps are numbered like the annotations that the model was trained on. Raises ValueError
    before anything is written, RuntimeError at the end if images are damaged.
    """
    accelerator, paths = make_accelerator(devices), _files_of(images, checkpoint, out)
    loaded = load_segmenter(checkpoint)
    loaded = loaded._replace(protocol=changes.applied_to(loaded.protocol))
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
        present = np.unique(labels).tolist()
        picture = with_legend(Image.fromarray(overlay(image, labels, classes)), present, classes)
        made = Image.fromarray(labels + int(loaded.reduce_zero_label)), picture
        for (suffix, kind), content in zip(KINDS.items(), made, strict=True):
            save_png(content, out / f"{path.stem}{suffix}.png", kind)
        logger.info("%s: %s", path, ", ".join(classes.names[label] for label in present))
    if unreadable.texts:
        raise RuntimeError(f"{len(unreadable.texts)} of {len(paths)} images could not be read")


def _files_of(images: Sequence[Path], checkpoint: Path, out: Path) -> list[Path]:
    """The files, and those in folders. Raises ValueError if they or their pictures cannot be."""
    check_output_folder(out, "--out", reads=filter(Path.is_dir, images))
    paths, takers = list[Path](), dict[Path, Path]()
    for path in images:
        paths += sorted(filter(Path.is_file, path.iterdir())) if path.is_dir() else [path]
    if not paths:
        raise ValueError("there are no images to predict")
    for path in paths:
        load_image(path, decode=False)  # what is no image is refused before any work
        for suffix, kind in KINDS.items():
            target = out / f"{path.stem}{suffix}.png"
            other = takers.setdefault(target, path)  # a.jpg and a.png have one stem
            if other is not path:
                raise ValueError(f"{other} and {path} would both become {target.name}")
            reads = (checkpoint, *paths)
            check_output_file(target, reads=reads, is_own=is_marked(kind), makes_folder=True)
    return paths


def draw_predictions(
    accelerator: Accelerator, model: Segmenter, images: WholeImages, classes: Classes, path: Path
) -> None:
    """Image, annotation and prediction of a few test images, one row each, with a legend."""
    loaded = LoadedSegmenter(model, classes, images.protocol, images.description.reduce_zero_label)
    rows, present = [], set()
    for index in evenly_spread(range(len(images)), SHEET_IMAGES):
        try:
            image, labels = images.load(index)
        except ValueError:  # evaluating has named it
            continue
        with evaluating(accelerator, model):
            guess = predict_image(loaded, image)
        # Both in one legend, so that what was missed is named, too.
        present |= {*np.unique(labels).tolist(), *np.unique(guess).tolist()}
        overlays = (overlay(image, numbers, classes) for numbers in (labels, guess))
        rows.append([(picture, "") for picture in (image, *overlays)])
    sheet = contact_sheet(rows, titles=("image", "annotation", "prediction"), tile_width=360)
    save_png(with_legend(sheet, sorted(present), classes), path, SHEET)


def overlay(image: np.ndarray, labels: np.ndarray, classes: Classes) -> np.ndarray:
    """[H, W, 3] uint8 RGB: the image, coloured by class; labels beyond the classes stay dark."""
    colours = np.zeros((256, 3), dtype=np.float32)  # black
    colours[: len(classes.names)] = classes.palette
    mixed = (1 - STRENGTH) * image + STRENGTH * colours[labels]
    return mixed.round().astype(np.uint8)


def with_legend(picture: Image.Image, labels: Sequence[int], classes: Classes) -> Image.Image:
    """The picture, and below it a bar in the colour of each given class, under its name."""
    known = [label for label in labels if label < len(classes.names)]
    bars = [(np.full((1, 12, 3), classes.palette[n]), classes.names[n]) for n in known]
    if not bars:
        return picture
    width = 10 * text_size(picture.width)  # of a bar, at least
    columns = max(1, picture.width // width)
    rows = [bars[first : first + columns] for first in range(0, len(bars), columns)]
    legend = contact_sheet(rows, tile_width=max(width, picture.width // columns - GAP))
    sheet = stacked([picture, legend])
    return sheet.crop((0, 0, picture.width, sheet.height))  # of a tiny picture: what fits
