"""What of a run's weights goes again (`--keep`), and what all of them take on the disk.

`all` keeps everything; `scored` every checkpoint of pretraining, but not what only continuing needs,
nor the weights of finetuned models, whose scores stay; `finetuned` of those checkpoints the ones that
are finetuned, and each run's last. What is gone counts as done: its step's record says so.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from common.step_files import BEST, CHECKPOINT, LAST
from mae.config import PretrainConfig
from pipeline.plan.check import init_of
from pipeline.plan.layout import Layout
from pipeline.plan.records import read_record, write_record
from pipeline.plan.settings import Keep
from pipeline.plan.step import Step
from segmenter.config import TrainConfig


class Expiring(NamedTuple):
    """A file that goes when the steps named in `after` are done; of: the step that leaves it."""

    path: Path
    of: str
    after: frozenset[str]


class DiskBytes(NamedTuple):
    """What the weights of a plan take, about: at the most, and when all of it is done."""

    peak: int
    end: int


def expiring(steps: Sequence[Step], keep: Keep) -> list[Expiring]:
    """Which files of a plan go, and when."""
    if keep == "all":
        return []
    found: list[Expiring] = []
    readers: dict[Path | None, list[Step]] = {}
    for step in steps:
        readers.setdefault(init_of(step), []).append(step)
        if step.kind == "evaluate":
            found += [
                Expiring(step.folder / name, step.name, frozenset({step.name})) for name in (CHECKPOINT, BEST)
            ]
    rounds = [step for step in steps if step.kind == "pretrain"]
    for _, of_run in groupby(sorted(rounds, key=lambda step: step.run), key=lambda step: step.run):
        *earlier, last = sorted(of_run, key=lambda step: step.epochs)
        every = frozenset(step.name for step in (*earlier, last))
        found.append(Expiring(last.folder / LAST, last.name, every))
        for step in earlier if keep == "finetuned" else ():
            scores = readers.get(step.outputs[0], [])
            # Another call may have finetuned it, and may again.
            was_finetuned = Layout(step.folder.parent.parent).eval_dir(step.run, step.epochs).exists()
            finetuned = was_finetuned or any(score.kind == "evaluate" for score in scores)
            if scores and not finetuned:
                after = frozenset(score.name for score in scores) | {step.name}
                found.append(Expiring(step.outputs[0], step.name, after))
    return found


def remove_expired(files: Iterable[Expiring], is_done: Callable[[str], bool], paths: Layout) -> None:
    """Remove the files whose time has come; what the record of a step lists is noted there first."""
    for file in files:
        if file.path.is_file() and all(map(is_done, file.after)):
            record, name = read_record(paths, file.of), str(file.path.relative_to(paths.root))
            if record is not None and name in record.outputs and name not in record.gone:
                write_record(paths, replace(record, gone=(*record.gone, name)))
            file.path.unlink(missing_ok=True)


def disk_bytes(steps: Sequence[Step], keep: Keep) -> DiskBytes:
    """What the files of weights take, about, by what the parts say of their size.

    Scores that run side by side are taken to hold all that they ever do at the same time.
    """
    there = dict[Path, int]()
    waiting, done, peak = expiring(steps, keep), set[str](), 0
    for group in _side_by_side(steps):
        for step in group:
            there.update(_leaves(step))
        # What is saved is written beside what it replaces.
        aside = sum(step.facts.checkpoint_bytes for step in group if step.facts)
        peak = max(peak, sum(there.values()) + aside)
        done |= {step.name for step in group}
        for file in [file for file in waiting if file.after <= done]:
            there.pop(file.path, None)
            waiting.remove(file)
    return DiskBytes(peak, sum(there.values()))


def _side_by_side(steps: Sequence[Step]) -> Iterable[Sequence[Step]]:
    """The steps in turn; scores in groups of as many as there are GPUs for."""
    for is_score, group in groupby(steps, key=lambda step: step.kind in ("probe", "evaluate")):
        members = list(group)
        at_once = members[0].places if is_score else 1
        for first in range(0, len(members), at_once):
            yield members[first : first + at_once]


def _leaves(step: Step) -> dict[Path, int]:
    """Files of weights that a step leaves, and their bytes; each is there once, whoever leaves it."""
    if step.facts is None or not isinstance(step.config, PretrainConfig | TrainConfig):
        return {}
    rolling, own = (LAST, step.outputs[0].name) if step.kind == "pretrain" else (CHECKPOINT, BEST)
    with_optimizer = step.facts.checkpoint_bytes
    kept = with_optimizer if step.config.run.keep_optimizer else step.facts.model_bytes
    return {step.folder / own: kept, step.folder / rolling: with_optimizer}
