"""Whether a cheap score orders the lines as complete finetuning does: Kendall's tau.

The interval is a bootstrap over lines: had others been compared. A line that is drawn twice makes no
pair with itself.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.report.scores import FINETUNING, MEASURES, Line, Measure
from pipeline.report.statistics import CONFIDENCE

LEAST_LINES = 5  # of fewer, draws hold hardly a pair
_DRAWS = 1000


class Share(NamedTuple):
    """A number with its interval."""

    value: float
    low: float
    high: float

    def text(self, form: str) -> str:
        """For people."""
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"


class Agreement(NamedTuple):
    """Of a probe with finetuning. alike: the share of pairs of lines, ties left out, in one order."""

    measure: Measure
    point: int  # epochs, or parts of the budget
    lines: int
    tau: Share
    alike: Share


def agreements(lines: Sequence[Line]) -> list[Agreement]:
    """Of each probe, wherever it and finetuning have scored the same checkpoints of enough lines."""
    found, trained = list[Agreement](), [line for line in lines if not line.is_baseline]
    for measure in (one for one in MEASURES.values() if one is not FINETUNING):
        points = {line.label: line.points(measure) & line.points(FINETUNING) for line in trained}
        seen = set[tuple[int, ...]]()
        for point in sorted(set().union(*points.values()), reverse=True):
            there = [line for line in trained if point in points[line.label]]
            # Several parts of a budget may end in one epoch.
            place = tuple(line.epochs_at(point) for line in there)
            if point == 0 or len(there) < LEAST_LINES or place in seen:
                continue
            seen.add(place)
            cheap, dear = (
                np.array([line.level(line.epochs_at(point), one).score for line in there])
                for one in (measure, FINETUNING)
            )
            if (both := _agreement(cheap, dear)) is not None:
                found.append(Agreement(measure, point, len(there), *both))
    return found


def _agreement(one: np.ndarray, two: np.ndarray) -> tuple[Share, Share] | None:
    """Tau-b and the share of pairs ordered alike; None where one of them orders nothing."""
    from scipy.stats import kendalltau  # slow to import

    signs = [np.sign(np.subtract.outer(of, of))[np.triu_indices(len(one), 1)] for of in (one, two)]
    tau = float(kendalltau(one, two).statistic)
    if math.isnan(tau):
        return None
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(one), [1 / len(one)] * len(one), size=_DRAWS)
    weights = (counts[:, :, None] * counts[:, None, :])[:, *np.triu_indices(len(one), 1)]  # [draws, pairs]
    taus, shares = _drawn(weights, *signs)
    whole = _drawn(np.ones((1, weights.shape[1])), *signs)[1]
    tails = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    of_tau, of_share = (np.nanquantile(of, tails) for of in (taus, shares))
    return Share(tau, *map(float, of_tau)), Share(float(whole[0]), *map(float, of_share))


def _drawn(weights: np.ndarray, one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tau-b (Kendall 1945) and the share alike of each draw; NaN where all its pairs are ties."""
    with np.errstate(invalid="ignore", divide="ignore"):
        alike, apart = weights @ (one * two > 0), weights @ (one * two < 0)
        tau = (alike - apart) / np.sqrt((weights @ (one != 0)) * (weights @ (two != 0)))
        return tau, alike / (alike + apart)


def sentence(found: Sequence[Agreement]) -> str:
    """What the best known probe, at the latest point, says; empty where nothing is known."""
    if not found:
        return ""
    first = found[0]
    return (
        f"Does the cheap score predict the dear one? Over {first.lines} lines {first.measure.words} orders "
        f"{first.alike.text('.0%')} of the pairs as finetuning does (Kendall's tau {first.tau.text('.2f')})."
    )


def rows(found: Sequence[Agreement], unit: str) -> list[dict[str, str]]:
    """For the page. unit: of a point."""
    return [
        {"probe": one.measure.short, unit: str(one.point), "lines": str(one.lines),
         "Kendall's tau": one.tau.text(".2f"), "pairs alike": one.alike.text(".0%")}
        for one in found
    ]  # fmt: skip
