"""One pass over many images: on all cores, in order, counted on the screen, ended by a signal.

results = each(work, keys, processes=None)  # what `work(key)` returns, or a Failure
for key, result in zip(keys, one_pass("check", results, total=len(keys))): ...
"""

import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, NamedTuple, TypeVar

from common.interruption import Interruption, leave_signals_to_the_main_process
from common.progress import Counter

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Result = TypeVar("Result")

AHEAD = 8  # items that wait for each process; more would only take memory


class Failure(NamedTuple):
    """An image that could not be done, and why."""

    key: str
    reason: str


def one_pass(
    what: str, results: Generator[Result, None, None], *, total: int, done: int = 0
) -> Generator[Result, None, None]:
    """Yields the results, counted as they are taken; fewer if a signal asks to stop.

    total: of all images, `done` of which were done before.
    """
    with Interruption() as stop, Counter(what, total=total, done=done) as counter:
        for result in results:
            yield result  # what is made of it, say a row of a store, comes before the signal
            counter.advance()
            if stop.requested and counter.done < counter.total:
                logger.warning("stopped; run the same command again to go on")
                results.close()
                return


def each(
    work: Callable[[str], Result], keys: Sequence[str], *, processes: int | None
) -> Generator[Result | Failure, None, None]:
    """Yields `work(key)` of each image in order; what it raises as ValueError is a Failure."""

    def attempt(key: str) -> Result | Failure:
        try:
            return work(key)
        except ValueError as error:
            return Failure(key, str(error))

    return in_order(attempt, keys, processes=processes)


def in_order(
    work: Callable[[Item], Result], items: Sequence[Item], *, processes: int | None
) -> Generator[Result, None, None]:
    """Yields `work(item)` for each item; what it raises is raised here.

    processes: None: one per core. They end with the generator, and when this process is killed.
    Raises BrokenProcessPool, a RuntimeError, if one of them is.
    """
    # Of the cores that Slurm or a container gives, not of all that the machine has.
    processes = min(processes or len(os.sched_getaffinity(0)), len(items))
    if processes <= 1:
        yield from map(work, items)
        return
    waiting: deque[Future[Result]] = deque()
    # Forked, so that `work` and all that it holds, say a million keys, is never pickled.
    context = multiprocessing.get_context("fork")
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(work,))
    try:
        for item in items:
            waiting.append(pool.submit(_do, item))
            # Results are taken in order, however they come; a slow reader stops the others.
            if len(waiting) > AHEAD * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any]  # of a process that `in_order` has begun


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    leave_signals_to_the_main_process(0)  # Ctrl-C reaches the whole group


def _do(item: Any) -> Any:
    return _work(item)
