"""The same work on many items, on all cores, results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from multiprocessing.connection import wait
from typing import Any, TypeVar

from common.interruption import leave_signals_to_the_main_process

Item = TypeVar("Item")
Result = TypeVar("Result")

SECONDS_ALONE = 2.0  # torch takes as long to import: what is done by then needs no other process


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], *, processes: int, chunk: int = 8
) -> Generator[Result, None, None]:
    """Yield `work(item)` for each item; what it raises is raised here.

    Closing the iterator ends the processes; they also end when this process is killed.
    """
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
        collate_fn=partial(_do_each, work),
        num_workers=processes,
        prefetch_factor=4,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork",  # nothing is pickled but the results
    )
    for results in loader:
        yield from results


def _do_each(work: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    return [work(item) for item in items]


def _start_worker(worker: int) -> None:
    leave_signals_to_the_main_process(worker)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """The loader's worker looks for its parent only between results, and hangs on a full pipe."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
