"""The programs that the pipeline's tests start, and what the parts would answer."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.plan.parts import Facts
from pipeline.plan.settings import Settings
from pipeline.plan.steps import Step, make_plan

REPO_ROOT = Path(__file__).resolve().parents[2]


def _fact(default: Any = None, *, neutral: bool = False) -> dict[str, Any]:
    return {"default": default, "neutral": neutral, "older": default}


_PLACES = dict.fromkeys(
    ("output_dir", "device", "compile", "workers", "resume", "plugin", "log_with"),
    _fact(neutral=True),
)
_SEGMENTS = {
    "uses_segments": True, "all_segments": False,
    "settings": ["coverage_ratio", "hide", "segments_from"],
}  # fmt: skip
# As test_parts.py compares them with the real ones.
FACTS = Facts(
    official_checkpoints=("vit_base", "vit_large", "vit_huge"),
    methods={
        "patches": {
            "uses_segments": False,
            "all_segments": False,
            "settings": ["mask_ratio", "use_unmasked_images"],
        },
        **dict.fromkeys(("segments", "four_channels", "preencoder"), _SEGMENTS),
        "segment_patches": {
            "uses_segments": True,
            "all_segments": True,
            "settings": ["mask_ratio", "segments_from"],
        },
    },
    recipes={
        "segmenter": {"epochs": 64, "batch_size": 8},
        "fast": {"epochs": 8, "batch_size": 16},
    },
    options={
        "pretrain": {
            **dict.fromkeys(("in1k_dir", "masks_dir", "init", "patch_size"), _fact()),
            "mask_method": _fact("patches"),
            "coverage_ratio": _fact(15.0),
            "segments_from": _fact("own"),
            "hide": _fact("segment"),
            "use_unmasked_images": _fact(False),
            "mask_ratio": _fact(0.75),
            "model": _fact("vit_large"),
            "epochs": _fact(50),
            "base_lr": _fact(1.5e-4),
            "effective_batch_size": _fact(4096),
            "seed": _fact(0),
            "batch_size": _fact(64, neutral=True),
            "stop_after": _fact(neutral=True),
            **_PLACES,
        },
        "probe": {
            **dict.fromkeys(
                ("dataset", "patch_size", "image_size", "probes", "image_folder"), _fact()
            ),
            "model": _fact("vit_large"),
            "recipe": _fact("segmenter"),
            "seed": _fact(0),
            "eval_batch_size": _fact(4, neutral=True),
            **_PLACES,
        },
        "evaluate": {
            **dict.fromkeys(("dataset", "init", "patch_size", "clip_grad"), _fact()),
            "image_size": _fact(),
            "model": _fact("vit_large"),
            "recipe": _fact("segmenter"),
            "decoder": _fact(),
            "epochs": _fact(),
            "batch_size": _fact(),
            "seed": _fact(0),
            "device_batch_size": _fact(neutral=True),
            "eval_batch_size": _fact(4, neutral=True),
            **_PLACES,
        },
    },
)


def plan_of(settings: Settings, *more: Any) -> list[Step]:
    """The plan, with what the parts would answer; `more`: runs that are there."""
    return make_plan(settings, FACTS, *more)


def standin(step: Step, **behaviour: object) -> Step:
    """The step, done by tests/pipeline/standin.py."""
    program = ("tests.pipeline.standin",)
    return replace(step, program=program, options={**step.options, **behaviour})


def fake_program(folder: Path, name: str, script: str) -> None:
    """A shell script in the place of a program; `folder` belongs on the PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def run_benchmark(
    *words: str | Path, timeout: float = 300, cwd: Path | None = None, **environment: str
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
