"""What the scores say as charts: all differences as a forest plot, and the scores themselves."""

import math
from collections.abc import Mapping, Sequence

from pipeline.report.answer import Answer
from pipeline.report.comparisons import STATES, Comparison
from pipeline.report.figures import Chart, Panel, Point, Row, Series, dot_chart, line_chart
from pipeline.report.scores import Level, Line, Measure

_LEAST_SPAN = 5.0  # points of a score's axis, unless intervals are narrower


def forest(answer: Answer) -> Chart:
    """All differences: own segments and controls, methods and plain MAE, gains of pretraining."""
    measure, comparisons, after = answer.measure, answer.comparisons, answer.epochs
    if not comparisons:
        return Chart("", "", {}, {})
    of: dict[str, list[Comparison]] = {}
    for c in comparisons:
        of.setdefault(c.kind, []).append(c)
    against = {c.second.label for c in of.get("method", ())}
    is_one = len(against) == 1
    titles = {
        "objects": "Object or not: own segment minus control",
        "method": f"Method minus {next(iter(against))}" if is_one else "Method minus method",
        "directory": "The same method in two directories",
        "start": "Gain: method minus no pretraining",
    }
    panels = [
        # What is near 0 has one scale; gains are far larger.
        Panel(
            titles[kind],
            _rows(of.get(kind, ()), is_one and kind == "method"),
            kind if kind == "start" else "near",
        )
        for kind in titles
    ]
    caption = (
        f"Differences by {measure.words}, {after[0].lower()}{after[1:]}. Bars: the intervals that "
        "the verdicts stand on, corrected for the number of comparisons; small rings: single seeds. "
        "A bar that holds 0 shows no difference; without a bar there is no verdict."
    )
    return dot_chart(panels, caption, f"difference in {measure.unit.split(' (')[0]}, points")


def _rows(comparisons: Sequence[Comparison], is_plain: bool = False) -> list[Row]:
    rows = []
    for c in comparisons:
        if c.value is not None:
            ends = (c.shown.low, c.shown.high) if c.shown else (math.nan, math.nan)
            said = f"{c.value:+.2f}, {STATES['unknown']}"
            if c.shown:
                said = f"{c.value:+.2f} ({ends[0]:+.2f} to {ends[1]:+.2f}) {STATES[c.state]}"
            label = c.first.label if is_plain else f"{c.first.label} \N{MINUS SIGN} {c.against}"
            style = c.second.style if c.is_control else c.first.style
            rows.append(Row(label, style, c.value, *ends, list(c.by_seed.values()), said))
    return rows


def scores_chart(every_line: Sequence[Line], answer: Answer, *, has_costs: bool = True) -> Chart:
    """Scores over pretraining, and its costs; where all are of one point, which makes no curve, as dots."""
    measure, levels, after = answer.measure, answer.levels, answer.epochs
    lines = [line for line in every_line if line.epochs(measure)]
    if not levels or any(len(line.epochs(measure)) > 1 for line in lines):
        return _curves(lines, measure, has_costs)
    rows = []
    for line in sorted(lines, key=lambda line: line.is_baseline):
        level = levels[line.label]
        ends = (level.spread.low, level.spread.high) if level.spread else (math.nan, math.nan)
        said = f"{level.score:.2f}" + (f"  ({level.spread.within(measure.most)})" if level.spread else "")
        rows.append(Row(line.label, line.style, level.score, *ends, list(level.scores.values()), said))
    caption = (
        f"{measure.unit[0].upper()}{measure.unit[1:]} by {measure.words}, {after[0].lower()}{after[1:]}."
    )
    if any(math.isfinite(row.low) for row in rows):
        caption += " Dots are means over seeds, bars their 95% intervals, rings the seeds."
    return dot_chart([Panel("", rows, is_difference=False)], caption, measure.unit)


def _curves(lines: Sequence[Line], measure: Measure, has_costs: bool) -> Chart:
    """Over epochs, device-hours and FLOPs, as far as they are known."""
    levels = {line.label: {at: line.level(at, measure) for at in line.epochs(measure)} for line in lines}
    if not lines:
        return Chart("", "", {}, {})
    every_level = [level for of_line in levels.values() for level in of_line.values()]
    widths = [level.spread.high - level.spread.low for level in every_level if level.spread]
    least = min(_LEAST_SPAN, 4 * max(widths)) if len(widths) == len(every_level) else _LEAST_SPAN
    flops = max(level.costs["train_flops"] or 0 for level in every_level)
    power = math.floor(math.log10(flops or 1))
    views = {"epochs of pretraining": _series(lines, levels, "", 1.0)}
    if has_costs:
        views["device-hours of pretraining"] = _series(lines, levels, "device_hours", 1.0)
        views[f"training FLOPs (x 1e{power})"] = _series(lines, levels, "train_flops", 10.0**power)
    unit, limits = measure.unit, (0.0, measure.most)
    caption = f"{unit[0].upper()}{unit[1:].split(' (')[0]} by {measure.words}, against pretraining."
    if widths:
        caption += " Points are means over seeds, bars their 95% intervals."
    return line_chart(views, caption, y_title=unit, least_span=least, limits=limits, is_wide=True)


def _series(
    lines: Sequence[Line], levels: Mapping[str, Mapping[int, Level]], cost: str, unit: float
) -> list[Series]:
    """The lines over a cost where it is known, or over epochs; a baseline is a level."""
    series, last = [], 0.0
    for line in sorted(lines, key=lambda line: line.is_baseline):  # when the last x is known
        points = []
        for at, level in levels[line.label].items():
            x, spread = level.costs[cost] if cost else at, level.spread
            ends = (spread.low, spread.high) if spread else ()
            places = [0.0, last] if line.is_baseline and last else [] if x is None else [x / unit]
            # One bar for a baseline, however long its line is.
            points += [Point(x, level.score, *(ends if not i else ())) for i, x in enumerate(places)]
        last = max([last, *(point.x for point in points)])
        series.append(Series(line.label, points, line.style, line.is_baseline))
    return series
