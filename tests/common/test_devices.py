"""What a machine needs to compile, and processes that have to agree on where they go on."""

import shutil
import sysconfig

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.nn.attention import SDPBackend

from common import devices
from common.run import DeviceConfig, TrainingConfig


def test_compiling_needs_a_compiler_and_pythons_header(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name else None)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert devices._lacks_to_compile() == ""
    (tmp_path / "Python.h").unlink()
    assert "Python.h (Debian: python3-dev)" in devices._lacks_to_compile()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "gcc" in devices._lacks_to_compile()


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
    config = TrainingConfig(
        output_dir=tmp_path, device="cpu", compile="on", compile_mode="reduce-overhead"
    )
    AcceleratorState._reset_state(reset_partial_state=True)  # accelerate has one for all
    try:
        devices.make_accelerator(config).prepare_model(torch.nn.Linear(1, 1))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert (asked["backend"], asked["mode"]) == ("inductor", "reduce-overhead")
