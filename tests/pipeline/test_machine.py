"""What nvidia-smi lists, by scripts in its place that answer as it does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.plan import machine
from pipeline.plan.machine import Gpu, visible_gpus
from tests.pipeline.programs import fake_program

V100 = "Tesla V100-SXM2-32GB, 535.104.05, 32768"
# Its -L lists a card's slices below it; a query lists cards.
MIG = """case "$1" in -L) echo 'GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5e2f)'
echo '  MIG 3g.20gb Device 0: (UUID: MIG-77aa)'; echo '  MIG 3g.20gb Device 1: (UUID: MIG-77ab)';;
*) echo 'NVIDIA A100-SXM4-40GB, 580.65.06, [N/A], 8.0';; esac"""
OLD = f"""case "$1" in *compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'
exit 2;; *) echo '{V100}';; esac"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path / "bin"


def test_a_card_comes_with_driver_memory_and_capability(smi: Path) -> None:
    fake_program(smi, "nvidia-smi", f"echo '{V100}, 7.0'; echo '{V100}, 7.0'")
    card = Gpu(name="Tesla V100-SXM2-32GB", driver=535, memory_gib=32.0, capability=(7, 0))
    assert machine.gpus() == [card, card]
    assert visible_gpus() == ["0", "1"]


def test_an_nvidia_smi_that_knows_no_capability_lists_the_rest(smi: Path) -> None:
    fake_program(smi, "nvidia-smi", OLD)
    assert [(gpu.name, gpu.capability) for gpu in machine.gpus()] == [
        ("Tesla V100-SXM2-32GB", None)
    ]


def test_slices_of_a_card_are_no_cards(smi: Path) -> None:
    fake_program(smi, "nvidia-smi", MIG)
    assert [gpu.name for gpu in machine.gpus()] == ["NVIDIA A100-SXM4-40GB"]
    assert visible_gpus() == ["0"]


def test_a_driver_that_does_not_answer_is_no_gpu(smi: Path) -> None:
    fake_program(smi, "nvidia-smi", "echo 'NVIDIA-SMI has failed because ...'; exit 9")
    assert (machine.gpus(), visible_gpus()) == ([], [])


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
    smi: Path, monkeypatch: pytest.MonkeyPatch, given: str, seen: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert visible_gpus() == seen
