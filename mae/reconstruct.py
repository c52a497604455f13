"""Pictures of what a model reconstructs.

reconstruct_files(Path("OUT/checkpoint-50.pth"), [photo], out=Path("a.png"), masks_dir=None)
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.contact_sheet import contact_sheet, save_png
from common.files import check_output_file, is_marked
from common.images import locate_image
from engine.checkpoint import load_weights
from mae.config import MethodConfig, ModelConfig, OptimisationConfig, make_method, parse_group
from mae.controls import SegmentSource
from mae.crops import centre_crop, read_crop
from mae.listing import check_donors, encode_paths
from mae.model import MaskedAutoencoder
from mae.weights import check_fixed_set, load_checkpoint
from segments.forms import open_segments
from segments.store import PackedStore

COLUMNS = ("original", "seen", "predicted", "pasted in")
SMALLEST_TILE, LARGEST_TILE = 120, 224  # pixels: one sheet is made in every round
FIXED_SET_SIZE = 8
KIND = "reconstructions"


def reconstruct_files(
    checkpoint_path: Path, images: Sequence[Path], *, out: Path, masks_dir: Path | None
) -> None:
    """Draw what a checkpoint reconstructs of given images, or of its fixed set if there are none.

    An image of its own segments needs `masks_dir`; else it takes one of the fixed set's patterns.
    Raises ValueError if a file cannot be used.
    """
    reads = [path for path in (checkpoint_path, *images, masks_dir) if path]
    check_output_file(out, reads=reads, is_own=is_marked(KIND))
    checkpoint = load_checkpoint(checkpoint_path)
    model = load_model(checkpoint, checkpoint_path)
    check_fixed_set(checkpoint, checkpoint_path)
    fixed_set = checkpoint["fixed_set"]
    if images:
        patterns, segments = fixed_set["pattern"], None
        if masks_dir and model.method.uses_segments:
            options = parse_group(MethodConfig, checkpoint["config"], checkpoint_path)
            store = open_segments(masks_dir)
            # Any image that has segments lends them; any suffix will do: they are paths.
            donors = [f"{key}.jpg" for key in sorted(store.images())]
            if options.segments_from == "borrowed":
                check_donors(donors)
            seed = parse_group(OptimisationConfig, checkpoint["config"], checkpoint_path).seed
            segments = SegmentSource(store=store, donors=encode_paths(donors), options=options, seed=seed)
        pairs = [_hide(model, path, n, patterns, segments) for n, path in enumerate(images)]
        pixels, patterns = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
        fixed_set = {"images": pixels, "pattern": patterns}
    draw_reconstructions(model, fixed_set, out)


def draw_reconstructions(model: MaskedAutoencoder, fixed_set: Mapping[str, Tensor], path: Path) -> None:
    """Write one row per image: original, seen, predicted, and predicted pasted where hidden.

    fixed_set: images [B, 3, H, W] uint8, and the pattern [B, ...] that hides each.
    """
    device, was_training = model.mean.device, model.training
    model.eval()
    pattern = fixed_set["pattern"].to(device)
    images = model.normalise(fixed_set["images"].to(device))
    both = images, model.reconstruct(images, pattern)  # [B, 3, H, W]
    model.train(was_training)
    # From normalised pixels to colours, 0 to 1.
    original, predicted = ((x.float() * model.std + model.mean).clamp(0, 1) for x in both)
    is_visible = model.method.visible_map(pattern) > 0  # [B, 1, H, W]
    # What is hidden is 0 after normalising: the mean colour.
    seen = torch.where(is_visible, original, model.mean)
    pasted = torch.where(is_visible, original, predicted)
    pictures = torch.stack([original, seen, predicted, pasted], dim=1)  # [B, 4, 3, H, W]
    pixels = (pictures * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).cpu().numpy()
    rows = [[(picture, "") for picture in row] for row in pixels]
    width = min(max(original.shape[-1], SMALLEST_TILE), LARGEST_TILE)
    save_png(contact_sheet(rows, titles=COLUMNS, tile_width=width), path, KIND)


def load_model(checkpoint: dict[str, Any], path: Path) -> MaskedAutoencoder:
    """The whole model of the checkpoint at `path`, ready to reconstruct. Raises ValueError."""
    method = parse_group(MethodConfig, checkpoint["config"], path)
    model_config = parse_group(ModelConfig, checkpoint["config"], path)
    model = MaskedAutoencoder(model_config, make_method(method, model_config))
    load_weights(model, checkpoint["model"], path)
    return model.eval()


def _hide(
    model: MaskedAutoencoder, path: Path, number: int, patterns: Tensor, segments: SegmentSource | None
) -> tuple[Tensor, Tensor]:
    """Centre crop of an image file, and its segment's pattern, or the fixed set's in turn."""
    try:
        image = read_crop(locate_image(path), centre_crop, model.config.image_size)
        if segments is None:
            return image.pixels, patterns[number % len(patterns)]
        key, rng = _key_of(path, segments.store), np.random.default_rng(number)
        segment = segments.cut(model.method, key, image, rng)
        return image.pixels, torch.from_numpy(model.method.pattern(rng, segment))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _key_of(path: Path, store: PackedStore) -> str:
    """What segments know an image by, from the end of its path: val/class/stem to stem."""
    parts = path.absolute().with_suffix("").parts
    for count in (3, 2, 1):
        key = "/".join(parts[-count:])
        if store.nearest(key, 0) is not None:
            return key
    raise ValueError("--masks-dir has no segment of it")
