"""Writes an output directory as the parts leave it, with invented numbers: the report's input.

Areas by image are drawn from a model: what all runs owe to an image, and what each makes of it.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from common.step_files import AREAS, LOG, PREDICTIONS, RESULT, reconstructions_path
from mae.masking import METHODS
from pipeline.plan.layout import Layout, RunId, eval_name
from pipeline.plan.records import Record, write_record

CLASSES = ("grass", "sand", "water", "disc", "square", "triangle", "flower")
OFFSETS = (-3, None, -1, 0, 1, 2, 1)  # of the classes' IoU from their mean; sand does not occur
IMAGES = 48
GAIN = {
    "scratch": -10.0,
    "patches": 0.0,
    "segments": 2.0,
    "four_channels": 4.0,
    "preencoder": -1.0,
    "segment_patches": 1.5,
    "own": 0.0,
    "borrowed": -1.5,
    "blob": -2.5,
    "block": -2.5,
}


def write_run(
    root: Path,
    methods: tuple[str, ...] = ("patches", "segments", "four_channels", "preencoder"),
    epochs: tuple[int, ...] = (5, 10),
    seeds: tuple[int, ...] = (0,),
    spread: float = 1.0,
    *,
    sources: tuple[str, ...] = ("own",),
    chance: float = 0.0,
    gain: float = 1.0,
    probes: bool = False,
    finetuned: bool = True,
    untrained: bool = False,
) -> Layout:
    """A run of `methods`; seed s scores `spread` x s points more.

    untrained: with the methods' own starts, 8 points below what they would score without gain.
    sources: of segments, for all methods but patches; chance: standard deviation in points of what
    a seed makes of a method; gain: a factor to GAIN.
    """
    paths = Layout(root)
    root.mkdir(parents=True, exist_ok=True)
    settings = {
        "mask_method": list(methods),
        "coverage_ratio": [15.0],
        "seed": list(seeds),
        "model": "vit_tiny",
        "pretrain_epochs": max(epochs),
        "finetune": {"lr": 0.001},
    }
    run_yml = {
        "settings": settings,
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
        "hardware": {"host": "here", "gpus": []},
    }
    paths.run_yml.write_text(yaml.safe_dump(run_yml))
    for run in [RunId(method="scratch", seed=seed) for seed in seeds] + [
        RunId(method=method, segments_from=source, seed=seed)
        for method in methods
        for source in (sources if method != "patches" else ("own",))
        for seed in seeds
    ]:
        trained = run.method != "scratch"
        if trained:
            write_pretraining(paths, run, epochs)
        start = (0,) if untrained and run.segments_from == "own" else ()
        for count in (*start, *epochs) if trained else (0,):
            level = 20 + count + gain * (GAIN[run.method] + GAIN[run.segments_from])
            level = 12 + max(epochs) if count == 0 and trained else level
            score = level + spread * run.seed + chance * _rng(run.name, count).normal()
            if finetuned:
                write_evaluation(paths, run, count, score)
            if probes:
                write_probe(paths, run, count, score - 4)
    return paths


def _rng(*seed: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(seed).encode()))


def write_pretraining(paths: Layout, run: RunId, epochs: tuple[int, ...]) -> None:
    folder = paths.pretrain_dir(run.name)
    folder.mkdir(parents=True)
    made_with: dict[str, object] = {"mask_method": run.method, "seed": run.seed, "epochs": max(epochs)}
    if run.method in METHODS and "coverage_ratio" in METHODS[run.method].settings:
        made_with["coverage_ratio"] = run.coverage_ratio
    cost = 1.0 if run.method in ("patches", "segment_patches") else 2.4
    for count in epochs:
        name = f"pretrain_{run.name}_{count}"
        _record(paths, name, "pretrain", run, made_with, seconds=round(90 * cost))
    with (folder / LOG).open("w") as stream:
        for epoch in range(1, max(epochs) + 1):
            loss = 0.4 + math.exp(-epoch / 4)
            entry = {"epoch": epoch, "train_loss": loss, "train_lr": 1e-3 * (1 - epoch / 20)}
            entry["train_flops"] = cost * epoch * 3e17
            stream.write(json.dumps(entry) + "\n")
    for count in epochs:
        _picture(reconstructions_path(folder, count), f"{run.name} {count}")


def _record(
    paths: Layout, name: str, kind: str, run: RunId, made_with: dict[str, object], seconds: int = 90
) -> None:
    record = Record(name=name, state="done", run=run.name, kind=kind, fingerprint=made_with, seconds=seconds)
    write_record(paths, record)


def write_evaluation(
    paths: Layout, run: RunId, epochs: int, score: float, eval_seed: int = 0, batch_size: int = 8
) -> None:
    folder = paths.eval_dir(run.name, epochs, eval_seed)
    folder.mkdir(parents=True)
    seed = run.seed + eval_seed
    name = f"evaluate_{eval_name(run.name, epochs, eval_seed)}"
    made_with: dict[str, object] = {"seed": seed, "batch_size": batch_size, "epochs": 6}
    _record(paths, name, "evaluate", run, made_with, seconds=0)
    scores = write_areas(folder / AREAS, f"{name}", score)
    result = {
        "format_version": 1,
        "epochs": 6,
        "pixel_accuracy": score + 30,
        "mean_accuracy": score + 10,
        **scores,
        "best_mean_iou": score,
        "seed": seed,
        "seeds": [{"seed": seed, "mean_iou": score}],
        "mean_iou_std": None,
        "minutes": 1.5,
        "recipe": {"lr": 0.001, "batch_size": 8},
        "protocol": {"crop_size": 96, "window_size": 96, "window_stride": 96, "flip": False},
        "model": "vit_tiny",
        "settings": made_with,
        "dataset": {"name": "sample", "num_classes": 7, "num_val": 48},
    }
    (folder / RESULT).write_text(json.dumps(result))
    entries = [{"epoch": e, "train_loss": 2 / e, "val_mean_iou": score * e / 6} for e in (2, 4, 6)]
    (folder / LOG).write_text("".join(json.dumps(e) + "\n" for e in entries))
    _picture(folder / PREDICTIONS, f"{run.name} {epochs}")


def write_probe(paths: Layout, run: RunId, epochs: int, score: float) -> None:
    """linear scores `score`, knn 3 points less, knn_raw 4."""
    folder = paths.probe_dir(run.name, epochs)
    folder.mkdir(parents=True)
    probes = {
        name: {
            "pixel_accuracy": 50.0, "mean_accuracy": 50.0,
            **write_areas(folder / f"areas-{name}.npz", f"{name}{run.name}{epochs}", value),
        }
        for name, value in (("linear", score), ("knn", score - 3), ("knn_raw", score - 4))
    }  # fmt: skip
    facts = {"format_version": 1, "seed": 0, "seconds": {}, "settings": {}}
    result = {**probes, "rankme": 30.0 + epochs + _rng(run.name).normal(), **facts}
    (folder / RESULT).write_text(json.dumps(result))


def write_areas(path: Path, name: str, score: float) -> dict[str, object]:
    """Areas that amount to a mean IoU of `score`; returns what result.json says of them."""
    iou = np.array([0 if offset is None else score + offset for offset in OFFSETS]) / 100
    there = np.array([offset is not None for offset in OFFSETS])
    shape = (IMAGES, len(CLASSES))
    label = np.round(1e5 * _rng("sizes").gamma(0.7, size=shape)) * there
    noise = 0.3 * _rng("images").normal(size=shape) + 0.1 * _rng(name).normal(size=shape)
    share = np.clip(2 * iou / (1 + iou) * np.exp(noise), 0, 1)
    # Intersection and union of all images together stay as the score has them.
    share *= 2 * iou / (1 + iou) * label.sum(0) / np.maximum(1, (share * label).sum(0))
    intersection = np.round(share * label)
    areas = np.stack([intersection, label, label], axis=1).astype(np.int64)
    np.savez_compressed(path, images=np.array([f"v{i}" for i in range(IMAGES)]), areas=areas)
    summed = areas.sum(0)
    classes = {
        name: 100 * inter / (predicted + label - inter) if label else None
        for name, inter, predicted, label in zip(CLASSES, *summed.tolist(), strict=True)
    }
    known = [value for value in classes.values() if value is not None]
    return {"mean_iou": sum(known) / len(known), "class_iou": classes}


def _picture(path: Path, text: str) -> None:
    image = Image.new("RGB", (300, 100), (90, 120, 160))  # larger ones take most of a report
    ImageDraw.Draw(image).text((20, 20), text)
    image.save(path)
