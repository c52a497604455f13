"""This machine: versions, processor, memory, GPUs, disk space. No torch here."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from common import environment
from common.cards import Capability

GIB = 2**30
REPO_ROOT = Path(__file__).resolve().parents[2]  # python -m mae is run from here
_VERSIONS_OF = ("torch", "torchvision", "timm", "accelerate", "onedl-mmsegmentation", "numpy")


def versions() -> dict[str, str]:
    """Python's, this repository's and the main packages' versions."""
    commit = _said("git", "-C", str(REPO_ROOT), "rev-parse", "--short", "HEAD")
    own = {"segmae": commit[0]} if commit else {}
    return own | environment.versions(_VERSIONS_OF)


def hardware() -> dict[str, Any]:
    """Name, processor, memory, GPUs."""
    return {
        "host": platform.node(),
        "processor": _processor(),
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": [gpu.name for gpu in gpus()],
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


class Gpu(NamedTuple):
    """A card as nvidia-smi lists it; slices of it (MIG) are no cards."""

    name: str
    driver: int
    """The branch, such as 580."""
    memory_gib: float
    capability: Capability | None
    """None where nvidia-smi is too old to tell."""


def gpus() -> list[Gpu]:
    """The GPUs that the driver has; empty where there is no nvidia-smi or it fails."""
    fields = "--query-gpu=name,driver_version,memory.total"
    form = "--format=csv,noheader,nounits"
    lines = _said("nvidia-smi", f"{fields},compute_cap", form) or _said("nvidia-smi", fields, form)
    return [_gpu(line) for line in lines]


def _gpu(line: str) -> Gpu:
    name, driver, memory, *rest = line.split(", ")
    capability = re.fullmatch(r"(\d+)\.(\d+)", rest[0]) if rest else None
    return Gpu(
        name=name,
        driver=int(driver.partition(".")[0]),
        memory_gib=float(memory) * 2**20 / GIB if memory.isdecimal() else 0.0,
        capability=(int(capability[1]), int(capability[2])) if capability else None,
    )


def visible_gpus() -> list[str]:
    """Indices or ids of the GPUs this process may use, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index, _ in enumerate(gpus())]
    # As CUDA reads it: from -1, or whatever else is none, the rest does not count.
    named = (part.strip() for part in visible.split(","))
    return list(takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, named))


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
