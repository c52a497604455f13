"""What an encoder sees, as pictures: patch tokens by their first principal components, and by likeness.

    tokens = patch_tokens(model, images)
    colours = pca_colours(tokens)

Shapes: maps [D, h, w] of an image's tokens; pictures [h, w, 3] uint8 RGB.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn

from common.contact_sheet import contact_sheet, save_png
from common.files import check_output_file, is_marked
from common.images import Unreadable, evenly_spread
from segmenter.config import EncoderConfig, ProtocolConfig
from segmenter.data import WholeImages, scaled_images
from segmenter.evaluate import evaluating
from segmenter.finetune import start_model
from segmenter.labels import read_image
from segmenter.model import Segmenter
from segmenter.use_config import FeaturesConfig

KIND = "features"
SHEET_IMAGES = 4
TILE = 256  # pixels, in which one patch may be 16
OUTLIERS = 1.0  # percent of the values on either side that have the strongest colour

logger = logging.getLogger(__name__)


def patch_tokens(model: Segmenter, accelerator: Accelerator, image: Tensor) -> Tensor:
    """[3, H, W] uint8 RGB to [D, h, w] fp32, of the whole image at once."""
    model.decoder = nn.Identity()
    with evaluating(accelerator, model):
        return model.patch_logits(model.normalise(image.to(model.mean.device)[None]))[0].float().cpu()


def pca_colours(maps: Sequence[Tensor]) -> list[np.ndarray]:
    """Each token's place along the first three principal components of all of them, as red, green, blue."""
    tokens = torch.cat([one.flatten(1).T for one in maps]).double()
    centred = tokens - tokens.mean(0)
    *_, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:3]
    # An axis has no sign: its largest weight is to be positive, so that pictures do not flip.
    axes = axes * axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    places = (centred @ axes.T).numpy()
    low, high = np.percentile(places, [OUTLIERS, 100 - OUTLIERS], axis=0)
    scaled = ((places - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    colours = np.pad((255 * scaled).round().astype(np.uint8), ((0, 0), (0, 3 - scaled.shape[1])))
    ends = np.cumsum([one[0].numel() for one in maps])[:-1]
    return [part.reshape(*one.shape[1:], 3) for part, one in zip(np.split(colours, ends), maps, strict=True)]


def similarity(tokens: Tensor, row: int, column: int) -> np.ndarray:
    """Cosine of each token with that of one patch, 0 to 1 as black to white; the patch itself is red."""
    unit = nn.functional.normalize(tokens, dim=0)
    cosines = torch.einsum("dhw,d->hw", unit, unit[:, row, column]).clamp(0, 1)
    picture = (255 * cosines).round().byte().numpy()[..., None].repeat(3, axis=2)
    picture[row, column] = (255, 0, 0)
    return picture


def draw_features(
    models: Sequence[tuple[str, Segmenter]], accelerator: Accelerator, images: Sequence[np.ndarray],
    size: int, patch_percent: Sequence[int] = (50, 50),
) -> Image.Image:  # fmt: skip
    """A row for each image [H, W, 3] uint8; for each encoder its components, and likeness to a patch.

    size: pixels of the short side. patch_percent: where the patch lies, from the top and the left.
    """
    protocol = _protocol(size)
    rows = [[(image, "")] for image in images]
    titles = ["image"]
    for name, model in models:
        scaled = [scaled_images(image, protocol, model.interpolation)[0] for image in images]
        maps = [patch_tokens(model, accelerator, image) for image in scaled]
        for row, colours, tokens in zip(rows, pca_colours(maps), maps, strict=True):
            y, x = (
                min(side - 1, side * share // 100)
                for side, share in zip(tokens.shape[1:], patch_percent, strict=True)
            )
            row += [(_enlarged(picture), "") for picture in (colours, similarity(tokens, y, x))]
        titles += [f"{name}: components", f"{name}: likeness"]
    return contact_sheet(rows, titles=titles, tile_width=TILE)


def _protocol(size: int) -> ProtocolConfig:
    """Whole images of that short side."""
    return ProtocolConfig(
        normalization="imagenet", image_size=size, crop_size=size, window_size=size, window_stride=size
    )


def _enlarged(picture: np.ndarray) -> np.ndarray:
    """Patches stay squares."""
    width = max(TILE, picture.shape[1])
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST))


def draw_files(
    init: Path | str, files: Sequence[Path], features: FeaturesConfig, config: EncoderConfig,
    accelerator: Accelerator,
) -> None:  # fmt: skip
    """The sheet of some image files. Raises ValueError before anything is written."""
    check_output_file(features.out, "--out", reads=files, is_own=is_marked(KIND), makes_folder=True)
    if features.out.suffix != ".png":
        raise ValueError(f"--out {features.out}: give a name that ends in .png")
    images, protocol = [read_image(path) for path in files], _protocol(features.size)
    named = [("before", features.before), ("after", init)] if features.before else [("encoder", init)]
    models = [
        (name, start_model(one, config, protocol, 2).to(accelerator.device)) for name, one in named if one
    ]
    sheet = draw_features(models, accelerator, images, features.size, features.patch)
    features.out.parent.mkdir(parents=True, exist_ok=True)
    save_png(sheet, features.out, KIND)


def draw_some(model: Segmenter, accelerator: Accelerator, images: WholeImages, path: Path) -> None:
    """The sheet that a probe leaves: of a few images, evenly spread."""
    found, unreadable = list[np.ndarray](), Unreadable()
    for pair in evenly_spread(images.pairs, SHEET_IMAGES):
        try:
            found.append(read_image(pair.image))
        except ValueError as error:  # scoring names it
            unreadable.note([str(error)])
    if found:
        save_png(
            draw_features([("tokens", model)], accelerator, found, images.protocol.image_size), path, KIND
        )
