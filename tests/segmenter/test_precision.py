"""fp16 finetuning, by torch's autocast on a CPU."""

import pytest
import torch
from accelerate.state import AcceleratorState

from common.formats import read_log
from engine import update
from tests.segmenter.boxes import call, train_arguments


@pytest.fixture(autouse=True)
def own_state():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.slow
@pytest.mark.parametrize("decoder", ["mask_transformer", "linear"])
def test_finetuning_in_fp16_is_that_in_fp32_and_keeps_its_scale(dataset, tmp_path, monkeypatch, decoder):
    """From a scale that fits: at 2^16 the few tokens of so small images overflow at first."""
    monkeypatch.setattr(update, "FIRST_SCALE", 2.0**10)
    logs = []
    for precision in ("fp32", "fp16"):
        arguments = train_arguments(
            dataset, tmp_path / precision, decoder=decoder, epochs=6, precision=precision,
            drop_path=0.0, decoder_dropout=0.0, optimizer="adamw", lr=1e-4, layer_decay=1.0,
        )  # fmt: skip
        AcceleratorState._reset_state(reset_partial_state=True)  # accelerate has one for all
        assert call(*arguments).code == 0
        logs.append([record["train_loss"] for record in read_log(tmp_path / precision / "log.txt")])
    assert logs[1] == pytest.approx(logs[0], rel=0.01)
    assert logs[1] != logs[0]
    (*_, last) = read_log(tmp_path / "fp16/log.txt")
    assert (last["loss_scale"], last["skipped_steps"]) == (2**10, 0)
    kept = torch.load(tmp_path / "fp16/checkpoint.pth", weights_only=True)["loss_scaling"]
    assert kept == {"scale": 2**10, "clean_steps": 12, "skipped_steps": 0}
