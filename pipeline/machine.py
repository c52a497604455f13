"""This machine: versions, processor, memory, GPUs, disk space. No torch here."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import psutil

from common import run
from pipeline.process import REPO_ROOT

GIB = 2**30
_VERSIONS_OF = ("torch", "torchvision", "timm", "accelerate", "onedl-mmsegmentation", "numpy")


def versions() -> dict[str, str]:
    """Python's, this repository's and the main packages' versions."""
    commit = _said("git", "-C", str(REPO_ROOT), "rev-parse", "--short", "HEAD")
    own = {"segmae": commit[0]} if commit else {}
    return own | run.versions(_VERSIONS_OF)


def hardware() -> dict[str, Any]:
    """Name, processor, memory, GPUs."""
    return {
        "host": platform.node(),
        "processor": _processor(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": gpu_names(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def gpu_names() -> list[str]:
    """The GPUs' names as nvidia-smi gives them; empty where there is none."""
    return _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")


def visible_gpus() -> list[str]:
    """Indices or ids of the GPUs this process may use, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip()]
    return [str(index) for index, _ in enumerate(gpu_names())]


def _said(*command: str) -> list[str]:
    """The lines a program prints; none if it fails or is not there."""
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line.strip() for line in listing.splitlines() if line.strip()]


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
