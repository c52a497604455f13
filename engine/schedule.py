"""What happens when: which images make a step, the learning rate, the streams of random numbers.

Pure functions of (seed, epoch, step, index), so that neither a kill, nor the number of workers or
processes, nor rounds change what a training sees. No torch here: the planner asks, too.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

# Separate streams of random numbers from one seed. FIXED and STEP share a number, but not a run:
# the one is drawn from in pretraining only, the other where there is dropout.
ORDER, SAMPLE, FIXED, STEP, TOKENS, CONTROL = 0, 1, 2, 2, 3, 4


def sample_rng(seed: int, stream: int, epoch: int, index: int) -> np.random.Generator:
    """Random numbers of one sample, whoever loads it.

    Philox is made for this: any place of its sequence can be named, without seeding anew
    (Salmon et al. 2011). Seeding numpy's default generator would take as long as cropping.
    """
    place = np.random.Philox(key=[seed, stream], counter=[0, 0, epoch, index])
    return np.random.Generator(place)


def derived_seeds(seed: int, stream: int, *place: int, count: int = 1) -> list[int]:
    """Seeds of generators that are not ours (torch's, mmcv's), 32 bits each."""
    return np.random.SeedSequence([seed, stream, *place]).generate_state(count).tolist()


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """How an effective batch is split over processes and forward passes.

    Step s of an epoch takes the images at s * effective_batch_size of that epoch's order, whatever
    the number of processes. An incomplete last batch is left out: every step weighs the same.

    end: epochs after which all is done; a fraction ends within the last one's steps (a budget's end).
    effective_batch_size: images per optimizer step, on all processes together.
    micro_batch_size: most images of a forward pass.
    """

    num_images: int
    effective_batch_size: int
    processes: int
    micro_batch_size: int
    seed: int
    end: float = math.inf

    def passes(self, rank: int) -> int:
        """Forward passes of one process per optimizer step."""
        # Rounded up, both: the first processes have one image more, the last pass may be smaller.
        share = -(-(self.effective_batch_size - rank) // self.processes)
        return -(-share // self.micro_batch_size)

    @property
    def accumulation_steps(self) -> int:
        """The same of the process that has most."""
        return self.passes(rank=0)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps per epoch."""
        return self.num_images // self.effective_batch_size

    def steps_in(self, epoch: int) -> int:
        """The same of that epoch, from 0: fewer in the one within which all ends, and at least one."""
        whole = self.steps_per_epoch
        return whole if epoch + 1 <= self.end else max(1, round(whole * (self.end - epoch)))

    def epochs_until(self, epochs: int) -> float:
        """Of so many, those that are trained: the last one counts by its steps."""
        return epochs - 1 + self.steps_in(epochs - 1) / self.steps_per_epoch

    @property
    def images_per_epoch(self) -> int:
        """Images that a whole epoch trains on."""
        return self.steps_per_epoch * self.effective_batch_size

    def order(self, epoch: int) -> np.ndarray:
        """Image indices of an epoch, shuffled."""
        return np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.num_images)

    def micro_batches(
        self, rank: int, start: tuple[int, int], epochs: int
    ) -> Iterator[list[tuple[int, int]]]:
        """One process's forward passes, as (epoch, image index), from (epoch, step) to `epochs`."""
        first_epoch, first_step = start
        for epoch in range(first_epoch, epochs):
            order = self.order(epoch)
            for step in range(first_step if epoch == first_epoch else 0, self.steps_in(epoch)):
                first = step * self.effective_batch_size
                # Every n-th image, so that no process has two more than another: each has to take
                # part in the exchange of gradients, with however few images.
                mine = order[first : first + self.effective_batch_size][rank :: self.processes]
                for at in range(0, len(mine), self.micro_batch_size):
                    indices = mine[at : at + self.micro_batch_size]
                    yield [(epoch, index) for index in indices.tolist()]


def learning_rate(
    progress: float,
    *,
    peak: float,
    least: float,
    warmup_fraction: float,
    fall: Callable[[float, float], float],
) -> float:
    """Linear warm-up from 0 to the peak, then down to `least`.

    progress: share of the whole run that is done, 0 to 1. fall: from how much of the descent is
    done, and how long it is, to what is left of the height, 1 to 0.
    """
    if progress < warmup_fraction:
        return peak * progress / warmup_fraction
    return least + (peak - least) * fall(progress - warmup_fraction, 1 - warmup_fraction)


def half_cosine(done: float, whole: float = 1.0) -> float:
    """From 1 to 0 (Loshchilov and Hutter 2017, arXiv:1608.03983)."""
    # Multiplied first, then divided: another order would change the last bit of every run.
    return 0.5 * (1 + math.cos(math.pi * done / whole))
