"""Reconstructions and predictions for the report, small and inline, side by side by epoch."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import layout
from pipeline.layout import BASELINES, Layout
from pipeline.settings import METHODS

_WIDTH = 1000  # pixels at most
_QUALITY = 80  # of the WebP


def picture_sections(all_paths: Sequence[Layout]) -> list[dict[str, Any]]:
    """Two sections, of groups by epoch, of one picture per run; empty ones are left out."""
    reconstructions: dict[int, list[dict[str, str]]] = {}
    predictions: dict[int, list[dict[str, str]]] = {}
    for paths in all_paths:
        suffix = "" if len(all_paths) == 1 else f" ({paths.root.name})"
        images = paths.pretrain_output.glob("*/reconstructions-*.png")
        for image in sorted(images, key=lambda path: _rank(path.parent.name)):
            epochs = layout.reconstructions_epochs(image)
            if epochs is not None:
                label = image.parent.name + suffix
                _add(reconstructions, epochs, image, label, "Reconstructions of")
        for folder in sorted(paths.eval_output.glob("*/"), key=lambda path: _rank(path.name)):
            image = layout.predictions(folder)
            try:
                run, epochs = layout.parse_eval_name(folder.name)
            except ValueError:
                continue
            if image.exists():
                _add(predictions, epochs, image, f"{run}{suffix}", "Predictions of")
    sections = [
        ("Reconstructions", "What pretraining makes of hidden parts, by epochs completed.",
         reconstructions),
        ("Predictions", "Validation images after finetuning, by epochs of pretraining completed.",
         predictions),
    ]  # fmt: skip
    return [
        {
            "title": title,
            "caption": caption,
            "groups": [
                {"title": _epochs_text(epochs), "pictures": groups[epochs]}
                for epochs in sorted(groups)
            ],
        }
        for title, caption, groups in sections
        if groups
    ]


def _rank(name: str) -> tuple[int, str]:
    """Baselines first, then the methods in their usual order."""
    order = (*BASELINES, *METHODS)
    rank = next((i for i, method in enumerate(order) if name.startswith(method)), len(order))
    return rank, name


def _add(
    groups: dict[int, list[dict[str, str]]], epochs: int, image: Path, label: str, what: str
) -> None:
    source = data_uri(image)
    if source:
        alt = f"{what} {label} {_epochs_text(epochs)}"
        groups.setdefault(epochs, []).append({"source": source, "alt": alt, "label": label})


def _epochs_text(epochs: int) -> str:
    return {0: "before pretraining", 1: "after 1 epoch"}.get(epochs, f"after {epochs} epochs")


def data_uri(path: Path) -> str:
    """The image, no wider than the report needs, as text for an src attribute.

    Empty for an image that cannot be read: it may just be written by a running step.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except OSError:
        return ""
    if picture.width > _WIDTH:
        height = round(picture.height * _WIDTH / picture.width)
        picture = picture.resize((_WIDTH, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
