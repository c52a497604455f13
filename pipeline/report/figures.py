"""Line charts as matplotlib's SVG, and the runs' own pictures, both inline in the page.

    line_chart({"epochs": [Series(label="patches", points=points, style=(0, 0))]}, "Loss.",
               y_title="loss")

A scaled picture scales its text, so a chart is drawn once for a phone and, where it may take a
desk's full width, once for that; the page's style shows one of them. Colours are Okabe and Ito's,
which colour-blind readers can tell apart; lines also differ in dashes and markers, for print
without colour.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from markupsafe import Markup

from common.step_files import PREDICTIONS, epochs_of
from pipeline.plan.layout import Layout, Run, parse_eval_name
from pipeline.report.scores import method_rank
from pipeline.report.statistics import Interval

if TYPE_CHECKING:  # matplotlib takes a second to load, and benchmark.py imports this file
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Width and height of a drawing in CSS pixels: a phone's, which is also a column's, and a desk's.
NARROW, WIDE = (350, 300), (880, 310)
_MARGINS = (54, 16, 44, 34)  # pixels left, right, below and above the axes
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a6761d", "#56b4e9", "#666666", "#000000")
_DASHES = ("-", (0, (7, 3)), (0, (2, 3)), (0, (9, 3, 2, 3)))
_MARKERS = {"o": 9.0, "s": 8.0, "^": 10.0, "D": 8.0}  # shape: pixels
_MOST_MARKERS = 40  # of a line; longer ones are lines only
_PICTURE_WIDTH = 1000  # pixels at most
_QUALITY = 80  # of the WebP
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, in the page's font
    "text.parse_math": False,  # a $ in a name is a $
    "font.size": 13,
    "axes.axisbelow": True,  # the grid and the ticks come first, see _svg
    "axes.edgecolor": "#555555",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": "#e4e4e4",
    "xtick.color": "#555555",
    "xtick.labelcolor": "black",  # the page's style colours text
    "xtick.major.size": 5,
    "ytick.major.size": 0,
    "ytick.major.pad": 8,
    "lines.linewidth": 2.2,
    "lines.markeredgewidth": 0,
    "lines.solid_capstyle": "butt",
    "lines.scale_dashes": False,  # dashes in pixels
    "path.simplify_threshold": 0.5,  # pixels by which a long line may be off
}
_LONG_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_METADATA = ("Date", "Creator", "Format", "Type")  # of an SVG file, all left out


@dataclass(frozen=True, kw_only=True)
class Point:
    """A point of a line with its spread, all in the axes' units."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    label: str
    points: Sequence[Point]
    # Chooses colour, and with it dashes and marker; the same looks the same in every chart.
    style: tuple[int, int]


def line_chart(
    views: Mapping[str, Sequence[Series]],
    caption: str,
    *,
    y_title: str,
    least_span: float = 0.0,
    limits: tuple[float, float] = (-math.inf, math.inf),
    sizes: Sequence[tuple[int, int]] = (NARROW,),
) -> Markup:
    """A figure of HTML: the lines over common axes; empty where no line has a point.

    views: x axis's title -> the lines over it; of several, the reader chooses one by a switch that
    works without script. least_span: of the y axis, so that noise is not blown up. limits: of y.
    """
    import matplotlib as mpl

    views = {title: [s for s in series if s.points] for title, series in views.items()}
    views = {title: series for title, series in views.items() if series}
    # Ids hold for a whole page of charts, so each starts with a name of its caption's.
    name, switch, parts = f"x{zlib.crc32(caption.encode())}", Markup(), Markup()
    with mpl.rc_context(_STYLE):
        for index, (title, series) in enumerate(views.items()):
            if len(views) > 1:
                switch += Markup(
                    '<input type="radio" name="{0}" id="{0}-{1}" class="x{1}"{2}>'
                    '<label for="{0}-{1}">{3}</label>'
                ).format(name, index, "" if index else Markup(" checked"), title)
            y_ticks = _y_ticks(series, least_span, limits)
            drawn = Markup().join(
                _plot(series, title, y_title, y_ticks, size, f"{name}-{index}", caption)
                for size in sorted(sizes, reverse=True)  # the style hides what follows a wide one
            )
            parts += Markup('<div class="plot{}">{}</div>').format(index, drawn)
        styles = {line.label: line.style for series in views.values() for line in series}
        legend = Markup().join(  # several seeds: one entry
            Markup("<li>{}{}</li>").format(_sample(style, name), label)
            for label, style in styles.items()
        )
    if not parts:
        return Markup()
    return Markup(
        '<figure>{}<ul class="legend">{}</ul>{}<figcaption>{}</figcaption></figure>'
    ).format(switch, legend, parts, caption)


def ticks(values: Sequence[float], *, whole: bool = False) -> list[float]:
    """At most 7 round numbers, evenly spaced, around the finite ones of the values."""
    from matplotlib.ticker import MaxNLocator

    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = max(abs(high) * 0.1, 1.0 if whole else 1e-6)
        low, high = low - margin, high + margin
    locator = MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=whole)
    return [float(value) for value in locator.tick_values(low, high)]


def _y_ticks(
    series: Sequence[Series], least_span: float, limits: tuple[float, float]
) -> list[float]:
    points = [point for line in series for point in line.points]
    ends = [end for p in points for end in (p.y, p.low, p.high) if end is not None]
    ends = [min(max(end, limits[0]), limits[1]) for end in ends if math.isfinite(end)]
    missing = least_span - (max(ends) - min(ends)) if ends else 0.0
    if missing > 0:
        low = max(limits[0], min(min(ends) - missing / 2, limits[1] - least_span))
        ends += [low, low + least_span]
    return ticks(ends)


def _plot(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    y_ticks: Sequence[float],
    size: tuple[int, int],
    name: str,
    said: str,
) -> Markup:
    from matplotlib.figure import Figure  # never pyplot, whose figures are global state

    width, height = size
    left, right, below, above = _MARGINS
    # At 72 dots per inch a point, matplotlib's unit of text and lines, is a CSS pixel.
    figure = Figure((width / 72, height / 72), dpi=72, frameon=False)
    axes = figure.add_axes(
        (left / width, below / height, 1 - (left + right) / width, 1 - (below + above) / height)
    )
    axes.patch.set_visible(False)
    axes.grid(axis="y", clip_on=False)  # a clip path would have to be named
    x_values = [point.x for line in series for point in line.points]
    x_ticks = ticks(x_values, whole=x_title.startswith("epochs"))
    for axis, places in ((axes.xaxis, x_ticks), (axes.yaxis, y_ticks)):
        axis.set_ticks(places, [f"{place:g}" for place in places])
    axes.set(xlim=(x_ticks[0], x_ticks[-1]), ylim=(y_ticks[0], y_ticks[-1]), xlabel=x_title)
    figure.text(6 / width, 1 - 6 / height, y_title, va="top")
    # Bars at the same place stand beside each other.
    has_bars = any(point.low is not None for line in series for point in line.points)
    step, titles = min(4.0, 24 / len(series)) if has_bars else 0.0, []
    for index, line in enumerate(series):
        titles += _draw(line, axes, step * (index - (len(series) - 1) / 2))
    look = "narrow" if size == NARROW else "wide"
    attributes = {"class": f"plot {look}", "role": "img", "aria-label": said}
    return _svg(figure, f"{name}-{look}", attributes, titles)


def _draw(line: Series, axes: Axes, beside: float) -> list[str]:
    """Draws a line with its bars, `beside` pixels to the right; returns its markers' titles."""
    from matplotlib.transforms import ScaledTranslation

    points = [point for point in line.points if math.isfinite(point.y)]
    low, high = axes.get_ylim()
    shift = ScaledTranslation(beside / 72, 0, axes.figure.dpi_scale_trans)
    # What lies beyond the axis is drawn at its end, and no marker is cut in two there.
    common: dict[str, Any] = {"transform": axes.transData + shift, "clip_on": False}
    look = _look(line.style)
    if len(points) > _MOST_MARKERS:
        look["marker"] = "None"
    within = [min(max(point.y, low), high) for point in points]
    bars = [(p.x, min(max(y, low), high)) for p in points if p.low is not None and p.high is not None
            for y in (p.low, p.high, math.nan)]  # fmt: skip
    if bars and look["marker"] != "None":
        axes.plot(*zip(*bars, strict=True), color=look["color"], **common)
    axes.plot([point.x for point in points], within, **look, **common)
    if look["marker"] == "None":
        return []
    return [f"{line.label}: {point.y:.4g} at {point.x:g}" for point in points]


def _look(style: tuple[int, int]) -> dict[str, Any]:
    """Of a line. A ninth family has the first one's colour, with other dashes."""
    family, variant = style
    again, color = divmod(family, len(_COLORS))
    shape = (color + again + variant) % len(_DASHES)
    marker, pixels = list(_MARKERS.items())[shape]
    return {
        "color": _COLORS[color], "linestyle": _DASHES[shape], "marker": marker,
        "markersize": pixels,
    }  # fmt: skip


def _sample(style: tuple[int, int], name: str) -> Markup:
    """A piece of a line, for the legend."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure((40 / 72, 14 / 72), dpi=72, frameon=False)
    line = Line2D((0.05, 0.5, 0.95), (0.5, 0.5, 0.5), markevery=[1], **_look(style))
    figure.add_artist(line)
    attributes = {"width": "40", "height": "14", "aria-hidden": "true"}
    return _svg(figure, f"{name}-{style[0]}-{style[1]}", attributes)


def _svg(
    figure: Figure, name: str, attributes: Mapping[str, str], titles: Sequence[str] = ()
) -> Markup:
    """matplotlib's file as an element of the page, with `attributes`, and a third of its size.

    name: unique in the page. titles: of the markers; a browser shows what is pointed at.
    """
    import matplotlib as mpl

    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # ids of markers are hashes of it
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(_METADATA))
    root = ElementTree.fromstring(stream.getvalue())
    root.remove(root[0])  # a <style> that would hold for the whole page
    for element in root.iter():
        # HTML knows SVG without namespaces.
        element.tag = element.tag.rpartition("}")[2]
        kept = {key.rpartition("}")[2]: value for key, value in element.items()}
        if element.tag == "g":
            kept.pop("id", None)  # figure_1 in every figure, and nothing refers to it
        elif element.tag == "text":  # the page chooses the font, and nothing is rotated
            kept["style"] = kept["style"].rpartition("; ")[2]
            del kept["transform"]
        element.attrib = {
            key: _LONG_NUMBER.sub(_rounded, " ".join(value.split())) for key, value in kept.items()
        }
        element.text, element.tail = (element.text or "").strip(), None
    root.attrib = {"viewBox": root.attrib["viewBox"], **attributes}
    # Ticks are drawn as markers, too, but before the lines.
    markers = list(root.iter("use"))
    for marker, title in zip(markers[len(markers) - len(titles) :], titles, strict=True):
        ElementTree.SubElement(marker, "title").text = title
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _rounded(number: re.Match[str]) -> str:
    """To a tenth of a pixel."""
    return f"{float(number[0]):.1f}".removesuffix(".0")


def interval_bar(found: Interval, widest: float) -> Markup:
    """A bar around 0 as wide as its cell of a table, whose ends are -widest and widest."""
    low, value, high = (50 + 50 * end / widest for end in (found.low, found.value, found.high))
    return Markup(
        '<svg class="bar" aria-hidden="true"><line class="zero" x1="50%" x2="50%" y1="0" y2="14"/>'
        f'<line class="span" x1="{low:.1f}%" x2="{high:.1f}%" y1="7" y2="7"/>'
        f'<circle cx="{value:.1f}%" cy="7" r="5"/></svg>'
    )


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
                find(paths), key=lambda found: (rank(Run.parse(found[0]).method), found)
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
            if epochs is not None and Run.parse(run):
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
    if picture.width > _PICTURE_WIDTH:
        height = round(picture.height * _PICTURE_WIDTH / picture.width)
        picture = picture.resize((_PICTURE_WIDTH, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=_QUALITY)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
