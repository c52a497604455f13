"""Disk space: how much a step will write, and whether it is there."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.plan import Step

# Millions of parameters of the encoders (ViT paper, DeiT for tiny and small), and of MAE's decoder.
_ENCODER_MILLIONS = {
    "vit_tiny": 6, "vit_small": 22, "vit_base": 86, "vit_large": 304, "vit_huge": 632,
}  # fmt: skip
_DECODER_MILLIONS = 26
_BYTES_PER_PARAMETER = 12  # fp32 weights and AdamW's two moments
_LOGS_BYTES = 50 * 2**20


def checkpoint_bytes(model: str) -> int:
    """About the size of a checkpoint with its optimizer; an unknown model counts as vit_large."""
    millions = _ENCODER_MILLIONS.get(model, _ENCODER_MILLIONS["vit_large"]) + _DECODER_MILLIONS
    return millions * 10**6 * _BYTES_PER_PARAMETER


def step_bytes(step: Step) -> int:
    """What has to be free before a step: its files, and one more while a file is replaced.

    Where an earlier checkpoint is there, its real size counts.
    """
    model = str(step.options.get("model"))
    sizes = [path.stat().st_size for path in step.folder.glob("*.pth")]
    one = max(sizes) if sizes else checkpoint_bytes(model)
    # Pretraining: last.pth, the round's checkpoint and one aside. Evaluation: last, best, aside.
    files = {"fetch": 1, "pretrain": 3, "evaluate": 3}[step.kind]
    return files * one + _LOGS_BYTES


def kept_bytes(steps: Sequence[Step], sizes: Mapping[str, int] | None = None) -> int:
    """About what the whole plan leaves on the disk.

    sizes: bytes of a checkpoint by kind of step, where they are known from a real one.
    """
    total = 0
    for step in steps:
        known = (sizes or {}).get(step.kind)
        one = known if known is not None else checkpoint_bytes(str(step.options.get("model")))
        # A round leaves its checkpoint, of which last.pth is a second name; an evaluation two.
        total += 2 * one if step.kind == "evaluate" else one
    return total


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def shortage(step: Step) -> str:
    """Why the step cannot be started for lack of space; empty if there is enough."""
    needed, free = step_bytes(step), free_bytes(step.folder)
    if free >= needed:
        return ""
    return (
        f"the disk of {step.folder} has {free / 2**30:.1f} GiB free and {step.name} needs about "
        f"{needed / 2**30:.1f} GiB; make room, then run the same command again"
    )
