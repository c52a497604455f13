"""The same work on many items, on all cores, results in the order of the items."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing.connection import wait
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNKS_AHEAD = 4  # per process: enough to keep it busy, little to lose when stopped

_work: Callable[[Any], Any]


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], *, processes: int, chunk: int = 8
) -> Generator[Result, None, None]:
    """Yield `work(item)` for each item; `work` is pickled once per process.

    What `work` raises is raised here. With one process, or few items, there is no other process.
    Closing the iterator ends the processes; they also end when this process is killed.
    """
    if processes <= 1 or len(items) <= chunk:
        yield from map(work, items)
        return
    chunks = (items[start : start + chunk] for start in range(0, len(items), chunk))
    pending: deque[Future[list[Result]]] = deque()
    pool = ProcessPoolExecutor(
        processes,
        mp_context=multiprocessing.get_context("fork"),
        initializer=_start_worker,
        initargs=(work,),
    )
    try:
        for items_of_chunk in chunks:
            pending.append(pool.submit(_do_chunk, items_of_chunk))
            if len(pending) >= processes * CHUNKS_AHEAD:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # A signal to the whole process group is for the main process, which finishes what is begun.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent cannot shut its pool down, and a worker would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _do_chunk(items: Sequence[Any]) -> list[Any]:
    return [_work(item) for item in items]
