"""Which images make a step, on any number of processes, and how the rate runs."""

import numpy as np
import pytest

from engine.schedule import BatchPlan, derived_seeds, half_cosine, learning_rate


def plan_of(**changed):
    values = {"effective_batch_size": 16, "processes": 1, "micro_batch_size": 8}
    return BatchPlan(**{"num_images": 50, "seed": 0, **values, **changed})


@pytest.mark.parametrize("effective", [16, 13])
@pytest.mark.parametrize("processes", [1, 2, 4, 5])
@pytest.mark.parametrize("micro_batch_size", [1, 3, 16])
def test_a_step_has_the_same_images_however_it_is_split(effective, processes, micro_batch_size):
    plan = plan_of(effective_batch_size=effective, processes=processes, micro_batch_size=micro_batch_size)
    parts = [plan.micro_batches(rank, (0, 0), 2) for rank in range(processes)]
    for epoch in range(2):
        order = np.random.default_rng([0, 0, epoch]).permutation(50)
        for step in range(3):
            keys = [[next(part) for _ in range(plan.passes(rank))] for rank, part in enumerate(parts)]
            assert all(0 < len(batch) <= micro_batch_size for passes in keys for batch in passes)
            taken = [key for passes in keys for batch in passes for key in batch]
            assert {key[0] for key in taken} == {epoch}
            expected = order[step * effective : (step + 1) * effective]
            assert sorted(key[1] for key in taken) == sorted(expected)
            sizes = [sum(map(len, passes)) for passes in keys]
            assert max(sizes) - min(sizes) <= 1, "no process has nothing to do"
    assert all(next(part, None) is None for part in parts)


def test_batches_can_start_anywhere():
    plan = plan_of()
    everything = list(plan.micro_batches(0, (0, 0), 3))
    assert len(everything) == 3 * 3 * 2
    assert everything[(3 + 2) * 2 :] == list(plan.micro_batches(0, (1, 2), 3))


def test_a_dataset_as_small_as_a_batch_makes_one_step():
    plan = plan_of(num_images=5, effective_batch_size=5)
    assert (plan.steps_per_epoch, plan.images_per_epoch, plan.accumulation_steps) == (1, 5, 1)


def test_the_rate_rises_linearly_then_falls():
    def at(progress, fall=half_cosine):
        return learning_rate(progress, peak=2.0, least=0.5, warmup_fraction=0.1, fall=fall)

    assert [at(0.0), at(0.05)] == [0, 1.0]
    assert at(0.1) == pytest.approx(2.0)
    assert at(0.55) == pytest.approx(1.25)
    assert at(0.1 + 0.9 / 4) == pytest.approx(0.5 + 1.5 * 0.5 * (1 + 0.5**0.5))
    assert at(1.0) == pytest.approx(0.5)
    assert at(0.55, fall=lambda done, whole: (1 - done / whole) ** 2) == pytest.approx(0.5 + 1.5 / 4)


def test_without_warmup_it_starts_at_the_peak():
    assert learning_rate(0.0, peak=2.0, least=0, warmup_fraction=0.0, fall=half_cosine) == 2.0


def test_every_step_and_process_has_its_own_seed():
    assert len({derived_seeds(0, 2, step, rank)[0] for step in range(50) for rank in range(4)}) == 200


def test_an_end_within_an_epoch_takes_whole_steps_of_it_the_nearest_and_at_least_one():
    steps = {end: [plan_of(end=end).steps_in(epoch) for epoch in range(3)] for end in (2.7, 2.9, 3, 2.01)}
    assert steps == {2.7: [3, 3, 2], 2.9: [3, 3, 3], 3: [3, 3, 3], 2.01: [3, 3, 1]}
    plan = plan_of(end=2.7)
    assert plan.epochs_until(3) == 2 + 2 / 3
    assert len(list(plan.micro_batches(0, (0, 0), 3))) == 2 * (3 + 3 + 2)
    whole = list(plan_of().micro_batches(0, (0, 0), 3))
    assert list(plan.micro_batches(0, (0, 0), 3)) == whole[:16], "until there it is the longer run's"
