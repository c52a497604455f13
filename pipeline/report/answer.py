"""What the scores say, in sentences that follow from intervals: better, worse, or not shown."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import NamedTuple

from pipeline.report.figures import Chart, Point, Series, line_chart
from pipeline.report.scores import FINETUNING, REFERENCE, Level, Line, Measure, last_common_epochs
from pipeline.report.statistics import (
    CONFIDENCE,
    LEAST_IMAGES,
    LEAST_VARIANCE,
    Interval,
    holm,
    interval,
)
from pipeline.report.tables import Table, cost_cells

_LEAST_SPAN = 5.0  # points of a score's axis, unless intervals are narrower
_EQUAL_COST = 0.02  # share by which training FLOPs may differ
# State of a comparison -> how its sentence begins, and its cell of the table.
_VERDICTS = {
    "better": ("Better than", "better"),
    "worse": ("Worse than", "worse"),
    "higher": ("Higher than", "higher, not the first look"),
    "lower": ("Lower than", "lower, not the first look"),
    "none": ("No difference shown to", "no difference shown"),
    "unknown": ("No verdict against", "none: "),
}


class Comparison(NamedTuple):
    """Two lines after the same epochs, by the seeds that both have."""

    first: Line
    second: Line
    is_control: bool  # whether they differ in nothing but whose segments are hidden
    seeds: int
    value: float | None = None  # first - second; None where they have no seed in common
    difference: Interval | None = None  # the same with its interval; None where nothing gives one
    why_not: str = ""  # there is no verdict
    cost_ratio: float | None = None  # training FLOPs of the first for one of the second
    p_value: float = 1.0  # corrected for the number of comparisons in the report
    is_first_look: bool = True  # others are hints: who looks often enough finds something

    @property
    def state(self) -> str:
        """better or worse, beyond the first look higher or lower; none (shown), or unknown."""
        if self.difference is None or self.why_not:
            return "unknown"
        if self.p_value >= 1 - CONFIDENCE:
            return "none"
        words = ("worse", "better") if self.is_first_look else ("lower", "higher")
        return words[self.difference.value > 0]

    @property
    def words(self) -> str:
        """What tells it from others with the same question, and the difference."""
        control = self.second.label.removeprefix(self.first.label).strip()
        name, found = control if self.is_control else self.first.label, self.difference
        if found is None or self.state == "unknown":
            said = "" if self.value is None else f"{self.value:+.2f} points, "
            return f"{name} ({said}{self.why_not})"
        within = f"95% interval {found.low:+.2f} to {found.high:+.2f}"
        if self.state != "none":
            return f"{name} (by {abs(found.value):.2f} points, {within})"
        # The interval stands for one comparison, the p-value is corrected for several.
        alone = "" if found.low <= 0 <= found.high else ", too near to 0 for one of several"
        return f"{name} ({found.value:+.2f} points, {within}{alone})"


class Answer(NamedTuple):
    """What one measure says: all that its section of the page lays out."""

    sentences: Sequence[str]
    measure: Measure = FINETUNING
    chart: Chart | None = None
    remarks: Sequence[str] = ()  # what speaks against trusting the sentences
    objects: Sequence[str] = ()  # whether it matters that the image's own segment is hidden
    doubts: Sequence[str] = ()  # what speaks against trusting that
    comparisons: Sequence[Comparison] = ()
    differences: Table | None = None
    levels: Table | None = None


def answer(every_line: Sequence[Line], measure: Measure, *, first_look: str = "") -> Answer | None:
    """Sentences, warnings, tables and chart of one measure; None where nothing was scored by it.

    first_look: what is looked at first, in words, where that is not this.
    """
    lines = [line for line in every_line if line.epochs(measure)]
    trained = [line for line in lines if not line.is_baseline]
    if not lines:
        return None
    chart, epochs = _chart(lines, measure), last_common_epochs(lines, measure)
    if epochs is None:
        missing = "The methods have not been evaluated at a common epoch yet."
        return Answer([missing] if trained else [], measure, chart)
    levels = {line.label: line.level(epochs, measure) for line in lines}
    best = max(trained, key=lambda line: levels[line.label].score)
    # Without areas by image nothing tells how much the choice of images makes: no comparisons.
    found = _comparisons(lines, best, levels) if measure.areas else []
    found = [c._replace(is_first_look=not first_look) for c in found]
    controls, others = [c for c in found if c.is_control], [c for c in found if not c.is_control]
    sentences = [_about_best(best.label, levels[best.label], epochs, measure, len(trained))]
    if measure.areas:
        sentences += _verdicts(others)
        start = _start_of(best, lines)
        sentences += _about_chance(best, start, levels) if start else []
        sentences += _about_cost(others)
    level_rows = [
        {"method": label, measure.unit: f"{level.score:.2f}",
         "95% interval": level.spread.within(measure.most) if level.spread else "",
         "seeds": str(len(level.scores)), **cost_cells(level.costs)}
        for label, level in levels.items()
    ]  # fmt: skip
    known = {name for row in level_rows for name, cell in row.items() if cell}
    level_rows = [{name: row[name] for name in row if name in known} for row in level_rows]
    hint = [
        f"This is a look beyond the first, which is {first_look}: what differs here is a hint, "
        "no finding."
    ] if first_look and found else []  # fmt: skip
    remarks = hint + _warnings(others)
    return Answer(
        sentences, measure, chart, remarks, _about_objects(controls), _warnings(controls),
        found, _difference_table(found) if found else None, Table(level_rows),
    )  # fmt: skip


def _comparisons(lines: Sequence[Line], best: Line, levels: Mapping[str, Level]) -> list[Comparison]:
    """Methods with the reference, each with its own start, own segments with their controls.

    All are one family, that of the report: a report makes a false claim in 5% of cases at most. The
    best of the methods is compared with scratch; as it was selected, all count.
    """
    trained = {line.label: line for line in lines if not line.is_baseline}
    # A control's family bears the name of its own line; without that line, it is one of the others.
    own = {label: trained.get(line.family, line) for label, line in trained.items()}
    others = [line for label, line in trained.items() if own[label] is line]
    reference = next((line for line in others if line.method == REFERENCE), others[0])
    pairs = [(line, reference, False) for line in others if line is not reference]
    starts = [(line, _start_of(line, lines), False) for line in others]
    pairs += [(line, start, no) for line, start, no in starts if start and start.is_untrained]
    scratch = next((line for line in lines if line.method == "scratch"), None)
    pairs += [(line, scratch, False) for line in trained.values() if scratch]
    pairs += [(own[label], line, True) for label, line in trained.items() if own[label] is not line]
    found = [_compared(first, second, is_control, levels, len(pairs)) for first, second, is_control in pairs]
    p_values = holm([c.difference.p_value if c.difference and not c.why_not else 1.0 for c in found])
    judged = [c._replace(p_value=p) for c, p in zip(found, p_values, strict=True)]
    return [c for c in judged if c.second is not scratch or c.first is best]


def _compared(
    first: Line, second: Line, is_control: bool, levels: Mapping[str, Level], among: int
) -> Comparison:
    """By the seeds that both have; both were drawn on the same images."""
    one, two = levels[first.label], levels[second.label]
    seeds = sorted(one.scores.keys() & two.scores.keys())
    drawn = [one.drawn[s] - two.drawn[s] for s in seeds] if one.drawn and two.drawn else None
    scores = [one.scores[seed] - two.scores[seed] for seed in seeds]
    found, in_family = interval(scores, drawn), interval(scores, drawn, among=among)
    if found and in_family:
        found = replace(found, detectable=in_family.detectable)
    why_not = (
        f"{len(seeds) or 'no'} seed in common" if len(seeds) < 2
        else "scored on different validation images" if len((one.images | two.images) - {None}) > 1
        else f"fewer than {LEAST_IMAGES} validation images" if drawn and not len(drawn[0])
        else "nothing varies" if found is None else ""
    )  # fmt: skip
    cost, other = one.costs["train_flops"], two.costs["train_flops"]
    return Comparison(
        first, second, is_control, len(seeds), fmean(scores) if scores else None, found, why_not,
        cost / other if cost and other else None,
    )  # fmt: skip


def _start_of(line: Line, lines: Sequence[Line]) -> Line | None:
    """What gains are counted from: the method's model before its first epoch, else scratch."""
    found = [one for one in lines if one.is_untrained and one.method == line.method]
    return next(iter(found + [one for one in lines if one.method == "scratch"]), None)


def _verdicts(comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence for each verdict, which names all that share it; controls by their source."""
    groups: dict[str, list[Comparison]] = {}
    for c in comparisons:
        against = "" if c.is_control else f" {c.second.label}"
        groups.setdefault(_VERDICTS[c.state][0] + against, []).append(c)
    sentences = []
    for verdict, found in groups.items():
        sentences.append(f"{verdict}: {'; '.join(c.words for c in found)}.")
        would = [c.difference.detectable for c in found if c.difference and c.state == "none"]
        if would:
            more = f"{max(would):.2f} points or more"
            sentences[-1] += f" {more} would have been shown with 80% probability."
    return sentences


def _about_best(label: str, level: Level, epochs: int, measure: Measure, methods: int) -> str:
    score = f"{level.score:.2f}" + ("" if math.isinf(measure.most) else "%")
    # The highest of several owes something to chance: its interval is one of as many.
    spread = level.spread and interval(
        list(level.scores.values()), list(level.drawn.values()) or None, among=methods
    )
    if spread:
        of = "" if methods == 1 else f" as the highest of {methods}"
        within = spread.within(measure.most)
        score += f" (95% interval{of} {within}, {len(level.scores)} seeds)"
    after = f"After {epochs} {'epoch' if epochs == 1 else 'epochs'} of pretraining"
    verb = "reaches" if methods == 1 else "is highest:"
    return f"{after}, by {measure.words}, {label} {verb} {score}."


def _about_chance(best: Line, start: Line, levels: Mapping[str, Level]) -> list[str]:
    """How far pretraining leads out of what the seeds of the initial weights do."""
    scores = list(levels[start.label].scores.values())
    if len(scores) < 3 or stdev(scores) ** 2 < LEAST_VARIANCE:
        return []
    above = (levels[best.label].score - fmean(scores)) / stdev(scores)
    where = f"{abs(above):.1f} standard deviations of the {len(scores)} {start.label} seeds"
    return [f"{best.label} lies {where} {'above' if above > 0 else 'below'} their mean."]


def _about_cost(comparisons: Sequence[Comparison]) -> list[str]:
    """Which comparisons with the reference are at equal cost."""
    known = [(c, c.cost_ratio) for c in comparisons if c.cost_ratio]
    if not known:
        return []
    equal = ("equal epochs only", "equal cost")
    said = [f"{c.first.label} {r:.2f} x ({equal[abs(r - 1) <= _EQUAL_COST]})" for c, r in known]
    return [f"Training FLOPs against {known[0][0].second.label}: {', '.join(said)}."]


def _about_objects(controls: Sequence[Comparison]) -> list[str]:
    """What it makes that the image's own segment is hidden: a sentence for each method."""
    sentences = []
    for own in dict.fromkeys(c.first.label for c in controls):
        found = [c for c in controls if c.first.label == own]
        states = {c.state for c in found}
        better, worse = ("better", "worse") if found[0].is_first_look else ("higher", "lower")
        verdict = (
            "not known" if "unknown" in states
            else f"yes, the image's own segment is {better} than every control"
            if states == {better}
            else f"no, the image's own segment is {worse} than a control" if worse in states
            else "not shown" if better not in states
            else f"in part, the image's own segment is {better} than some controls"
        )  # fmt: skip
        sentences.append(f"{own}: {verdict}. {' '.join(_verdicts(found))}")
    return sentences


def _warnings(comparisons: Sequence[Comparison]) -> list[str]:
    """What speaks against trusting the comparisons."""
    remarks = []
    for seeds, words in ((1, "There is one seed"), (0, "There is no seed")):
        few = [f"{c.first.label} and {c.second.label}" for c in comparisons if c.seeds == seeds]
        if few:
            all_of = "per method" if len(few) == len(comparisons) else f"for {', '.join(few)}"
            why = "so nothing tells a real difference from chance"
            remarks.append(f"{words} in common {all_of}, {why}: run several, such as --seed 0,1,2.")
    for why in dict.fromkeys(c.why_not for c in comparisons if c.seeds > 1 and c.why_not):
        remarks.append(f"There are comparisons without a verdict: {why}.")
    if any(c.difference and not c.difference.of_images for c in comparisons):
        remarks.append(
            "Scores of an earlier version came without areas by image: intervals hold chance "
            "between seeds only, not that in the choice of images."
        )
    return remarks


def _difference_table(comparisons: Sequence[Comparison]) -> Table:
    """A row for each comparison; its bar: where the page draws it, in percent of the cell."""
    # Pretraining leads so far that beside a baseline's bar the others would be dots.
    drawn = [c.difference for c in comparisons if c.difference and not c.second.is_baseline]
    half = 1.05 * max((max(abs(d.low), abs(d.high)) for d in drawn), default=1.0)
    rows = []
    for c in comparisons:
        d = c.difference
        bar = [50 + 50 * end / half for end in (d.low, d.value, d.high)] if d else ""
        rows.append({
            "method": c.first.label, "against": c.second.label,
            "": "" if c.second.is_baseline else bar,
            "difference": "" if c.value is None else f"{c.value:+.2f}",
            "95% interval": f"{d.low:+.2f} to {d.high:+.2f}" if d else "",
            "detectable": f"{d.detectable:.2f}" if d and c.seeds > 1 else "",
            "seeds": str(c.seeds), "FLOPs": f"{c.cost_ratio:.2f} x" if c.cost_ratio else "",
            "verdict": _VERDICTS[c.state][1] + c.why_not,
        })  # fmt: skip
    return Table(rows, [c.state for c in comparisons])


def _chart(lines: Sequence[Line], measure: Measure) -> Chart:
    """Over epochs, device-hours and FLOPs, as far as they are known."""
    levels = {line.label: {at: line.level(at, measure) for at in line.epochs(measure)} for line in lines}
    every_level = [level for of_line in levels.values() for level in of_line.values()]
    widths = [level.spread.high - level.spread.low for level in every_level if level.spread]
    least = min(_LEAST_SPAN, 4 * max(widths)) if len(widths) == len(every_level) else _LEAST_SPAN
    flops = max(level.costs["train_flops"] or 0 for level in every_level)
    power = math.floor(math.log10(flops or 1))
    views = {
        "epochs of pretraining": _series(lines, levels, "", 1.0),
        "device-hours of pretraining": _series(lines, levels, "device_hours", 1.0),
        f"training FLOPs (x 1e{power})": _series(lines, levels, "train_flops", 10.0**power),
    }
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
            points += [Point(x, level.score, *ends) for x in places]
        last = max([last, *(point.x for point in points)])
        series.append(Series(line.label, points, line.style))
    return series
