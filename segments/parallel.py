"""The same work on many items, on all cores, results in the order of the items."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from common.interruption import leave_signals_to_the_main_process

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_ALONE = 2.0  # torch takes as long to import: what is done by then needs no other process


def in_order(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    *,
    processes: int | None,
    chunk: int = 8,
) -> Generator[Result, None, None]:
    """Yield `work(item)` for each item; what it raises is raised here.

    processes: None: one per core; 1: this one. Closing the iterator ends them; they also end when
    this process is killed.
    """
    processes = processes or len(os.sched_getaffinity(0))
    started, done = time.monotonic(), 0
    while done < len(items) and (processes == 1 or time.monotonic() - started < SECONDS_ALONE):
        yield work(items[done])
        done += 1
    if done == len(items):
        return
    from torch.utils.data import DataLoader

    left: Any = items[done:]  # any sequence is a data set
    loader: DataLoader[Any] = DataLoader(
        left,
        batch_size=chunk,
        collate_fn=lambda some: [work(item) for item in some],
        num_workers=processes,
        prefetch_factor=4,
        worker_init_fn=leave_signals_to_the_main_process,
        multiprocessing_context="fork",  # nothing is pickled but the results
    )
    for results in loader:
        yield from results
