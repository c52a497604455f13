"""Segments of images, in whatever form they are kept; see `open_segments`."""

import os
from pathlib import Path

from mae.segments.forms import EMPTY_LIST, JsonFolder, SegmentFolder, SegmentSource
from mae.segments.pngs import METADATA, TABLE, PngMetadataFolder, PngTableFolder
from mae.segments.segment import Segment
from mae.segments.store import STORE_NAME, PackedStore

__all__ = ["Segment", "SegmentSource", "open_segments"]


def open_segments(masks_dir: Path) -> SegmentSource:
    """Open a packed store, or a folder of segments in whatever form.

    A folder that holds `masks.sqlite` is read from there. Raises ValueError, in one line, if there
    are no segments, or the store is damaged.
    """
    if masks_dir.is_file():
        return PackedStore(masks_dir)
    if not masks_dir.is_dir():
        raise ValueError(f"{masks_dir} is neither a folder of segments nor a packed store")
    if (masks_dir / STORE_NAME).is_file():
        return PackedStore(masks_dir / STORE_NAME)
    return open_folder(masks_dir)


def open_folder(root: Path) -> SegmentSource:
    """Find out in which form a folder keeps its segments as files. Raises ValueError if in none."""
    form = _form_of(root)
    if form is None:
        raise ValueError(
            f"{root} holds no segments: expected {STORE_NAME}, or per image a .json, "
            f"a folder with {METADATA} or a folder with {TABLE}"
        )
    return form(root, (root / EMPTY_LIST, root.parent / "train" / EMPTY_LIST))


def _form_of(root: Path) -> type[SegmentFolder] | None:
    """By the first file that tells; a whole walk could take minutes."""
    for _, _, names in os.walk(root, followlinks=True):
        if TABLE in names:
            return PngTableFolder
        if METADATA in names:
            return PngMetadataFolder
        if any(name.endswith(JsonFolder.suffix) and name[0] != "." for name in names):
            return JsonFolder
    return None
