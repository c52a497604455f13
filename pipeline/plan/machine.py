"""This machine: versions, processor, memory, GPUs, disk space. No torch here."""

import hashlib
import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pynvml

from common import environment

GIB = 2**30
REPO_ROOT = Path(__file__).resolve().parents[2]  # python -m mae is run from here


def versions() -> dict[str, str]:
    """Python's, this repository's and the main packages' versions."""
    found, command = {}, ["git", "-C", str(REPO_ROOT), "rev-parse", "--short", "HEAD"]
    with suppress(OSError, subprocess.CalledProcessError):  # no git, or a copy without history
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found["segmae"] = done.stdout.strip()
    names = ("torch", "torchvision", "timm", "accelerate", "onedl-mmsegmentation", "numpy")
    return found | environment.versions(names)


@cache
def code_digest(plugin: Path | None = None) -> str:
    """Changes when the project's sources, or a plugin, do: of all that computes, scores and compares."""
    rooms = ("benchmark.py", "common", "engine", "mae", "pipeline", "segmenter", "segments")
    files = [file for room in rooms for file in sorted([REPO_ROOT / room, *(REPO_ROOT / room).rglob("*.py")])]
    digest = hashlib.sha256()
    for file in [file for file in (*files, *([plugin] if plugin else [])) if file.is_file()]:
        digest.update(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def hardware() -> dict[str, Any]:
    """Name, processor, memory, GPUs."""
    processor = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux, where platform knows the kind only
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = next(iter(named), processor)
    return {
        "host": platform.node(),
        "processor": processor,
        "cpu_cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": [gpu.name for gpu in gpus()],
    }


class Gpu(NamedTuple):
    """A card of this machine; slices of it (MIG) are no cards."""

    name: str
    driver: int  # the branch, such as 580
    capability: tuple[int, int]  # (7, 0) is a V100's, whose machine code is called sm_70


def gpus() -> list[Gpu]:
    """The GPUs that the driver has, by NVML; none without a driver, or where it does not answer."""
    found = []
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        driver = int(pynvml.nvmlSystemGetDriverVersion().partition(".")[0])
        for index in range(pynvml.nvmlDeviceGetCount()):
            with suppress(pynvml.NVMLError):  # another job's or container's; or it is lost
                card = pynvml.nvmlDeviceGetHandleByIndex(index)
                capability = pynvml.nvmlDeviceGetCudaComputeCapability(card)
                found.append(Gpu(pynvml.nvmlDeviceGetName(card), driver, capability))
        pynvml.nvmlShutdown()  # an open library keeps the driver from being changed
    return found


def visible_gpus() -> list[str]:
    """Indices or ids of the GPUs this process may use, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(index) for index, _ in enumerate(gpus())]
    # As CUDA reads it: from -1, or whatever else is none, the rest does not count.
    named = (part.strip() for part in visible.split(","))
    return list(takewhile(re.compile(r"\d+|(GPU|MIG)-.+").fullmatch, named))


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
