"""Two lines compared by their seeds and images, and corrected for how many comparisons a report makes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import NamedTuple

from common.areas import LEAST_IMAGES
from pipeline.report.scores import REFERENCE, Level, Line
from pipeline.report.statistics import CONFIDENCE, Interval, holm, holm_levels, interval

CONFIRMATORY = "confirmatory"  # what a frozen plan asks for
# State of a comparison -> in a table and on the page; beyond the first look it is a hint.
STATES = {
    "better": "better", "worse": "worse", "higher": "higher, a hint", "lower": "lower, a hint",
    "none": "not shown", "unknown": "no verdict",
}  # fmt: skip


class Comparison(NamedTuple):
    """Two lines, by the seeds that both have."""

    first: Line
    second: Line
    is_control: bool  # whether they differ in nothing but whose segments are hidden
    by_seed: Mapping[int, float]  # first - second
    # Their mean with the interval that the verdict stands on; None where nothing gives one.
    difference: Interval | None = None
    why_not: str = ""  # there is no verdict
    cost_ratio: float | None = None  # training FLOPs of the first for one of the second
    p_value: float = 1.0  # corrected for the number of comparisons in the report
    family: int = 1  # comparisons that it is corrected for, itself among them
    plan: str = ""  # confirmatory or exploratory, where a plan was frozen
    is_first_look: bool = True  # others are hints: who looks often enough finds something

    @property
    def value(self) -> float | None:
        """The mean difference; None where they have no seed in common."""
        return fmean(self.by_seed.values()) if self.by_seed else None

    @property
    def seeds(self) -> int:
        """How many they have in common."""
        return len(self.by_seed)

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
    def kind(self) -> str:
        """What is asked: object or not, which method, what pretraining gains, which directory."""
        if self.is_control or self.second.is_baseline:
            return "objects" if self.is_control else "start"
        is_twin = self.first.home != self.second.home and self.first.method == self.second.method
        return "directory" if is_twin else "method"

    @property
    def shown(self) -> Interval | None:
        """The interval, where a verdict stands on it: of one seed there is only that of the images."""
        return None if self.state == "unknown" else self.difference

    @property
    def against(self) -> str:
        """What it is compared with, in as few words as tell it beside the first."""
        if self.is_control:
            return self.second.source
        return "untrained" if self.second.is_untrained else self.second.label

    @property
    def numbers(self) -> str:
        """The difference with its interval, or why there is none."""
        said = "" if self.value is None else f"{self.value:+.2f}"
        if self.shown is None:
            return f"{said}, {self.why_not}" if said else self.why_not
        return f"{said} ({self.shown.low:+.2f} to {self.shown.high:+.2f})"


def compare(
    lines: Sequence[Line], levels: Mapping[str, Level], primary: Collection[tuple[str, str]] = ()
) -> list[Comparison]:
    """Methods with plain MAE, own segments with their controls, all with what is not pretrained.

    All are one family, that of the report: a report makes a false claim in 5% of cases at most. Those
    that were asked for beforehand (`primary`) are a family of their own, which alone makes claims.
    Controls against scratch count, and are not told: the best of them was chosen for being best.
    """
    trained = {line.label: line for line in lines if not line.is_baseline}
    # A control's family bears the name of its own line; without that line, it is one of the others.
    own = {label: trained.get(line.family, line) for label, line in trained.items()}
    others = [line for label, line in trained.items() if own[label] is line]
    references = [line for line in others if line.method == REFERENCE] or others
    scratches = [line for line in lines if line.method == "scratch"]

    def of_home(line: Line, found: Sequence[Line]) -> Line | None:
        return next((one for one in found if one.home == line.home), next(iter(found), None))

    pairs = [(line, of_home(line, references), False) for line in others]
    # The same method in another directory is what the two directories are compared by.
    twins = {_name(line): line for line in reversed(others)}
    pairs += [(line, twins[_name(line)], False) for line in others]
    untrained = [line for line in lines if line.is_untrained]
    starts = [(line, [u for u in untrained if u.method == line.method]) for line in others]
    pairs += [(line, of_home(line, found), False) for line, found in starts]
    pairs += [(line, of_home(line, scratches), False) for line in trained.values()]
    pairs += [(own[label], line, True) for label, line in trained.items()]
    made = dict.fromkeys((one, two, no) for one, two, no in pairs if two is not None and one is not two)
    known = {(one.label, two.label): (one, two, no) for one, two, no in made}
    by_label = {line.label: line for line in lines}
    asked = [
        known.pop((one, two), (by_label[one], by_label[two], False))
        for one, two in primary
        if one in by_label and two in by_label
    ]
    judged = _family(asked, levels, CONFIRMATORY) + _family([*known.values()], levels, "")
    return [c for c in judged if c.second.method != "scratch" or c.first in others or c.plan]


def _family(
    pairs: Sequence[tuple[Line, Line, bool]], levels: Mapping[str, Level], plan: str
) -> list[Comparison]:
    """Compared, and corrected for their number."""
    found = [_compared(first, second, is_control, levels, len(pairs)) for first, second, is_control in pairs]
    p_values = [c.difference.p_value if c.difference and not c.why_not else 1.0 for c in found]
    judged = zip(found, holm(p_values), holm_levels(p_values), strict=True)
    return [_at_level(c, levels, among)._replace(p_value=p, plan=plan) for c, p, among in judged]


def _name(line: Line) -> str:
    return line.label.removesuffix(f" ({line.home})")


def _difference(c: Comparison, levels: Mapping[str, Level], among: int = 1) -> Interval | None:
    """By the seeds that both have; both were drawn on the same images."""
    one, two = levels[c.first.label].drawn, levels[c.second.label].drawn
    drawn = [one[s] - two[s] for s in c.by_seed] if one and two else None
    return interval(list(c.by_seed.values()), drawn, among=among)


def _at_level(c: Comparison, levels: Mapping[str, Level], among: int) -> Comparison:
    """With the interval that holds 0 unless the corrected p-value shows a difference."""
    found = _difference(c, levels, among) if c.difference else None
    if found is None or c.difference is None:
        return c
    return c._replace(difference=replace(c.difference, low=found.low, high=found.high))


def _compared(
    first: Line, second: Line, is_control: bool, levels: Mapping[str, Level], count: int
) -> Comparison:
    """With its own p-value; what could be told from 0 is that of one among `count`."""
    one, two = levels[first.label], levels[second.label]
    seeds = sorted(one.scores.keys() & two.scores.keys())
    c = Comparison(first, second, is_control, {s: one.scores[s] - two.scores[s] for s in seeds}, family=count)
    found, in_family = _difference(c, levels), _difference(c, levels, count)
    if found and in_family:
        found = replace(found, detectable=in_family.detectable)
    draws = [one.drawn[s] for s in seeds] if one.drawn and two.drawn else []
    why_not = (
        f"{len(seeds) or 'no'} seed in common" if len(seeds) < 2
        else "scored on different validation images" if len((one.images | two.images) - {None}) > 1
        else f"fewer than {LEAST_IMAGES} validation images" if draws and not len(draws[0])
        else "nothing varies" if found is None else ""
    )  # fmt: skip
    cost, other = one.costs["train_flops"], two.costs["train_flops"]
    ratio = cost / other if cost and other else None
    return c._replace(difference=found, why_not=why_not, cost_ratio=ratio)
