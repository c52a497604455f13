"""What the scores say, in sentences that follow from intervals: better, worse, or not shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev

from markupsafe import Markup

from pipeline.report.figures import NARROW, WIDE, Point, Series, interval_bar, line_chart
from pipeline.report.scores import FINETUNING, REFERENCE, Level, Line, Measure, last_common_epochs
from pipeline.report.statistics import CONFIDENCE, Interval, holm, interval
from pipeline.report.tables import COST, Table, cost_text

_LEAST_SPAN = 5.0  # points of a score's axis, unless intervals are narrower
_EQUAL_COST = 0.02  # share by which training FLOPs may differ
_VERDICTS = {
    "better": "Better than",
    "worse": "Worse than",
    "none": "No difference shown to",
    "unknown": "No verdict against",
}


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one measure says: all that its section of the page lays out."""

    measure: Measure = FINETUNING
    chart: Markup = field(default_factory=Markup)
    sentences: Sequence[str] = ()
    remarks: Sequence[str] = ()  # what speaks against trusting them
    objects: Sequence[str] = ()  # whether it matters that the image's own segment is hidden
    doubts: Sequence[str] = ()  # what speaks against trusting that
    comparisons: Sequence[Comparison] = ()
    differences: Table | None = None
    levels: Table | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two lines after the same epochs, by the seeds that both have."""

    first: Line
    second: Line
    is_control: bool  # whether they differ in nothing but whose segments are hidden
    seeds: int
    # first - second; None where they have no seed in common, or nothing gives an interval.
    difference: Interval | None
    cost_ratio: float | None  # training FLOPs of the first for one of the second
    p_value: float = 1.0  # corrected for the number of comparisons with the same question

    @property
    def question(self) -> str:
        """What it answers with others: own segments against controls, or all against one line."""
        return self.first.label if self.is_control else self.second.label

    @property
    def name(self) -> str:
        """What tells it from others with the same question."""
        control = self.second.label.removeprefix(self.first.label).strip()
        return control if self.is_control else self.first.label

    @property
    def state(self) -> str:
        """better, worse, none (no difference shown) or unknown (fewer than two seeds)."""
        if self.difference is None or self.seeds < 2:
            return "unknown"
        if self.p_value >= 1 - CONFIDENCE:
            return "none"
        return "better" if self.difference.value > 0 else "worse"

    @property
    def numbers(self) -> str:
        """The difference in words."""
        found = self.difference
        if found is None or self.state == "unknown":
            said = f"{found.value:+.2f} points from " if found else ""
            return f"{said}{self.seeds or 'no'} seed in common"
        interval = f"95% interval {found.low:+.2f} to {found.high:+.2f}"
        if self.state != "none":
            return f"by {abs(found.value):.2f} points, {interval}"
        alone = "" if found.low <= 0 <= found.high else ", too near to 0 for one of several"
        return f"{found.value:+.2f} points, {interval}{alone}"


def answer(every_line: Sequence[Line], measure: Measure) -> Answer | None:
    """Sentences, warnings, tables and chart of one measure; None where nothing was scored by it."""
    lines = [line for line in every_line if line.epochs(measure)]
    trained = [line for line in lines if not line.is_baseline]
    if not lines:
        return None
    chart, epochs = _chart(lines, measure), last_common_epochs(lines, measure)
    if epochs is None:
        said = "The methods have not been evaluated at a common epoch yet."
        return Answer(measure=measure, chart=chart, sentences=[said] if trained else [])
    best = max(trained, key=lambda line: fmean(line.scores(epochs, measure).values()))
    # Without areas by image nothing tells how much the choice of images makes: no comparisons.
    comparisons = _comparisons(lines, best, epochs, measure) if measure.areas else []
    controls = [c for c in comparisons if c.is_control]
    others = [c for c in comparisons if not c.is_control]
    return Answer(
        measure=measure,
        chart=chart,
        sentences=[
            _about_best(best, epochs, measure, is_alone=len(trained) == 1),
            *_verdicts(others),
            *(_about_scratch(best, lines, epochs, measure) if measure.areas else ()),
            *_about_cost(others),
        ],
        remarks=_warnings(others),
        objects=_about_objects(controls),
        doubts=_warnings(controls),
        comparisons=comparisons,
        differences=_difference_table(comparisons) if comparisons else None,
        levels=_level_table(lines, epochs, measure),
    )


def _comparisons(
    lines: Sequence[Line], best: Line, epochs: int, measure: Measure
) -> list[Comparison]:
    """All against the reference, the best against scratch, own segments against their controls."""
    trained = {line.label: line for line in lines if not line.is_baseline}
    controls = [
        (own, line)
        for line in trained.values()
        if (own := trained.get(line.family)) and own is not line
    ]
    others = [line for line in trained.values() if line not in [control for _, control in controls]]
    reference = next((line for line in others if line.method == REFERENCE), others[0])
    pairs = [(line, reference) for line in others if line is not reference]
    pairs += [(best, line) for line in lines if line.method == "scratch"]
    found = [_compare(*pair, epochs, measure, is_control=False) for pair in pairs]
    found += [_compare(*pair, epochs, measure, is_control=True) for pair in controls]
    judged = []
    for question in dict.fromkeys(c.question for c in found):
        asked = [c for c in found if c.question == question]
        p_values = [c.difference.p_value if c.difference and c.seeds > 1 else 1.0 for c in asked]
        judged += [replace(c, p_value=p) for c, p in zip(asked, holm(p_values), strict=True)]
    return judged


def _compare(
    first: Line, second: Line, epochs: int, measure: Measure, *, is_control: bool
) -> Comparison:
    one, two = first.scores(epochs, measure), second.scores(epochs, measure)
    seeds = sorted(one.keys() & two.keys())
    one_drawn, two_drawn = first.drawn(epochs, measure), second.drawn(epochs, measure)
    # The draws are the same images for both: differences are paired by seed and by image.
    drawn = [one_drawn[s] - two_drawn[s] for s in seeds] if one_drawn and two_drawn else None
    cost = [line.cost(epochs, "train_flops") for line in (first, second)]
    return Comparison(
        first=first,
        second=second,
        is_control=is_control,
        seeds=len(seeds),
        difference=interval([one[seed] - two[seed] for seed in seeds], drawn),
        cost_ratio=cost[0] / cost[1] if cost[0] and cost[1] else None,
    )


def _about_best(best: Line, epochs: int, measure: Measure, *, is_alone: bool) -> str:
    level = best.level(epochs, measure)
    text = f"{level.score:.2f}" + ("" if math.isinf(measure.most) else "%")
    if level.spread:
        within = level.spread.within(measure.most)
        text += f" (95% interval {within}, {level.seeds} seeds)"
    return (
        f"After {epochs} {'epoch' if epochs == 1 else 'epochs'} of pretraining, by "
        f"{measure.words}, {best.label} {'reaches' if is_alone else 'is highest:'} {text}."
    )


def _verdicts(comparisons: Sequence[Comparison]) -> list[str]:
    """A sentence for each verdict, which names all that share it; controls by their source."""
    groups: dict[str, list[Comparison]] = {}
    for c in comparisons:
        against = "" if c.is_control else f" {c.second.label}"
        groups.setdefault(_VERDICTS[c.state] + against, []).append(c)
    sentences = []
    for verdict, found in groups.items():
        named = "; ".join(f"{c.name} ({c.numbers})" for c in found)
        sentences.append(f"{verdict}: {named}.")
        would = [c.difference.detectable for c in found if c.difference and c.state == "none"]
        if would:
            words = "points or more would have been shown with 80% probability."
            sentences[-1] += f" {max(would):.2f} {words}"
    return sentences


def _about_scratch(best: Line, lines: Sequence[Line], epochs: int, measure: Measure) -> list[str]:
    """How far pretraining leads out of what the seeds of a random encoder do."""
    scratch = next((line for line in lines if line.method == "scratch"), None)
    scores = list(scratch.scores(epochs, measure).values()) if scratch else []
    if len(scores) < 3 or not stdev(scores):
        return []
    above = (fmean(best.scores(epochs, measure).values()) - fmean(scores)) / stdev(scores)
    where = f"{abs(above):.1f} standard deviations of the {len(scores)} scratch seeds"
    return [f"{best.label} lies {where} {'above' if above > 0 else 'below'} their mean."]


def _about_cost(comparisons: Sequence[Comparison]) -> list[str]:
    """Which comparisons with the reference are at equal cost."""
    said = [
        f"{c.first.label} {c.cost_ratio:.2f} x "
        f"({'equal cost' if abs(c.cost_ratio - 1) <= _EQUAL_COST else 'equal epochs only'})"
        for c in comparisons
        if c.cost_ratio
    ]
    known = next((c.second.label for c in comparisons if c.cost_ratio), "")
    return [f"Training FLOPs against {known}: {', '.join(said)}."] if said else []


def _about_objects(controls: Sequence[Comparison]) -> list[str]:
    """What it makes that the image's own segment is hidden: a sentence for each method."""
    sentences = []
    for own in dict.fromkeys(c.first.label for c in controls):
        found = [c for c in controls if c.first.label == own]
        states = {c.state for c in found}
        if "unknown" in states:
            verdict = "not known"
        elif states == {"better"}:
            verdict = "yes, the image's own segment is better than every control"
        elif "worse" in states:
            verdict = "no, the image's own segment is worse than a control"
        elif "better" in states:
            verdict = "in part, the image's own segment is better than some controls"
        else:
            verdict = "not shown"
        sentences.append(f"{own}: {verdict}. {' '.join(_verdicts(found))}")
    return sentences


def _warnings(comparisons: Sequence[Comparison]) -> list[str]:
    """What speaks against trusting the comparisons."""
    remarks = []
    for seeds, words in ((1, "There is one seed"), (0, "There is no seed")):
        few = [f"{c.first.label} and {c.second.label}" for c in comparisons if c.seeds == seeds]
        if few:
            all_of = "per method" if len(few) == len(comparisons) else f"for {', '.join(few)}"
            remarks.append(
                f"{words} in common {all_of}, so nothing tells a real difference from chance: "
                "run several, such as --seed 0,1,2."
            )
    if any(c.difference and not c.difference.of_images for c in comparisons):
        remarks.append(
            "Scores of an earlier version came without areas by image: intervals hold chance "
            "between seeds only, not that in the choice of images."
        )
    return remarks


def _difference_table(comparisons: Sequence[Comparison]) -> Table:
    """A row for each comparison, with its interval as a bar on an axis that all have in common."""
    drawn = [c.difference for c in comparisons if c.difference and not c.second.is_baseline]
    widest = 1.05 * max((max(abs(d.low), abs(d.high)) for d in drawn), default=1.0)
    rows = []
    for c in comparisons:
        found, numbers, detectable, bar = c.difference, ["", ""], "", Markup()
        if found:
            numbers = [f"{found.value:+.2f}", f"{found.low:+.2f} to {found.high:+.2f}"]
            detectable = f"{found.detectable:.2f}" if c.seeds > 1 else ""
            # Pretraining leads so far that the others' bars would be dots beside a baseline's.
            bar = Markup() if c.second.is_baseline else interval_bar(found, widest)
        cost = f"{c.cost_ratio:.2f} x" if c.cost_ratio else ""
        verdict = {"none": "no difference shown", "unknown": "none: too few seeds"}
        rows.append(
            [c.first.label, c.second.label, bar, *numbers, detectable, str(c.seeds), cost]
            + [verdict.get(c.state, c.state)]
        )
    return Table(
        columns=["method", "against", "", "difference", "95% interval", "detectable", "seeds",
                 "FLOPs", "verdict"],
        rows=rows,
        looks={index: c.state for index, c in enumerate(comparisons)},
    )  # fmt: skip


def _level_table(lines: Sequence[Line], epochs: int, measure: Measure) -> Table:
    rows = []
    for line in lines:
        if line.scores(epochs, measure):
            level = line.level(epochs, measure)
            within = level.spread.within(measure.most) if level.spread else ""
            costs = [cost_text(name, line.cost(epochs, name)) for name in COST]
            rows.append([line.label, f"{level.score:.2f}", within, str(level.seeds), *costs])
    columns = ["method", measure.unit, "95% interval", "seeds", *COST.values()]
    return Table(columns=columns, rows=rows)


def _chart(lines: Sequence[Line], measure: Measure) -> Markup:
    """Over epochs, device-hours and FLOPs, as far as they are known."""
    levels = {
        line.label: {at: line.level(at, measure) for at in line.epochs(measure)} for line in lines
    }
    known = [level.spread for of_line in levels.values() for level in of_line.values()]
    widths = [spread.high - spread.low for spread in known if spread]
    least = min(_LEAST_SPAN, 4 * max(widths)) if len(widths) == len(known) else _LEAST_SPAN
    most = max(line.cost(at, "train_flops") or 0 for line in lines for at in levels[line.label])
    power = math.floor(math.log10(most or 1))
    views = {
        title: _series(lines, levels, name, unit)
        for title, name, unit in (
            ("epochs of pretraining", "", 1.0),
            ("device-hours of pretraining", "device_hours", 1.0),
            (f"training FLOPs (x 1e{power})", "train_flops", 10.0**power),
        )
    }
    caption = f"{measure.unit.split(' (')[0]} by {measure.words}, against pretraining."
    caption = caption[0].upper() + caption[1:]
    if widths:
        caption += " Points are means over seeds, bars their 95% intervals."
    return line_chart(
        views, caption, y_title=measure.unit, least_span=least, limits=(0.0, measure.most),
        sizes=(NARROW, WIDE),
    )  # fmt: skip


def _series(
    lines: Sequence[Line], levels: Mapping[str, Mapping[int, Level]], cost: str, unit: float
) -> list[Series]:
    """The lines over a cost where it is known, or over epochs; a baseline is a level."""
    series, last = [], 0.0
    for line in sorted(lines, key=lambda line: line.is_baseline):  # when the last x is known
        points = []
        for at, level in levels[line.label].items():
            spread, x = level.spread, line.cost(at, cost) if cost else at
            ends = {"low": spread.low, "high": spread.high} if spread else {}
            places = [0.0, last] if line.is_baseline and last else [] if x is None else [x / unit]
            points += [Point(x=x, y=level.score, **ends) for x in places]
        last = max([last, *(point.x for point in points)])
        series.append(Series(label=line.label, points=points, style=line.style))
    return series
