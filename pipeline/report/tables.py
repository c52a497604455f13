"""The tables: results.csv, the scores on a terminal, and those of the page in words and numbers."""

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

from common.console import aligned
from pipeline.plan.budget import in_words
from pipeline.plan.layout import Layout, ratio_text
from pipeline.plan.records import read_all_records
from pipeline.report import scores
from pipeline.report.answer import Answer
from pipeline.report.comparisons import STATES, Comparison
from pipeline.report.scores import COSTS, FINETUNING, MEASURES, REFERENCE, Evaluation, Line, Measure

SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou", "best_mean_iou")
# Of results.csv, with their forms. Equal runs differ in the minutes and device-hours only. `row` is
# score (of one seed), mean (over seeds) or difference (to `against`); low and high are the interval.
COLUMNS = {
    "method": "", "coverage_ratio": "", "segments_from": "", "seed": "", "eval_seed": "",
    "epochs": "", "measure": "", "row": "", "plan": "", "score": ".4f", "low": ".4f", "high": ".4f",
    "against": "", "seeds": "", "p_value": ".4g", "detectable": ".4f", "verdict": "", "why_not": "",
    **dict.fromkeys(SCORES, ".4f"), "minutes": ".2f", "device_hours": ".4f", "train_flops": ".6g",
    "device_hours_with_segments": ".4f", "directory": "",
}  # fmt: skip
_WIDEST = 110  # characters of a table on a terminal
_LEAST_CHANGE = 0.05  # in points; less is shown as 0.0
_MOST_CLASSES = 8  # shown for each method: those with the largest change
MARKS = {"better": "▲", "worse": "▼", "higher": "△", "lower": "▽", "none": "=", "unknown": "?"}


class Table(NamedTuple):
    """What the page lays out."""

    # Title of the column -> text; the same titles in each.
    rows: Sequence[Mapping[str, str]]
    looks: Sequence[str] = ()  # of each row: its class in CSS


def results_csv(lines: Sequence[Line], answers: Sequence[Answer]) -> str:
    """All scores, their means over seeds and their differences: a row for each."""
    stream, names = io.StringIO(), {measure: name for name, measure in MEASURES.items()}
    writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
    writer.writeheader()

    def write(line: Line, measure: Measure, **known: Any) -> None:
        ratio = known.pop("coverage_ratio", line.coverage_ratio)
        known |= {"method": line.method, "segments_from": line.source, "directory": line.home or None}
        known |= {"measure": names[measure], "coverage_ratio": None if ratio is None else ratio_text(ratio)}
        there = {name: known[name] for name in COLUMNS if known.get(name) is not None}
        writer.writerow({name: f"{value:{COLUMNS[name]}}" for name, value in there.items()})

    for line in lines:
        for one in line.scored:
            if one.score is not None:
                known = {name: one.result.get(name) for name in SCORES} | one.costs
                known |= {"minutes": one.minutes if one.measure is FINETUNING else None}
                known |= {"seed": one.run.seed, "eval_seed": one.eval_seed, "epochs": one.epochs}
                write(line, one.measure, row="score", score=one.score, **known)
    for line, measure in product(lines, MEASURES.values()):
        for at in line.epochs(measure):
            level = line.level(at, measure)
            ends = {"low": level.spread.low, "high": level.spread.high} if level.spread else {}
            write(line, measure, row="mean", score=level.score, epochs=at, seeds=len(level.scores),
                  **ends, **level.costs)  # fmt: skip
    for found in answers:
        for c in found.comparisons:
            known = {"against": c.second.label, "verdict": c.state, "why_not": c.why_not or None}
            known["plan"] = c.plan or None
            if c.shown:
                known |= {"low": c.shown.low, "high": c.shown.high, "p_value": c.p_value}
                known |= {"detectable": c.shown.detectable}
            write(c.first, found.measure, row="difference", score=c.value, seeds=c.seeds,
                  epochs=found.ends[c.first.label], **known)  # fmt: skip
    return stream.getvalue()


def terminal_table(lines: Sequence[Line], answers: Sequence[Answer]) -> str:
    """Means over seeds, a line for each checkpoint, with the cost where it fits; then differences."""
    measures = list(dict.fromkeys(found.measure for found in answers))
    rows = [["method", "epochs", "seeds", *(m.short for m in measures), *COSTS.values()]]
    for line in lines:
        for at in sorted({epochs for measure in measures for epochs in line.epochs(measure)}):
            there = {m: line.level(at, m) for m in measures if at in line.epochs(m)}
            scores = [f"{there[m].score:.2f}" if m in there else "" for m in measures]
            seeds = max(len(level.scores) for level in there.values())
            costs = cost_cells(next(iter(there.values())).costs).values()
            rows.append([line.label, str(at), str(seeds), *scores, *costs])
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    rows = [[row[i] for i in kept] for row in rows]
    text = _fitting(rows, right=range(1, len(rows[0])))
    first, *others = [found for found in answers if found.comparisons] or [Answer([])]
    compared = [
        {"method": c.first.label, "against": c.second.label, **_difference_cells(c),
         **{o.short: _in_short(o, c) for o in others}}
        for c in first.comparisons
    ]  # fmt: skip
    if compared:
        rows = [list(compared[0]), *(list(row.values()) for row in compared)]
        after = f"{first.epochs[0].lower()}{first.epochs[1:]}"
        text += f"\n\nby {first.measure.words}, {after}\n{_fitting(rows, right=(2, 3))}"
        marks = "△ ▽ higher or lower, a hint; = no difference shown; ? no verdict"
        text += f"\n{marks}" if any(o.comparisons for o in others) else ""
    return text


def _fitting(rows: Sequence[Sequence[str]], right: Sequence[int]) -> str:
    """As many of the columns as a terminal has room for; the last ones matter least."""
    for most in range(len(rows[0]), 0, -1):
        text = aligned([row[:most] for row in rows], right=[i for i in right if i < most])
        if max(map(len, text.split("\n"))) <= _WIDEST:
            break
    return text


def aligned_table(table: Table) -> str:
    """A table as aligned text."""
    cells = [list(table.rows[0]), *(list(row.values()) for row in table.rows)]
    return aligned(cells, right=range(1, len(cells[0])))


def _in_short(answer: Answer, c: Comparison) -> str:
    """The difference of the same two lines by another measure, with its mark."""
    same = (d for d in answer.comparisons if (d.first, d.second) == (c.first, c.second))
    return next((f"{d.value:+.2f} {MARKS[d.state]}" for d in same if d.value is not None), "")


def differences(answers: Sequence[Answer]) -> list[dict[str, str]]:
    """A row for each comparison, as text."""
    return [
        {"measure": found.short, "method": c.first.label, "against": c.second.label,
         **_difference_cells(c), "seeds": str(c.seeds),
         "detectable": f"{c.shown.detectable:.2f}" if c.shown else ""}
        for found in answers for c in found.comparisons
    ]  # fmt: skip


def _difference_cells(c: Comparison) -> dict[str, str]:
    return {
        "difference": "" if c.value is None else f"{c.value:+.2f}",
        "corrected interval": f"{c.shown.low:+.2f} to {c.shown.high:+.2f}" if c.shown else "",
        "verdict": STATES[c.state] + (f": {c.why_not}" if c.why_not else "") + (c.plan and f", {c.plan}"),
    }


class Cell(NamedTuple):
    """A score of the matrix."""

    score: str
    within: str = ""  # its interval over seeds
    state: str = ""  # of the comparison with the reference


def matrix(lines: Sequence[Line], answers: Sequence[Answer]) -> dict[Line, list[Cell]]:
    """Methods x measures where each measure compares them."""
    found: dict[Line, list[Cell]] = {}
    for line in sorted(lines, key=lambda line: line.is_baseline):
        cells = []
        for one in answers:
            level = one.levels.get(line.label)
            states = {c.first: c.state for c in one.comparisons if c.kind == "method"}
            cells.append(Cell("") if level is None else Cell(
                f"{level.score:.2f}", level.spread.within(one.measure.most) if level.spread else "",
                states.get(line, ""),
            ))  # fmt: skip
        if any(cell.score for cell in cells):
            found[line] = cells
    return found


def score_table(labelled: Sequence[tuple[str, Evaluation]]) -> Table:
    """The cells of each evaluation, whose label comes first; the best by mean IoU stands out."""
    titles = {name: name.replace("_", " ").replace("iou", "IoU") for name in SCORES[:3]}
    rows = [
        {"method": label, "seed": str(one.run.seed), "eval seed": str(one.eval_seed),
         "epochs": str(one.epochs),
         **{title: f"{one.result[name]:.2f}" for name, title in titles.items()},
         "minutes": f"{one.minutes:.1f}", **cost_cells(one.costs)}
        for label, one in labelled
    ]  # fmt: skip
    # Seeds that are the same in every row are left out, and costs of which nothing is known.
    idle = [name for name in ("seed", "eval seed") if len({row[name] for row in rows}) < 2]
    idle += [name for name in COSTS.values() if not any(row[name] for row in rows)]
    rows = [{name: row[name] for name in row if name not in idle} for row in rows]
    miou = [one.result["mean_iou"] for _, one in labelled]
    return Table(rows, ["best" if score == max(miou) else "" for score in miou])


def cost_cells(costs: Mapping[str, float | None]) -> dict[str, str]:
    """What a pretraining has cost, for people; nothing where that is not known."""
    cells = {}
    for name, value in costs.items():
        form = ".2e" if name == "train_flops" else ".3g" if (value or 0) < 1000 else ".0f"
        cells[COSTS[name]] = "" if value is None else f"{value:{form}}"
    return cells


def spent(lines: Sequence[Line], answer: Answer) -> dict[str, Any]:
    """What each line with a budget has spent where it is compared: caption and table; empty without."""
    bound = [line for line in lines if line.spends and line.label in answer.levels]
    rows, reference = [], next((line for line in bound if _is_reference(line)), next(iter(bound), None))
    for line in bound:
        assert line.spends is not None and reference is not None
        costs, whole = answer.levels[line.label].costs, answer.levels[reference.label].costs["train_flops"]
        of_step, flops = line.spends["methods"][line.method]["flops_per_step"], costs["train_flops"]
        steps, off = (f"{flops / of_step:.0f}", flops - (whole or math.nan)) if flops else ("", math.nan)
        rows.append({
            "method": line.label, "epochs": f"{min(answer.ends[line.label], line.exact_end):.4g}",
            "optimizer steps": steps,
            f"own steps more than {reference.label}": "" if math.isnan(off) else f"{off / of_step:+.2f}",
            **cost_cells(costs),
        })  # fmt: skip
    if reference is None or reference.spends is None:
        return {}
    asked = in_words(reference.spends["asked"], counts_segments=reference.spends["count_segments"])
    caption = f"Budget: {asked}. More: in optimizer steps of its own; within 1, FLOPs cannot be more equal."
    return {"caption": caption, "table": Table(rows)}


def _is_reference(line: Line) -> bool:
    """Whether the budget is told in its epochs."""
    return line.spends is not None and line.spends["asked"].startswith(f"flops={line.method}@")


def class_tables(lines: Sequence[Line]) -> dict[str, Any]:
    """IoU class by class, at the last epochs after which all methods were finetuned.

    caption: text; changes: line's label -> table, against plain MAE; all: table. Empty if there are
    no such epochs.
    """
    lines = [line for line in lines if line.evaluations]
    trained, ends = [line for line in lines if not line.is_baseline], scores.compared_epochs(lines)
    if not ends:
        return {}
    iou = {line.label: _class_iou(line, ends[line.label]) for line in trained}
    reference = next((line.label for line in trained if line.method == REFERENCE), "")
    others = [label for label in iou if label != reference] if reference else []
    caption = f"IoU in percent after {max(ends.values())} epochs of pretraining."
    if others:
        caption += f" First the classes that change most against {reference}."
    names = dict.fromkeys(name for values in iou.values() for name in values)
    rows = [{"class": n, **{label: _shown(iou[label], n) for label in iou}} for n in names]
    changes = {label: _changes(iou, label, reference) for label in others}
    return {"caption": caption, "changes": changes, "all": Table(rows)}


def _class_iou(line: Line, epochs: int) -> dict[str, float]:
    """Class -> mean IoU over seeds in percent; NaN for a class that did not occur."""
    found: dict[str, list[float]] = {}
    for evaluation in line.evaluations:
        if evaluation.epochs == epochs:
            for name, value in evaluation.result["class_iou"].items():
                found.setdefault(name, []).extend([] if value is None else [value])
    return {name: fmean(values) if values else math.nan for name, values in found.items()}


def _changes(iou: Mapping[str, Mapping[str, float]], label: str, reference: str) -> Table:
    """The largest changes, gains first. iou: by label and class."""
    values, before = iou[label], iou[reference]
    changes = {name: values[name] - before.get(name, math.nan) for name in values}
    seen = [name for name in changes if abs(changes[name]) >= _LEAST_CHANGE]
    largest = sorted(seen, key=lambda name: -abs(changes[name]))[:_MOST_CLASSES]
    names = sorted(largest, key=lambda name: -changes[name])
    rows = [
        {"class": name, reference: _shown(before, name), label: _shown(values, name),
         "change": f"{changes[name]:+.1f}"}
        for name in names
    ]  # fmt: skip
    return Table(rows, ["gain" if changes[name] >= 0 else "loss" for name in names])


def _shown(values: Mapping[str, float], name: str) -> str:
    return "–" if math.isnan(values.get(name, math.nan)) else f"{values[name]:.1f}"


def provenance(all_paths: Sequence[Layout]) -> tuple[dict[str, list[tuple[str, str]]], Table]:
    """What the numbers came from: pairs of name and value by title; apart, settings that differ."""
    run_ymls = [scores.read_run_yml(paths) for paths in all_paths]
    flat = [dict(flatten(run_yml.get("settings", {}))) for run_yml in run_ymls]
    folders, common, differing = scores.names_of(all_paths), [], []
    for name in dict.fromkeys(name for settings in flat for name in settings if name != "output_dir"):
        texts = [settings.get(name, "not given") for settings in flat]
        if len(set(texts)) == 1:
            common.append((name, texts[0]))
        else:
            differing.append({"setting": name, **dict(zip(folders, texts, strict=True))})
    pairs = {"Common settings" if len(flat) > 1 else "Settings": common}
    for part in ("versions", "hardware"):
        found = (pair for run_yml in run_ymls for pair in flatten(run_yml.get(part, {})))
        pairs[part.capitalize()] = joined(found)
    pairs["Time spent"] = _time_spent(all_paths)
    return {title: rows for title, rows in pairs.items() if rows}, Table(differing)


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested settings as "group: name" and text; what was not given is left out."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}: {key}" if prefix else str(key))
    elif isinstance(value, list | tuple):
        yield prefix, ", ".join(str(item) for item in value) or "none"
    elif value is not None:
        yield prefix, str(value)


def joined(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """One pair for each name, with all the different texts that go with it."""
    texts: dict[str, dict[str, None]] = {}
    for name, text in pairs:
        texts.setdefault(name, {})[text] = None
    return [(name, ", ".join(different)) for name, different in texts.items()]


def _time_spent(all_paths: Sequence[Layout]) -> list[tuple[str, str]]:
    """Hours by kind of step, from the records: finished attempts, interrupted ones included."""
    wall, device = defaultdict[str, float](float), defaultdict[str, float](float)
    for record in (record for paths in all_paths for record in read_all_records(paths)):
        wall[record.kind] += record.seconds / 3600
        device[record.kind] += record.seconds / 3600 * record.devices
    rows = [(f"{k}, hours (times devices)", f"{wall[k]:.2f} ({device[k]:.2f})") for k in wall]
    total = f"{sum(device.values()):.2f}"
    return [*rows, ("total device-hours (GPUs, or the CPU as one)", total)]
