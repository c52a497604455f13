"""result.json: what a finetuning amounts to, with everything needed to compare it."""

from __future__ import annotations

import platform
import statistics
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from segmenter.build import Run, State, all_settings
from segmenter.config import RANDOM
from segmenter.devices import device_name
from segmenter.layout import RESULT

__all__ = ["RESULT", "combined_result", "run_result"]

FORMAT_VERSION = 1
SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou")
PACKAGES = ("torch", "torchvision", "timm", "accelerate", "onedl-mmsegmentation", "onedl-mmcv")


def run_result(run: Run, state: State) -> dict[str, Any]:
    """The result of one finetuning, from its last epoch. Percentages are 0 to 100."""
    config, scores = run.config, state.scores
    assert scores is not None
    seed = config.optimisation.seed
    return {
        "format_version": FORMAT_VERSION,
        "epochs": config.optimisation.epochs,
        "num_updates": config.optimisation.epochs * run.plan.steps_per_epoch,
        **{name: scores[name] for name in SCORES},
        "best_mean_iou": state.best_mean_iou,
        "class_iou": scores["class_iou"],
        "seed": seed,
        "seeds": [{"seed": seed, **{name: scores[name] for name in SCORES}}],
        "mean_iou_std": None,
        "minutes": state.total_seconds / 60,
        "recipe": config.recipe(),
        "protocol": config.protocol.described(),
        "model": config.model.model,
        "init": RANDOM if config.run.init is None else str(config.run.init),
        "dataset": {
            "name": run.task.description.name,
            "num_classes": len(run.task.classes),
            "num_val": len(run.task.val),
        },
        "versions": versions(),
        "device": device_name(run.accelerator.device),
        "num_processes": run.accelerator.num_processes,
        "settings": all_settings(config, run.task),
    }


def combined_result(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the results of several seeds, and the sample deviation of the mean IoU."""
    first = results[0]
    return {
        **first,
        **{name: statistics.fmean(result[name] for result in results) for name in SCORES},
        "best_mean_iou": statistics.fmean(result["best_mean_iou"] for result in results),
        "class_iou": {
            name: _mean([result["class_iou"][name] for result in results])
            for name in first["class_iou"]
        },
        "seeds": [seed for result in results for seed in result["seeds"]],
        "mean_iou_std": statistics.stdev(result["mean_iou"] for result in results),
        "minutes": sum(result["minutes"] for result in results),
    }


def versions() -> dict[str, str]:
    """What the numbers were made with."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
