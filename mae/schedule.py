"""Which images make a step, and the learning rate: pure functions of progress. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mae.config import OptimisationConfig

# Separate streams of random numbers from one seed.
ORDER_STREAM, SAMPLE_STREAM, FIXED_STREAM = 0, 1, 2


def sample_rng(seed: int, stream: int, epoch: int, index: int) -> np.random.Generator:
    """Random numbers of one sample, whoever loads it.

    Philox is made for this: any place of its sequence can be named, without seeding anew
    (Salmon et al. 2011).
    """
    place = np.random.Philox(key=[seed, stream], counter=[0, 0, epoch, index])
    return np.random.Generator(place)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How an effective batch is split over processes and forward passes.

    Step s of an epoch takes the images at s * effective_batch_size of that epoch's order, whatever
    the number of processes. An incomplete last batch is left out: every step weighs the same.
    """

    num_images: int
    effective_batch_size: int
    processes: int
    micro_batch_size: int
    seed: int

    @property
    def accumulation_steps(self) -> int:
        """Forward passes per process and optimizer step."""
        return self.effective_batch_size // (self.processes * self.micro_batch_size)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.num_images // self.effective_batch_size

    @property
    def images_per_epoch(self) -> int:
        """Images that an epoch trains on."""
        return self.steps_per_epoch * self.effective_batch_size

    def order(self, epoch: int) -> np.ndarray:
        """Image indices of an epoch, shuffled."""
        return np.random.default_rng([self.seed, ORDER_STREAM, epoch]).permutation(self.num_images)

    def micro_batches(
        self, rank: int, start: tuple[int, int], epochs: int
    ) -> Iterator[list[tuple[int, int]]]:
        """One process's batches of (epoch, image index), from (epoch, step) to `epochs`."""
        first_epoch, first_step = start
        for epoch in range(first_epoch, epochs):
            order = self.order(epoch)
            for step in range(first_step if epoch == first_epoch else 0, self.steps_per_epoch):
                position = step * self.effective_batch_size + rank * self.micro_batch_size
                for _ in range(self.accumulation_steps):
                    indices = order[position : position + self.micro_batch_size].tolist()
                    yield [(epoch, index) for index in indices]
                    position += self.processes * self.micro_batch_size


def make_batch_plan(
    optimisation: OptimisationConfig, *, num_images: int, processes: int, batch_size: int
) -> BatchPlan:
    """Split the effective batch into equal parts of at most `batch_size` images per process.

    Raises ValueError if that cannot be, or if there are fewer images than one batch.
    """
    effective = optimisation.effective_batch_size
    if num_images < effective:
        raise ValueError(
            f"--effective-batch-size {effective} is more than the {num_images} training images; "
            f"give at most {num_images}"
        )
    if effective % processes:
        raise ValueError(
            f"--effective-batch-size {effective} cannot be split over {processes} processes; "
            f"give a multiple of {processes}"
        )
    share = effective // processes
    accumulation = math.ceil(share / batch_size)
    while share % accumulation:
        accumulation += 1
    return BatchPlan(
        num_images=num_images,
        effective_batch_size=effective,
        processes=processes,
        micro_batch_size=share // accumulation,
        seed=optimisation.seed,
    )


def learning_rate(optimisation: OptimisationConfig, progress: float) -> float:
    """Linear warm-up, then half a cosine to `min_lr` (Loshchilov and Hutter 2017).

    progress: share of the whole run that is done, 0 to 1.
    """
    peak, warmup = optimisation.learning_rate, optimisation.warmup_fraction
    if progress < warmup:
        return peak * progress / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return optimisation.min_lr + (peak - optimisation.min_lr) * cosine
