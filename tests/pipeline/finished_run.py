"""Writes an output directory as the parts leave it, with invented numbers: the report's input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

from common.layout import LOG, PREDICTIONS, RESULT, reconstructions_path
from pipeline.layout import Layout, Run, eval_name
from pipeline.records import Record, write_record
from tests.pipeline.programs import FACTS

CLASSES = ("grass", "sand", "water", "disc", "square", "triangle", "flower")
GAIN = {"patches": 0.0, "segments": 2.0, "four_channels": 4.0, "preencoder": -1.0}


def write_run(
    root: Path,
    methods: tuple[str, ...] = tuple(GAIN),
    epochs: tuple[int, ...] = (5, 10),
    seeds: tuple[int, ...] = (0,),
    spread: float = 1.0,
) -> Layout:
    """A run of `methods`; seed s scores `spread` x s points more."""
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
    for seed in seeds:
        write_evaluation(paths, Run(method="scratch", seed=seed), 0, 10 + seed)
        for method in methods:
            run = Run(method=method, seed=seed)
            write_pretraining(paths, run, epochs)
            for count in epochs:
                write_evaluation(paths, run, count, 20 + count + GAIN[method] + spread * seed)
    return paths


def write_pretraining(paths: Layout, run: Run, epochs: tuple[int, ...]) -> None:
    folder = paths.pretrain_dir(run.name)
    folder.mkdir(parents=True)
    made_with: dict[str, object] = {"mask_method": run.method, "seed": run.seed}
    if FACTS.uses("coverage_ratio", run.method):
        made_with["coverage_ratio"] = run.coverage_ratio
    for count in epochs:
        _record(paths, f"pretrain_{run.name}_{count}", "pretrain", run, made_with)
    with (folder / LOG).open("w") as stream:
        for epoch in range(1, max(epochs) + 1):
            loss = 0.4 + math.exp(-epoch / 4)
            entry = {"epoch": epoch, "train_loss": loss, "train_lr": 1e-3 * (1 - epoch / 20)}
            stream.write(json.dumps(entry) + "\n")
    for count in epochs:
        _picture(reconstructions_path(folder, count), f"{run.name} {count}")


def _record(
    paths: Layout, name: str, kind: str, run: Run, made_with: dict[str, object], seconds: int = 90
) -> None:
    record = Record(
        name=name, state="done", run=run.name, kind=kind, fingerprint=made_with, seconds=seconds
    )
    write_record(paths, record)


def write_evaluation(
    paths: Layout, run: Run, epochs: int, score: float, eval_seed: int = 0, batch_size: int = 8
) -> None:
    folder = paths.eval_dir(run.name, epochs, eval_seed)
    folder.mkdir(parents=True)
    seed = run.seed + eval_seed
    name = f"evaluate_{eval_name(run.name, epochs, eval_seed)}"
    made_with: dict[str, object] = {"seed": seed, "batch_size": batch_size, "epochs": 6}
    _record(paths, name, "evaluate", run, made_with, seconds=0)
    result = {
        "format_version": 1,
        "epochs": 6,
        "pixel_accuracy": score + 30,
        "mean_accuracy": score + 10,
        "mean_iou": score,
        "best_mean_iou": score,
        "class_iou": {name: score + i for i, name in enumerate(CLASSES)} | {"sand": None},
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


def _picture(path: Path, text: str) -> None:
    image = Image.new("RGB", (1200, 400), (90, 120, 160))
    ImageDraw.Draw(image).text((20, 20), text)
    image.save(path)
