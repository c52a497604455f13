"""What a process runs in: its place among others, and the versions of what it stands on."""

import os
import platform
import shutil
import sysconfig
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What the launcher of a plan tells a step.
PROCESSES_HERE = "SEGMAE_PROCESSES_HERE"  # how many processes steps beside each other have
PROGRESS_FILE = "SEGMAE_PROGRESS"  # where a step of a plan tells how far it is


def rank() -> int:
    """This process among those of torchrun or Slurm, known before torch is imported."""
    return number_of("RANK", number_of("SLURM_PROCID", 0))


def world_size() -> int:
    """The number of processes that torchrun started, or will, as benchmark.py says."""
    return max(1, number_of("WORLD_SIZE", 1))


def number_of(variable: str, default: int) -> int:
    """What an environment variable says, where it is a number from 0."""
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdecimal() else default


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Python's version and those of packages: what numbers were made with."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def lacks_to_compile() -> str:
    """What is missing; empty: nothing."""
    # torch.compile and Triton build pieces of C at run time, on a GPU, too.
    if not any(shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang")):
        return "C compiler (gcc or clang)"
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return "" if header.is_file() else f"{header} (Debian: python3-dev)"
