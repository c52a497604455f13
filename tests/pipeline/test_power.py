"""The stated power is what experiments have, and what statsmodels says where its assumptions hold."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from pipeline.plan.layout import RunId
from pipeline.report.power import Design, Parts, parts_of, power, power_text, seeds_for
from pipeline.report.statistics import interval
from tests.pipeline.finished_run import write_evaluation, write_run

THREE = (0, 1, 2)


@pytest.mark.parametrize("seeds", [3, 5, 8, 12])
@pytest.mark.parametrize("effect", [0.3, 1.0, 1.5])
def test_of_seeds_alone_it_is_that_of_a_paired_t_test(seeds: int, effect: float) -> None:
    theirs = pytest.importorskip("statsmodels.stats.power").TTestPower()
    parts = Parts(pretraining=0.6, finetuning=0.8)
    stated = power(effect, parts, Design(seeds=seeds, finetunings=2))
    assert stated == pytest.approx(theirs.power(effect, seeds, 0.05), abs=0.01)


@pytest.mark.parametrize("effect", [0.4, 0.8, 1.5])
def test_the_seeds_that_it_takes_are_those_of_a_paired_t_test(effect: float) -> None:
    theirs = pytest.importorskip("statsmodels.stats.power").TTestPower()
    needed = theirs.solve_power(effect_size=effect, power=0.8, alpha=0.05)
    assert seeds_for(effect, Parts(pretraining=1.0)) == pytest.approx(np.ceil(needed), abs=1)


def experiment(
    rng: np.random.Generator, effect: float, parts: Parts, design: Design, images: int
) -> tuple[list[list[float]], list[np.ndarray]]:
    """Differences of each seed's finetunings on images that are drawn, and their scores on others.

    What all seeds owe to an image, and what one makes of it, have the variances of `parts` in the mean.
    """
    shared = rng.normal(0, (images * parts.images) ** 0.5, images)
    counts = rng.multinomial(images, [1 / images] * images, size=200) / images
    scores, drawn = [], []
    for _ in range(design.seeds):
        level = effect + rng.normal(0, parts.pretraining**0.5)
        by_image = level + shared + rng.normal(0, (images * parts.of_seed) ** 0.5, images)
        noise = rng.normal(0, parts.finetuning**0.5, design.finetunings)
        scores.append([float(by_image.mean() + one) for one in noise])
        drawn.append(counts @ by_image + noise.mean())
    return scores, drawn


@pytest.mark.slow
@pytest.mark.parametrize(
    ("parts", "design", "effect"),
    [
        (
            Parts(pretraining=0.5, finetuning=0.5, images=0.2, of_seed=0.1),
            Design(seeds=4, finetunings=2),
            2.0,
        ),
        (Parts(pretraining=0.1, finetuning=0.2, images=0.5), Design(seeds=6), 1.5),
        (Parts(pretraining=1.0, of_seed=0.3), Design(seeds=3), 3.0),
    ],
)
def test_simulated_experiments_show_a_difference_as_often_as_it_says(
    parts: Parts, design: Design, effect: float
) -> None:
    """By the interval on which the report's verdicts stand."""
    rng, shown, runs = np.random.default_rng(0), 0, 1500
    for _ in range(runs):
        scores, drawn = experiment(rng, effect, parts, design, images=60)
        found = interval([float(np.mean(several)) for several in scores], drawn)
        shown += found is not None and found.p_value < 0.05
    stated = power(effect, parts, design)
    assert 0.2 < stated < 0.95
    assert shown / runs == pytest.approx(stated, abs=0.03)


def test_parts_of_variance_are_those_of_the_experiment_in_the_mean() -> None:
    rng = np.random.default_rng(1)
    true = Parts(pretraining=1.0, finetuning=0.6, images=0.4, of_seed=0.2)
    found = [
        parts_of(*experiment(rng, 0.0, true, Design(seeds=8, finetunings=3), images=60)) for _ in range(250)
    ]
    for name, value in vars(true).items():
        assert np.mean([vars(one)[name] for one in found]) == pytest.approx(value, abs=0.12), name


def test_what_a_hand_can_compute() -> None:
    parts = parts_of([[1.0, 3.0], [5.0, 7.0]], [])
    assert parts.finetuning == 2  # both pairs lie 1 from their means
    assert parts.pretraining == 8 - 2 / 2  # means of 2 and 6
    assert parts_of([[1.0, 3.0], [1.9, 2.1]], []).pretraining == 0, "no variance below 0"


def test_more_of_anything_never_has_less_power() -> None:
    parts = Parts(pretraining=0.5, finetuning=0.5, images=0.3, of_seed=0.2)
    base = Design(seeds=4)
    for more in (Design(seeds=5), Design(seeds=4, finetunings=2), Design(seeds=4, images=2)):
        assert power(1.5, parts, more) > power(1.5, parts, base)
    assert seeds_for(0.001, Parts(pretraining=1.0)) is None


def test_a_pilot_says_its_parts_a_curve_and_what_is_worth_most(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segments"), seeds=THREE, chance=1.0)
    for method, seed in ((m, s) for m in ("patches", "segments") for s in THREE):
        score = 30.0 + 2 * (method == "segments") + seed
        write_evaluation(paths, RunId(method=method, seed=seed), 10, score, eval_seed=1)
    said = power_text(paths, 1.0, None)
    assert "a difference (segments 15%-patches), from a pilot of 3 seeds" in said
    curve = [float(share) for share in re.findall(r"^ *\d+ +(\d+)%", said, flags=re.M)]
    assert curve == sorted(curve) and len(curve) == 11
    assert re.search(r"\d+ seeds show a difference of 1 with 80% probability, 2 finetuned each", said)
    # Both lines: 180 and 432 seconds of pretraining, and finetunings that took no time.
    [cost] = re.findall(r"^ *10 +\d+% +(\S+)", said, flags=re.M)
    assert float(cost) == pytest.approx(10 * (180 + 432) / 3600, rel=0.01)
    assert "with twice as many seeds of pretraining" in said
    assert said == power_text(paths, 1.0, "segments 15%-patches")


def test_a_pilot_of_one_finetuning_does_not_tell_the_two_seeds_apart(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segments"), seeds=THREE, chance=1.0)
    assert "--eval-seeds 2 tells them apart" in power_text(paths, 1.0, None)


def test_published_spreads_are_marked_so() -> None:
    said = power_text(None, 0.5, None)
    assert said.startswith("by published spreads, since there is no pilot")
    # 2 x 0.82^2 is the variance of a difference of two reruns: 0.43 of its roots are 0.5.
    assert (
        "45 seeds show a difference of 0.5 with 80% probability, if reruns have a deviation of 0.82" in said
    )
    assert "Of seeds of pretraining no spread was found" in said
