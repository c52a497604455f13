"""Line charts as matplotlib's SVG, and the runs' own pictures, both inline in the page.

A scaled drawing scales its text, so a chart is drawn once for a phone and, where it may take a
desk's full width, once for that; the page shows one of them. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; lines also differ in dashes and markers, for print without
colour.
"""

import base64
import io
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # never pyplot, whose figures are global state
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import ScaledTranslation, nonsingular
from PIL import Image

from common.images import load_image
from common.step_files import FEATURES, PREDICTIONS, epochs_of
from pipeline.plan.layout import Layout, RunId, parse_eval_name
from pipeline.report.scores import method_rank, names_of

# Width and height of a drawing in CSS pixels: a phone's, which is also a column's, and a desk's.
_NARROW, _WIDE = (350, 300), (880, 310)
_LEFT, _RIGHT, _BELOW, _ABOVE = 54, 16, 44, 34  # pixels beside the axes
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a6761d", "#56b4e9", "#666666", "#000000")
_SHAPES = (  # dashes in pixels; marker and its size, by which all look equally large
    ("-", "o", 9), ((0, (7, 3)), "s", 8), ((0, (2, 3)), "^", 10), ((0, (9, 3, 2, 3)), "D", 8),
)  # fmt: skip
_MOST_MARKERS = 40  # of a line; longer ones are lines only
_NOISE = re.compile(
    r"<defs>\s*<style.*?</defs>"  # it would hold for the whole page
    r'|(?<=<g) id="[^"]*"'  # figure_1 in every figure; nothing refers to it
    r"|font-size[^>]*(?=text-anchor)"  # the page chooses the font
    r'| transform="rotate[^"]*"',  # of text, by nothing
    re.DOTALL,
)
_LONG_NUMBER = re.compile(r'(?<=[" ])-?\d+\.\d{2,}')  # of an attribute, not of a label


class Point(NamedTuple):
    """A point of a line with its interval, all in the axes' units."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


class Series(NamedTuple):
    """One line of a chart."""

    label: str
    points: Sequence[Point]
    style: tuple[int, int]  # family and variant: the same look in every chart, a family one colour


class Chart(NamedTuple):
    """What the page puts together; no view where there is nothing to show."""

    name: str  # unique in the page
    caption: str
    views: dict[str, Markup]  # x axis's title -> drawings, of which the page shows one
    legend: dict[str, Markup]  # label -> a piece of its line


def line_chart(
    views: Mapping[str, Sequence[Series]],
    caption: str,
    *,
    y_title: str,
    least_span: float = 0.0,
    limits: tuple[float, float] = (-math.inf, math.inf),
    is_wide: bool = False,
) -> Chart:
    """Draws lines over each x axis, whose title `views` has, as far as there are any.

    least_span: of the y axis, so that noise is not blown up. limits: of y.
    """
    chart = Chart(f"x{zlib.crc32(caption.encode())}", caption, {}, {})
    with mpl.rc_context(fname=Path(__file__).with_suffix(".mplstyle")):
        for title, every_line in views.items():
            series = [line for line in every_line if line.points]
            if not series:
                continue
            y_ticks, drawn = _y_ticks(series, least_span, limits), Markup()
            # The wide one first: the page hides the one that follows it.
            for look, size in (("wide", _WIDE), ("narrow", _NARROW))[not is_wide :]:
                figure = Figure((size[0] / 72, size[1] / 72))
                _plot(figure, series, title, y_title, y_ticks)
                attributes = f'class="plot {look}" role="img" aria-label="{escape(caption)}"'
                drawn += _svg(figure, f"{chart.name}{title}{look}", attributes)
            chart.views[title] = drawn
            for line in series:  # several seeds: one entry
                sample = Figure((40 / 72, 14 / 72))
                piece = {"markevery": [1], **_look(line.style)}
                sample.add_artist(Line2D((0.05, 0.5, 0.95), (0.5,) * 3, **piece))
                name, attributes = f"{chart.name}{line.style}", 'width="40" height="14"'
                chart.legend[line.label] = _svg(sample, name, f'{attributes} aria-hidden="true"')
    return chart


def ticks(values: Sequence[float], *, whole: bool = False) -> list[float]:
    """At most 7 round numbers, evenly spaced, around the values."""
    low, high = nonsingular(min(values), max(values), expander=0.1, tiny=1e-9)
    if whole:  # a single value has neighbours, too
        low, high = math.floor(low), math.ceil(high)
    locator = MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=whole)
    return [float(value) for value in locator.tick_values(low, high)]


def _y_ticks(series: Sequence[Series], least_span: float, limits: tuple[float, float]) -> list[float]:
    values = [value for line in series for point in line.points for value in point[1:]]
    ends = [min(max(end, limits[0]), limits[1]) for end in values if math.isfinite(end)]
    missing = least_span - (max(ends) - min(ends))
    if missing > 0:
        low = max(limits[0], min(min(ends) - missing / 2, limits[1] - least_span))
        ends += [low, low + least_span]
    return ticks(ends)


def _plot(
    figure: Figure, series: Sequence[Series], x_title: str, y_title: str, y_ticks: Sequence[float]
) -> None:
    """Draws axes and lines."""
    width, height = figure.get_size_inches() * 72
    inner = (1 - (_LEFT + _RIGHT) / width, 1 - (_BELOW + _ABOVE) / height)
    axes = figure.add_axes((_LEFT / width, _BELOW / height, *inner))
    x_values = [point.x for line in series for point in line.points]
    x_ticks = ticks(x_values, whole=x_title.startswith("epochs"))
    for axis, places in ((axes.xaxis, x_ticks), (axes.yaxis, y_ticks)):
        axis.set_ticks(places, [f"{place:g}" for place in places])
    axes.set(xlim=(x_ticks[0], x_ticks[-1]), ylim=(y_ticks[0], y_ticks[-1]), xlabel=x_title)
    figure.text(6 / width, 1 - 6 / height, y_title, va="top")
    # Bars at the same place stand beside each other.
    has_bars = any(point.low < point.high for line in series for point in line.points)
    step = min(4.0, 24 / len(series)) if has_bars else 0.0
    for index, line in enumerate(series):
        _draw(line, axes, step * (index - (len(series) - 1) / 2))


def _draw(line: Series, axes: Axes, beside: float) -> None:
    """Draws a line with its bars, `beside` pixels to the right."""
    x, *levels = np.array(line.points).T  # 4 x [N]: x, y, low, high
    y, low, high = np.clip(levels, *axes.get_ylim())  # what lies beyond the axis is at its end
    place = axes.transData + ScaledTranslation(beside / 72, 0, axes.figure.dpi_scale_trans)
    look = _look(line.style)
    if len(line.points) > _MOST_MARKERS:
        axes.plot(x, y, transform=place, **{**look, "marker": ""})
        return
    # One path for all bars, with a gap after each.
    ends = np.stack([low, high, np.full(len(x), math.nan)], axis=1)
    axes.plot(np.repeat(x, 3), ends.ravel(), color=look["color"], transform=place)
    axes.plot(x, y, transform=place, **look)


def _look(style: tuple[int, int]) -> dict[str, Any]:
    # A ninth family has the first one's colour again, with other dashes.
    again, color = divmod(style[0], len(_COLORS))
    dashes, marker, pixels = _SHAPES[(color + again + style[1]) % len(_SHAPES)]
    return {"color": _COLORS[color], "ls": dashes, "marker": marker, "markersize": pixels}


def _svg(figure: Figure, name: str, attributes: str) -> Markup:
    """matplotlib's file as an element of the page, with `attributes`, and a third of its size."""
    for artist in figure.findobj():  # a marker at the end of an axis is not cut in two
        artist.set_clip_on(False)
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):  # ids of markers hash it: the page has many charts
        # Nothing that is said of a file, which this is none.
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", metadata=metadata)
    inside = stream.getvalue().partition("<svg")[2].partition(">")[2]
    inside = " ".join(_NOISE.sub("", inside).split()).replace("> <", "><")
    inside = _LONG_NUMBER.sub(lambda number: f"{float(number[0]):.1f}", inside)
    width, height = figure.get_size_inches() * 72
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" {attributes}>{inside}')


def pictures(all_paths: Sequence[Layout]) -> dict[str, dict[int, list[tuple[str, str]]]]:
    """Kind -> epochs completed -> label and src of each picture; empty kinds are left out."""
    rank, found = method_rank(all_paths), dict[str, dict[int, list[tuple[str, str]]]]()
    for paths, name in zip(all_paths, names_of(all_paths), strict=True):
        suffix = "" if len(all_paths) == 1 else f" ({name})"
        by_run = sorted(_pictures(paths), key=lambda one: (rank(one[1].method), one[1].name))
        for kind, run, epochs, image in by_run:
            if source := _data_uri(image):
                there = found.setdefault(kind, {}).setdefault(epochs, [])
                there.append((f"{run.name}{suffix}", source))
    # What was pretrained comes before what it was finetuned to.
    return {kind: dict(sorted(found[kind].items())) for kind in sorted(found, reverse=True)}


def _pictures(paths: Layout) -> Iterator[tuple[str, RunId, int, Path]]:
    """Their kind, run and epochs completed; of a checkpoint's finetunings, the first one's."""
    folders = (paths.pretrain_output, paths.eval_output, paths.probe_output)
    for image in [image for folder in folders for image in folder.glob("*/*.png")]:
        with suppress(ValueError):  # a folder that is no run's
            if (count := epochs_of(image)) is not None:
                yield "Reconstructions", RunId.parse(image.parent.name), count, image
            elif image.name == FEATURES:
                run, epochs, _ = parse_eval_name(image.parent.name)
                yield "Features of the frozen encoder", run, epochs, image
            elif image.name == PREDICTIONS:
                run, epochs, number = parse_eval_name(image.parent.name)
                if not number:
                    yield "Predictions", run, epochs, image


def _data_uri(path: Path) -> str:
    """The image, no wider than the report needs, as text for an src attribute."""
    try:
        picture = load_image(path).convert("RGB")
    except ValueError:
        return ""  # a running step may just be writing it
    picture.thumbnail((1000, picture.height), Image.Resampling.LANCZOS, reducing_gap=None)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
