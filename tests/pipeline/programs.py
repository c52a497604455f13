"""The programs that the pipeline's tests start."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from pipeline.plan.step import Step

REPO_ROOT = Path(__file__).resolve().parents[2]


def standin(step: Step, **behaviour: object) -> Step:
    """The step, done by tests/pipeline/standin.py."""
    words = [w for k, v in behaviour.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    return replace(step, program=("tests.pipeline.standin", *words))


def fake_program(folder: Path, name: str, script: str) -> None:
    """A shell script in the place of a program; `folder` belongs on the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def run_benchmark(
    *words: str | Path, timeout: float = 500, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """benchmark.py as a user calls it."""
    return subprocess.run(
        [sys.executable, str(REPO_ROOT / "benchmark.py"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
