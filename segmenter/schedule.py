"""What happens when: batches, order of the images, learning rate, seeds. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from segmenter.config import OptimisationConfig

# Streams of random numbers that must not meet.
ORDER_STREAM, SAMPLE_STREAM, STEP_STREAM, TOKEN_STREAM = 0, 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How a batch is spread. batch_size: images of a step on all processes together.

    Raises ValueError if a process would have nothing to do.
    """

    num_images: int
    batch_size: int
    processes: int

    def __post_init__(self) -> None:
        if self.effective_batch_size < self.processes:
            raise ValueError(
                f"a batch of {self.effective_batch_size} images cannot be spread over "
                f"{self.processes} processes; raise --batch-size or use fewer processes"
            )

    @property
    def effective_batch_size(self) -> int:
        """Images of a step; fewer than asked for if the dataset has no more."""
        return min(self.batch_size, self.num_images)

    @property
    def steps_per_epoch(self) -> int:
        """Full batches only, as is usual; a dataset smaller than a batch makes one step."""
        return max(1, self.num_images // self.batch_size)

    @property
    def images_per_epoch(self) -> int:
        """Images trained on in an epoch."""
        return self.steps_per_epoch * self.effective_batch_size

    def indices(self, seed: int, epoch: int, rank: int, first_step: int) -> Iterator[list[int]]:
        """This process's images of every step from `first_step` on."""
        order = np.random.default_rng([seed, ORDER_STREAM, epoch]).permutation(self.num_images)
        for step in range(first_step, self.steps_per_epoch):
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            yield batch[rank :: self.processes].tolist()


def learning_rate(optimisation: OptimisationConfig, progress: float) -> float:
    """The rate at `progress`, the completed share of the run, from 0 to 1."""
    warmup = optimisation.warmup_fraction
    if progress < warmup:
        return optimisation.lr * progress / warmup
    left = 1 - (progress - warmup) / (1 - warmup)
    if optimisation.schedule == "poly":
        factor = left**optimisation.poly_power
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (1 - left)))
    return optimisation.min_lr + (optimisation.lr - optimisation.min_lr) * factor


def learning_rate_points(optimisation: OptimisationConfig) -> list[tuple[float, float, str]]:
    """(epoch, rate, name) where it matters, ascending."""
    epochs = float(optimisation.epochs)
    warm = optimisation.warmup_fraction * epochs
    named = {epochs / 2: "middle", epochs: "end", warm: "end of warm-up", 0.0: "start"}
    return [
        (epoch, learning_rate(optimisation, epoch / epochs), named[epoch])
        for epoch in sorted(named)
    ]


def step_seed(seed: int, global_step: int, rank: int) -> int:
    """Seed of dropout and drop path in one step of one process."""
    return int(np.random.SeedSequence([seed, STEP_STREAM, global_step, rank]).generate_state(1)[0])
