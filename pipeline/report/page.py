"""report.html: one offline page that answers the question first, from what the folders hold now.

`write_report` reads top to bottom like the page. Several output directories make one page; the
same method in directories of equal settings is one line, with the spread over their seeds.
"""

import math
import time
from collections.abc import Sequence
from pathlib import Path

import jinja2

from common.files import check_output_file, write_text
from common.formats import read_log
from common.step_files import LOG
from pipeline.plan.layout import Layout, is_report, is_results_csv
from pipeline.plan.records import read_all_records, read_plan
from pipeline.report import scores, tables
from pipeline.report.answer import Answer, answer
from pipeline.report.encoders import benchmarks
from pipeline.report.figures import Chart, Point, Series, line_chart, pictures
from pipeline.report.scores import FINETUNING, MEASURES, Line


def write_all(paths: Layout) -> str:
    """Writes results.csv and report.html from what there is; returns the table to show."""
    write_report([paths.root], paths.report_html)
    shown = [f"by {one.measure.words}\n{tables.aligned_table(one.table)}\n" for one in benchmarks([paths])]
    if evaluations := scores.read_evaluations(paths):
        shown += [tables.terminal_table(evaluations), "", str(paths.results_csv)]
    elif not shown:
        return f"no evaluation has finished; {paths.report_html}"
    return "\n".join(["", *shown, str(paths.report_html)])


def write_report(folders: Sequence[Path], page: Path) -> None:
    """Writes results.csv in each of the folders, and one page over all of them.

    Raises ValueError for a folder that is no output directory; then nothing is written.
    """
    all_paths = [Layout(folder) for folder in folders]
    check_output_file(page, is_own=is_report)
    for paths in all_paths:
        check_output_file(paths.results_csv, "report", is_own=is_results_csv, makes_folder=True)
        outputs = (paths.pretrain_output, paths.probe_output, paths.eval_output)
        # run.yml alone is a run that has just begun.
        if not any(path.exists() for path in (*outputs, paths.run_yml)):
            raise ValueError(f"{paths.root} is not the output directory of a run")
    lines = scores.make_lines(all_paths)
    scored = [(line.label, one) for line in lines for one in line.evaluations]
    if is_of_encoders := bool(lines) and all(line.is_baseline for line in lines):
        first, *others = [Answer(["Nothing was pretrained here: the tables compare encoders."])]
    else:
        first, *others = _answers(lines, _planned_epochs(all_paths))
    settings, differing = tables.provenance(all_paths)
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
        Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    )
    html = template.render(
        title="Encoders on the same bench" if is_of_encoders else "Mean IoU against pretraining",
        subtitle=f"{', '.join(scores.names_of(all_paths))}; {time.strftime('%F %H:%M')}",
        progress=" ".join(filter(None, map(_progress, all_paths))),
        answer=first,
        other_answers=others,
        benchmarks=benchmarks(all_paths),
        scores=tables.score_table(scored),
        # Where evaluations differ, all values.
        protocol=tables.joined(
            (name.removeprefix("protocol: "), text)
            for _, one in scored
            for part in ("dataset", "model", "protocol", "recipe")
            for name, text in tables.flatten({part: one.result.get(part)})
        ),
        loss_charts=_training_charts(lines),
        classes=tables.class_tables(lines),
        pictures=pictures(all_paths),
        settings=settings,
        differing=differing,
    )
    for paths in all_paths:
        tables.write_results_csv(paths)
    write_text(page, html)


def _progress(paths: Layout) -> str:
    """How far a run is that has not finished; nothing for one that has."""
    steps = read_plan(paths) if paths.plan.exists() else []
    states = {record.name: record.state for record in read_all_records(paths)}
    done = sum(states.get(step["name"]) == "done" for step in steps)
    if done == len(steps):
        return ""
    failed = [step["name"] for step in steps if states.get(step["name"]) == "failed"]
    failure = f"; failed: {', '.join(failed)}" if failed else ""
    return f"{paths.root.name}: {done} of {len(steps)} steps are done{failure}."


def _planned_epochs(all_paths: Sequence[Layout]) -> int:
    """Where pretraining ends, as the calls said; 0: it is not known."""
    known = [scores.read_run_yml(paths).get("settings", {}).get("pretrain_epochs") for paths in all_paths]
    return max((epochs for epochs in known if isinstance(epochs, int)), default=0)


def _answers(lines: Sequence[Line], planned_epochs: int) -> list[Answer]:
    """What the measures say: complete finetuning first, the probes where there is none yet.

    One of them is looked at first, at the end of pretraining: the others say what differs as a hint.
    """
    scored = [one for one in MEASURES.values() if any(line.epochs(one) for line in lines)]
    asked = next((one for one in scored if one.areas), FINETUNING)
    reached = scores.last_common_epochs(lines, asked)
    is_early = reached is not None and reached < planned_epochs
    first_look = f"{asked.words} after {planned_epochs} epochs" if is_early else asked.words
    found = []
    for measure in scored:
        look = "" if measure is asked and not is_early else first_look
        found += [one for one in [answer(lines, measure, first_look=look)] if one]
    first, *others = sorted(found or [Answer([])], key=lambda one: not one.sentences)
    if not first.sentences:
        first = first._replace(sentences=["No evaluation has finished yet."])
    elif first.measure is not FINETUNING:
        said = "No finetuning has been scored yet; this is what frozen probes say."
        first = first._replace(sentences=[said, *first.sentences])
    return [first, *others]


def _training_charts(lines: Sequence[Line]) -> list[Chart]:
    """Pretraining loss, held-out loss and rate per run; finetuning loss of each last evaluation."""
    pretraining = [(line, read_log(folder / LOG)) for line in lines for folder in line.pretrainings]
    last = [(line, read_log(line.evaluations[-1].folder / LOG)) for line in lines if line.evaluations]
    scored = [(line, log) for line, log in last if sum("val_mean_iou" in e for e in log) > 1]
    charts = []
    for logs, work, key, y_title, caption in (
        (pretraining, "pretraining", "train_loss", "reconstruction loss",
         "Pretraining loss on the training images. Methods hide different pixels, "
         "so compare a line's course, not its height."),
        (pretraining, "pretraining", "val_loss", "held-out loss",
         "Reconstruction loss on the images in val/."),
        (pretraining, "pretraining", "train_lr", "learning rate",
         "Learning rate of pretraining."),
        (last, "finetuning", "train_loss", "finetuning loss",
         "Finetuning loss of each line's last evaluation."),
        (scored, "finetuning", "val_mean_iou", "mean IoU (%)",
         "Mean IoU while finetuning, at each line's last evaluation."),
    ):  # fmt: skip
        series = []
        for line, log in logs:  # runs of other seeds look alike
            values = [(entry["epoch"], entry.get(key)) for entry in log]
            points = [Point(x, y) for x, y in values if y is not None and math.isfinite(y)]
            series.append(Series(line.label, points, line.style))
        charts.append(line_chart({f"epochs of {work}": series}, caption, y_title=y_title))
    return [chart for chart in charts if chart.views]
