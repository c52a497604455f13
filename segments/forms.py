"""In which form segments are kept is found by looking; training reads the packed store only."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from common.folders import walk
from segments.folders import JsonFolder, PngMetadataFolder, PngTableFolder, SegmentFolder
from segments.store import STORE_NAME, PackedStore

SegmentSource = PackedStore | SegmentFolder


def form_of(path: Path) -> str:
    """What the segments at a path are kept as, "none" if there are none; raises nothing."""
    if os.path.isfile(_store_path(path)):  # noqa: PTH113  (Path's raises where it may not look)
        return PackedStore.name
    with suppress(ValueError):  # whoever opens them will say why
        form = _folder_form(path)
        return form.name if form else "none"
    return "none"


def open_segments(path: Path) -> PackedStore:
    """Open a packed store, given as a file or by the folder that holds masks.sqlite.

    Raises ValueError if the store is damaged, or the segments are kept in another form.
    """
    source = open_any_form(path)
    if isinstance(source, PackedStore):
        return source
    raise ValueError(
        f"{path} holds segments as {source.name}, and training reads a packed store only; make it "
        f"by `python -m mae masks pack {path}`"
    )


def open_any_form(path: Path) -> SegmentSource:
    """Open segments to look at or check them. Raises ValueError if there are none."""
    store = _store_path(path)
    return PackedStore(store) if store.is_file() else open_folder(path)


def open_folder(root: Path) -> SegmentFolder:
    """Open segments that are kept as files, to pack them. Raises ValueError if there are none."""
    form = _folder_form(root)
    if form is None:
        raise ValueError(
            f"{root} is no folder of segments: expected {STORE_NAME}, or per image a .json, "
            f"a folder with {PngMetadataFolder.table} or a folder with {PngTableFolder.table}"
        )
    return form(root)


def _store_path(path: Path) -> Path:
    return path / STORE_NAME if os.path.isdir(path) else path  # noqa: PTH112  (as above)


def _folder_form(root: Path) -> type[SegmentFolder] | None:
    """By the first file that tells; a whole walk could take minutes."""
    if not os.path.isdir(root):  # noqa: PTH112
        return None
    for _, entries in walk(root):
        names = [entry.name for entry in entries]
        for form in (PngTableFolder, PngMetadataFolder):
            if form.table in names:
                return form
        if any(name.endswith(JsonFolder.suffix) and name[0] != "." for name in names):
            return JsonFolder
    return None
