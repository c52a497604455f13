"""Line charts as inline SVG that stay readable on a phone and in print.

The height is fixed and x is in percent of the width, so a chart follows the page's width while its
text keeps its size (a scaled viewBox would shrink it). Colours are Okabe and Ito's, which colour-
blind readers can tell apart; lines also differ in dashes and markers, for print without colour.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

HEIGHT = 260  # pixels of the plotting area
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a6761d", "#56b4e9", "#666666", "#000000")
COLORS = len(_COLORS)
_DASHES = ("", "7 3", "2 3", "9 3 2 3")
_MARKERS = (
    "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0 -9 0",  # disc
    "M-4 -4h8v8h-8z",  # square
    "M0 -5.5L5 4H-5z",  # triangle
    "M0 -6L5 0L0 6L-5 0z",  # diamond
)
_MOST_POINTS = 200  # of a line; longer ones are thinned
_MOST_MARKERS = 40


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
    style: int
    """Chooses colour, dashes and marker; the same number looks the same in every chart, and n and
    n + COLORS have the colour in common."""


def line_chart(
    views: Mapping[str, Sequence[Series]],
    caption: str,
    *,
    y_title: str,
    least_span: float = 0.0,
    limits: tuple[float, float] = (-math.inf, math.inf),
) -> str:
    """A figure of HTML: the lines over common axes; empty where no line has a point.

    views: x axis's title -> the lines over it; of several, the reader chooses one by a switch that
    works without script. least_span: of the y axis, so that noise is not blown up. limits: of y.
    """
    views = {title: [s for s in series if s.points] for title, series in views.items()}
    views = {title: series for title, series in views.items() if series}
    name, parts, switch = f"x{zlib.crc32(caption.encode())}", [], []
    for index, (title, series) in enumerate(views.items()):
        if len(views) > 1:
            checked, said = "" if index else " checked", escape(title)
            switch.append(
                f'<input type="radio" name="{name}" id="{name}-{index}" class="x{index}"{checked}>'
                f'<label for="{name}-{index}">{said}</label>'
            )
        plot = _plot(series, escape(caption), title, y_title, least_span, limits)
        parts.append(f'<div class="area plot{index}">{plot}</div>')
    if not parts:
        return ""
    styles = {line.label: line.style for series in views.values() for line in series}
    legend = "".join(  # several seeds: one entry
        f'<li><svg width="40" height="14" aria-hidden="true"><line x1="2" y1="7" x2="38" y2="7" '
        f'{_stroke(style)}/><svg x="20" y="7" class="mark">{_marker(style)}</svg></svg>'
        f"{escape(label)}</li>"
        for label, style in styles.items()
    )
    figure = f'{"".join(switch)}<ul class="legend">{legend}</ul>{"".join(parts)}'
    return f"<figure>{figure}<figcaption>{escape(caption)}</figcaption></figure>"


def _plot(
    series: Sequence[Series],
    said: str,
    x_title: str,
    y_title: str,
    least_span: float,
    limits: tuple[float, float],
) -> str:
    points = [point for line in series for point in line.points]
    x_ticks = ticks([point.x for point in points], whole=x_title.startswith("epochs"))
    ends = [end for p in points for end in (p.y, p.low, p.high) if end is not None]
    ends = [min(max(end, limits[0]), limits[1]) for end in ends if math.isfinite(end)]
    missing = least_span - (max(ends) - min(ends)) if ends else 0.0
    if missing > 0:
        low = max(limits[0], min(min(ends) - missing / 2, limits[1] - least_span))
        ends += [low, low + least_span]
    y_ticks = ticks(ends)
    scale = _Scale(x_ticks[0], x_ticks[-1], y_ticks[0], y_ticks[-1])
    parts = [_axes(scale, x_ticks, y_ticks, x_title, y_title)]
    # Bars at the same place stand beside each other.
    step = min(4.0, 24 / len(series)) if any(p.low is not None for p in points) else 0.0
    for index, line in enumerate(series):
        beside = step * (index - (len(series) - 1) / 2)
        parts.append(f'<g transform="translate({beside:.1f} 0)">{_line(line, scale)}</g>')
    return f'<svg class="plot" role="img" aria-label="{said}">{"".join(parts)}</svg>'


@dataclass(frozen=True)
class _Scale:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, value: float) -> float:
        """Percent of the width."""
        return 100 * (value - self.x_low) / (self.x_high - self.x_low)

    def y(self, value: float) -> float:
        """Pixels from the top; a value beyond the axis is at its end."""
        value = min(max(value, self.y_low), self.y_high)
        return HEIGHT * (self.y_high - value) / (self.y_high - self.y_low)


def ticks(values: Sequence[float], *, whole: bool = False, most: int = 6) -> list[float]:
    """At most `most` round numbers, 1, 2 or 5 times a power of ten apart, around the values."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = max(abs(high) * 0.1, 1.0 if whole else 1e-6)
        low, high = low - margin, high + margin
    exponent = math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20, 50, 100):
        step = factor * 10.0**exponent
        if whole:
            step = max(1.0, step)
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if last - first < most:
            return [index * step for index in range(first, last + 1)]
    raise AssertionError("a hundred times the smallest step is always wide enough")


def _axes(
    scale: _Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_title: str, y_title: str
) -> str:
    parts = []
    for value in y_ticks:
        y = scale.y(value)
        parts.append(f'<line x1="0" x2="100%" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(f'<text x="-8" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    for value in x_ticks:
        x = scale.x(value)
        parts.append(
            f'<text x="{x:.2f}%" y="{HEIGHT + 19}" text-anchor="middle">{value:g}</text>'
            f'<line x1="{x:.2f}%" x2="{x:.2f}%" y1="{HEIGHT}" y2="{HEIGHT + 5}" class="axis"/>'
        )
    parts.append(f'<line x1="0" x2="100%" y1="{HEIGHT}" y2="{HEIGHT}" class="axis"/>')
    parts.append(f'<line x1="0" x2="0" y1="0" y2="{HEIGHT}" class="axis"/>')
    parts.append(f'<text x="50%" y="{HEIGHT + 38}" text-anchor="middle">{escape(x_title)}</text>')
    parts.append(f'<text x="-48" y="-12">{escape(y_title)}</text>')
    return "".join(parts)


def _line(line: Series, scale: _Scale) -> str:
    """The polyline in a stretched inner picture, markers and spreads at their places."""
    points = [point for point in line.points if math.isfinite(point.y)]
    points = _thinned(points, _MOST_POINTS)
    corners = " ".join(f"{scale.x(p.x):.3f},{scale.y(p.y):.2f}" for p in points)
    parts = [
        f'<svg viewBox="0 0 100 {HEIGHT}" preserveAspectRatio="none" width="100%" '
        f'height="{HEIGHT}" overflow="visible"><polyline points="{corners}" fill="none" '
        f'vector-effect="non-scaling-stroke" {_stroke(line.style)}/></svg>'
    ]
    for point in points if len(points) <= _MOST_MARKERS else []:
        x, y = scale.x(point.x), scale.y(point.y)
        if point.low is not None and point.high is not None and point.high > point.low:
            ends = f'y1="{scale.y(point.low):.1f}" y2="{scale.y(point.high):.1f}"'
            spread = _stroke(line.style, dashed=False)
            parts.append(f'<line x1="{x:.2f}%" x2="{x:.2f}%" {ends} {spread}/>')
        value = f"{escape(line.label)}: {point.y:.4g} at {point.x:g}"
        parts.append(
            f'<svg x="{x:.2f}%" y="{y:.1f}" class="mark"><title>{value}</title>'
            f"{_marker(line.style)}</svg>"
        )
    return "".join(parts)


def _thinned(points: Sequence[Point], most: int) -> list[Point]:
    """Every n-th point and the last."""
    every = max(1, math.ceil(len(points) / most))
    return [p for i, p in enumerate(points) if i % every == 0 or i == len(points) - 1]


def _stroke(style: int, *, dashed: bool = True) -> str:
    dash = _DASHES[_variant(style) % len(_DASHES)] if dashed else ""
    dash_attribute = f' stroke-dasharray="{dash}"' if dash else ""
    return f'stroke="{_COLORS[style % COLORS]}" stroke-width="2.2"{dash_attribute}'


def _marker(style: int) -> str:
    marker = _MARKERS[_variant(style) % len(_MARKERS)]
    return f'<path d="{marker}" fill="{_COLORS[style % COLORS]}"/>'


def _variant(style: int) -> int:
    return style % COLORS + style // COLORS
