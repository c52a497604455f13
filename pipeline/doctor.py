"""Is this machine, and are these folders, ready for a run? What is not, and what to do about it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import disk, preview
from pipeline.datasets import (
    ADE20K_PAIRS,
    SegmentationData,
    image_files,
    sampled,
)
from pipeline.layout import Layout
from pipeline.options import settings_from
from pipeline.plan import make_plan
from pipeline.records import made_runs
from pipeline.settings import METHODS_WITH_SEGMENTS

_SAMPLED_FILES = 100
_OLDEST_PYTHON = (3, 11)
_LITTLE_MEMORY_GIB = 8.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's report."""

    subject: str
    text: str
    fix: str = ""
    """What to do; empty if nothing has to be done."""


def examine(given: dict[str, Any]) -> list[Finding]:
    """Everything worth knowing before a run with these flags; without flags, about the machine."""
    findings = [*_software(), *_machine(given)]
    if given.get("in1k_dir"):
        findings += _images(given)
    dataset = given.get("ade20k_dir") or given.get("eval_dataset")
    if dataset:
        findings += _dataset(dataset)
    if given.get("in1k_dir") and dataset:
        findings += _plan(given)
    return findings


def findings_text(findings: list[Finding]) -> str:
    """Aligned lines; what has to be fixed is marked and comes with its remedy."""
    width = max(len(finding.subject) for finding in findings)
    lines = []
    for finding in findings:
        mark = "FIX" if finding.fix else "ok "
        lines.append(f"{mark}  {finding.subject.ljust(width)}  {finding.text}")
        if finding.fix:
            lines.append(f"     {''.ljust(width)}  -> {finding.fix}")
    wrong = sum(bool(finding.fix) for finding in findings)
    lines.append(f"{wrong} to fix" if wrong else "ready")
    return "\n".join(lines)


def _software() -> Iterator[Finding]:
    for name, version in preview.versions().items():
        fix = ""
        if version == "not installed":
            fix = "set the environment up with ./run_benchmark.sh, or install requirements.txt"
        elif name == "python" and sys.version_info[:2] < _OLDEST_PYTHON:
            fix = "use Python 3.11 or newer"
        yield Finding(subject=name, text=version, fix=fix)


def _machine(given: dict[str, Any]) -> Iterator[Finding]:
    hardware = preview.hardware()
    gpus, cores = hardware["gpus"], hardware["cpu_cores"]
    wanted = given.get("num_gpus")
    fix = ""
    if wanted is not None and wanted > len(gpus) and given.get("launcher") != "slurm":
        fix = f"--num-gpus {wanted}, but there are {len(gpus)}: give fewer, or check the driver"
    yield Finding(subject="devices", text=", ".join(gpus) or "no GPU, CPU only", fix=fix)
    if gpus and not any(map(shutil.which, (os.environ.get("CC", ""), "gcc", "clang"))):
        fix = "install gcc (Debian: build-essential, python3-dev), or models run uncompiled"
        yield Finding(subject="C compiler", text="none", fix=fix)
    processes = given.get("num_processes") or (len(gpus) if wanted is None else wanted) or 1
    pretrain = given.get("pretrain") or {}
    workers = pretrain.get("workers")
    text = f"{cores} cores, {processes} processes"
    fix = ""
    if isinstance(workers, int):
        text += f", {workers} workers each for pretraining"
        if workers * processes > cores:
            fix = f"{workers * processes} workers on {cores} cores: set pretrain workers to "
            fix += f"{max(cores // processes - 1, 0)}"
    yield Finding(subject="processors", text=text, fix=fix)
    free_gib = _available_memory_gib()
    fix = "close other programs, or use fewer workers" if free_gib < _LITTLE_MEMORY_GIB / 4 else ""
    text = f"{free_gib:.1f} of {hardware['memory_gib']} GiB available"
    yield Finding(subject="memory", text=text, fix=fix)
    shm = Path("/dev/shm")
    if shm.exists():
        free = shutil.disk_usage(shm).free / 2**30
        few = free < 1 and workers != 0
        fix = "give it more (docker: --shm-size=16g), or use workers=0" if few else ""
        yield Finding(subject="shared memory", text=f"{free:.1f} GiB free", fix=fix)


def _available_memory_gib() -> float:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _images(given: dict[str, Any]) -> Iterator[Finding]:
    in1k_dir: Path = given["in1k_dir"]
    images = image_files(in1k_dir / "train")
    if not images:
        fix = "put class folders of images there, or name another --in1k-dir"
        yield Finding(subject="images", text=f"none in {in1k_dir / 'train'}", fix=fix)
        return
    chosen = sampled(images, _SAMPLED_FILES)
    broken = [path for path in chosen if not _is_image(path)]
    text = f"{len(images)} in {in1k_dir / 'train'}; {len(broken)} of {len(chosen)} looked at broken"
    fix = f"replace broken ones, such as {broken[0]}" if len(broken) * 100 > len(chosen) else ""
    yield Finding(subject="images", text=text, fix=fix)
    if any(method in METHODS_WITH_SEGMENTS for method in given.get("mask_method") or ()):
        yield _segments(given["masks_dir"] or in1k_dir / "masks", in1k_dir, chosen)


def _segments(masks: Path, in1k_dir: Path, images: list[Path]) -> Finding:
    """Folder forms only: a packed store is one file, which the parts' own check opens."""
    if masks.is_file() or (masks / "masks.sqlite").exists():
        return Finding(subject="segments", text=f"packed store {masks}")
    remedy = "make them with python -m mae masks, or name another --masks-dir"
    if not masks.exists():
        return Finding(subject="segments", text=f"{masks} does not exist", fix=remedy)
    without = [path for path in images if not _has_segments(masks, path, in1k_dir)]
    share = len(without) / len(images)
    text = f"{masks}: {len(images) - len(without)} of {len(images)} images looked at have some"
    if share > 0.5:
        return Finding(subject="segments", text=text, fix=f"{remedy}; {without[0]} has none")
    return Finding(subject="segments", text=text)


def _has_segments(masks: Path, image: Path, in1k_dir: Path) -> bool:
    at = masks / image.relative_to(in1k_dir / "train").with_suffix("")
    return at.is_dir() or at.with_name(f"{at.name}.json").exists()


def _dataset(path: Path) -> Iterator[Finding]:
    try:
        data = SegmentationData.open(path)
    except ValueError as error:
        yield Finding(subject="dataset", text=str(path), fix=str(error))
        return
    for split in ("train", "val"):
        pairs = list(data.pairs(split))
        missing = [annotation for _, annotation in pairs if not annotation.exists()]
        chosen = sampled([image for image, _ in pairs], _SAMPLED_FILES)
        broken = [image for image in chosen if not _is_image(image)]
        expected = ADE20K_PAIRS[split] if data.is_ade20k else None
        fix = ""
        if not pairs:
            fix = f"{data.root / data.description['images'][split]} holds no image"
        elif missing:
            fix = f"{len(missing)} annotations are missing, such as {missing[0]}"
        elif broken:
            fix = f"replace broken images, such as {broken[0]}"
        elif expected is not None and len(pairs) != expected:
            fix = f"{expected} pairs belong there: python -m segmenter prepare completes them"
        yield Finding(subject=f"{data.name}, {split}", text=f"{len(pairs)} pairs", fix=fix)


def _is_image(path: Path) -> bool:
    """Whether the image's header and data can be read."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):
        return False
    return True


def _plan(given: dict[str, Any]) -> Iterator[Finding]:
    """The run itself: disk space, and the parts' own judgement of the flags."""
    import click

    try:
        settings = settings_from(given)
        paths = Layout(settings.output_dir)
        steps = make_plan(settings, made_runs(paths))
        preview.check(settings, steps, paths)
    except (click.UsageError, ValueError) as error:
        message = error.format_message() if isinstance(error, click.UsageError) else str(error)
        yield Finding(subject="flags", text="a run would be refused", fix=message)
        return
    yield Finding(subject="flags", text=f"a plan of {len(steps)} steps")
    kept, free = disk.kept_bytes(steps), disk.free_bytes(paths.root)
    text = f"{free / 2**30:.0f} GiB free, the run keeps about {kept / 2**30:.1f} GiB"
    fix = "free some, or use another --output-dir" if free < kept else ""
    yield Finding(subject="disk", text=text, fix=fix)
