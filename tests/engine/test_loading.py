"""Processes that load data, and what keeps them from handing it over."""

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from engine.task import start_loader_process


class Batches(Dataset[object]):
    """The last one cannot be handed over, as none can where /dev/shm is full."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> object:
        return torch.tensor(index) if index < 2 else iter(lambda: 0, 1)


def test_a_batch_that_is_not_handed_over_is_an_error_and_no_wait() -> None:
    loader = DataLoader(
        Batches(), batch_size=None, num_workers=2, worker_init_fn=start_loader_process, timeout=60
    )
    batches: Any = iter(loader)
    assert (next(batches), next(batches)) == (0, 1)
    said = "cannot hand over a batch .*; make /dev/shm larger"
    with pytest.raises(RuntimeError, match=said):
        next(batches)
    batches._shutdown_workers()  # signals do not end them
