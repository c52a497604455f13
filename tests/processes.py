"""Processes of a run, forked from a server that has imported torch once: it takes seconds."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

SECONDS = 300  # on a machine that does a lot beside the tests

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["mae.pretrain", "segmenter.probing", "torch.utils.tensorboard", "tests.mae.conftest"]
)


def start(work: Callable[[int], int], processes: int = 1, output: Path | None = None) -> list[BaseProcess]:
    """Processes that end with the exit code of work(rank), connected as torchrun connects them.

    output: a file for all that they print.
    """
    port = _free_port() if processes > 1 else None
    started = [
        _server.Process(target=_child, args=(work, rank, processes, port, output))
        for rank in range(processes)
    ]
    for process in started:
        process.start()
    return started


def ended(started: list[BaseProcess]) -> list[int | None]:
    """Their exit codes, when all have ended; negative: killed by that signal."""
    for process in started:
        process.join(SECONDS)
    for process in started:
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in started]


def until(condition: Callable[[], object], seconds: float = SECONDS, pause: float = 0.02) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(pause)


def _child(
    work: Callable[[int], int], rank: int, processes: int, port: int | None, output: Path | None
) -> None:
    import torch

    multiprocessing.set_start_method("fork", force=True)  # of loaders' processes, as in a real run
    if output is not None:
        stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
    torch.set_num_threads(1)
    if processes > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes),
            LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
            OMP_NUM_THREADS="1",
        )  # fmt: skip
    sys.exit(work(rank))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
