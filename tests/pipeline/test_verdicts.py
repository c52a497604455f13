"""Verdicts on lines of a few numbers, which a hand can follow."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy import stats

from common.areas import DRAWS
from pipeline.plan.layout import RunId
from pipeline.report.answer import Answer, answer
from pipeline.report.comparisons import Comparison
from pipeline.report.scores import COSTS, FINETUNING, Evaluation, Line
from pipeline.report.statistics import interval

LOW = [30.0, 30.0, 30.0]
NEARLY = [31.0, 31.5, 32.0]  # by 1.5 more, p = 0.035: a verdict alone, none as one of two


def line_of(
    method: str,
    scores: Sequence[float],
    *,
    source: str = "own",
    flops: float | None = None,
    images: float | None = None,
    untrained: bool = False,
    seeds: Sequence[int] = (0, 1, 2),
) -> Line:
    """A score of each seed.

    images: what the choice of images makes, as a deviation; None: areas were not kept.
    """
    run = RunId(method=method, coverage_ratio=None, segments_from=source)
    label = f"untrained {method}" if untrained else run.label
    line = Line(label=label, family=method, method=method, source=source, is_untrained=untrained)
    chance = np.random.default_rng(len(label)).normal(size=DRAWS)
    for seed, score in zip(seeds, scores, strict=False):
        one = Evaluation(
            folder=Path("nowhere"), run=RunId(method=method, segments_from=source, seed=seed),
            eval_seed=seed, epochs=0 if untrained or method == "scratch" else 10, minutes=0.0,
            costs={**dict.fromkeys(COSTS), "train_flops": flops}, result={"mean_iou": score},
        )  # fmt: skip
        if images is not None:
            vars(one)["drawn"] = score + images * chance  # instead of reading a file
        line.scored.append(one)
    return line


def answered(*lines: Line) -> Answer:
    found = answer(lines, FINETUNING)
    assert found is not None
    return found


def compared(found: Answer, first: str, second: str) -> Comparison:
    [c] = [c for c in found.comparisons if (c.first.label, c.second.label) == (first, second)]
    return c


def test_a_verdict_follows_from_the_p_value_of_the_family_not_from_its_own() -> None:
    alone = stats.ttest_1samp([1.0, 1.5, 2.0], 0).pvalue
    assert 0.025 < alone < 0.05
    patches, segments = line_of("patches", LOW), line_of("segments", NEARLY)
    found = answered(patches, segments)
    assert compared(found, "segments", "patches").p_value == pytest.approx(alone, rel=1e-4)
    assert "segments is shown better than patches" in found.sentences[0]
    found = answered(patches, segments, line_of("preencoder", [29.0, 30.0, 31.5]))
    c = compared(found, "segments", "patches")
    assert (c.state, c.p_value) == ("none", pytest.approx(2 * alone, rel=1e-4))
    # The interval at the level of its verdict holds 0; alone it would be +0.26 to +2.74.
    expected = stats.t.interval(1 - 0.05 / 2, 2, loc=1.5, scale=stats.sem([1.0, 1.5, 2.0]))
    assert c.difference
    assert (c.difference.low, c.difference.high) == pytest.approx(expected, abs=1e-3)
    assert c.difference.low < 0


def test_what_has_no_verdict_counts_as_chance_in_the_family() -> None:
    """One seed with thousands of images has an interval, but nothing tells chance between seeds."""
    found = answered(
        line_of("patches", LOW, images=0.0), line_of("segments", NEARLY, images=0.0),
        line_of("preencoder", [40.0], images=0.5),
    )  # fmt: skip
    one = compared(found, "preencoder", "patches")
    assert one.difference and one.difference.p_value < 1e-6
    assert (one.state, one.why_not, one.p_value) == ("unknown", "1 seed in common", 1.0)
    c = compared(found, "segments", "patches")
    assert c.difference
    assert (c.state, c.p_value) == ("none", pytest.approx(2 * c.difference.p_value))


def test_what_could_have_been_shown_is_that_of_one_of_the_family_and_the_largest_is_told() -> None:
    lines = [
        line_of("patches", LOW),
        line_of("segments", [29.0, 30.0, 31.5]),
        line_of("preencoder", [28.0, 30.0, 32.5]),
    ]
    found, detectable = answered(*lines), []
    for line in lines[1:]:
        differences = [one.score - 30 for one in line.scored if one.score]
        expected, c = interval(differences, among=2), compared(found, line.label, "patches")
        assert expected and c.difference
        assert c.difference.detectable == pytest.approx(expected.detectable)
        detectable.append(expected.detectable)
    told = " ".join(part for v in found.verdicts for part in v.reference.parts)
    assert all(f"{one:.2f} or more would have been shown" in told for one in detectable)


@pytest.mark.parametrize(
    ("ratio", "said"),
    [
        (0.5, "equal epochs only"), (0.97, "equal epochs only"), (0.985, "equal cost"),
        (1.0, "equal cost"), (1.015, "equal cost"), (1.03, "equal epochs only"),
    ],
)  # fmt: skip
def test_equal_cost_is_within_two_percent_to_either_side(ratio: float, said: str) -> None:
    lines = line_of("patches", LOW, flops=2e18), line_of("segments", NEARLY, flops=ratio * 2e18)
    [verdict] = [v for v in answered(*lines).verdicts if v.line is lines[1]]
    assert verdict.reference.parts[0].endswith(f", {ratio:.2f} x its FLOPs ({said})")


CONTROLS = {
    "better": [20.0, 20.1, 20.2],
    "worse": [40.0, 40.1, 40.2],
    "none": [29.0, 30.0, 31.1],
    "unknown": [20.0],
}


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        (("better", "better"), "yes"),
        (("better", "none"), "in part"),
        (("better", "worse"), "no, worse"),
        (("worse", "none"), "no, worse"),
        (("none", "none"), "not shown"),
        (("better", "unknown"), "no verdict"),
    ],
)
def test_what_the_controls_say_together(states: tuple[str, str], verdict: str) -> None:
    controls = [
        line_of("segments", CONTROLS[state], source=source)
        for state, source in zip(states, ("blob", "borrowed"), strict=True)
    ]
    found = answered(line_of("segments", LOW), *controls)
    assert tuple(c.state for c in found.comparisons) == states
    assert found.verdicts[0].objects.short == verdict


def test_without_patches_the_first_method_is_what_others_are_compared_with() -> None:
    lines = [line_of(name, LOW) for name in ("segments", "four_channels", "preencoder")]
    pairs = [(c.first.label, c.second.label) for c in answered(*lines).comparisons]
    assert pairs == [("four_channels", "segments"), ("preencoder", "segments")]


@pytest.mark.parametrize("start", [[20.0, 21.0], [20.0, 21.0, 23.0]])
def test_standard_deviations_of_the_start_are_told_from_three_seeds_on(start: list[float]) -> None:
    begins = line_of("segments", start, untrained=True)
    others = line_of("patches", [10.0, 11.0, 13.0], untrained=True), line_of("patches", LOW)
    found = answered(others[0], begins, others[1], line_of("segments", NEARLY))
    [verdict] = [v for v in found.verdicts if v.line.label == "segments"]
    above = (fmean(NEARLY) - fmean(start)) / stdev(start)
    expected = f", {above:+.1f} standard deviations of its 3 seeds"
    assert verdict.start.parts[0].endswith(expected) == (len(start) == 3)
    assert ("standard deviations" in verdict.start.parts[0]) == (len(start) == 3)


def test_several_finetunings_of_a_pretraining_count_as_their_mean_on_all_images() -> None:
    line = line_of("patches", [30.0, 32.0], images=1.0, seeds=(0, 0))
    vars(line.scored[1])["drawn"] = np.arange(DRAWS) * 1.0
    expected = (line.scored[0].drawn + np.arange(DRAWS)) / 2
    level = line.level(10, FINETUNING)
    assert level.scores == {0: 31.0}
    assert np.array_equal(level.drawn[0], expected)
    vars(line.scored[1])["drawn"] = None
    assert line.level(10, FINETUNING).drawn == {}, "areas of one were not kept"
