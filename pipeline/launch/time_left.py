"""How long the rest of a plan takes, from what its steps have taken so far: of `run` and `status`."""

import time
from collections.abc import Mapping, Sequence
from statistics import fmean

from common.progress import duration
from pipeline.plan.layout import Layout, RunId, parse_eval_name
from pipeline.plan.records import PlannedStep, Record, read_plan, read_progress, read_record


def time_left_text(paths: Layout, running: Sequence[str], beside: int = 1) -> str:
    """In words; empty where there is no plan, or nothing is left or known.

    running: names of steps. beside: how many ran at once, at most.
    """
    if not paths.plan.exists():
        return ""
    plan = read_plan(paths)
    records = {step["name"]: read_record(paths, step["name"]) for step in plan}
    left = [step for step in plan if (r := records[step["name"]]) is None or r.state != "done"]
    expected = _expected(paths, plan, {n: r for n, r in records.items() if r is not None}, running)
    seconds = [expected[step["name"]] for step in left if step["name"] in expected]
    if not seconds:
        return ""
    # Steps that ran beside each other will go on to do so.
    total = sum(seconds) / max(beside, len(running))
    return f"{'about' if len(seconds) == len(left) else 'more than'} {duration(total)} left"


def _expected(
    paths: Layout, plan: Sequence[PlannedStep], records: Mapping[str, Record], running: Sequence[str]
) -> dict[str, float]:
    """Step -> seconds that it still takes, as far as one of its kind has told."""
    kinds = {step["name"]: _kind(step["name"]) for step in plan}
    lengths = _lengths(list(kinds))
    spent: dict[tuple[str, str], list[float]] = {}  # by kind: seconds of a step, or of an epoch
    for name, record in records.items():
        if record.state == "done" and lengths[name]:
            spent.setdefault(kinds[name], []).append(record.seconds / lengths[name])
    left = {}
    for step in plan:
        name, now = step["name"], read_progress(paths.root / step["folder"])
        if name in running and now.get("seconds_left") is not None:
            left[name] = float(now["seconds_left"])
            if kinds[name][0] == "pretrain":  # its progress is that of the whole pretraining
                rest = max(now.get("epochs_total", 0) - now.get("epoch", 0), 1e-9)
                rounds = [n for n in lengths if kinds[n] == kinds[name] and _run(n) == _run(name)]
                done = sum(lengths[n] for n in rounds[: rounds.index(name) + 1])
                rate = left[name] / rest
                left[name] = rate * max(0.0, done - now.get("epoch", 0))
                spent.setdefault(kinds[name], []).append(rate)
            elif name in records:
                spent.setdefault(kinds[name], []).append(time.time() - records[name].started + left[name])
    for name in lengths:
        # Methods differ in cost; one of which nothing is known is taken for another.
        known = spent.get(kinds[name]) or [s for k, of in spent.items() if k[0] == kinds[name][0] for s in of]
        if name not in left and (known or not lengths[name]):
            left[name] = fmean(known) * lengths[name] if known else 0.0
    return left


def _kind(name: str) -> tuple[str, str]:
    """Of a step, by its name: what it does, and the method of a pretraining."""
    kind, _, rest = name.partition("_")
    return kind, parse_eval_name(rest)[0].method if kind == "pretrain" else ""


def _run(name: str) -> RunId:
    return parse_eval_name(name.partition("_")[2])[0]


def _lengths(names: Sequence[str]) -> dict[str, int]:
    """Epochs of each round of pretraining; 1 for another step."""
    ends: dict[RunId, int] = {}
    found = {}
    for name in names:  # in the plan's order, rounds ascend
        found[name] = 1
        if name.startswith("pretrain_"):
            run, end, _ = parse_eval_name(name.partition("_")[2])
            found[name], ends[run] = end - ends.get(run, 0), end
    return found
