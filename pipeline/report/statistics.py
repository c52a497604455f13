"""How sure a mean over seeds, or a difference, is: chance in training and chance in the images.

Every seed is scored on the same validation images: seeds are crossed with images, as readers are
with cases in studies of medical imaging, whose analysis this is. The variance of the mean is that
between seeds (which holds what seed and image make together) and, once, what all seeds owe to the
choice of images: the covariance between seeds when images are drawn anew (Obuchowski and Rockette,
Communications in Statistics 24, 1995). Adding the variances of both as they stand would count what
seed and image make together twice. The interval is Behrens' and Fisher's: of the sum of a t
variable for the few seeds and a normal one for the many images. Degrees of freedom by Welch and
Satterthwaite hold the truth in 92% of cases only with three seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, special

CONFIDENCE, POWER = 0.95, 0.80
LEAST_VARIANCE = 1e-12  # of scores in percent; what is below is rounding
_GRID = 200  # points of a normal distribution, of equal probability


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds, or of differences between seeds, in the scores' unit."""

    value: float
    # The 95% interval; of a single seed, it holds what chance in the images makes only.
    low: float
    high: float
    p_value: float  # how likely a value so far from 0 is if the true one is 0
    # The smallest true difference that is told from 0 with 80% probability.
    detectable: float
    of_images: bool  # whether chance in the images is part of it

    def within(self, most: float) -> str:
        """The interval of a score, which lies from 0 to `most`."""
        return f"{max(0.0, self.low):.2f} to {min(most, self.high):.2f}"


def interval(
    scores: Sequence[float], drawn: Sequence[np.ndarray] | None = None, *, among: int = 1
) -> Interval | None:
    """Mean with its interval. scores: one for each seed; drawn: [DRAWS] each, on other images.

    Without `drawn`, chance is that between seeds. among: of how many this is one, so that all such
    intervals hold their truths in 95% of cases, and as many verdicts are kept apart (Bonferroni).
    None where nothing tells chance: of one seed without `drawn`, of too few images to draw from,
    or where nothing varies.
    """
    if len(scores) < (2 if drawn is None else 1) or (drawn is not None and not len(drawn[0])):
        return None
    seeds, value = len(scores), float(np.mean(scores))
    between = float(np.var(scores, ddof=1)) / seeds if seeds > 1 else 0.0
    shared = 0.0
    if drawn is not None:
        covariance = np.atleast_2d(np.cov(drawn))
        off_diagonal = covariance.sum() - covariance.trace()
        shared = float(off_diagonal) / (seeds * (seeds - 1)) if seeds > 1 else covariance[0, 0]
    if max(between, shared) < LEAST_VARIANCE:
        return None
    error = Error(max(between, 1e-18) ** 0.5, max(1, seeds - 1), max(0.0, shared) ** 0.5)
    half = error.exceeded_by((1 - CONFIDENCE) / 2 / among)
    return Interval(
        value=value, low=value - half, high=value + half, of_images=drawn is not None,
        p_value=min(1.0, 2 * error.tail(abs(value))),
        detectable=half + error.exceeded_by(1 - POWER),
    )  # fmt: skip


@dataclass(frozen=True)
class Error:
    """Of an estimate: deviation x Student's t of `freedom` + common x a normal variable."""

    deviation: float
    freedom: int
    common: float

    def tail(self, value: float) -> float:
        """The probability of more than `value`: the mean over a grid of the normal variable."""
        normal = self.common * special.ndtri((np.arange(_GRID) + 0.5) / _GRID)
        return float(special.stdtr(self.freedom, (normal - value) / self.deviation).mean())

    def exceeded_by(self, share: float) -> float:
        """The value that `share` of the errors exceed; share: below a half."""
        # Where each part exceeds its own with half the share, the sum cannot do so more often.
        most = -self.deviation * special.stdtrit(self.freedom, share / 2)
        most -= self.common * special.ndtri(share / 2)
        found = optimize.brentq(lambda v: self.tail(v) - share, 0, 1.01 * most, xtol=1e-4 * most)
        return float(found)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    The chance that any of them falls below a level without cause is that level at most.
    """
    largest, corrected = 0.0, [0.0] * len(p_values)
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def holm_levels(p_values: Sequence[float]) -> list[int]:
    """Of how many each was tested as one: its interval `among` so many holds 0 unless it is shown.

    Holm tests the smallest as one of all, each next as one of one fewer, up to the first that is not
    shown; that one's level is the level of all that follow.
    """
    count, ranked = len(p_values), sorted(range(len(p_values)), key=p_values.__getitem__)
    failed = [rank for rank, i in enumerate(ranked) if p_values[i] * (count - rank) >= 1 - CONFIDENCE]
    last = min(failed, default=count)
    return [count - min(ranked.index(index), last) for index in range(count)]
