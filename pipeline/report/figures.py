"""Lines over epochs and dots with intervals as matplotlib's SVG, and the runs' own pictures.

A scaled drawing scales its text, so a chart is drawn once for a phone and, where it may take a
desk's full width, once for that; the page shows one of them. The colour is the method's and marker
and dash are those of the segments' source, in every chart. Colours are Okabe and Ito's, which
colour-blind readers can tell apart; the page has others for the dark (`var`).
"""

import base64
import io
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from html import escape
from pathlib import Path
from types import MappingProxyType
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
from pipeline.report.scores import SOURCES, method_rank, names_of

# Width and height of a drawing in CSS pixels: a phone's, which is also a column's, and a desk's.
_NARROW, _WIDE = (350, 300), (880, 330)
_LEFT, _RIGHT, _BELOW, _ABOVE = 54, 16, 44, 34  # pixels beside the axes
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a6761d", "#56b4e9", "#882255")
_GREY, _GRID, _INK = "#666666", "#e4e4e4", "#555555"  # of baselines, grid and axes
_DARK = {name: f"var(--c{name[1:]},{name})" for name in (*_COLORS, _GREY, _GRID, _INK)}
_SHAPES = (  # of sources: dashes in pixels; marker and its size, by which all look equally large
    ("-", "o", 9), ((0, (7, 3)), "s", 8), ((0, (2, 3)), "^", 10), ((0, (9, 3, 2, 3)), "D", 8),
)  # fmt: skip
_OF_BASELINES = ((0, (1, 3)), (0, (5, 2, 1, 2)), (0, (12, 3)), (0, (3, 2)))
_ROW, _TITLE, _AXIS = 30, 30, 30  # pixels of a row of dots, of a panel's title, and of its axis
_CHARACTER = 7.2  # pixels, generously
_MOST_STRETCH = 1.5  # of an axis, for a baseline
_MOST_MARKERS = 40  # of a line; longer ones are lines only
_NOISE = re.compile(
    r"<defs>\s*<style.*?</defs>"  # it would hold for the whole page
    r'|(?<=<g) id="[^"]*"'  # figure_1 in every figure; nothing refers to it
    r"|font-size[^>]*(?=text-anchor)"  # the page chooses the font
    r'| transform="rotate[^"]*"',  # of text, by nothing
    re.DOTALL,
)
_MARKER_ID = re.compile(r'(?<=\bid=")m\w+|(?<=href="#)m\w+')
_TAG, _LONG_NUMBER = re.compile(r"<[^>]*>"), re.compile(r'(?<=[" ])-?\d+\.\d{2,}')


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
    style: tuple[int, int]  # of a scores.Line: the same look in every chart
    is_level: bool = False  # a baseline, which does not stretch the axis


class Row(NamedTuple):
    """A dot with its interval and the seeds that it is the mean of."""

    label: str
    style: tuple[int, int]
    value: float
    low: float = math.nan
    high: float = math.nan
    seeds: Sequence[float] = ()
    said: str = ""  # beside it


class Panel(NamedTuple):
    """Rows below one title, over an axis; of one group, panels have one scale."""

    title: str
    rows: Sequence[Row]
    group: str = ""
    is_difference: bool = True  # then there is a line at 0


class Chart(NamedTuple):
    """What the page puts together; no view where there is nothing to show."""

    name: str  # unique in the page
    caption: str
    views: dict[str, Markup]  # x axis's title -> drawings, of which the page shows one
    legend: dict[str, Markup]  # label -> a piece of its line
    figure: Figure | None = None  # the first view at a desk's width, for `files_of`
    styles: Mapping[str, tuple[int, int]] = MappingProxyType({})  # of the legend
    beyond: Sequence[str] = ()  # levels that the axis does not reach


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
            inside = [s for s in series if not s.is_level or y_ticks[0] <= s.points[0].y <= y_ticks[-1]]
            left_out = [s for s in series if s not in inside]
            edges = {True: "below", False: "above"}
            beyond = [
                f"{s.label} {s.points[0].y:.2f}, {edges[s.points[0].y < y_ticks[0]]} the axis"
                for s in left_out
            ]
            chart, series = chart._replace(beyond=beyond), inside
            # The wide one first: the page hides the one that follows it.
            for look, size in (("wide", _WIDE), ("narrow", _NARROW))[not is_wide :]:
                figure = Figure((size[0] / 72, size[1] / 72))
                _plot(figure, series, title, y_title, y_ticks)
                attributes = f'class="plot {look}" role="img" aria-label="{escape(caption)}"'
                drawn += _svg(figure, f"{chart.name}{title}{look}", attributes)
                if look == "wide" and chart.figure is None:
                    chart = chart._replace(figure=figure)
            chart.views[title] = drawn
            for line in series:  # several seeds: one entry
                chart.legend[line.label] = sample(line.style, chart.name)
            chart = chart._replace(styles={line.label: line.style for line in series})
    return chart


def sample(style: tuple[int, int], name: str = "") -> Markup:
    """A piece of a line of this style, for a legend; name: unique, of where it is used."""
    own = f"x{zlib.crc32(f'{name}{style}'.encode()):x}"  # ids are unique in a page
    return Markup(_MARKER_ID.sub(lambda found: found[0] + own, _sample(style)))


@lru_cache
def _sample(style: tuple[int, int]) -> Markup:
    with mpl.rc_context(fname=Path(__file__).with_suffix(".mplstyle")):
        figure = Figure((40 / 72, 14 / 72))
        figure.add_artist(Line2D((0.05, 0.5, 0.95), (0.5,) * 3, **{"markevery": [1], **_look(style)}))
        return _svg(figure, str(style), 'width="40" height="14" aria-hidden="true"')


def dot_chart(panels: Sequence[Panel], caption: str, x_title: str) -> Chart:
    """A forest plot: a row for each difference or level, its interval a bar, its seeds small dots."""
    chart = Chart(f"d{zlib.crc32(caption.encode())}", caption, {}, {})
    if not any(panel.rows for panel in panels):
        return chart
    drawn = Markup()
    with mpl.rc_context(fname=Path(__file__).with_suffix(".mplstyle")):
        for look, width in (("wide", _WIDE[0]), ("narrow", _NARROW[0])):
            figure = _dots([panel for panel in panels if panel.rows], x_title, width, look == "narrow")
            attributes = f'class="plot {look}" role="img" aria-label="{escape(caption)}"'
            drawn += _svg(figure, f"{chart.name}{look}", attributes)
            if look == "wide":
                chart = chart._replace(figure=figure)
    chart.views[x_title] = drawn
    return chart


def _dots(panels: Sequence[Panel], x_title: str, width: int, is_narrow: bool) -> Figure:
    """On a phone what a row says stands above its bar, on a desk to both sides of it."""
    row_height, titled = _ROW + 32 * is_narrow, _TITLE * bool(panels[0].title)
    heights = [titled + row_height * len(panel.rows) + _AXIS for panel in panels]
    height = sum(heights) + 20  # the axis's title
    rows = [row for panel in panels for row in panel.rows]
    left, right = 8.0, 12.0
    if not is_narrow:
        left = min(0.4 * width, 16 + _CHARACTER * max(len(row.label) for row in rows))
        right = min(0.4 * width, 16 + _CHARACTER * max(len(row.said) for row in rows))
    figure, top = Figure((width / 72, height / 72)), float(height)
    for panel, panel_height in zip(panels, heights, strict=True):
        of_group = [row for other in panels if other.group == panel.group for row in other.rows]
        ends = [x for r in of_group for x in (r.value, r.low, r.high, *r.seeds) if math.isfinite(x)]
        places = ticks([*ends, 0.0] if panel.is_difference else ends)
        places = places[:: 2 if is_narrow and len(places) > 5 else 1]
        box = (left, top - panel_height + _AXIS, width - left - right, panel_height - _AXIS - titled)
        axes = figure.add_axes((box[0] / width, box[1] / height, box[2] / width, box[3] / height))
        axes.set(xlim=(min(places[0], *ends), max(places[-1], *ends)), ylim=(len(panel.rows) - 0.5, -0.5))
        axes.set_xticks(places, [f"{place:g}" for place in places])
        axes.set_yticks([])
        axes.grid(visible=not is_narrow, axis="x")  # it would cross what rows say
        axes.spines["left"].set_visible(False)
        figure.text(8 / width, (top - 6) / height, panel.title, va="top", fontweight="bold")
        for index, row in enumerate(panel.rows):
            y, look = index + 0.2 * is_narrow, {**_look(row.style), "ls": ""}
            look = look if look["marker"] else {**look, "marker": "o", "ms": 8}
            if panel.is_difference:
                around = (-0.12, 0.3) if is_narrow else (-0.5, 0.5)
                axes.plot([0, 0], [y + end for end in around], color=_INK, lw=1.4, zorder=1)
            axes.plot([row.low, row.high], [y, y], color=look["color"], lw=3, zorder=2)
            seeds = {"ms": 5, "mew": 1.2, "mfc": "none", "mec": look["color"], "zorder": 3}
            rings = row.seeds if len(row.seeds) > 1 else ()
            axes.plot(rings, [y + 9 / row_height] * len(rings), "o", **seeds)
            alone = {} if row.low < row.high else {"mfc": "none", "mec": look["color"], "mew": 1.6}
            axes.plot([row.value], [y], **{**look, "zorder": 4, **alone})
            at = box[1] + box[3] * (1 - (index + 0.5) / len(panel.rows)) + 22 * is_narrow
            figure.text(8 / width, at / height, row.label, va="center")
            beside = (8, at - 17) if is_narrow else (width - right + 12, at)
            figure.text(beside[0] / width, beside[1] / height, row.said, va="center")
        top -= panel_height
    figure.text((left + (width - left - right) / 2) / width, 4 / height, x_title, ha="center")
    return figure


def files_of(chart: Chart, *forms: str) -> dict[str, bytes]:
    """By the file's ending, for a paper and other programs: with a legend, tight around it."""
    found: dict[str, bytes] = {}
    if chart.figure is None:
        return found
    with mpl.rc_context(fname=Path(__file__).with_suffix(".mplstyle")):
        handles = [Line2D([], [], label=label, **_look(style)) for label, style in chart.styles.items()]
        if handles:
            place: Any = {"loc": "upper left", "bbox_to_anchor": (1, 1)}
            chart.figure.legend(handles=handles, frameon=False, **place)
        # Text that editors can read; equal charts give equal files.
        with mpl.rc_context({"svg.hashsalt": "", "pdf.fonttype": 42}):
            for form in forms:
                date = {"pdf": "CreationDate", "svg": "Date"}[form]
                stream = io.BytesIO()
                chart.figure.savefig(stream, format=form, bbox_inches="tight", metadata={date: None})
                found[form] = stream.getvalue()
    return found


def ticks(values: Sequence[float], *, whole: bool = False) -> list[float]:
    """At most 7 round numbers, evenly spaced, around the values."""
    low, high = nonsingular(min(values), max(values), expander=0.1, tiny=1e-9)
    if whole:  # a single value has neighbours, too
        low, high = math.floor(low), math.ceil(high)
    locator = MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=whole)
    return [float(value) for value in locator.tick_values(low, high)]


def _y_ticks(series: Sequence[Series], least_span: float, limits: tuple[float, float]) -> list[float]:
    of_axis = [line for line in series if not line.is_level] or series
    values = [value for line in of_axis for point in line.points for value in point[1:]]
    ends = [min(max(end, limits[0]), limits[1]) for end in values if math.isfinite(end)]
    missing = least_span - (max(ends) - min(ends))
    if missing > 0:
        low = max(limits[0], min(min(ends) - missing / 2, limits[1] - least_span))
        ends += [low, low + least_span]
    # A baseline far away would press the methods into one line: it is said beside the chart instead.
    for level in (line.points[0].y for line in series if line.is_level):
        if max([*ends, level]) - min([*ends, level]) <= _MOST_STRETCH * (max(ends) - min(ends)):
            ends.append(level)
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
    # Few places at which something was scored say more than round numbers.
    there = sorted({x for line in series if not line.is_level for x in (p.x for p in line.points)})
    if x_title.startswith("epochs") and 1 < len(there) <= 12 and there[-1] <= x_ticks[-1]:
        gap = (there[-1] - min(0, there[0])) / 12  # closer ones would overlap
        x_ticks = [x for i, x in enumerate(there) if not i or x - there[i - 1] >= gap]
        x_ticks = sorted({min(0.0, *x_values), *x_ticks}) if min(x_values) == 0 else x_ticks
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
    if style[0] < 0:  # a baseline
        return {"color": _GREY, "ls": _OF_BASELINES[style[1] % len(_OF_BASELINES)], "marker": ""}
    # An eighth family has the first one's colour again, its markers hollow.
    again, color = divmod(style[0], len(_COLORS))
    dashes, marker, pixels = _SHAPES[style[1]]
    hollow = {"mfc": "none", "mew": 2, "mec": _COLORS[color]} if again else {}
    return {"color": _COLORS[color], "ls": dashes, "marker": marker, "ms": pixels, **hollow}


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
    inside = _TAG.sub(lambda tag: _LONG_NUMBER.sub(lambda n: f"{float(n[0]):.1f}", tag[0]), inside)
    inside = re.sub("#[0-9a-f]{6}", lambda color: _DARK.get(color[0], color[0]), inside)
    width, height = figure.get_size_inches() * 72
    return Markup(f'<svg viewBox="0 0 {width:g} {height:g}" {attributes}>{inside}')


def pictures(all_paths: Sequence[Layout]) -> dict[str, dict[int, list[tuple[str, str]]]]:
    """Kind -> epochs completed -> label and src of each picture; empty kinds are left out.

    Of several seeds, the first that a run has: the others look alike.
    """
    rank, found = method_rank(all_paths), dict[str, dict[int, list[tuple[str, str]]]]()
    for paths, name in zip(all_paths, names_of(all_paths), strict=True):
        suffix = "" if len(all_paths) == 1 else f" ({name})"

        def place(one: tuple[str, RunId, int, Path]) -> tuple[Any, ...]:
            run = one[1]
            ratio = run.coverage_ratio or 0
            return rank(run.method), ratio, SOURCES.index(run.segments_from), run.seed

        shown = set[tuple[Any, ...]]()
        for kind, run, epochs, image in sorted(_pictures(paths), key=place):
            line = kind, replace(run, seed=0), epochs
            if line not in shown and (source := _data_uri(image)):
                shown.add(line)
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
    # Twice as fast as the default method, and 5 % larger.
    picture.save(stream, "WEBP", quality=80, method=2)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
