"""Steps of the real trainer, looked at from outside: their time, losses, graphs and waits."""

import gc
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from torch._dynamo.utils import counters

import engine.trainer
from common.interruption import Interruption
from engine.devices import make_accelerator, peak_memory_mib
from engine.schedule import BatchPlan
from engine.task import MicroBatch, Run, State, Task, load
from engine.trainer import EpochTrainer
from mae.config import PretrainConfig
from segmenter.config import TrainConfig


def afresh() -> None:
    """Clear what a row before has left in the process: accelerate's state, graphs, memory."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()
    counters.clear()
    torch.set_float32_matmul_precision("highest")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.init()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def build(config: PretrainConfig | TrainConfig) -> Run:
    """The run as a training of either part begins with it."""
    afresh()
    if isinstance(config, PretrainConfig):
        from mae.pretrain import Pretraining

        task: Task = Pretraining(config)
    else:  # a row of the one part needs none of the other's packages
        from segmenter.dataset import read_description
        from segmenter.finetune import Finetuning

        task = Finetuning(config, read_description(config.run.dataset))
    return engine.trainer.build(task, make_accelerator(config.run), Interruption())[0]


class Laps:
    """In the place of a run's logbook: notes when each step was done, by the device's clock."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = [self._now()]

    def advance(self, epoch: float, images: int, seconds: float) -> None:
        """A step has been given to the device."""
        self.marks.append(self._now())

    def _now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[float]:
        """Of each step."""
        if not self.on_gpu:
            return [after - before for before, after in pairwise(self.marks)]
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in pairwise(self.marks)]


@dataclass(kw_only=True)
class Rehearsal:
    """What some epochs of so many steps have shown.

    losses: means of the epochs. laps: seconds of each step. graphs, breaks: of torch.compile.
    waits: the lines that kept the host waiting for a GPU after the first epoch.
    """

    losses: list[float] = field(default_factory=list)
    laps: list[float] = field(default_factory=list)
    waited_share: float = 0.0
    graphs: int = 0
    breaks: int = 0
    waits: list[str] = field(default_factory=list)
    peak_memory_mib: int = 0


def rehearse(run: Run, *, epochs: int, steps: int, resident: bool = False) -> Rehearsal:
    """Train a run that is built for more epochs, by its loader or with one batch on the device."""
    device, state = run.accelerator.device, State.of(run.task, {}, None)
    stretch(run, steps * run.plan.effective_batch_size)
    batches = load(run, (0, 0), epochs)
    if resident:
        batches = repeat(on_device(next(batches), device))
    laps: Any = Laps(device)
    run.logbook = laps
    trainer, shown, seconds, waited = EpochTrainer(run), Rehearsal(), 0.0, 0.0
    for epoch in range(epochs):
        state.begin_epoch(epoch)
        with count_waits(device, shown.waits) if epoch else nullcontext():
            if trainer.train_one_epoch(state, batches):
                raise RuntimeError("stopped by a signal")
        shown.losses.append(state.sums["loss"] / steps)
        seconds, waited = seconds + state.seconds, waited + state.waited_seconds
    shown.laps, shown.waited_share = laps.seconds(), waited / seconds
    shown.graphs = counters["stats"]["unique_graphs"]
    shown.breaks = sum(counters["graph_break"].values())
    shown.peak_memory_mib = peak_memory_mib(device)
    return shown


def steps_of(run: Run, count: int) -> Callable[[], None]:
    """So many steps at each call, of an epoch of their own, on one batch on the device."""
    stretch(run, count * run.plan.effective_batch_size)
    batch = on_device(next(load(run, (0, 0), 1)), run.accelerator.device)
    trainer = EpochTrainer(run)

    def train() -> None:
        trainer.train_one_epoch(State.of(run.task, {}, None), repeat(batch))

    return train


@dataclass(frozen=True, kw_only=True)
class LongPlan(BatchPlan):
    """Epochs of more images than are there, which come in turn."""

    available: int

    def order(self, epoch: int) -> np.ndarray:
        """Indices of those that are there."""
        return super().order(epoch) % self.available


def stretch(run: Run, num_images: int) -> None:
    """Let an epoch have so many images."""
    available = getattr(run.plan, "available", run.plan.num_images)
    run.plan = LongPlan(**{**asdict(run.plan), "num_images": num_images, "available": available})


def divide(run: Run, *, passes: int, images: int) -> None:
    """Give a training steps of so many passes, of so many images each."""
    run.plan = replace(run.plan, effective_batch_size=passes * images, micro_batch_size=images)


def on_device(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """A batch of either part, with what the model gets of it there already."""
    return batch._replace(inputs=[tensor.to(device) for tensor in batch.inputs])


@contextmanager
def count_waits(device: torch.device, found: list[str]) -> Iterator[None]:
    """Note each line that makes the host wait for a GPU; torch tells only there."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    about = (w for w in caught if "synchronizing" in str(w.message))
    found += [f"{Path(warning.filename).name}:{warning.lineno}" for warning in about]
