from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.version import cuda

from common.environment import CUDA_REMEDY
from mae.check import PretrainFacts, plan_batches
from pipeline.launch import doctor
from pipeline.launch.doctor import Finding, examine, findings_text
from pipeline.plan import machine
from pipeline.plan.machine import Gpu
from pipeline.plan.segments import with_segments
from pipeline.plan.settings import GROUPS, Compute, Parts, Settings
from pipeline.plan.steps import make_plan
from tests.pipeline.programs import run_benchmark

LOCKED = {
    "torch": "2.14.1+cu130", "cuda": "13.0", "lacks_to_compile": "", "error": "no GPU", "gpus": [],
    "archs": ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"],
}  # fmt: skip
CARD = {"error": "", "free_bytes": 2**35, "total_bytes": 2**35, "bf16": True}


def to_fix(**groups: object) -> list[str]:
    given: Mapping[str, Any] = {name: group() for name, group in GROUPS.items()} | groups
    return [f.subject for f in examine(lambda: Settings(**given), given) if f.fix]


def test_a_machine_without_flags_is_examined() -> None:
    given = {name: group() for name, group in GROUPS.items()}
    subjects = [f.subject for f in examine(lambda: pytest.fail("no run was asked for"), given)]
    assert {"python", "torch", "devices", "processors", "memory"} <= set(subjects)


def test_more_gpus_than_there_are_is_found() -> None:
    assert to_fix(compute=Compute(num_gpus=64)) == ["devices"]


def test_more_workers_than_cores_is_found() -> None:
    given = {"compute": Compute(num_gpus=0), "parts": Parts(pretrain={"workers": 10_000})}
    assert to_fix(**given) == ["processors"]


def test_flags_of_a_run_that_would_be_refused_are_found(tmp_path: Any) -> None:
    assert to_fix(data=replace(GROUPS["data"](), in1k_dir=tmp_path)) == ["flags"]


def test_segments_that_the_plan_will_make_are_named(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, data: Path
) -> None:
    shutil.rmtree(data / "in1k/masks")
    chosen = settings("--make-segments felzenszwalb --segment-shards 2 --pretrain-epochs 1")
    steps = with_segments(make_plan(chosen), chosen)
    monkeypatch.setattr(doctor, "checked_plan", lambda settings: steps)
    groups = {name: getattr(chosen, name) for name in GROUPS}
    found = {finding.subject: finding.text for finding in examine(lambda: chosen, groups)}
    assert found["segments"] == "make segments by felzenszwalb (3 steps)"


@pytest.mark.parametrize(
    ("workers", "batch_size", "free_gib", "is_enough"),
    [
        (10, 128, 2, True),  # 4 x 10 batches of 128 images of 4 x 224 x 224 bytes, twice: 1.9 GiB
        (10, 128, 1, False),
        (10, "auto", 4, True),  # 512 at once, of which 2 x 10 are ahead: 3.8 GiB
        (10, "auto", 3, False),
        (0, 128, 0, True),
    ],
)
def test_shared_memory_that_loaders_would_overflow_is_found(
    settings: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch,
    workers: int, batch_size: object, free_gib: int, is_enough: bool,
) -> None:  # fmt: skip
    words = f"--num-processes 2 --pretrain workers={workers} --pretrain batch_size={batch_size}"
    step = make_plan(settings(f"{words} --pretrain effective_batch_size=1024"))[0]
    plan = plan_batches(step.config, 4096, 2)  # type: ignore[arg-type]
    facts = dict.fromkeys(("train", "left_out", "val", "val_left_out", "checkpoint_bytes"), 0)
    images = PretrainFacts(**facts, plan=plan, learning_rates=(), some_images=())
    monkeypatch.setattr(machine, "free_bytes", lambda folder: free_gib * 2**30)
    assert bool(doctor._shared_memory(step, images).fix) is not is_enough


def test_images_of_which_none_can_be_read_are_found(data: Path) -> None:
    """One that cannot is replaced while training, and named there."""
    folder = data / "in1k/train"
    facts = dict.fromkeys(("train", "left_out", "val", "val_left_out", "checkpoint_bytes"), 0)
    paths = [folder / f"{number}.jpg" for number in range(3)]
    for path in paths:
        Image.new("RGB", (8, 8)).save(path)
    images = PretrainFacts(**facts, plan=None, learning_rates=(), some_images=tuple(paths))
    for number, path in enumerate(paths):
        assert doctor._unreadable(images) == ""
        path.write_bytes(b"P6 30000 30000 255\n" if number else b"cut")  # a bomb of 2.7 GB
    assert "cannot be read as an image" in doctor._unreadable(images)


def test_what_to_fix_is_marked_with_its_remedy() -> None:
    found = [Finding("a", "good"), Finding("bb", "bad", fix="do it")]
    assert findings_text(found).splitlines() == [
        *("ok   a   good", "FIX  bb  bad", "         -> do it", "1 to fix"),
    ]


@pytest.mark.slow
@pytest.mark.skipif(not (cuda or "").startswith("13."), reason="torch is not the lock's, but of TORCH_INDEX")
def test_eight_v100_with_the_locked_torch_are_told_the_cause_and_the_command(
    cards_here: Callable[..., None],
) -> None:
    """The command as a user calls it; torch itself is asked, and sees none of these cards."""
    cards_here(*[Gpu("Tesla V100-SXM2-32GB", 535, (7, 0))] * 8)
    done = run_benchmark("doctor")
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert any("8 x Tesla V100-SXM2-32GB" in line for line in lines)
    at = next(n for n, line in enumerate(lines) if line.startswith("FIX  Tesla V100"))
    assert "needs driver 580 or newer, here is 535" in lines[at]
    assert f"torch {version('torch')}" in lines[at] and "not for sm_70" in lines[at]
    assert "-> TORCH_INDEX=URL ./run_benchmark.sh" in lines[at + 1]


@pytest.fixture
def on(cards_here: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Finding]]:
    """What is found on one card where torch answers so."""

    def find(card: Gpu, **torch: object) -> dict[str, Finding]:
        cards_here(card)
        monkeypatch.setattr(doctor, "ask", lambda commands: [json.dumps(LOCKED | torch)])
        given = {name: group() for name, group in GROUPS.items()}
        return {f.subject: f for f in examine(lambda: pytest.fail("no run was asked for"), given)}

    return find


H100 = Gpu("NVIDIA H100 80GB HBM3", 580, (9, 0))
Find = Callable[..., dict[str, Finding]]


def test_a_card_that_computes_is_ready(on: Find) -> None:
    found = on(H100, error="", gpus=[CARD])
    assert found["GPU 0"].text == "32.0 of 32.0 GiB free, bf16 in hardware"
    assert [f.subject for f in found.values() if f.fix] == []


@pytest.mark.parametrize(
    ("torch", "subject", "text", "fix"),
    [
        ({"gpus": [CARD | {"free_bytes": 2**34}]}, "GPU 0", "16.0 of 32.0", "programs that use it"),
        (
            {"gpus": [CARD | {"error": "ECC"}]},
            "GPU 0",
            "cannot compute on it: ECC",
            "nvidia-smi -q",
        ),
        ({}, "torch on GPUs", "no GPU", "container"),
        ({"cuda": None, "archs": []}, "torch on GPUs", "without CUDA", "./run_benchmark.sh"),
        ({"lacks_to_compile": "C compiler"}, "compiling", "no C compiler", "python3-dev"),
    ],
)
def test_what_torch_lacks_is_found(
    on: Find, torch: dict[str, object], subject: str, text: str, fix: str
) -> None:
    finding = on(H100, **torch)[subject]
    assert text in finding.text
    assert fix in finding.fix


BROKEN = CARD | {"error": "no kernel image is available", "bf16": False}


def test_an_old_card_that_fails_for_want_of_kernels_is_told_the_same_command(on: Find) -> None:
    found = on(Gpu("Tesla V100-SXM2-32GB", 580, (7, 0)), error="", gpus=[BROKEN])
    assert "driver" not in found["Tesla V100-SXM2-32GB"].text
    assert "from sm_75 on, not for sm_70" in found["Tesla V100-SXM2-32GB"].text
    assert found["GPU 0"].fix == found["Tesla V100-SXM2-32GB"].fix == CUDA_REMEDY


def test_a_card_that_is_newer_than_the_build_fails_at_the_kernel_that_is_tried(on: Find) -> None:
    older = {"cuda": "12.6", "archs": ["sm_50", "sm_90"], "error": ""}
    found = on(Gpu("NVIDIA B200", 580, (10, 0)), **older, gpus=[BROKEN])
    assert [(f.subject, f.fix) for f in found.values() if f.fix] == [("GPU 0", CUDA_REMEDY)]


def test_a_new_card_with_an_old_driver_is_told_the_driver_only(on: Find) -> None:
    finding = on(Gpu("NVIDIA A40", 535, (8, 6)))["NVIDIA A40"]
    assert finding.text.endswith("needs driver 580 or newer, here is 535")
    assert "update the driver" in finding.fix
