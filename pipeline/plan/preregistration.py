"""A plan that binds: preregistration.yml, written once before a run, and what deviates from it.

    write_frozen(paths, settings, steps, pairs=[("green_patches", "patches")])
    frozen = read_frozen(paths)  # None where nothing was frozen
    deviations(frozen, {step.name: Made(...) for step in steps})

The last line is the SHA-256 digest of all lines above it. It tells of a change, not of somebody who
makes a new digest, too: whoever has to be convinced gets the digest beforehand.
"""

import hashlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import FiniteFloat
from typing_extensions import TypedDict

from common.files import read_text, write_text
from common.formats import parse_value, parsed_plain, plain
from common.options import differences
from mae.config import END_DIGITS
from pipeline.plan.layout import BASELINES, Layout, RunId, dataset_of, parse_eval_name
from pipeline.plan.machine import code_digest
from pipeline.plan.records import Record, read_all_records
from pipeline.plan.settings import Settings
from pipeline.plan.step import Step

_HEAD = (
    "# Written once, before the run, by `benchmark.py freeze`. The last line is the digest of all above.\n"
)
_KINDS = ("pretrain", "probe", "evaluate")  # what makes or scores a model
_MOST = 3  # names of steps in a deviation


class _Difference(TypedDict):
    first: str
    second: str


class Content(TypedDict):
    """The file. settings: by kind, those that all its steps share; steps: by name, their own."""

    written: str
    written_seconds: FiniteFloat
    question: list[_Difference]
    measure: Literal["finetuning", "linear"]
    correction: str
    datasets: list[str]
    budget: str
    seeds: list[int]
    settings: dict[str, dict[str, Any]]
    steps: dict[str, dict[str, Any]]
    images: dict[str, str]
    code: str


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A plan as it was written. is_changed: whether the file is not what it was."""

    content: Content
    digest: str
    is_changed: bool

    def settings_of(self, name: str) -> dict[str, Any]:
        """All of a planned step's."""
        return {**self.content["settings"].get(name.partition("_")[0], {}), **self.content["steps"][name]}

    @property
    def ends(self) -> dict[tuple[str, str], float]:
        """The budget and the method of pretrainings -> their epochs."""
        planned = [self.settings_of(name) for name in self.content["steps"] if name.startswith("pretrain_")]
        return {
            (s["budget"], s["mask_method"]): round(s["epochs"] - 1 + s["last_epoch"], END_DIGITS)
            for s in planned if "budget" in s
        }  # fmt: skip

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Names of the runs whose differences are asked for, without seeds."""
        return [(one["first"], one["second"]) for one in self.content["question"]]


class Made(NamedTuple):
    """What is known of a step: its settings, and the digests of its images and of the code."""

    settings: Mapping[str, Any]
    images: str = ""
    code: str = ""
    started: float = 0.0


def of_steps(steps: Iterable[Step]) -> dict[str, Made]:
    """Those of a plan that was checked."""
    return {
        s.name: Made(s.settings, s.facts.digest if s.facts else "", code_digest(s.plugin))
        for s in steps if s.kind in _KINDS
    }  # fmt: skip


def of_records(records: Iterable[Record]) -> dict[str, Made]:
    """Those that are done."""
    return {
        r.name: Made(r.fingerprint, r.images, r.code, r.started)
        for r in records if r.kind in _KINDS and r.state == "done"
    }  # fmt: skip


def parse_primary(text: str, names: Iterable[str]) -> list[tuple[str, str]]:
    """A-B[,C-D] as pairs of names of runs, which may hold "-" themselves. Raises ValueError."""
    known, pairs = list(names), list[tuple[str, str]]()
    for one in text.split(","):
        word = one.strip()
        cuts = [i for i, letter in enumerate(word) if letter == "-"]
        found = [(word[:i], word[i + 1 :]) for i in cuts if {word[:i], word[i + 1 :]} <= set(known)]
        if len(found) != 1 or found[0][0] == found[0][1]:
            raise ValueError(f"--primary is {word[:80]!r}; give A-B, two different of {', '.join(known)}")
        pairs += found
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"--primary {text[:80]} names one twice")
    return pairs


def names_of_runs(steps: Iterable[Step]) -> list[str]:
    """Of a plan's lines: the runs without their seeds, and the baselines."""
    scored = [parse_eval_name(s.name.partition("_")[2])[0] for s in steps if s.kind in ("probe", "evaluate")]
    return list(dict.fromkeys(name_of_line(run) for run in scored))


def name_of_line(run: RunId) -> str:
    """The run's name without its seed."""
    ratio = RunId.coverage_ratio if run.coverage_ratio is None else run.coverage_ratio
    return RunId(method=run.method, coverage_ratio=ratio, segments_from=run.segments_from).name


def write_frozen(paths: Layout, settings: Settings, steps: Sequence[Step], primary: str) -> str:
    """Write the plan; returns its digest. Raises ValueError if there is one, or the question is none."""
    if paths.preregistration.exists():
        raise ValueError(f"{paths.preregistration} is there already: a plan is frozen once")
    if earlier := of_records(read_all_records(paths)):
        raise ValueError(f"{paths.root}: {len(earlier)} steps are done already; freeze a plan before its run")
    pairs, made = parse_primary(primary, names_of_runs(steps)), of_steps(steps)
    kinds = {step.name: step.kind for step in steps}
    shared: dict[str, dict[str, Any]] = {}
    for name, one in made.items():
        values = plain(one.settings)
        before = shared.setdefault(kinds[name], values)
        shared[kinds[name]] = {n: v for n, v in before.items() if n in values and values[n] == v}
    own = {
        name: {n: v for n, v in plain(one.settings).items() if n not in shared[kinds[name]]}
        for name, one in made.items()
    }
    now, experiment = time.time(), settings.experiment
    content: Content = {
        "written": time.strftime("%F %T UTC", time.gmtime(now)),
        "written_seconds": now,
        "question": [{"first": first, "second": second} for first, second in pairs],
        "measure": "finetuning" if "evaluate" in shared else "linear",
        "correction": f"Holm over {len(pairs)} at 5%",
        "datasets": list(map(str, settings.data.datasets)),
        "budget": str(experiment.shared_budget or f"epochs={experiment.pretrain_epochs}"),
        "seeds": list(experiment.seed),
        "settings": shared,
        "steps": own,
        # Before segments are there, nobody knows which images have some.
        "images": {_lists(name): one.images for name, one in made.items() if one.images},
        "code": next((one.code for one in made.values()), ""),
    }
    body = _HEAD + yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    write_text(paths.preregistration, f"{body}digest: {digest}\n")
    return digest


def read_frozen(paths: Layout) -> Frozen | None:
    """The plan of an output directory; None where none was frozen. Raises ValueError for a damaged."""
    path = paths.preregistration
    if not path.exists():
        return None
    body, _, digest = read_text(path).rpartition("digest: ")
    content = parse_value(body, str(path))
    found = parsed_plain(Content, content, f"{path} is damaged")
    is_changed = hashlib.sha256(body.encode()).hexdigest() != digest.strip()
    return Frozen(content=found, digest=digest.strip()[:64], is_changed=is_changed)


def deviations(frozen: Frozen, made: Mapping[str, Made], *, is_over: bool = False) -> list[str]:
    """In words, each once: what was made, or is planned, otherwise than it was written.

    is_over: whether what is missing, and when steps began, counts, too.
    """
    content, found = frozen.content, dict[str, list[str]]()
    if frozen.is_changed:
        found["preregistration.yml was changed after it was written"] = []
    for name, one in made.items():
        if name not in content["steps"]:
            if _is_of_question(name, frozen):
                found.setdefault("not in the plan", []).append(name)
            continue
        written = frozen.settings_of(name)
        now = {n: v for n, v in one.settings.items() if n in written}
        said = differences(written, now, {})
        if one.code and one.code != content["code"]:
            said.append(f"code: {content['code']} -> {one.code}")
        listed = content["images"].get(_lists(name), "")
        if listed and one.images and one.images != listed:
            said.append(f"images: {listed} -> {one.images}")
        if is_over and 0 < one.started < content["written_seconds"]:
            said.append("begun before the plan was written")
        for text in said:
            found.setdefault(text, []).append(name)
    if is_over and (missing := [name for name in content["steps"] if name not in made]):
        found[f"not done, of {len(content['steps'])} steps"] = missing
    return [text + _named(names) for text, names in found.items()]


def _lists(name: str) -> str:
    """Which lists of images a step sees: its kind's, of its dataset."""
    return f"{name.partition('_')[0]} {dataset_of(name)}".strip()


def _is_of_question(name: str, frozen: Frozen) -> bool:
    """Whether a step is of a line that is asked for, as one more seed or finetuning is."""
    run = parse_eval_name(name.partition("_")[2])[0]
    asked = {line for pair in frozen.pairs for line in pair}
    return name_of_line(run) in asked and (run.method not in BASELINES or run.method in asked)


def _named(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return f" ({', '.join(names[:_MOST])}{more})" if names else ""
