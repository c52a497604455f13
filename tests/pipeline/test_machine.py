"""The GPUs of this machine, by a stand-in for NVIDIA's library."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pipeline.plan import machine
from pipeline.plan.machine import Gpu, visible_gpus

V100 = Gpu(name="Tesla V100-SXM2-32GB", driver=535, capability=(7, 0))


def test_a_card_comes_with_driver_and_capability(cards_here: Callable[..., None]) -> None:
    cards_here(V100, V100)
    assert machine.gpus() == [V100, V100]
    assert visible_gpus() == ["0", "1"]


def test_a_driver_that_does_not_answer_is_no_gpu(cards_here: Callable[..., None]) -> None:
    cards_here()
    assert (machine.gpus(), visible_gpus()) == ([], [])


def test_the_cards_of_other_jobs_are_left_out(
    cards_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """NVML counts them, and gives no handle."""
    cards_here(V100, V100)

    def handle(index: int) -> Gpu:
        if index == 0:
            raise machine.pynvml.NVMLError("Insufficient Permissions")
        return V100

    monkeypatch.setattr(machine.pynvml, "nvmlDeviceGetHandleByIndex", handle)
    assert machine.gpus() == [V100]


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ("2,3", ["2", "3"]),
        ("GPU-5e2f-11, MIG-77aa", ["GPU-5e2f-11", "MIG-77aa"]),
        ("MIG-GPU-5e2f/1/0", ["MIG-GPU-5e2f/1/0"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),  # what Slurm sets for a job without GPUs
        ("0,-1,1", ["0"]),
    ],
)
def test_visible_devices_are_read_as_cuda_reads_them(
    monkeypatch: pytest.MonkeyPatch, given: str, seen: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == seen
