"""What the scores say, as verdicts that follow from intervals: better, worse, or not shown."""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from pipeline.plan.budget import in_words
from pipeline.plan.layout import OWN
from pipeline.report.comparisons import CONFIRMATORY, STATES, Comparison, compare
from pipeline.report.scores import FINETUNING, MEASURES, Level, Line, Measure, compared_epochs
from pipeline.report.statistics import LEAST_VARIANCE

_EQUAL_COST = 0.02  # share by which training FLOPs may differ
_MOST_NAMES = 3  # in a warning


class Question(NamedTuple):
    """What a frozen plan asks: the differences of which lines, by their labels, by which measure."""

    pairs: Collection[tuple[str, str]]
    measure: str


class Said(NamedTuple):
    """An answer to one question about one method."""

    state: str  # of STATES, or "" where it was not asked
    short: str
    parts: Sequence[str] = ()  # each comparison with its numbers


class Verdict(NamedTuple):
    """All that is asked of one method."""

    line: Line
    level: Level
    objects: Said  # whether it matters that the image's own segment is hidden
    reference: Said  # whether it is better than plain MAE
    start: Said  # whether pretraining helps
    directory: Said  # whether it is better than in another directory


class Answer(NamedTuple):
    """What one measure says."""

    sentences: Sequence[str]
    measure: Measure = FINETUNING
    epochs: str = ""  # after which, in words
    verdicts: Sequence[Verdict] = ()
    remarks: Sequence[str] = ()  # what speaks against trusting them
    comparisons: Sequence[Comparison] = ()
    ends: Mapping[str, int] = {}  # label -> epochs completed where it is compared
    levels: Mapping[str, Level] = {}
    where: str = ""  # it is compared, unless at the ends

    @property
    def short(self) -> str:
        """As a column's title."""
        return f"{self.measure.short}, {self.where}" if self.where else self.measure.short


def answers(lines: Sequence[Line], question: Question | None = None) -> list[Answer]:
    """What the measures say: complete finetuning first, the probes where there is none yet.

    One of them is looked at first, at the end of pretraining: the others say what differs as a hint.
    With a question that was frozen, that is the first look, and all else is a hint.
    """
    scored = [one for one in MEASURES.values() if any(line.epochs(one) for line in lines)]
    asked = next((one for one in scored if one.areas), FINETUNING)
    asked = MEASURES[question.measure] if question else asked
    reached, planned = compared_epochs(lines, asked), max((line.end for line in lines), default=0)
    is_early = any(0 < reached.get(line.label, 0) < line.end for line in lines)
    first_look = f"{asked.words} after {planned} epochs" if is_early else asked.words
    looks = ((one, "" if one is asked and not is_early else first_look) for one in scored)
    pairs = None if question is None else question.pairs
    found = [
        one
        for measure, look in looks
        if (one := answer(lines, measure, first_look=look, primary=() if look and pairs else pairs))
    ]
    # Budgets end at different epochs: where all were scored after equal ones, that is told, too.
    trained = [line for line in lines if not line.is_baseline and line.epochs(asked)]
    equal = set.intersection(*(set(line.epochs(asked)) for line in trained)) - {0} if trained else set()
    if equal and len({line.exact_end for line in trained if line.spends}) > 1:
        told: Any = {"first_look": first_look, "primary": () if pairs else None, "at": max(equal)}
        found += [one for one in [answer(lines, asked, **told)] if one]
    first, *others = sorted(
        found or [Answer([])], key=lambda one: (not one.sentences, one.measure is not asked)
    )
    if not first.sentences:
        first = first._replace(sentences=["No evaluation has finished yet."])
    elif FINETUNING not in scored:
        said = "No finetuning has been scored yet; this is what frozen probes say."
        first = first._replace(sentences=[*first.sentences, said])
    return [first, *others]


def answer(
    every_line: Sequence[Line], measure: Measure, *, first_look: str = "",
    primary: Collection[tuple[str, str]] | None = None, at: int = 0,
) -> Answer | None:  # fmt: skip
    """Verdicts and warnings of one measure; None where nothing was scored by it.

    first_look: what is looked at first, in words, where that is not this. primary: labels of the
    differences that a frozen plan asks for; None without one. at: epochs to compare after, in place
    of the ends.
    """
    lines = [line for line in every_line if line.epochs(measure)]
    trained = [line for line in lines if not line.is_baseline]
    if not lines:
        return None
    ends = {line.label: at for line in lines} if at else compared_epochs(lines, measure)
    if not trained or not ends:
        missing = "The methods have not been evaluated at a common epoch yet."
        return Answer([missing] if trained else [], measure)
    levels = {line.label: line.level(ends[line.label], measure) for line in lines}
    # Without areas by image nothing tells how much the choice of images makes: no comparisons.
    found = compare(lines, levels, primary or ()) if measure.areas else []
    is_free = primary is None  # nothing was frozen: all of the first look counts
    found = [c._replace(is_first_look=not first_look and (is_free or c.plan == CONFIRMATORY)) for c in found]
    found = [c._replace(plan="" if is_free else c.plan or "exploratory") for c in found]
    after = _after(sorted({ends[line.label] for line in trained}))
    sentences = [_headline(found, trained, levels, f"{after}, by {measure.words}", measure)]
    of_own = [line for line in trained if not any(c.is_control and c.second is line for c in found)]
    verdicts = [_verdict(line, found, levels) for line in of_own] if found else []
    planned = [c for c in found if c.plan == CONFIRMATORY]
    told = (f"{c.first.label} against {c.against} {c.numbers}, {STATES[c.state]}" for c in planned)
    sentences += [f"Asked for beforehand: {one}." for one in told]
    sentences += _about_objects(verdicts) + _ranking(lines, levels, measure)
    remarks = [
        f"What is looked at first is {first_look}. Whatever else differs is a hint, no finding."
    ] if first_look and found else []  # fmt: skip
    if at:
        remarks.append(
            f"After {at} epochs of each: there they have spent different amounts, and stand at different "
            "places of their schedules."
        )
    elif asked := {_budget_of(line) for line in trained if line.spends}:
        said = "; ".join(sorted(asked))
        remarks.append(f"Compared at equal shares of the budget, each by its own schedule: {said}.")
    elif len({ends[line.label] for line in trained}) > 1:
        runs = ", ".join(dict.fromkeys(f"{line.home}: {ends[line.label]}" for line in trained))
        remarks.append(
            f"The runs end after different epochs ({runs}). Each is compared at its end: differences "
            "are those of whole runs, not of equal epochs."
        )
    remarks += [] if at else _warnings(found)
    where = "equal epochs" if at else ""
    return Answer(sentences, measure, after, verdicts, remarks, found, ends, levels, where)


def _budget_of(line: Line) -> str:
    assert line.spends is not None
    return in_words(line.spends["asked"], counts_segments=line.spends["count_segments"])


def _after(epochs: Sequence[int]) -> str:
    if len(epochs) > 1:
        return f"At the end of pretraining ({epochs[0]} to {epochs[-1]} epochs)"
    return f"After {epochs[0]} {'epoch' if epochs[0] == 1 else 'epochs'} of pretraining"


# In words -----------------------------------------------------------------------------------------


def _headline(
    comparisons: Sequence[Comparison], trained: Sequence[Line], levels: Mapping[str, Level],
    where: str, measure: Measure,
) -> str:  # fmt: skip
    """Names nobody as better without a verdict."""
    if len(trained) == 1:
        level = levels[trained[0].label]
        return f"{where}, {trained[0].label} reaches {_score(level, measure)}."
    asked = [c for c in comparisons if c.kind == "method"]
    seconds = list(dict.fromkeys(c.second.label for c in asked))
    methods = dict.fromkeys(c.second.method for c in asked)
    against, said = seconds[0] if seconds else "", list[str]()
    if len(seconds) > 1:  # each directory has its own
        against = f"{_listed(methods)} of the same directory"
    if asked and not any(c.state in ("better", "higher") for c in asked):
        said.append(f"no method is shown better than {against}")
    for state, words in (
        ("better", f"shown better than {against}"), ("higher", f"higher, as a hint, than {against}"),
        ("worse", f"shown worse than {against}"), ("lower", f"lower, as a hint, than {against}"),
    ):  # fmt: skip
        if names := [c.first.label for c in asked if c.state == state]:
            said.append(f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {words}")
    scratch = [c for c in comparisons if c.second.method == "scratch" and c.value is not None]
    if below := [c for c in scratch if (c.value or 0) < 0]:
        in_words = STATES | {"worse": "shown", "lower": "a hint"}
        told = [(in_words[c.state], c.first.label) for c in below]
        each = _grouped(told) if len({word for word, _ in told}) > 1 else told[0][0]
        how = "" if each == "shown" else f" ({each})"
        who = "all" if len(below) == len(scratch) > 1 else _listed([c.first.label for c in below])
        said.append(f"{who} {'lies' if len(below) == 1 else 'lie'} below scratch{how}")
    if not said:
        own = [line for line in trained if line.source == OWN] or trained
        said = [f"{line.label} reaches {_score(levels[line.label], measure)}" for line in own[:_MOST_NAMES]]
    return f"{where}, {'; '.join(said)}."


def _grouped(told: Iterable[tuple[str, str]]) -> str:
    """What is said of labels, each once: "yes for a and b; not shown for c"."""
    labels: dict[str, list[str]] = {}
    for said, label in told:
        labels.setdefault(said, []).append(label)
    return "; ".join(f"{said} for {_listed(of)}" for said, of in labels.items())


def _about_objects(verdicts: Sequence[Verdict]) -> list[str]:
    """What it makes that the image's own segment is hidden, by all that is asked of it."""
    said = _grouped((v.objects.short, v.line.label) for v in verdicts if v.objects.state)
    return [f"That what is hidden is an object matters: {said}."] if said else []


def _ranking(lines: Sequence[Line], levels: Mapping[str, Level], measure: Measure) -> list[str]:
    """Means over the seeds that all have: those over others rank the seeds, not the methods."""
    ranked = [line for line in lines if not line.is_untrained]
    if len(ranked) < 2 or math.isinf(measure.most):
        return []
    for group in (ranked, [line for line in ranked if not line.is_baseline]):
        if seeds := set.intersection(*(set(levels[line.label].scores) for line in group)):
            break
    else:
        return ["No seed is common to all, so their means are not ranked."]
    ranked = group
    means = {one.label: fmean(levels[one.label].scores[s] for s in seeds) for one in ranked}
    order = sorted(means, key=lambda label: -means[label])
    which = f"the seed {min(seeds)}" if len(seeds) == 1 else f"the seeds {_listed(map(str, sorted(seeds)))}"
    return [f"Over {which} that all share: {', '.join(f'{label} {means[label]:.2f}' for label in order)}."]


def _listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def _score(level: Level, measure: Measure) -> str:
    score = f"{level.score:.2f}" + ("" if math.isinf(measure.most) else "%")
    if level.spread:
        score += f" (95% interval {level.spread.within(measure.most)}, {len(level.scores)} seeds)"
    return score


def _verdict(line: Line, comparisons: Sequence[Comparison], levels: Mapping[str, Level]) -> Verdict:
    mine = [c for c in comparisons if c.first is line]
    kinds = [[c for c in mine if c.kind == kind] for kind in ("objects", "method", "start", "directory")]
    controls, others, *_ = kinds
    said = [_about(of, levels) for of in kinds]
    if not controls and line.coverage_ratio is None:
        said[0] = Said("", "hides no segments")
    elif not controls:
        said[0] = Said("", "not asked", ["no controls were run: --segments-from borrowed,blob,block"])
    if not others:
        said[1] = Said("", "the reference")
    return Verdict(line, levels[line.label], *said)


def _about(found: Sequence[Comparison], levels: Mapping[str, Level]) -> Said:
    """What comparisons of one kind say together, then each of them."""
    if not found:
        return Said("", "not asked")
    states = {c.state for c in found}
    better, worse = ("better", "worse") if found[0].is_first_look else ("higher", "lower")
    state, short = (
        ("unknown", "no verdict") if "unknown" in states
        else (better, "yes") if states == {better} else (worse, "no, worse") if worse in states
        else ("none", "not shown") if better not in states else (better, "in part")
    )  # fmt: skip
    parts = [f"{c.against} {c.numbers}{_cost(c)}{_apart(c, levels)}{c.plan and f', {c.plan}'}" for c in found]
    would = [c.difference.detectable for c in found if c.difference and c.state == "none"]
    if would:
        parts.append(f"{max(would):.2f} or more would have been shown with 80% probability")
    hint = ", a hint" if state in ("higher", "lower") else ""
    return Said(state, short + hint, parts)


def _cost(c: Comparison) -> str:
    """Whether a comparison with another method is at equal cost."""
    if c.cost_ratio is None or c.is_control:
        return ""
    equal = "equal cost" if abs(c.cost_ratio - 1) <= _EQUAL_COST else "equal epochs only"
    if equal != "equal cost" and c.first.spends and c.second.spends:
        equal = "one budget"
    is_unlike = c.first.end != c.second.end and equal == "equal epochs only"
    return f", {c.cost_ratio:.2f} x its FLOPs" + ("" if is_unlike else f" ({equal})")


def _apart(c: Comparison, levels: Mapping[str, Level]) -> str:
    """How far pretraining leads out of what the seeds of the initial weights do."""
    scores = list(levels[c.second.label].scores.values())
    if not c.second.is_untrained or len(scores) < 3 or stdev(scores) ** 2 < LEAST_VARIANCE:
        return ""
    above = (levels[c.first.label].score - fmean(scores)) / stdev(scores)
    return f", {above:+.1f} standard deviations of its {len(scores)} seeds"


def _warnings(comparisons: Sequence[Comparison]) -> list[str]:
    """What speaks against trusting the comparisons."""
    remarks = []
    for seeds, words in ((1, "There is one seed"), (0, "There is no seed")):
        few = [f"{c.first.label} and {c.second.label}" for c in comparisons if c.seeds == seeds]
        if few:
            more = f" and {len(few) - _MOST_NAMES} more pairs" if len(few) > _MOST_NAMES else ""
            named = f"for {', '.join(few[:_MOST_NAMES])}{more}"
            all_of = "per method" if len(few) == len(comparisons) else named
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
