"""Reconstructions and predictions for the report, small and inline, side by side by epoch."""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.step_files import PREDICTIONS, epochs_of
from pipeline.plan.layout import Layout, RunId, parse_eval_name
from pipeline.report.results import method_rank

_WIDTH = 1000  # pixels at most
_QUALITY = 80  # of the WebP


def picture_sections(all_paths: Sequence[Layout]) -> list[dict[str, Any]]:
    """Two sections, of groups by epoch, of one picture per run; empty ones are left out."""
    rank, sections = method_rank(all_paths), []
    for title, caption, find in (
        ("Reconstructions", "What pretraining makes of hidden parts, by epochs completed.",
         _reconstructions),
        ("Predictions", "Validation images after finetuning, by epochs of pretraining completed.",
         _predictions),
    ):  # fmt: skip
        groups: dict[int, list[dict[str, str]]] = {}
        for paths in all_paths:
            suffix = "" if len(all_paths) == 1 else f" ({paths.root.name})"
            for run, epochs, image in sorted(
                find(paths), key=lambda found: (rank(RunId.parse(found[0]).method), found)
            ):
                source, label = _data_uri(image), f"{run}{suffix}"
                alt = f"{title} of {label} {_epochs_text(epochs)}"
                if source:
                    picture = {"source": source, "alt": alt, "label": label}
                    groups.setdefault(epochs, []).append(picture)
        pictures = [{"title": _epochs_text(n), "pictures": groups[n]} for n in sorted(groups)]
        sections += [{"title": title, "caption": caption, "groups": pictures}] if groups else []
    return sections


def _reconstructions(paths: Layout) -> Iterator[tuple[str, int, Path]]:
    """Run, epochs completed and picture; other folders and files are passed over."""
    for image in paths.pretrain_output.glob("*/*.png"):
        run, epochs = image.parent.name, epochs_of(image)
        with contextlib.suppress(ValueError):
            if epochs is not None and RunId.parse(run):
                yield run, epochs, image


def _predictions(paths: Layout) -> Iterator[tuple[str, int, Path]]:
    """The same of the first finetuning of each checkpoint."""
    for image in paths.eval_output.glob(f"*/{PREDICTIONS}"):
        with contextlib.suppress(ValueError):
            run, epochs, number = parse_eval_name(image.parent.name)
            if not number:
                yield run, epochs, image


def _epochs_text(epochs: int) -> str:
    return {0: "before pretraining", 1: "after 1 epoch"}.get(epochs, f"after {epochs} epochs")


def _data_uri(path: Path) -> str:
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
