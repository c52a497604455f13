import dataclasses

import pytest

from segmenter.config import OptimisationConfig
from segmenter.schedule import (
    BatchPlan,
    learning_rate,
    learning_rate_points,
    step_seed,
)

POLY = OptimisationConfig(
    epochs=10, batch_size=8, optimizer="sgd", lr=1e-3, momentum=0.9, weight_decay=0.0,
    layer_decay=1.0, schedule="poly", poly_power=0.9, min_lr=1e-5, warmup_fraction=0.0,
    eval_every=3,
)  # fmt: skip


def test_poly_falls_from_the_rate_to_the_least():
    assert learning_rate(POLY, 0.0) == pytest.approx(1e-3)
    assert learning_rate(POLY, 0.5) == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5**0.9)
    assert learning_rate(POLY, 1.0) == pytest.approx(1e-5)


def test_warmup_is_linear_and_cosine_follows():
    cosine = dataclasses.replace(POLY, schedule="cosine", warmup_fraction=0.2, min_lr=0.0)
    assert learning_rate(cosine, 0.1) == pytest.approx(0.5e-3)
    assert learning_rate(cosine, 0.2) == pytest.approx(1e-3)
    assert learning_rate(cosine, 0.6) == pytest.approx(0.5e-3)
    assert learning_rate(cosine, 1.0) == pytest.approx(0.0, abs=1e-12)


def test_the_points_that_matter_are_named():
    warm = dataclasses.replace(POLY, warmup_fraction=0.2, min_lr=0.0, poly_power=1.0)
    assert learning_rate_points(warm) == [
        (0.0, 0.0, "start"), (2.0, 1e-3, "end of warm-up"),
        (5.0, pytest.approx(1e-3 * 5 / 8), "middle"), (10.0, 0.0, "end"),
    ]  # fmt: skip
    assert [name for _, _, name in learning_rate_points(POLY)] == ["start", "middle", "end"]


def test_the_last_epoch_is_always_evaluated():
    assert [dataclasses.replace(POLY, epochs=n).evaluations for n in (1, 3, 4, 6)] == [1, 1, 2, 2]


def test_an_epoch_uses_each_image_at_most_once_whatever_the_processes():
    whole = list(BatchPlan(num_images=13, batch_size=4, processes=1).indices(0, 2, 0, 0))
    assert len(whole) == 3
    assert len({index for batch in whole for index in batch}) == 12
    plan = BatchPlan(num_images=13, batch_size=4, processes=3)
    parts = [list(plan.indices(0, 2, rank, 0)) for rank in range(3)]
    for step, batch in enumerate(whole):
        assert sorted(batch) == sorted(index for part in parts for index in part[step])


def test_a_dataset_smaller_than_a_batch_makes_one_step():
    plan = BatchPlan(num_images=5, batch_size=16, processes=1)
    assert (plan.steps_per_epoch, plan.images_per_epoch) == (1, 5)


def test_a_batch_too_small_for_the_processes_is_refused():
    with pytest.raises(ValueError, match="cannot be spread over 4 processes"):
        BatchPlan(num_images=100, batch_size=2, processes=4)


def test_every_step_and_process_has_its_own_seed():
    seeds = {step_seed(0, step, rank) for step in range(50) for rank in range(4)}
    assert len(seeds) == 200
