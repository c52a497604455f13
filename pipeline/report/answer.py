"""What the scores say, in sentences that follow from intervals: better, worse, or not shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from pipeline.report.charts import Point, Series, line_chart
from pipeline.report.curves import REFERENCE, Line, last_common_epochs
from pipeline.report.results import Measure
from pipeline.report.statistics import CONFIDENCE, Estimate, estimate, holm

_LEAST_SPAN = 5.0  # points of a score's axis, unless intervals are narrower
_EQUAL_COST = 0.02  # share by which training FLOPs may differ
_VERDICTS = {
    "better": "Better than",
    "worse": "Worse than",
    "none": "No difference shown to",
    "unknown": "No verdict against",
}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two lines after the same epochs, by the seeds that both have."""

    first: Line
    second: Line
    is_control: bool
    """Whether they differ in nothing but whose segments are hidden."""
    seeds: int
    difference: Estimate | None
    """first - second; None where they have no seed in common, or nothing gives an interval."""
    cost_ratio: float | None
    """Training FLOPs of the first for one of the second."""
    p_value: float = 1.0
    """Corrected for the number of comparisons with the same question."""

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


def answer(every_line: Sequence[Line], measure: Measure) -> dict[str, Any] | None:
    """Sentences, warnings, tables and chart of one measure; None where nothing was scored by it."""
    lines = [line for line in every_line if line.epochs(measure)]
    trained = [line for line in lines if not line.is_baseline]
    if not lines:
        return None
    found: dict[str, Any] = {"measure": measure, "chart": _chart(lines, measure)}
    epochs = last_common_epochs(lines, measure)
    if epochs is None:
        said = "The methods have not been evaluated at a common epoch yet."
        return {**found, "sentences": [said] if trained else []}
    best = max(trained, key=lambda line: fmean(line.scores(epochs, measure).values()))
    highest = "reaches" if len(trained) == 1 else "is highest:"
    found["sentences"] = [
        f"After {epochs} {'epoch' if epochs == 1 else 'epochs'} of pretraining, by "
        f"{measure.words}, {best.label} {highest} {_level(best, epochs, measure)}."
    ]
    found |= {"levels": [line for line in lines if line.scores(epochs, measure)], "epochs": epochs}
    if not measure.areas:
        return found
    comparisons = _comparisons(lines, best, epochs, measure)
    controls = [c for c in comparisons if c.is_control]
    others = [c for c in comparisons if not c.is_control]
    found["remarks"], found["doubts"] = _warnings(others), _warnings(controls)
    found["sentences"] += _verdicts(others) + _about_scratch(best, lines, epochs, measure)
    found["sentences"] += _about_cost(others)
    found["objects"] = _about_objects(controls)
    drawn = [c.difference for c in comparisons if c.difference and not c.second.is_baseline]
    widest = max((max(abs(e.low), abs(e.high)) for e in drawn), default=1.0)
    return {**found, "differences": comparisons, "widest": 1.05 * widest}


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
    others = [line.drawn(epochs, measure) for line in (first, second)]
    drawn = [others[0][s] - others[1][s] for s in seeds] if others[0] and others[1] else None
    cost = [line.cost(epochs, "train_flops") for line in (first, second)]
    return Comparison(
        first=first,
        second=second,
        is_control=is_control,
        seeds=len(seeds),
        difference=estimate([one[seed] - two[seed] for seed in seeds], drawn),
        cost_ratio=cost[0] / cost[1] if cost[0] and cost[1] else None,
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


def _level(line: Line, epochs: int, measure: Measure) -> str:
    scores, found = line.scores(epochs, measure), line.estimate(epochs, measure)
    text = f"{fmean(scores.values()):.2f}" + ("" if math.isinf(measure.most) else "%")
    if len(scores) == 1 or found is None:
        return text
    return f"{text} (95% interval {found.within(measure.most)}, {len(scores)} seeds)"


def _chart(lines: Sequence[Line], measure: Measure) -> str:
    """Over epochs, device-hours and FLOPs, as far as they are known."""
    found = {
        line.label: {at: line.estimate(at, measure) for at in line.epochs(measure)}
        for line in lines
    }
    known = [e for estimates in found.values() for e in estimates.values()]
    widths = [e.high - e.low for e in known if e and e.seeds > 1]
    least = min(_LEAST_SPAN, 4 * max(widths)) if len(widths) == len(known) else _LEAST_SPAN
    most = max(line.cost(e, "train_flops") or 0 for line in lines for e in found[line.label])
    power = math.floor(math.log10(most or 1))
    views = {
        title: _series(lines, found, measure, name, unit)
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
    limits = (0.0, measure.most)
    return line_chart(views, caption, y_title=measure.unit, least_span=least, limits=limits)


def _series(
    lines: Sequence[Line],
    found: dict[str, dict[int, Estimate | None]],
    measure: Measure,
    cost: str,
    unit: float,
) -> list[Series]:
    """The lines over a cost where it is known, or over epochs; a baseline is a level."""
    series, last = [], 0.0
    for line in sorted(lines, key=lambda line: line.is_baseline):
        points = []
        for at, known in found[line.label].items():
            scores, x = line.scores(at, measure), line.cost(at, cost) if cost else at
            ends = {"low": known.low, "high": known.high} if known and known.seeds > 1 else {}
            places = [0.0, last] if line.is_baseline and last else [] if x is None else [x / unit]
            points += [Point(x=x, y=fmean(scores.values()), **ends) for x in places if scores]
        last = max([last, *(point.x for point in points)])
        series.append(Series(label=line.label, points=points, style=line.style))
    return series
