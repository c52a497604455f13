"""report.html: one offline page that answers the question first, from what the folders hold now.

`write_report` reads top to bottom like the page. Several output directories make one page; the
same method in directories of equal settings is one line, with the spread over their seeds.
"""

import base64
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jinja2

from common.files import check_output_file, write_text
from common.formats import read_log
from common.step_files import LOG
from pipeline.plan.layout import Layout, RunId, is_report, is_results_csv
from pipeline.plan.preregistration import deviations, name_of_line, of_records, read_frozen
from pipeline.plan.records import read_all_records, read_plan
from pipeline.report import scores, tables
from pipeline.report.agreement import agreements, rows, sentence
from pipeline.report.answer import Answer, Question, answers
from pipeline.report.bundle import opened
from pipeline.report.charts import forest, scores_chart
from pipeline.report.encoders import benchmarks
from pipeline.report.figures import Chart, Point, Series, files_of, line_chart, pictures, sample
from pipeline.report.paper import check_paper, paper_tables, write_paper
from pipeline.report.scores import COSTS, Line

TITLE = "Does hiding objects make pretraining better?"
OF_ENCODERS = "Encoders on the same bench"  # where nothing was pretrained
_QUESTIONS = (
    "Does it matter that what is hidden is an object?", "Better than plain MAE?",
    "Better than without pretraining?", "Better than in the other directory?",
)  # fmt: skip


def page_of(folders: Sequence[Path]) -> Path:
    """Where the page goes: into the one directory, or beside nobody's own page."""
    if len(folders) == 1 and not folders[0].is_file():
        return Layout(folders[0]).report_html
    return Path(f"report-{'-'.join(folder.name for folder in folders)}"[:100] + ".html")


def write_all(paths: Layout) -> str:
    """Writes results.csv and report.html from what there is; returns the tables to show."""
    lines, found = write_report([paths.root], paths.report_html)
    if not any(line.scored for line in lines):
        return f"no evaluation has finished; {paths.report_html}"
    shown = [f"by {one.measure.words}\n{tables.aligned_table(one.table)}\n" for one in benchmarks([paths])]
    shown = shown or [tables.terminal_table(lines, found), ""]
    return "\n".join(["", *shown, str(paths.results_csv), str(paths.report_html)])


def write_report(
    folders: Sequence[Path], page: Path, *, paper: Path | None = None
) -> tuple[list[Line], list[Answer]]:
    """Writes results.csv in each of the folders, one page over all of them; returns what it says.

    A bundle is read as its directory is, and left as it is. paper: a folder for what a paper needs.
    Raises ValueError for a folder that is no output directory; then nothing is written.
    """
    with opened(folders) as all_paths:
        for paths in (paths for paths in all_paths if paths.root in folders):
            check_output_file(paths.results_csv, "report", is_own=is_results_csv, makes_folder=True)
        for paths in all_paths:
            outputs = (paths.pretrain_output, paths.probe_output, paths.eval_output)
            # run.yml alone is a run that has just begun.
            if not any(path.exists() for path in (*outputs, paths.run_yml)):
                raise ValueError(f"{paths.root} is not the output directory of a run")
        check_output_file(page, is_own=is_report)
        if paper is not None:
            check_paper(paper)
        lines = scores.make_lines(all_paths)
        question, deviating = frozen_question(all_paths, lines)
        found = answers(lines, question)
        html = _page(all_paths, lines, found, deviating)
        for paths in (paths for paths in all_paths if paths.root in folders):
            is_alone = len(all_paths) == 1
            own = lines if is_alone else scores.make_lines([paths])
            alone = found if is_alone else answers(own, frozen_question([paths], own)[0])
            write_text(paths.results_csv, tables.results_csv(own, alone))
        write_text(page, html)
        if paper is not None:
            write_paper(paper, all_paths, lines, found)
    return lines, found


def frozen_question(all_paths: Sequence[Layout], lines: Sequence[Line]) -> tuple[Question | None, list[str]]:
    """What frozen plans ask for, None where there is none, and what was done otherwise, in words."""
    pairs, measures, said = [], [], []
    for paths, name in zip(all_paths, scores.names_of(all_paths), strict=True):
        if (frozen := read_frozen(paths)) is None:
            continue
        measures.append(frozen.content["measure"])
        said.append(
            f"{name}: a plan was frozen on {frozen.content['written']} (digest {frozen.digest[:12]}). "
            "Verdicts on what it asks for are confirmatory, all others exploratory."
        )
        made = of_records(read_all_records(paths))
        said += [f"Deviation from the plan: {text}" for text in deviations(frozen, made, is_over=True)]
        here = [line for line in lines if not line.is_untrained and line.home in ("", name)]
        label = {
            name_of_line(RunId(
                method=line.method, coverage_ratio=line.coverage_ratio, segments_from=line.source
            )): line.label
            for line in here
        }  # fmt: skip
        known = [] if frozen.is_changed else frozen.pairs  # a changed plan binds nobody
        pairs += [(label[one], label[two]) for one, two in known if one in label and two in label]
    return (Question(pairs, measures[0]) if measures else None), said


def _page(
    all_paths: Sequence[Layout], lines: Sequence[Line], found: Sequence[Answer], deviating: Sequence[str]
) -> str:
    first, *others = found
    if is_of_encoders := bool(lines) and all(line.is_baseline for line in lines):
        said = "Nothing was pretrained here: the tables compare encoders."
        first, others = first._replace(sentences=[said]), []
    scored = [(line.label, one) for line in lines for one in line.evaluations]
    settings, differing = tables.provenance(all_paths)
    matrix = tables.matrix(lines, found)
    charts = {"forest": forest(first), "scores": scores_chart([] if is_of_encoders else lines, first)}
    curves = [
        scores_chart(lines, one, has_costs=False) for one in others if len(one.ends) > 1 and not one.where
    ]
    costs = {line: tables.cost_cells(first.levels[line.label].costs) if line.label in first.levels
             else dict.fromkeys(COSTS.values(), "") for line in matrix}  # fmt: skip
    there = {
        "answer": "The answer", "encoders": (tabled := benchmarks(all_paths)),
        "differences": charts["forest"].views, "scores": matrix,
        "curves": charts["scores"].views, "pictures": (shown := pictures(all_paths)),
        "classes": (classes := tables.class_tables(lines)),
        "training": (loss_charts := _training_charts(lines)),
        "settings": True, "downloads": True,
    }  # fmt: skip
    remarks = filter(None, map(_progress, all_paths))
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(
        Path(__file__).with_name("page.html.j2").read_text(encoding="utf-8")
    )
    return template.render(
        title=OF_ENCODERS if is_of_encoders else TITLE,
        benchmarks=tabled,
        subtitle=_subtitle(all_paths, lines),
        contents={
            name: name.capitalize() if value != "The answer" else value
            for name, value in there.items()
            if value
        },
        remarks=list(dict.fromkeys([*remarks, *deviating, *(said for one in found for said in one.remarks)])),
        questions=_QUESTIONS[: 3 + any(v.directory.state for v in first.verdicts)],
        answer=first,
        all_answers=found,
        differences=tables.differences(found),
        matrix=matrix,
        marks=tables.MARKS,
        sample=lambda line, where: sample(line.style, f"{where}{line.label}"),
        costs=[name for name in COSTS.values() if any(of[name] for of in costs.values())],
        line_costs=costs,
        charts=charts,
        spent=tables.spent(lines, first),
        predicts=sentence(agreed := agreements(lines)),
        agreements=rows(agreed, "part of the budget" if any(line.spends for line in lines) else "epochs"),
        curves=[one for one in curves if one.legend],
        scores=tables.score_table(scored),
        protocol=_protocol(one for _, one in scored),
        loss_charts=loss_charts,
        classes=classes,
        pictures=shown,
        settings=settings,
        differing=differing,
        downloads=_downloads(lines, found, charts),
    )


def _protocol(evaluations: Iterable[scores.Evaluation]) -> list[tuple[str, str]]:
    """What they were made with; where they differ, all values."""
    return tables.joined(
        (name.removeprefix("protocol: "), text)
        for one in evaluations
        for part in ("dataset", "model", "protocol", "recipe")
        for name, text in tables.flatten({part: one.result.get(part)})
    )


def _subtitle(all_paths: Sequence[Layout], lines: Sequence[Line]) -> str:
    """Where it comes from: what was scored, by how many seeds, in which directories, when."""
    known = [one.result for line in lines for one in line.scored]
    datasets = dict.fromkeys(
        str(r["dataset"].get("name")) for r in known if isinstance(r.get("dataset"), dict)
    )
    models = dict.fromkeys(str(r["model"]) for r in known if r.get("model"))
    seeds = {one.run.seed for line in lines for one in line.scored if not line.is_baseline}
    count = f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}" if seeds else ""
    said = [*models, *datasets, count, ", ".join(scores.names_of(all_paths)), time.strftime("%F %H:%M")]
    return " · ".join(filter(None, said))


def _downloads(lines: Sequence[Line], found: Sequence[Answer], charts: Mapping[str, Chart]) -> dict[str, str]:
    """File name -> what it holds as an address, so that the page needs nothing beside it."""
    files = {"results.csv": tables.results_csv(lines, found).encode()}
    files |= {name: text.encode() for name, text in paper_tables(lines, found).items()}
    files |= {f"{name}.svg": data for name, c in charts.items() for data in files_of(c, "svg").values()}
    types = {"csv": "text/csv", "svg": "image/svg+xml", "tex": "application/x-tex"}
    return {
        name: f"data:{types[name.rpartition('.')[2]]};base64,{base64.b64encode(data).decode('ascii')}"
        for name, data in files.items()
    }


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
