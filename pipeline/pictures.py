"""Reconstructions and predictions for the report, small and inline, side by side by epoch."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common.layout import PREDICTIONS, epochs_of
from pipeline.layout import Layout, Run, parse_eval_name
from pipeline.results import method_rank

_WIDTH = 1000  # pixels at most
_QUALITY = 80  # of the WebP


def picture_sections(all_paths: Sequence[Layout]) -> list[dict[str, Any]]:
    """Two sections, of groups by epoch, of one picture per run; empty ones are left out."""
    reconstructions: dict[int, list[dict[str, str]]] = {}
    predictions: dict[int, list[dict[str, str]]] = {}
    rank = method_rank(all_paths)
    for paths in all_paths:
        suffix = "" if len(all_paths) == 1 else f" ({paths.root.name})"
        for run, folder in _by_run(paths.pretrain_output, lambda name: name, rank):
            for image in folder.glob("reconstructions-*.png"):
                epochs = epochs_of(image)
                if epochs is not None:
                    _add(reconstructions, epochs, image, f"{run}{suffix}", "Reconstructions of")
        for run, folder in _by_run(paths.eval_output, lambda name: parse_eval_name(name)[0], rank):
            _, epochs, number = parse_eval_name(folder.name)
            image = folder / PREDICTIONS
            if image.exists() and not number:  # one finetuning of each checkpoint is enough
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


def _by_run(
    parent: Path, run_of: Callable[[str], str], rank: Callable[[str], tuple[int, str]]
) -> list[tuple[str, Path]]:
    """Run and folder of those below `parent` that are named after a run, in the methods' order."""
    found = []
    for folder in parent.glob("*/"):
        with contextlib.suppress(ValueError):
            run = run_of(folder.name)
            found.append((rank(Run.parse(run).method), run, folder))
    return [(run, folder) for _, run, folder in sorted(found)]


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
