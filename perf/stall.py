"""How long a device waits for data, with a device that only sleeps. `python -m perf.stall --help`.

The real trainer, loader and images; each pass keeps the device busy for a while without using the
CPU, and the host runs ahead of it until it reads. Micro-batches streamed and read a look late, as
`engine.trainer` does it, against all of a step's fetched before its first pass and read at once,
as it was before.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.task import Run, State, load
from engine.trainer import PASSES_BETWEEN_LOOKS, EpochTrainer
from engine.update import GuardedUpdate
from mae.config import PretrainConfig
from perf.campaign import Bench, Results, Row, Table
from perf.rehearsal import build, divide, stretch

MICRO_BATCH = 16
FEW = 8  # images, of which any dataset has so many
ACCUMULATION = (1, 4, 16)
SLOWER = 2.0  # than the loader: a pass takes so many times as long as loading its images
PASSES, WARM_UP = 160, 32  # measured, and before that
MOST_PERCENT = 2.0  # that the device may be idle


class SleepingDevice(nn.Module):
    """In the place of the model and of the run's logbook: busy by the clock, not by computing."""

    def __init__(self, pass_seconds: float, passes_per_step: int, *, reads_late: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.pass_seconds, self.passes_per_step = pass_seconds, passes_per_step
        self.reads_late = reads_late
        self.free_at = self.looked_at = time.monotonic()
        self.idle_seconds, self.passes, self.steps = 0.0, 0, 0

    def forward(self, images: Tensor, pattern: Tensor) -> Tensor:
        """A pass is put behind what the device still has to do: errors [B], all 0."""
        now = time.monotonic()
        if self.passes >= WARM_UP:
            self.idle_seconds += max(0.0, now - self.free_at)
        self.passes += 1
        self.free_at = max(now, self.free_at) + self.pass_seconds
        return self.weight * torch.zeros(len(images))

    def advance(self, epoch: float, images: int, seconds: float) -> None:
        """A step has been given to the device: look, as often as the trainer does at a GPU."""
        self.steps += 1
        if self.steps % max(1, PASSES_BETWEEN_LOOKS // self.passes_per_step):
            return
        until = self.looked_at if self.reads_late else self.free_at
        time.sleep(max(0.0, until - time.monotonic()))
        self.looked_at = self.free_at

    @property
    def idle_percent(self) -> float:
        """Share of the time after the warm-up."""
        busy = (self.passes - WARM_UP) * self.pass_seconds
        return 100 * self.idle_seconds / (self.idle_seconds + busy)


def stall(
    bench: Bench, accumulation: int, seconds_per_batch: Callable[[], float], *, streamed: bool
) -> dict[str, Any]:
    """Figures of one way to fetch a step's micro-batches."""
    run = _built(bench, accumulation)
    seconds = SLOWER * seconds_per_batch()
    device = SleepingDevice(seconds, accumulation, reads_late=streamed)
    logbook: Any = device
    run.prepared, run.logbook = device, logbook
    optimizer = torch.optim.AdamW(device.parameters(), fused=True)
    run.update = GuardedUpdate(optimizer, None, scales_loss=False)
    batches = load(run, (0, 0), 1)
    fetched = batches if streamed else _fetched_first(batches, accumulation)
    EpochTrainer(run).train_one_epoch(State.of(run.task, {}, None), fetched)
    return {
        "idle %": device.idle_percent, "pass ms": seconds * 1e3,
        **({"passes": device.idle_percent < MOST_PERCENT} if streamed and not bench.tiny else {}),
    }  # fmt: skip


def _built(bench: Bench, accumulation: int) -> Run:
    """A pretraining on this machine's CPU, with one epoch of so many passes."""
    config = bench.config(
        PretrainConfig, mask_method="four_channels", batch_size=FEW, effective_batch_size=FEW,
        model="vit_tiny", device="cpu", **bench.photographs,
    )  # fmt: skip
    run = build(config)
    divide(run, passes=accumulation, images=MICRO_BATCH)
    stretch(run, bench.size(PASSES + WARM_UP, WARM_UP + max(ACCUMULATION)) * MICRO_BATCH)
    return run


def _seconds_per_batch(bench: Bench) -> float:
    """Of the loader alone, after those that it has fetched while it was not asked."""
    run = _built(bench, 1)
    batches = load(run, (0, 0), 1)
    for _ in islice(batches, WARM_UP):
        pass
    began = time.monotonic()
    count = sum(1 for _ in batches)
    return (time.monotonic() - began) / count


def _fetched_first(batches: Iterator[Any], count: int) -> Iterator[Any]:
    """All of a step before the first is given out."""
    while step := list(islice(batches, count)):
        yield from step


def table(bench: Bench) -> Table:
    """Both ways, by passes per step; the loader is timed once for all of them."""
    seconds_per_batch = cache(partial(_seconds_per_batch, bench))
    return Table(
        title=f"a sleeping device, passes of {MICRO_BATCH} images", columns=("idle %", "pass ms"),
        rows=[
            Row(
                work=f"accumulation {accumulation}, {'streamed' if streamed else 'fetched first'}",
                measure=partial(stall, bench, accumulation, seconds_per_batch, streamed=streamed),
            )
            for accumulation in ACCUMULATION
            for streamed in (False, True)
        ],
    )  # fmt: skip


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m perf.stall", description=__doc__)
    parser.add_argument("--images", type=Path, help="folder with train/; default: generated images")
    parser.add_argument("--masks", type=Path, help="their segments; default: IMAGES/masks")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(
            wanted="cpu", tiny=False, scratch=Path(scratch), images=arguments.images,
            masks=arguments.masks,
        )  # fmt: skip
        results = Results(Path(scratch) / "rows.json", bench.machine)
        results.measure([table(bench)], until=float("inf"))
        print(results.markdown([table(bench)]))


if __name__ == "__main__":
    main()
