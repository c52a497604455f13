"""What the scores say, in sentences that follow from intervals: better, worse, or not shown."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

from pipeline.report.figures import Chart, Point, Series, line_chart
from pipeline.report.scores import FINETUNING, REFERENCE, Level, Line, Measure, last_common_epochs
from pipeline.report.statistics import CONFIDENCE, Interval, holm, interval
from pipeline.report.tables import Table, cost_cells

_LEAST_SPAN = 5.0  # points of a score's axis, unless intervals are narrower
_EQUAL_COST = 0.02  # share by which training FLOPs may differ
# State of a comparison -> how its sentence begins, and its cell of the table.
_VERDICTS = {
    "better": ("Better than", "better"),
    "worse": ("Worse than", "worse"),
    "none": ("No difference shown to", "no difference shown"),
    "unknown": ("No verdict against", "none: too few seeds"),
}


class Comparison(NamedTuple):
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
    def state(self) -> str:
        """better, worse, none (no difference shown) or unknown (fewer than two seeds)."""
        if self.difference is None or self.seeds < 2:
            return "unknown"
        if self.p_value >= 1 - CONFIDENCE:
            return "none"
        return "better" if self.difference.value > 0 else "worse"

    @property
    def words(self) -> str:
        """What tells it from others with the same question, and the difference."""
        control = self.second.label.removeprefix(self.first.label).strip()
        name, found = control if self.is_control else self.first.label, self.difference
        if found is None or self.state == "unknown":
            said = f"{found.value:+.2f} points from " if found else ""
            return f"{name} ({said}{self.seeds or 'no'} seed in common)"
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


def answer(every_line: Sequence[Line], measure: Measure) -> Answer | None:
    """Sentences, warnings, tables and chart of one measure; None where nothing was scored by it."""
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
    controls, others = [c for c in found if c.is_control], [c for c in found if not c.is_control]
    sentences = [_about_best(best.label, levels[best.label], epochs, measure, len(trained) == 1)]
    if measure.areas:
        scratch = next((levels[line.label] for line in lines if line.method == "scratch"), None)
        sentences += _verdicts(others) + _about_scratch(best.label, levels[best.label], scratch)
        sentences += _about_cost(others)
    level_rows = [
        {"method": label, measure.unit: f"{level.score:.2f}",
         "95% interval": level.spread.within(measure.most) if level.spread else "",
         "seeds": str(len(level.scores)), **cost_cells(level.costs)}
        for label, level in levels.items()
    ]  # fmt: skip
    return Answer(
        sentences, measure, chart, _warnings(others), _about_objects(controls), _warnings(controls),
        found, _difference_table(found) if found else None, Table(level_rows),
    )  # fmt: skip


def _comparisons(lines: Sequence[Line], best: Line, levels: Mapping[str, Level]) -> list[Comparison]:
    """All against the reference, the best against scratch, own segments against their controls."""
    trained = {line.label: line for line in lines if not line.is_baseline}
    # A control's family bears the name of its own line; without that line, it is one of the others.
    own = {label: trained.get(line.family, line) for label, line in trained.items()}
    others = [line for label, line in trained.items() if own[label] is line]
    reference = next((line for line in others if line.method == REFERENCE), others[0])
    pairs = [(line, reference, False) for line in others if line is not reference]
    pairs += [(best, line, False) for line in lines if line.method == "scratch"]
    pairs += [(own[label], line, True) for label, line in trained.items() if own[label] is not line]
    found, judged = [], []
    for first, second, is_control in pairs:
        one, two = levels[first.label], levels[second.label]
        seeds = sorted(one.scores.keys() & two.scores.keys())
        # Both were drawn on the same images: differences are paired by seed and by image.
        drawn = [one.drawn[s] - two.drawn[s] for s in seeds] if one.drawn and two.drawn else None
        difference = interval([one.scores[seed] - two.scores[seed] for seed in seeds], drawn)
        cost, other = one.costs["train_flops"], two.costs["train_flops"]
        ratio = cost / other if cost and other else None
        found.append(Comparison(first, second, is_control, len(seeds), difference, ratio))
    for question in dict.fromkeys(c.question for c in found):
        asked = [c for c in found if c.question == question]
        p_values = [c.difference.p_value if c.difference and c.seeds > 1 else 1.0 for c in asked]
        judged += [c._replace(p_value=p) for c, p in zip(asked, holm(p_values), strict=True)]
    return judged


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


def _about_best(label: str, level: Level, epochs: int, measure: Measure, is_alone: bool) -> str:
    score = f"{level.score:.2f}" + ("" if math.isinf(measure.most) else "%")
    if level.spread:
        within = level.spread.within(measure.most)
        score += f" (95% interval {within}, {len(level.scores)} seeds)"
    after = f"After {epochs} {'epoch' if epochs == 1 else 'epochs'} of pretraining"
    verb = "reaches" if is_alone else "is highest:"
    return f"{after}, by {measure.words}, {label} {verb} {score}."


def _about_scratch(best: str, level: Level, scratch: Level | None) -> list[str]:
    """How far pretraining leads out of what the seeds of a random encoder do."""
    scores = list(scratch.scores.values()) if scratch else []
    if len(scores) < 3 or not stdev(scores):
        return []
    above = (level.score - fmean(scores)) / stdev(scores)
    where = f"{abs(above):.1f} standard deviations of the {len(scores)} scratch seeds"
    return [f"{best} lies {where} {'above' if above > 0 else 'below'} their mean."]


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
    for own in dict.fromkeys(c.question for c in controls):
        found = [c for c in controls if c.question == own]
        states = {c.state for c in found}
        verdict = (
            "not known" if "unknown" in states
            else "yes, the image's own segment is better than every control" if states == {"better"}
            else "no, the image's own segment is worse than a control" if "worse" in states
            else "not shown" if "better" not in states
            else "in part, the image's own segment is better than some controls"
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
            "difference": f"{d.value:+.2f}" if d else "",
            "95% interval": f"{d.low:+.2f} to {d.high:+.2f}" if d else "",
            "detectable": f"{d.detectable:.2f}" if d and c.seeds > 1 else "",
            "seeds": str(c.seeds), "FLOPs": f"{c.cost_ratio:.2f} x" if c.cost_ratio else "",
            "verdict": _VERDICTS[c.state][1],
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
