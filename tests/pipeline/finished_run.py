"""Writes an output directory as the parts leave it, with invented numbers: the report's input."""

from __future__ import annotations

import json
import math
from pathlib import Path

import yaml
from PIL import Image, ImageDraw

from pipeline import layout
from pipeline.layout import Layout, RunName
from pipeline.records import Record, write_record
from pipeline.settings import METHODS_WITH_SEGMENTS

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
    experiment = {
        "mask_methods": list(methods),
        "coverage_ratios": [15.0],
        "seeds": list(seeds),
        "model": "vit_tiny",
        "pretrain_epochs": max(epochs),
    }
    run_yml = {
        "settings": {"experiment": experiment, "finetune": {"lr": 0.001}},
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
        "hardware": {"host": "here", "gpus": []},
    }
    paths.run_yml.write_text(yaml.safe_dump(run_yml))
    for seed in seeds:
        named_seed = seed if len(seeds) > 1 else None
        write_evaluation(paths, RunName(method="scratch", seed=named_seed), 0, seed, 10 + seed)
        for method in methods:
            run = RunName(method=method, seed=named_seed)
            write_pretraining(paths, run, epochs, seed)
            for count in epochs:
                score = 20 + count + GAIN[method] + spread * seed
                write_evaluation(paths, run, count, seed, score)
    return paths


def write_pretraining(
    paths: Layout, run: RunName, epochs: tuple[int, ...], seed: int = 0, ratio: str = "15"
) -> None:
    folder = paths.pretrain_dir(run)
    folder.mkdir(parents=True)
    made_with = {"mask_method": run.method, "seed": str(seed)}
    made_with |= {"coverage_ratio": ratio} if run.method in METHODS_WITH_SEGMENTS else {}
    for count in epochs:
        name = f"pretrain_{run}_{count}"
        write_record(
            paths,
            Record(
                name=name,
                state="done",
                run=str(run),
                kind="pretrain",
                fingerprint=made_with,
                seconds=90,
            ),
        )
    with layout.epoch_log(folder).open("w") as stream:
        for epoch in range(1, max(epochs) + 1):
            loss = 0.4 + math.exp(-epoch / 4)
            entry = {"epoch": epoch, "train_loss": loss, "train_lr": 1e-3 * (1 - epoch / 20)}
            stream.write(json.dumps(entry) + "\n")
    for count in epochs:
        _picture(paths.reconstructions(run, count), f"{run} {count}")


def write_evaluation(paths: Layout, run: RunName, epochs: int, seed: int, score: float) -> None:
    folder = paths.eval_dir(run, epochs)
    folder.mkdir(parents=True)
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
        "dataset": {"name": "sample", "num_classes": 7, "num_val": 48},
    }
    layout.result(folder).write_text(json.dumps(result))
    entries = [{"epoch": e, "train_loss": 2 / e, "val_mean_iou": score * e / 6} for e in (2, 4, 6)]
    layout.epoch_log(folder).write_text("".join(json.dumps(e) + "\n" for e in entries))
    _picture(layout.predictions(folder), f"{run} {epochs}")


def _picture(path: Path, text: str) -> None:
    image = Image.new("RGB", (1200, 400), (90, 120, 160))
    ImageDraw.Draw(image).text((20, 20), text)
    image.save(path)
