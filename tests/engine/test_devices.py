"""What a machine needs to compile and to compute on its GPUs, and what is said without it."""

import json
import shutil
import subprocess
import sys
import sysconfig
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend

from engine import devices
from engine.config import DeviceConfig, TrainingConfig

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")


def test_compiling_needs_a_compiler_and_pythons_header(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name else None)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert devices.lacks_to_compile() == ""
    (tmp_path / "Python.h").unlink()
    assert "Python.h (Debian: python3-dev)" in devices.lacks_to_compile()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "gcc" in devices.lacks_to_compile()


@NO_GPU
def test_a_wanted_gpu_that_is_not_there_is_refused_with_torchs_own_reason():
    with pytest.raises(ValueError, match=r"--device cuda: torch .* has no GPU: .*; use --device"):
        devices.choose_device("cuda")
    assert devices.choose_device("auto").type == "cpu"


def test_a_driver_that_is_too_old_is_told_with_both_versions_of_cuda(monkeypatch):
    def init():
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 11040). Please update ..."
        )

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = f"for CUDA {torch.version.cuda}, has no GPU: the NVIDIA driver is too old, it has CUDA"
    with pytest.raises(ValueError, match=f"{said} 11.4; use --device cpu"):
        devices.choose_device("cuda")


@pytest.fixture
def v100(monkeypatch):
    """A card that torch sees; it has no kernels for it, and cannot compute here."""
    for name, value in {
        "is_available": True, "device_count": 1, "get_device_capability": (7, 0),
        "get_device_name": "Tesla V100-SXM2-32GB", "is_bf16_supported": False,
        "get_arch_list": ["sm_75", "sm_90", "compute_90"], "mem_get_info": (2**34, 2**35),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize("wanted", ["cuda", "auto"])
def test_a_card_without_kernels_is_refused_at_the_start_with_the_command(v100, wanted, monkeypatch):
    def ones(*_, **__):
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(ValueError, match=r"no kernels for Tesla V100-SXM2-32GB: .*TORCH_INDEX=U"):
        devices.choose_device(wanted)
    assert devices.choose_device("cpu").type == "cpu"


def test_a_card_with_kernels_is_taken(v100, monkeypatch):
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda count, device: ones(count))
    assert devices.choose_device("auto") == torch.device("cuda", 0)


@NO_GPU
def test_each_gpu_is_tried_and_its_error_told(v100):
    (gpu,) = devices.examine()["gpus"]
    assert gpu["error"]
    assert (gpu["capability"], gpu["free_bytes"], gpu["bf16"]) == ((7, 0), 2**34, False)


@pytest.mark.slow
@NO_GPU
def test_gpus_are_told_in_json():
    root, words = Path(__file__).resolve().parents[2], [sys.executable, "-m", "engine.devices"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["torch"] == torch.__version__
    assert told["archs"] == torch.cuda.get_arch_list()
    assert "has no GPU" in told["error"]
    assert told["gpus"] == []


@pytest.mark.parametrize("wanted", ["flash", "math"])
def test_the_wanted_attention_comes_first_until_another_is_asked_for(wanted):
    query = torch.zeros(1, 1, 8, 64)
    usual = torch._fused_sdp_choice(query, query, query)
    try:
        devices.make_accelerator(DeviceConfig(device="cpu", attention=wanted))
        chosen = torch._fused_sdp_choice(query, query, query)
        assert SDPBackend(chosen) == devices.ATTENTION[wanted]
    finally:
        devices.make_accelerator(DeviceConfig(device="cpu"))
    assert torch._fused_sdp_choice(query, query, query) == usual


def test_what_the_wanted_attention_cannot_do_others_do_before_plain_math():
    """A bias that is trained, as UPerNet's encoder has: math would store every attention map."""
    queries = torch.zeros(1, 1, 8, 64, dtype=torch.bfloat16)
    kernels = (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.mem_efficient_sdp_enabled)
    try:
        devices.make_accelerator(DeviceConfig(device="cpu", attention="flash"))
        assert all(is_allowed() for is_allowed in kernels)
        order = [SDPBackend(number) for number in torch._C._get_sdp_priority_order()]
        assert order[0] == SDPBackend.FLASH_ATTENTION
        assert order.index(SDPBackend.EFFICIENT_ATTENTION) < order.index(SDPBackend.MATH)
        assert torch.nn.functional.scaled_dot_product_attention(queries, queries, queries).shape
    finally:
        devices.make_accelerator(DeviceConfig(device="cpu"))


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("compile_mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("compiling", ["auto", "off"])
def test_graphs_that_would_lose_gradients_are_refused_by_name(tmp_path, passes, compile_mode, compiling):
    config = TrainingConfig(output_dir=tmp_path, compile=compiling, compile_mode=compile_mode)
    if (passes, compile_mode, compiling) == (2, "reduce-overhead", "auto"):
        with pytest.raises(ValueError, match="--compile-mode reduce-overhead: gradients of 2 passes"):
            config.check_passes(passes)
    else:
        config.check_passes(passes)


def test_an_attention_that_is_not_here_is_refused_and_leaves_the_others():
    with pytest.raises(ValueError, match="--attention cudnn: torch has no such kernel for cpu in"):
        devices.make_accelerator(DeviceConfig(device="cpu", attention="cudnn"))
    query = torch.zeros(1, 1, 8, 64)
    assert torch.nn.functional.scaled_dot_product_attention(query, query, query).shape == (
        1, 1, 8, 64,
    )  # fmt: skip


def test_the_compile_mode_reaches_torch(monkeypatch, tmp_path):
    asked = {}
    monkeypatch.setattr(torch, "compile", lambda model, **how: asked.update(how) or model)
    config = TrainingConfig(output_dir=tmp_path, device="cpu", compile="on", compile_mode="reduce-overhead")
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate has one for all
    try:
        devices.make_accelerator(config).prepare_model(torch.nn.Linear(1, 1))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert (asked["backend"], asked["mode"]) == ("inductor", "reduce-overhead")
