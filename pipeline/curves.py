"""Evaluations put together into the lines that the report compares."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from pipeline.layout import BASELINES, Layout, RunName
from pipeline.results import Evaluation, coverage_of, read_evaluations, read_run_yml
from pipeline.settings import METHODS

REFERENCE = "patches"  # plain MAE, what the others are compared with
# Settings that say where and how a run was made, not what was compared.
_NOT_COMPARED = ("output_dir", "compute", "cluster", "launcher", "keep_going")


@dataclass(frozen=True, kw_only=True)
class Line:
    """What the charts show as one line: a method, and its ratio, over seeds and epochs."""

    label: str
    method: str
    style: int
    evaluations: Sequence[Evaluation]

    def scores(self, epochs: int) -> list[float]:
        """Mean IoU after `epochs`, in percent: one for each seed of pretraining.

        Several finetunings of one pretraining count as their mean, and so does a seed that is in
        several directories: neither tells how much chance there is in pretraining.
        """
        by_seed: dict[int | None, list[float]] = {}
        for evaluation in self.evaluations:
            score = evaluation.result.get("mean_iou")
            if evaluation.epochs == epochs and score is not None:
                by_seed.setdefault(evaluation.seed, []).append(score)
        return [fmean(scores) for scores in by_seed.values()]

    @property
    def epochs(self) -> list[int]:
        """Where it was evaluated, ascending."""
        return sorted({evaluation.epochs for evaluation in self.evaluations})


def make_lines(all_paths: Sequence[Layout]) -> list[Line]:
    """All evaluations sorted into lines; baselines come first."""
    apart = kept_apart(all_paths)
    groups: dict[tuple[str, str], list[Evaluation]] = {}
    for paths in all_paths:
        for evaluation in read_evaluations(paths):
            label = f"{evaluation.label} ({paths.root.name})" if apart else evaluation.label
            groups.setdefault((label, evaluation.method), []).append(evaluation)
    order = {method: index for index, method in enumerate((*BASELINES, *METHODS))}
    ordered = sorted(groups.items(), key=lambda item: order.get(item[0][1], len(order)))
    return [
        Line(label=label, method=method, style=style, evaluations=evaluations)
        for style, ((label, method), evaluations) in enumerate(ordered)
    ]


def kept_apart(all_paths: Sequence[Layout]) -> bool:
    """Whether the directories' settings differ, so that each has lines of its own."""
    compared = [json.dumps(_compared(read_run_yml(p)), sort_keys=True) for p in all_paths]
    return len(set(compared)) > 1


def _compared(run_yml: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that have to agree before results are put on one line."""
    settings = {k: v for k, v in run_yml.get("settings", {}).items() if k not in _NOT_COMPARED}
    varies = ("mask_methods", "coverage_ratios", "seeds", "eval_epochs", "eval_only")
    experiment = settings.get("experiment", {})
    settings["experiment"] = {k: v for k, v in experiment.items() if k not in varies}
    return settings


def line_label(run: RunName, paths: Layout, *, apart: bool) -> str:
    """The label of the line that a run belongs to, as `make_lines` has it."""
    ratio = coverage_of(run, paths)
    label = run.method if ratio is None else f"{run.method} {ratio:g}%"
    return f"{label} ({paths.root.name})" if apart else label


def read_log(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a log.txt; a line that is being written is left out."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    complete = text[: text.rfind("\n") + 1].splitlines()
    try:
        return [json.loads(line) for line in complete if line.strip()]
    except ValueError as error:
        raise ValueError(f"{path} has a damaged line ({error}); mend or remove it") from None
