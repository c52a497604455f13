"""Evaluations put together into the lines that the report compares."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from pipeline.layout import BASELINES, Layout, Run
from pipeline.parts import ask_facts
from pipeline.records import made_alike, read_all_records
from pipeline.results import Evaluation, coverage_of, method_rank, read_evaluations, run_label

REFERENCE = "patches"  # plain MAE, what the others are compared with


@dataclass(kw_only=True)
class Line:
    """What the charts show as one line: a method, and its ratio, over seeds and epochs."""

    label: str
    method: str
    style: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)
    pretrainings: list[Path] = field(default_factory=list)
    """Their folders; an evaluation may have outlived its pretraining, or not have begun."""

    @property
    def is_baseline(self) -> bool:
        """Whether nothing was pretrained here."""
        return self.method in BASELINES

    def scores(self, epochs: int) -> list[float]:
        """Mean IoU after `epochs`, in percent: one for each seed of pretraining.

        Several finetunings of one pretraining count as their mean, and so does a seed that is in
        several directories: neither tells how much chance there is in pretraining.
        """
        by_seed: dict[int, list[float]] = {}
        for evaluation in self.evaluations:
            score = evaluation.result.get("mean_iou")
            if evaluation.epochs == epochs and score is not None:
                by_seed.setdefault(evaluation.seed, []).append(score)
        return [fmean(scores) for scores in by_seed.values()]

    @property
    def epochs(self) -> list[int]:
        """Where it was evaluated, ascending."""
        return sorted({evaluation.epochs for evaluation in self.evaluations})


def last_common_epochs(lines: Sequence[Line]) -> int | None:
    """The last epochs after which all methods were evaluated, None if there are none."""
    evaluated = [set(line.epochs) for line in lines if not line.is_baseline]
    return max(set.intersection(*evaluated), default=None) if evaluated else None


def make_lines(all_paths: Sequence[Layout]) -> list[Line]:
    """All runs sorted into lines; baselines come first.

    Directories whose settings differ have lines of their own, which bear the directory's name.
    """
    apart = len(all_paths) > 1 and not made_alike(all_paths, ask_facts())
    lines: dict[str, Line] = {}
    for paths in all_paths:
        suffix = f" ({paths.root.name})" if apart else ""
        for evaluation in read_evaluations(paths):
            label = evaluation.label + suffix
            line = lines.setdefault(label, Line(label=label, method=evaluation.method))
            line.evaluations.append(evaluation)
        records = read_all_records(paths)
        for folder in sorted(paths.pretrain_output.glob("*/")):
            with contextlib.suppress(ValueError):  # not a run's name
                method = Run.parse(folder.name).method
                label = run_label(method, coverage_of(folder.name, records)) + suffix
                line = lines.setdefault(label, Line(label=label, method=method))
                line.pretrainings.append(folder)
    rank = method_rank(all_paths)
    ordered = sorted(lines.values(), key=lambda line: rank(line.method))
    for style, line in enumerate(ordered):
        line.style = style
    return ordered
