"""torch.compile, for real, on a CPU."""

import json
import os
import signal
from functools import partial

import psutil
import pytest

from tests.mae.conftest import make_config
from tests.processes import until

pytestmark = pytest.mark.slow


def _compiling(cache, rank):
    """A process group of its own, as torchrun and Slurm have them; a cold cache."""
    import torch

    os.setsid()
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    os.environ["TORCHINDUCTOR_WORKER_START"] = "subprocess"
    torch._dynamo.config.error_on_recompile = True
    torch._inductor.config.cpp.vec_isa_ok = False  # no vector instructions: half of the time


def test_a_signal_to_all_processes_while_compiling_stops_the_run(in1k_dir, tmp_path, processes):
    """It reaches the compiler's processes, too. Then nothing is compiled a second time."""
    out = tmp_path / "run"
    config = make_config(in1k_dir, out, compile="on", batch_size=4)
    sabotage = partial(_compiling, tmp_path / "cache")
    (process,) = processes.start(config, sabotage=sabotage)
    run = psutil.Process(process.pid)
    until(lambda: any(_compiles(child) for child in run.children(recursive=True)))
    os.killpg(process.pid, signal.SIGTERM)
    process.join(240)
    assert process.exitcode == 75
    assert json.loads((out / "progress.json").read_text())["state"] == "stopped"
    assert (out / "last.pth").exists()
    assert processes.run(config, sabotage=sabotage) == [0]
    assert len((out / "log.txt").read_text().splitlines()) == 4


def _compiles(process):
    try:
        return process.name() == "cc1plus"
    except psutil.Error:
        return False
