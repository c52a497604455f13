"""Looking at the segments of a dataset: numbers, one picture, one page that needs no network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.images import read_rgb
from mae.segments.forms import SegmentSource
from mae.segments.segment import Segment, nearest
from mae.segments.statistics import Statistics, describe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#1f6fb2", "#d1701f", "#2e8b57", "#8a4fa3", "#b03a48", "#5f6b76")
HIDDEN_COLOUR = np.array([235, 30, 140], np.float32)
THUMBNAIL = 240
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;
color:#222}img{max-width:100%}td{padding:.2em 1em .2em 0;vertical-align:top}code{background:#eee}"""


def write_pictures(
    statistics: Statistics,
    source: SegmentSource,
    images: dict[str, Path],
    *,
    ratios: Sequence[float],
    title: str,
    out: Path,
    rows: int,
) -> tuple[Path, Path]:
    """Write `<out>.png` and `<out>.html`; `images` are the files by key, perhaps not all."""
    known = [key for key in statistics.keys if key in images]
    shown = [known[i * len(known) // rows] for i in range(rows)] if len(known) > rows else known
    figure = draw(statistics, source, {key: images[key] for key in shown}, ratios, title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100, facecolor="white")
    png, page = out.with_name(f"{out.name}.png"), out.with_name(f"{out.name}.html")
    png.write_bytes(picture.getvalue())
    page.write_text(_page(statistics, ratios, title, picture.getvalue()), encoding="utf-8")
    return png, page


def draw(
    statistics: Statistics,
    source: SegmentSource,
    images: dict[str, Path],
    ratios: Sequence[float],
    title: str,
) -> Figure:
    """Three charts above a contact sheet: each image, and what each coverage would hide of it."""
    from matplotlib.figure import Figure

    columns = 1 + len(ratios)
    charts_height, row_height = 3.8, 2.05
    height = charts_height + 0.9 + row_height * len(images) + (0.6 if images else 0)
    figure = Figure(figsize=(max(12.0, 2.4 * columns), height), layout="constrained")
    figure.suptitle(title, fontsize=14)
    heights = [charts_height, row_height * len(images) + 0.6] if images else [charts_height]
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    charts = parts[0].subplots(1, 3)
    _draw_numbers(charts[0], statistics)
    _draw_coverages(charts[1], statistics, ratios)
    _draw_distances(charts[2], statistics, ratios)
    if images:
        parts[1].suptitle("What --hide segment hides (pink) at each --coverage-ratio", fontsize=12)
        axes = parts[1].subplots(len(images), columns, squeeze=False)
        for row, (key, path) in zip(axes, images.items(), strict=True):
            _draw_row(row, source, key, path, ratios)
    return figure


def _draw_numbers(axes: Any, statistics: Statistics) -> None:
    numbers = statistics.segments_per_image
    step = numbers.max() // 30 + 1
    axes.hist(numbers, bins=np.arange(0.5, numbers.max() + step + 1, step), color=COLOURS[0])
    axes.set(xlabel="segments of an image", ylabel="images", xlim=(0, numbers.max() + step))
    axes.set_title(f"{len(statistics.without)} more images are known to have none", fontsize=10)


def _draw_coverages(axes: Any, statistics: Statistics, ratios: Sequence[float]) -> None:
    axes.hist(np.concatenate(statistics.coverages), bins=np.arange(0, 101, 2), color=COLOURS[0])
    axes.set(xlabel="coverage, % of the image", ylabel="segments", yscale="log", xlim=(0, 100))
    for index, ratio in enumerate(ratios):
        axes.axvline(ratio, color=_colour(index + 1), linestyle="--", linewidth=1.5)
    axes.set_title("dashed: the coverage ratios asked for", fontsize=10)


def _draw_distances(axes: Any, statistics: Statistics, ratios: Sequence[float]) -> None:
    share = np.linspace(0, 100, len(statistics.coverages) + 1)[1:]
    for index, ratio in enumerate(ratios):
        distances = np.sort(statistics.distances(ratio))
        axes.plot(distances, share, color=_colour(index + 1), label=f"{ratio:g} %", linewidth=2)
    axes.set(
        xlabel="distance to the nearest segment, points",
        ylabel="% of images within it",
        xlim=(0, 30),
        ylim=(0, 101),
    )
    axes.grid(alpha=0.3)
    axes.legend(title="coverage ratio", fontsize=9)


def _draw_row(
    row: Any, source: SegmentSource, key: str, path: Path, ratios: Sequence[float]
) -> None:
    for axes in row:
        axes.set_axis_off()
    try:
        image = read_rgb(path)
        segments = source.segments(key)
    except ValueError as error:
        row[0].set_title(f"unreadable: {error}", fontsize=8)
        return
    row[0].imshow(_thumbnail(image))
    row[0].set_title(path.name, fontsize=8)
    for axes, ratio in zip(row[1:], ratios, strict=True):
        segment = nearest(segments, ratio)
        if segment is None or segment.decode().shape != image.shape[:2]:
            axes.set_title(f"{ratio:g} %: does not fit the image", fontsize=8, color="red")
            continue
        axes.imshow(_thumbnail(_hide(image, segment)))
        axes.set_title(f"{ratio:g} % asked: {segment.coverage_percent:.1f} % hidden", fontsize=8)


def _hide(image: np.ndarray, segment: Segment) -> np.ndarray:
    """Tint the segment; what it hides can still be guessed."""
    inside = segment.decode()[..., None].astype(np.float32)
    return (image * (1 - 0.75 * inside) + HIDDEN_COLOUR * 0.75 * inside).astype(np.uint8)


def _thumbnail(image: np.ndarray) -> np.ndarray:
    step = max(1, max(image.shape) // THUMBNAIL)
    return image[::step, ::step]


def _colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _page(statistics: Statistics, ratios: Sequence[float], title: str, png: bytes) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(what)}</td><td>{html.escape(value)}</td></tr>"
        for what, value in describe(statistics, ratios)
    )
    picture = base64.b64encode(png).decode()
    lists = _list("Images known to have no segment", statistics.without)
    lists += _list("Damaged", statistics.damaged)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style>'
        f"<h1>{html.escape(title)}</h1><table>{rows}</table>"
        f'<img alt="charts and a contact sheet" src="data:image/png;base64,{picture}">'
        f"{lists}</html>"
    )


def _list(title: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    items = "".join(f"<li>{html.escape(name)}</li>" for name in names[:1000])
    more = f"<p>... and {len(names) - 1000} more</p>" if len(names) > 1000 else ""
    return f"<h2>{title}: {len(names)}</h2><ul>{items}</ul>{more}"
