"""Evaluations put together into the lines that the report compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from pipeline.layout import BASELINES, Layout, Run
from pipeline.parts import ask_facts
from pipeline.records import made_alike
from pipeline.results import Evaluation, coverage_of, method_rank, read_evaluations, run_label

REFERENCE = "patches"  # plain MAE, what the others are compared with


@dataclass(frozen=True, kw_only=True)
class Line:
    """What the charts show as one line: a method, and its ratio, over seeds and epochs."""

    label: str
    method: str
    style: int
    evaluations: Sequence[Evaluation]

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


def make_lines(all_paths: Sequence[Layout], *, apart: bool) -> list[Line]:
    """All evaluations sorted into lines; baselines come first. apart: see `kept_apart`."""
    groups: dict[tuple[str, str], list[Evaluation]] = {}
    for paths in all_paths:
        for evaluation in read_evaluations(paths):
            label = f"{evaluation.label} ({paths.root.name})" if apart else evaluation.label
            groups.setdefault((label, evaluation.method), []).append(evaluation)
    rank = method_rank(all_paths)
    ordered = sorted(groups.items(), key=lambda item: rank(item[0][1]))
    return [
        Line(label=label, method=method, style=style, evaluations=evaluations)
        for style, ((label, method), evaluations) in enumerate(ordered)
    ]


def kept_apart(all_paths: Sequence[Layout]) -> bool:
    """Whether the directories' settings differ, so that each has lines of its own."""
    return len(all_paths) > 1 and not made_alike(all_paths, ask_facts())


def line_label(run: str, paths: Layout, *, apart: bool) -> str:
    """The label of the line that a run belongs to, as `make_lines` has it."""
    label = run_label(Run.parse(run).method, coverage_of(run, paths))
    return f"{label} ({paths.root.name})" if apart else label
