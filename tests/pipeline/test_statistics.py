"""Intervals hold the truth as often as they say, on data whose truth is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from common.areas import DRAWS, draw_images, mean_iou, read_areas
from pipeline.report.statistics import holm, holm_levels, interval

EXPERIMENTS, IMAGES, CLASSES = 500, 60, 5
_HARDNESS = np.linspace(-0.5, 1, CLASSES)  # of the classes
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(41)  # the mean over a normal variable
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def truth(delta: float, seed: float, noise: float) -> float:
    """Mean IoU in percent over endless images and seeds; noise: of images, whatever its origin."""
    logits = _HARDNESS[:, None, None] + delta + seed * _NODES[:, None] + noise * _NODES
    overlap = (1 / (1 + np.exp(-logits))) @ _WEIGHTS  # [K, seeds]
    return float(100 * (overlap / (2 - overlap)).mean(0) @ _WEIGHTS)


def differences(
    seeds: int, deviations: tuple[float, float], delta: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Differences of two methods [E, S], and on other images [E, S, draws].

    A model of scoring: the share of a class that is found in an image depends on image and class,
    on method and image, on the seed, and on seed and image together (the deviations).
    """
    seed, mixed = deviations
    sizes = rng.gamma(0.7, 1000, size=(EXPERIMENTS, IMAGES, CLASSES))
    image = rng.normal(size=(EXPERIMENTS, 1, IMAGES, 1))
    counts = rng.multinomial(IMAGES, [1 / IMAGES] * IMAGES, size=150)
    scores, drawn = [], []
    for shift in (delta, 0.0):
        logits = _HARDNESS + shift + image
        logits = logits + 0.3 * rng.normal(size=image.shape)
        logits = logits + seed * rng.normal(size=(EXPERIMENTS, seeds, 1, 1))
        logits = logits + mixed * rng.normal(size=(EXPERIMENTS, seeds, IMAGES, CLASSES))
        found = sizes[:, None] / (1 + np.exp(-logits))
        union = 2 * sizes[:, None] - found  # as much is predicted as there is
        scores.append(mean_iou(found.sum(2), union.sum(2)))
        drawn.append(mean_iou(counts @ found, counts @ union))
    return scores[0] - scores[1], drawn[0] - drawn[1]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("deviations", "delta"), [((0.1, 0.5), 0.0), ((0.1, 1.0), 0.1), ((0.3, 1.5), 0.1)])
def test_a_95_percent_interval_holds_the_truth_in_93_to_97_percent(
    seeds: int, deviations: tuple[float, float], delta: float
) -> None:
    """With delta = 0, two sets of seeds of one method are called different in about 5%."""
    noise = (1 + 0.3**2 + deviations[1] ** 2) ** 0.5
    true = truth(delta, deviations[0], noise) - truth(0.0, deviations[0], noise)
    data = differences(seeds, deviations, delta, np.random.default_rng(seeds))
    found = [interval(scores, list(drawn)) for scores, drawn in zip(*data, strict=True)]
    assert 0.93 <= np.mean([one.low <= true <= one.high for one in found]) <= 0.975
    called_different = [one.p_value < 0.05 for one in found]
    assert called_different == [one.low > 0 or one.high < 0 for one in found]
    if not delta:
        assert 0.025 <= np.mean(called_different) <= 0.07


def test_a_true_difference_of_the_detectable_size_is_shown_in_80_percent() -> None:
    rng, seeds, common = np.random.default_rng(0), 5, 0.5
    noise = rng.normal(size=(600, seeds)) + common * rng.normal(size=(600, 1))
    drawn = [common * rng.normal(size=DRAWS)] * seeds
    size = np.mean([interval(one, drawn).detectable for one in noise])
    shown = [interval(one + size, drawn).low > 0 for one in noise]
    assert np.mean(shown) == pytest.approx(0.8, abs=0.08)


def test_without_images_it_is_students_interval() -> None:
    scores = [1.0, 2.5, 2.0]
    found, expected = interval(scores), stats.ttest_1samp(scores, 0)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-6)
    low, high = expected.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-3)
    assert not found.of_images


def test_the_sum_of_seeds_and_images_has_the_quantile_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(size=DRAWS)
    images = 2 * (images - images.mean()) / images.std(ddof=1)
    found = interval([1.0, 2.0, 3.0], [images] * 3)
    both = rng.standard_t(2, 1_000_000) / 3**0.5 + 2 * rng.normal(size=1_000_000)
    assert found.high - 2 == pytest.approx(np.quantile(both, 0.975), rel=0.01)


def test_a_single_score_has_the_interval_of_its_images_or_none() -> None:
    images = np.random.default_rng(0).normal(size=DRAWS)
    found = interval([5.0], [images])
    assert found.high - 5 == pytest.approx(1.96 * images.std(), rel=0.03)
    assert interval([5.0]) is None
    assert interval([]) is None


@pytest.mark.parametrize(("scores", "deviation"), [([5.0, 5.0, 5.0], 0.3), ([4.0, 5.0, 6.0], 0.0)])
def test_what_varies_in_one_way_alone_has_an_interval(scores: list[float], deviation: float) -> None:
    """Seeds that agree by chance say nothing against the chance in the images, nor images that agree."""
    images = deviation * np.random.default_rng(0).normal(size=DRAWS)
    assert interval(scores, [images] * 3)
    assert interval([5.0, 5.0, 5.0], [images * 0] * 3) is None


def test_ten_images_are_enough_to_draw_from_and_nine_are_not(tmp_path: Path) -> None:
    areas = np.random.default_rng(0).integers(1, 9, size=(10, 3, 4))
    assert len(draw_images(write(tmp_path / "ten.npz", areas))) == DRAWS
    assert len(draw_images(write(tmp_path / "nine.npz", areas[:9]))) == 0


def test_holm_corrects_as_its_paper_says() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("seed", range(4))
def test_an_interval_at_its_level_of_holm_holds_0_unless_the_verdict_shows_a_difference(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = [rng.normal(size=5) + shift for shift in (0, 0.5, 1, 1.5, 2, 3, 4, 8)]
    p_values = [float(stats.ttest_1samp(one, 0).pvalue) for one in samples]
    for one, corrected, among in zip(samples, holm(p_values), holm_levels(p_values), strict=True):
        low, high = stats.t.interval(1 - 0.05 / among, 4, loc=one.mean(), scale=stats.sem(one))
        assert (low <= 0 <= high) == (corrected >= 0.05)
        found = interval(list(one), among=among)
        assert found and (found.low, found.high) == pytest.approx((low, high), rel=1e-3)
    assert holm_levels([0.001, 0.9, 0.02, 0.03]) == [4, 3, 3, 3]
    assert holm_levels([]) == []


def write(path: Path, areas: np.ndarray, names: list[str] | None = None) -> Path:
    names = names or [f"v{i}" for i in range(len(areas))]
    np.savez_compressed(path, images=np.array(names), areas=areas)
    return path


def test_mean_iou_is_that_of_a_calculation_by_hand() -> None:
    areas = np.array([[[2, 0, 0], [4, 1, 0], [3, 0, 0]], [[1, 3, 0], [1, 5, 0], [2, 4, 0]]])
    total = areas.sum(0)  # class 0: 3 of 5 + 5 - 3; class 1: 3 of 6 + 4 - 3; class 2: nowhere
    union = total[1] + total[2] - total[0]
    assert mean_iou(total[0], union) == pytest.approx(100 * (3 / 7 + 3 / 7) / 2)


def test_drawing_images_is_scipys_bootstrap_and_shared_by_equal_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    label = rng.integers(0, 1000, size=(80, 4))
    found = (label * rng.uniform(0.2, 1, size=label.shape)).astype(int)
    areas = np.stack([found, label, label], axis=1)
    drawn = draw_images(write(tmp_path / "a.npz", areas))

    def score(index: np.ndarray) -> float:
        inter, predicted, there = areas[index.astype(int)].sum(0)
        return float(mean_iou(inter, predicted + there - inter))

    expected = stats.bootstrap((np.arange(80),), score, vectorized=False, n_resamples=800, rng=rng)
    assert drawn.std() == pytest.approx(expected.standard_error, rel=0.1)
    assert (draw_images(write(tmp_path / "b.npz", areas)) == drawn).all()
    others = draw_images(write(tmp_path / "c.npz", areas, [f"w{i}" for i in range(80)]))
    assert abs(np.corrcoef(others, drawn)[0, 1]) < 0.2


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(path.read_bytes()[:200]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("areas"),
        lambda path: np.savez(path, areas=np.zeros((2, 3, 4), int)),
        lambda path: np.savez(path, images=["a"], areas=np.zeros((2, 3, 4), int)),
        lambda path: np.savez(path, images=["a"], areas=np.full((1, 3, 4), np.nan)),
        lambda path: np.savez(path, images=["a"], areas=-np.ones((1, 3, 4), int)),
        lambda path: np.savez(path, images=["a"], areas=np.array([{}], dtype=object)),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, damage) -> None:
    path = write(tmp_path / "areas.npz", np.ones((2, 3, 4), int))
    damage(path)
    with pytest.raises(ValueError, match=r"areas\.npz is damaged"):
        read_areas(path)
