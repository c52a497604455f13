"""What a GPU computes is right, and what is promised of runs holds there.

Each row says whether it passes; `pytest -m gpu` asks the same.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console import EXIT_STOPPED
from common.formats import read_json, read_log
from common.step_files import LAST, LOG, RESULT
from engine.checkpoint import read_torch_file
from engine.config import DeviceConfig
from engine.devices import examine, make_accelerator
from mae.config import PretrainConfig
from mae.masking import METHODS
from perf.campaign import Bench, Row, Table
from perf.rehearsal import Rehearsal, afresh, build, rehearse
from segmenter.config import ProbeConfig, TrainConfig

if TYPE_CHECKING:
    from segmenter.metrics import Areas

EPOCHS, STEPS = 4, 5  # 20 steps (4 in --tiny), and a mean loss of every five
MODEL = "vit_base"
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"precision": "fp32", "compile": "off"},
    "bf16": {"precision": "bf16", "compile": "off"},
    "fp16": {"precision": "fp16", "compile": "off"},
    "bf16, compiled, two passes": {"precision": "bf16", "compile": "auto", "batch_size": 32},
}
COMPILED = "bf16, compiled, two passes"  # takes half a minute: of one method only
WORKERS = 4  # loader processes, which take time to start
MOST_PERCENT = 1.0  # that a loss may differ from fp32's
MOST_POINTS = 1.0  # that a score may differ from a CPU's
NEAR = 1e-3  # relative, of what a GPU adds up in another order
ROOT = Path(__file__).resolve().parents[1]
# What a run is started with in place of `python -m mae`.
AS_IT_IS = "from mae.cli import main; main()"
WITHOUT_HEADER = (
    f"import sysconfig; f = sysconfig.get_path; sysconfig.get_path = "
    f"lambda name, *a, **k: '/nowhere' if name == 'include' else f(name, *a, **k); {AS_IT_IS}"
)


def tables(bench: Bench, out: Path) -> list[Table]:
    """Tables of verdicts. out: not used, rows are all that is left."""
    losses = cache(partial(_losses, bench))
    cells = [(method, precision) for method in METHODS for precision in PRECISIONS if precision != COMPILED]
    runs = {
        "stopped and gone on with": partial(_resume, bench),
        "no C compiler": partial(_hidden, bench, {"PATH": "/nowhere", "CC": ""}, AS_IT_IS),
        "no Python.h": partial(_hidden, bench, {}, WITHOUT_HEADER),
    }
    return [
        Table(
            title="torch for the card",
            columns=("capability", "archs", "lacks to compile", "shared memory MiB", "error", "passes"),
            rows=[Row(work="one kernel", measure=_card)],
        ),
        Table(
            title=f"{EPOCHS * STEPS} steps of {MODEL}", turn=2,
            columns=("loss", "off fp32 %", "graphs", "breaks", "waits", "passes"),
            rows=[
                Row(
                    work=f"{method}, {precision}",
                    measure=partial(_steps, losses, method, precision),
                )
                for method, precision in [*cells, ("four_channels", COMPILED)]
            ],
        ),
        Table(
            title="told to stop", turn=8, columns=("exit code", "seconds", "passes"),
            rows=[Row(work="SIGTERM to all of it while it compiles", measure=partial(_stop, bench))],
        ),
        Table(
            title="runs", turn=14, columns=("exit code", "seconds", "off %", "passes"),
            rows=[Row(work=work, measure=measure) for work, measure in runs.items()],
        ),
        Table(
            title="scores against a CPU's", turn=12,
            columns=("loss", "waits", "mean IoU", "CPU's", "off", "passes"),
            rows=[
                Row(work="finetuning, evaluation", measure=partial(_finetuning, bench)),
                Row(work="probe, linear", measure=partial(_probe, bench)),
            ],
        ),
    ]  # fmt: skip


def _card() -> dict[str, Any]:
    """As doctor asks; on a CPU there is nothing that could be wrong."""
    found = examine()
    gpus = [(gpu["capability"], gpu["error"]) for gpu in found["gpus"]]
    capability = ".".join(map(str, gpus[0][0])) if gpus else None
    error = "; ".join(error for _, error in gpus if error)
    archs = " ".join(found["archs"])
    return {
        "capability": capability, "archs": archs, "lacks to compile": found["lacks_to_compile"],
        "shared memory MiB": shutil.disk_usage("/dev/shm").free // 2**20, "error": error,
        "passes": not error,
    }  # fmt: skip


def _losses(bench: Bench, method: str, precision: str) -> Rehearsal:
    options = {"batch_size": 64, "workers": WORKERS} | PRECISIONS[precision]
    options["batch_size"] = bench.size(options["batch_size"], 1)
    config = bench.config(
        PretrainConfig, model=MODEL, mask_method=method, effective_batch_size=bench.size(64), **options
    )
    return rehearse(build(config), epochs=EPOCHS, steps=bench.size(STEPS, 1))


def _steps(losses: Any, method: str, precision: str) -> dict[str, Any]:
    found, expected = losses(method, precision), losses(method, "fp32")
    off = _most_off(found.losses, expected.losses)
    whole = found.graphs <= 1 and found.breaks == 0  # one graph, made once
    return {
        "loss": found.losses[-1], "off fp32 %": off, "graphs": found.graphs,
        "breaks": found.breaks, "waits": _named(found.waits),
        "passes": off <= MOST_PERCENT and whole and not found.waits,
    }  # fmt: skip


def _most_off(found: list[float], expected: list[float]) -> float:
    """The largest relative difference, percent; infinite if something is not finite."""
    off = [abs(a / b - 1) * 100 for a, b in zip(found, expected, strict=True)]
    return max(off) if all(part < float("inf") for part in off) else float("inf")


def _named(waits: list[str]) -> str:
    """How many, and at which lines."""
    return " ".join([str(len(waits)), *sorted(set(waits))])


def _resume(bench: Bench) -> dict[str, Any]:
    """Two epochs in one call, and in two."""
    from mae.pretrain import pretrain

    batch, logs, began = bench.size(64), [], time.monotonic()
    for name, calls in (("whole", [2]), ("parts", [1, 2])):
        folder = bench.scratch / name
        for stop_after in calls:
            afresh()
            config = bench.config(
                PretrainConfig, model=MODEL, mask_method="four_channels", epochs=2,
                stop_after=stop_after, batch_size=batch, effective_batch_size=batch,
                output_dir=folder, workers=WORKERS, compile="off",
            )  # fmt: skip
            pretrain(config)
        logs.append([record["train_loss"] for record in read_log(folder / LOG)])
        assert read_torch_file(folder / LAST)["epochs_completed"] == 2
    off = _most_off(*logs)
    return {
        "off %": off, "seconds": time.monotonic() - began, "passes": off <= 100 * NEAR
    }  # fmt: skip


def _start(
    bench: Bench, name: str, environment: dict[str, str], program: str, **options: Any
) -> subprocess.Popen[bytes]:
    """A real pretraining with a cold cache, in a process group of its own as Slurm would have it.

    Its output is in console.log beside its folder.
    """
    batch = bench.size(64)
    every = bench.options(
        PretrainConfig, model=MODEL, mask_method="patches", batch_size=batch,
        effective_batch_size=batch, output_dir=bench.scratch / name, **options,
    )  # fmt: skip
    arguments = [text for key, value in every.items() for text in (f"--{key}", str(value))]
    compiled = bench.scratch / f"{name}-compiled"
    with (bench.scratch / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", program, "pretrain", *arguments], cwd=ROOT, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(compiled), **environment},
        )  # fmt: skip


def _stop(bench: Bench) -> dict[str, Any]:
    """The signal comes when the run has begun, on a GPU when the compiler has written a file."""
    process = _start(bench, "stopped", {}, AS_IT_IS)
    log, compiled = bench.scratch / "stopped.log", bench.scratch / "stopped-compiled"

    def has_begun() -> bool:
        compiles = bench.device.type != "cuda" or any(compiled.rglob("*.py"))
        return compiles and "effective batch" in log.read_text()

    try:
        while not has_begun() and process.poll() is None:
            time.sleep(0.05)
        began = time.monotonic()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        code = process.wait()
    finally:
        _end(process)
    seconds, lines = time.monotonic() - began, log.read_text().splitlines()
    return {
        "exit code": code, "seconds": seconds, "passes": code == EXIT_STOPPED,
        "said": "\n".join(lines[-5:]),
    }  # fmt: skip


def _end(process: subprocess.Popen[bytes]) -> None:
    """What a row that is given up leaves would take the card's time."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _hidden(bench: Bench, environment: dict[str, str], program: str) -> dict[str, Any]:
    """Training goes on uncompiled where something to compile with is missing, and says so."""
    name, began = f"hidden-{len(environment)}", time.monotonic()
    process = _start(bench, name, environment, program, epochs=1)
    try:
        code = process.wait()
    finally:
        _end(process)
    says = "the model is not compiled" in (bench.scratch / f"{name}.log").read_text()
    return {
        "exit code": code, "seconds": time.monotonic() - began,
        "passes": code == 0 and says == (bench.device.type == "cuda"),
    }  # fmt: skip


def _finetuning(bench: Bench) -> dict[str, Any]:
    """20 steps, then the same weights scored here and in fp32 on a CPU."""
    from segmenter.evaluate import evaluate_model

    config = bench.config(TrainConfig, model=MODEL, batch_size=bench.size(8), workers=WORKERS, compile="off")
    run = build(config)
    found = rehearse(run, epochs=EPOCHS, steps=bench.size(STEPS, 1))
    here = evaluate_model(run.accelerator, run.model, run.task.images, config.run)
    afresh()
    on_cpu = make_accelerator(DeviceConfig(device="cpu"))
    scoring = replace(config.run, device="cpu")
    there = evaluate_model(on_cpu, run.model.cpu(), run.task.images, scoring)
    scores = [_mean_iou(areas, run.task.classes.names) for areas in (here, there)]
    return {
        "loss": found.losses[-1], "waits": _named(found.waits), **_compared(*scores),
        "passes": abs(scores[0] - scores[1]) <= MOST_POINTS and not found.waits,
    }  # fmt: skip


def _mean_iou(areas: "Areas | None", names: tuple[str, ...]) -> float:
    assert areas is not None
    return float(areas.scores(names)["mean_iou"])


def _compared(here: float, there: float) -> dict[str, float]:
    return {"mean IoU": here, "CPU's": there, "off": here - there}


def _probe(bench: Bench) -> dict[str, Any]:
    """The linear probe of the same random weights."""
    from segmenter.dataset import read_description
    from segmenter.probing import probe

    scores: list[float] = []
    for device in (bench.device.type, "cpu"):
        afresh()
        folder = bench.scratch / f"probe-{len(scores)}"
        config = bench.config(ProbeConfig, model=MODEL, probes=("linear",), output_dir=folder, device=device)
        probe(config, read_description(config.run.dataset))
        scores.append(read_json(folder / RESULT, dict[str, Any])["linear"]["mean_iou"])
    return {**_compared(*scores), "passes": abs(scores[0] - scores[1]) <= MOST_POINTS}
