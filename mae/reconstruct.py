"""Pictures of what a model reconstructs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from common.files import check_output_file, is_marked, mark, replacing
from engine.checkpoint import load_weights, read_torch_file
from mae.checkpoint import load_checkpoint
from mae.config import MethodConfig, make_method, parse_settings
from mae.controls import SegmentSource
from mae.data import Batch, Sample, collate, make_sample
from mae.decode import read_crop
from mae.listing import check_donors, encode_paths
from mae.model import MaskedAutoencoder
from mae.transforms import centre_crop
from segments.forms import open_segments
from segments.store import PackedStore

COLUMNS = ("original", "seen", "predicted", "pasted in")
FIXED_SET_SIZE = 8
KIND = "reconstructions"


def reconstruct_files(
    checkpoint_path: Path, images: Sequence[Path], *, out: Path, masks_dir: Path | None
) -> None:
    """Draw what a checkpoint reconstructs of given images, or of its fixed set if there are none.

    An image of its own segments needs `masks_dir`; else it takes one of the fixed set's patterns.
    Raises ValueError if a file cannot be used.
    """
    reads = [checkpoint_path, *images, *([masks_dir] if masks_dir else [])]
    check_output_file(out, reads=reads, is_own=is_marked(KIND))
    _refuse_encoder_only(checkpoint_path)
    checkpoint = load_checkpoint(checkpoint_path)
    model = load_model(checkpoint, checkpoint_path)
    batch = unpack_fixed_set(checkpoint["fixed_set"])
    if images:
        segments = None
        if masks_dir and model.method.uses_segments:
            options, _ = parse_settings(checkpoint["config"], checkpoint_path)
            segments = _open_source(masks_dir, options)
        batch = collate(
            [_sample(model, path, number, batch, segments) for number, path in enumerate(images)]
        )
    draw_reconstructions(model, batch, out)


def draw_reconstructions(model: MaskedAutoencoder, batch: Batch, path: Path) -> None:
    """Write one row per image: original, seen, predicted, and predicted pasted where hidden."""
    device = model.mean.device
    was_training = model.training
    model.eval()
    images = model.normalise(batch.images.to(device))
    result = model.reconstruct(images, batch.pattern.to(device))
    model.train(was_training)
    original, predicted = (_colours(model, pictures) for pictures in (images, result.predicted))
    visible = result.visible.cpu()
    seen = original * visible + model.mean.cpu() * (1 - visible)  # hidden is 0, the mean colour
    pasted = original * visible + predicted * (1 - visible)
    _save_grid([original, seen, predicted, pasted], path)


def pack_fixed_set(batch: Batch) -> dict[str, Tensor]:
    """Plain tensors for a checkpoint, so that it can draw its fixed set without the dataset."""
    return {"images": batch.images, "pattern": batch.pattern, "hidden_pixels": batch.hidden_pixels}


def unpack_fixed_set(stored: dict[str, Tensor]) -> Batch:
    """The inverse of `pack_fixed_set`."""
    return Batch(**stored, unreadable=[])


def load_model(checkpoint: dict[str, Any], path: Path) -> MaskedAutoencoder:
    """The whole model of the checkpoint at `path`, ready to reconstruct. Raises ValueError."""
    method, model_config = parse_settings(checkpoint["config"], path)
    model = MaskedAutoencoder(model_config, make_method(method, model_config))
    load_weights(model, checkpoint["model"], path)
    return model.eval()


def _refuse_encoder_only(path: Path) -> None:
    """Raise ValueError for files that have no decoder: exports, and most official checkpoints."""
    content = read_torch_file(path, lazily=True)
    weights = content.get("model", content) if isinstance(content, dict) else {}
    if "patch_embed.proj.weight" in weights and "decoder_pred.weight" not in weights:
        raise ValueError(
            f"{path} holds an encoder only; reconstructing needs the decoder of a checkpoint-N.pth"
        )


def _sample(
    model: MaskedAutoencoder,
    path: Path,
    number: int,
    fixed_set: Batch,
    segments: SegmentSource | None,
) -> Sample:
    """Centre crop of an image file, hidden by its segment or as one of the fixed set is."""
    size, row = model.config.image_size, number % len(fixed_set)
    try:
        image = read_crop(path, centre_crop, size)
        if segments is not None:
            key, rng = _key_of(path, segments.store), np.random.default_rng(number)
            segment = segments.cut(model.method, key, image, rng)
            return make_sample(model.method, image.pixels, rng, segment)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Sample(
        image=image.pixels,
        pattern=fixed_set.pattern[row].numpy(),
        hidden_pixels=int(fixed_set.hidden_pixels[row]),
    )


def _open_source(masks_dir: Path, options: MethodConfig) -> SegmentSource:
    """Segments of given images, which borrow from any image that has some."""
    store = open_segments(masks_dir)
    donors = [f"{key}.jpg" for key in sorted(store.images())]  # any suffix: they are paths
    if options.segments_from == "borrowed":
        check_donors(donors)
    return SegmentSource(store=store, donors=encode_paths(donors), options=options)


def _key_of(path: Path, store: PackedStore) -> str:
    """What segments know an image by, from the end of its path: val/class/stem to stem."""
    parts = path.absolute().with_suffix("").parts
    for count in (3, 2, 1):
        key = "/".join(parts[-count:])
        if store.nearest(key, 0) is not None:
            return key
    raise ValueError("--masks-dir has no segment of it")


def _colours(model: MaskedAutoencoder, normalised: Tensor) -> Tensor:
    """Normalised [B, C, H, W] to colours from 0 to 1 on the CPU."""
    return (normalised.float() * model.std + model.mean).clamp(0, 1).cpu()


def _save_grid(pictures: Sequence[Tensor], path: Path) -> None:
    rows, side = len(pictures[0]), pictures[0].shape[-1]
    inches = max(1.2, min(side, 224) / 100)
    figure = Figure(figsize=(inches * len(COLUMNS), inches * (rows + 0.25)), dpi=100)
    FigureCanvasAgg(figure)
    axes = np.atleast_2d(figure.subplots(rows, len(COLUMNS)))
    for column, (title, images) in enumerate(zip(COLUMNS, pictures, strict=True)):
        # Large enough to be read on a phone, where the four columns share 370 pixels.
        axes[0][column].set_title(title, fontsize=9.5 * inches)
        for row in range(rows):
            axes[row][column].imshow(images[row].permute(1, 2, 0).numpy(), interpolation="nearest")
            axes[row][column].axis("off")
    figure.tight_layout(pad=0.3)
    with replacing(path) as unfinished:
        figure.savefig(unfinished, format="png", metadata={"Software": mark(KIND)})
