"""How many seeds show a difference: from a pilot's parts of variance, or published spreads.

    parts = parts_of(level_of_first, level_of_second, scores_of_both)
    power(0.5, parts, Design(seeds=5))

A difference paired by seed varies with the seed of pretraining, that of finetuning, and the choice
of validation images. Of the last, all seeds share a part; what a seed makes of an image comes anew
with each seed. The power is that of the interval in the report, with the chance in what few seeds
estimate of their own spread.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean

import numpy as np
from scipy import special, stats

from common.console import aligned
from pipeline.plan.layout import Layout
from pipeline.plan.records import Record, read_all_records
from pipeline.report.answer import Answer, answers
from pipeline.report.comparisons import Comparison
from pipeline.report.scores import FINETUNING, Line, make_lines
from pipeline.report.statistics import CONFIDENCE, POWER, Error

# Standard deviations of one score over reruns of finetuning, and where they were read
# (docs/question.md, section 2, has the sources). Nobody published that over seeds of pretraining.
PUBLISHED = {
    0.04: "MAE ViT-B with UPerNet on ADE20K in three repositories: 48.13, 48.15, 48.20",
    0.82: "Segmenter ViT-T on ADE20K, its developers' own rerun: 39.99, 38.83",
}
_CURVE = (2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50)  # seeds
_FINETUNINGS = (1, 2, 3, 5, 10)  # of a checkpoint, that are tried
_MOST_SEEDS = 1000
_GRID = 200  # points of a chi-squared variable, of equal probability
_KNOTS = 24  # of the width of an interval, by what the seeds say of their spread
_BAR = 20  # characters of a power of 100%


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Variances of one seed's difference, in squared points.

    pretraining, finetuning: between their seeds. images: that all seeds share; of_seed: what a seed and
    the choice of images make together.
    """

    pretraining: float
    finetuning: float = 0.0
    images: float = 0.0
    of_seed: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Design:
    """seeds: of pretraining. finetunings: of each checkpoint. images: to score on, times the pilot's."""

    seeds: int
    finetunings: int = 1
    images: float = 1.0


@cache
def power(effect: float, parts: Parts, design: Design) -> float:
    """The probability, 0 to 1, that a true difference of `effect` points is shown, at 5% two-sided."""
    between = parts.pretraining + parts.finetuning / design.finetunings + parts.of_seed / design.images
    deviation, common = (between / design.seeds) ** 0.5, (parts.images / design.images) ** 0.5
    freedom = design.seeds - 1
    if not deviation and not common:
        return 1.0
    # What the seeds will say of their own spread, as a factor of the true deviation.
    factors = np.sqrt(stats.chi2.ppf((np.arange(_GRID) + 0.5) / _GRID, freedom) / freedom)
    level = (1 - CONFIDENCE) / 2
    if common:
        # A smooth function of the factor: solved at some, read off between them.
        knots = np.linspace(factors[0], factors[-1], _KNOTS)
        solved = [Error(max(f * deviation, 1e-9), freedom, common).exceeded_by(level) for f in knots]
        half = np.interp(factors, knots, solved)
    else:
        half = -special.stdtrit(freedom, level) * factors * deviation
    spread = math.hypot(deviation, common)
    shown = special.ndtr((effect - half) / spread) + special.ndtr((-effect - half) / spread)
    return float(shown.mean())


def seeds_for(effect: float, parts: Parts, finetunings: int = 1) -> int | None:
    """The fewest seeds that show it with 80% probability; None if a thousand do not."""
    low, high = 1, 2
    while power(effect, parts, Design(seeds=high, finetunings=finetunings)) < POWER:
        low, high = high, 2 * high
        if high > _MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        enough = power(effect, parts, Design(seeds=middle, finetunings=finetunings)) >= POWER
        low, high = (low, middle) if enough else (middle, high)
    return high


def parts_of(by_seed: Sequence[Sequence[float]], drawn: Sequence[np.ndarray]) -> Parts:
    """From differences: by_seed has those of its finetunings; drawn: [DRAWS] of each seed, or none.

    Analysis of variance with a random effect (Searle, Casella and McCulloch, Variance Components, 1992);
    a negative estimate is 0.
    """
    within = [np.var(several, ddof=1) for several in by_seed if len(several) > 1]
    weights = [len(several) - 1 for several in by_seed if len(several) > 1]
    finetuning = float(np.average(within, weights=weights)) if within else 0.0
    per_seed = fmean(1 / len(several) for several in by_seed)
    between = float(np.var([fmean(several) for several in by_seed], ddof=1))
    images = of_seed = 0.0
    if len(drawn) > 1:
        covariance = np.cov(drawn)
        images = max(0.0, float((covariance.sum() - covariance.trace()) / (len(drawn) * (len(drawn) - 1))))
        of_seed = max(0.0, float(covariance.trace() / len(drawn)) - images)
    left = max(0.0, between - finetuning * per_seed - of_seed)
    return Parts(pretraining=left, finetuning=finetuning, images=images, of_seed=min(of_seed, between))


def power_text(paths: Layout | None, effect: float, primary: str | None) -> str:
    """What `benchmark.py power` says. Raises ValueError."""
    if not (math.isfinite(effect) and 0 < effect <= 100):
        raise ValueError(f"--effect is {effect:g}; give points of the score, above 0 and at most 100")
    if paths is None and primary is not None:
        raise ValueError("--primary names lines of a pilot; give its FOLDER, too")
    if paths is None:
        return _published_text(effect)
    if not paths.eval_output.exists() and not paths.probe_output.exists():
        raise ValueError(f"{paths.root} is not the output directory of a run that scored something")
    found = answers(make_lines([paths]))[0]
    chosen = _chosen(found, primary)
    differences = [_differences(c, found) for c in chosen]
    each = [parts_of(scores, _drawn(c, found)) for c, scores in zip(chosen, differences, strict=True)]
    parts = Parts(**{name: fmean(vars(one)[name] for one in each) for name in vars(each[0])})
    pilot = Design(
        seeds=min(c.seeds for c in chosen),
        finetunings=min(len(scores) for of in differences for scores in of),
    )
    hours = _hours(read_all_records(paths), chosen, found)
    return _pilot_text(effect, parts, pilot, hours, chosen, found)


def _published_text(effect: float) -> str:
    lines = ["by published spreads, since there is no pilot: another code, and of finetuning alone."]
    for deviation, source in PUBLISHED.items():
        parts = Parts(pretraining=0.0, finetuning=2 * deviation**2)  # of a difference of two
        lines.append(f"{_needed(effect, parts)}, if reruns have a deviation of {deviation} ({source})")
    lines.append(
        "Of seeds of pretraining no spread was found: whatever it is, it comes on top. A pilot with "
        "--seed 0,1,2 --eval-seeds 2 tells yours."
    )
    return "\n".join(lines)


def _needed(effect: float, parts: Parts) -> str:
    seeds = seeds_for(effect, parts)
    enough = f"{seeds} seeds" if seeds else f"not even {_MOST_SEEDS} seeds"
    return f"{enough} show a difference of {effect:g} with {POWER:.0%} probability"


def _chosen(found: Answer, primary: str | None) -> list[Comparison]:
    """The comparisons of methods and of controls that have two seeds, or the one that is named."""
    named = {
        f"{c.first.label}-{c.second.label}": c for c in found.comparisons if c.kind in ("method", "objects")
    }
    if primary is not None and primary not in named:
        raise ValueError(f"--primary is {primary[:80]!r}; choose of {', '.join(named) or 'no pair at all'}")
    there = [c for name, c in named.items() if primary in (None, name) and c.seeds > 1]
    if not there:
        raise ValueError(
            "no two lines have two seeds of pretraining in common: run the pilot with --seed 0,1,2, or leave "
            "FOLDER out for published spreads"
        )
    return there


def _differences(c: Comparison, found: Answer) -> list[list[float]]:
    """By seed, those of each finetuning."""

    def scores_of(line: Line, seed: int) -> list[float]:
        there = [
            one
            for one in line.scored
            if one.measure is found.measure and one.epochs == found.ends[line.label] and one.run.seed == seed
        ]
        return [one.result[found.measure.key] for one in sorted(there, key=lambda one: one.eval_seed)]

    pairs = ((scores_of(c.first, seed), scores_of(c.second, seed)) for seed in c.by_seed)
    return [[a - b for a, b in zip(one, two, strict=False)] for one, two in pairs]


def _drawn(c: Comparison, found: Answer) -> list[np.ndarray]:
    one, two = found.levels[c.first.label].drawn, found.levels[c.second.label].drawn
    drawn = [one[s] - two[s] for s in c.by_seed] if one and two else []
    return drawn if all(map(len, drawn)) else []


def _hours(
    records: Iterable[Record], chosen: Sequence[Comparison], found: Answer
) -> tuple[float, float] | None:
    """Device-hours of both lines of a difference: pretraining, and a score; None where it is not known."""
    kind = "evaluate" if found.measure is FINETUNING else "probe"
    spent = [r.seconds * r.devices / 3600 for r in records if r.kind == kind and r.state == "done"]
    costs = [[found.levels[line.label].costs["device_hours"] for line in c[:2]] for c in chosen]
    known = [sum(hour for hour in both if hour is not None) for both in costs if None not in both]
    return (fmean(known), 2 * fmean(spent)) if known and spent else None


def _pilot_text(
    effect: float, parts: Parts, pilot: Design, hours: tuple[float, float] | None,
    chosen: Sequence[Comparison], found: Answer,
) -> str:  # fmt: skip
    """Parts of variance, a curve, the seeds that it takes, and which of the three is worth more."""

    def price(seeds: int, finetunings: int) -> float:
        return seeds * (hours[0] + finetunings * hours[1]) if hours else 0.0

    def cost(seeds: int, finetunings: int) -> str:
        return f"{price(seeds, finetunings):.3g}" if hours else ""

    k = pilot.finetunings
    first, *more = chosen
    whose = f"the mean of {len(chosen)}" if more else f"{first.first.label}-{first.second.label}"
    lines = [f"by {found.measure.words}: a difference ({whose}), from a pilot of {pilot.seeds} seeds", ""]
    known = {
        "seed of pretraining": parts.pretraining, "seed of finetuning": parts.finetuning,
        "validation images": parts.images, "images, anew with each seed": parts.of_seed,
    }  # fmt: skip
    rows = [("varies with", "standard deviation", "")]
    rows += [(name, f"{variance**0.5:.3f}", "") for name, variance in known.items()]
    if not any(_drawn(c, found) for c in chosen):
        rows[3:] = [("validation images", "-", "not known: fewer than 10, or none kept by the pilot")]
    if k == 1 and found.measure is FINETUNING:
        rows[2] = ("seed of finetuning", "-", "in that of pretraining: --eval-seeds 2 tells them apart")
    lines += [aligned(rows, right=(1,)), ""]
    curve = {n: power(effect, parts, Design(seeds=n, finetunings=k)) for n in _CURVE}
    drawn = [("seeds", "power", "device-hours", "")]
    drawn += [(str(n), f"{p:.0%}", cost(n, k), "#" * round(_BAR * p)) for n, p in curve.items()]
    lines += [aligned(drawn, right=(0, 1, 2)), "", f"{_needed(effect, _with(parts, k))}, {k} finetuned each."]
    tried = {j: seeds_for(effect, parts, j) for j in (_FINETUNINGS if k > 1 else ())}
    if hours and (enough := {j: n for j, n in tried.items() if n}):
        j = min(enough, key=lambda j: price(enough[j], j))
        lines.append(f"Cheapest: {enough[j]} seeds, {j} finetunings each: {cost(enough[j], j)} device-hours.")
    at = power(effect, parts, pilot)
    twice = {
        "seeds of pretraining": replace(pilot, seeds=2 * pilot.seeds),
        "finetunings of each": replace(pilot, finetunings=2 * k),
        "validation images": replace(pilot, images=2.0),
    }
    if k == 1:  # what they would gain is not known
        del twice["finetunings of each"]
    gains = {name: power(effect, parts, design) for name, design in twice.items()}
    said = ", ".join(f"{name} {value:.0%}" for name, value in gains.items())
    best = max(gains, key=gains.__getitem__)
    most = f": {best} are worth most" if gains[best] > at + 0.005 else ""
    lines.append(f"The pilot's own power is {at:.0%}; with twice as many {said}{most}.")
    # The pilot's seeds say little of their own spread.
    freedom = pilot.seeds - 1
    factors = [freedom / float(stats.chi2.ppf(q, freedom)) for q in (0.975, 0.025)]
    ends = [seeds_for(effect, _scaled(parts, factor), k) for factor in factors]
    low, high = (str(n) if n else f"more than {_MOST_SEEDS}" for n in ends)
    lines.append(f"The spread is known from {pilot.seeds} seeds: by its 95% interval, {low} to {high} seeds.")
    return "\n".join(lines)


def _with(parts: Parts, finetunings: int) -> Parts:
    return replace(parts, finetuning=parts.finetuning / finetunings)


def _scaled(parts: Parts, factor: float) -> Parts:
    """With more, or less, between seeds."""
    return replace(
        parts, pretraining=factor * parts.pretraining, finetuning=factor * parts.finetuning,
        of_seed=factor * parts.of_seed,
    )  # fmt: skip
