"""What a paper needs of a run: LaTeX tables, figures, a paragraph on methods and its sources.

`report --paper FOLDER` writes it; `pdflatex paper`, `bibtex paper` and `pdflatex paper` twice make a
page of it that shows what each file gives. Tables need booktabs and graphicx alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from common.files import HEAD_BYTES, check_output_folder, open_regular, replacing, write_text
from pipeline.plan.layout import Layout
from pipeline.plan.records import read_all_records
from pipeline.report import scores, tables
from pipeline.report.answer import Answer
from pipeline.report.charts import forest, scores_chart
from pipeline.report.comparisons import STATES
from pipeline.report.figures import files_of
from pipeline.report.scores import Line

_MARK = "% Made by SegMAE: report --paper"
_SPECIAL = {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{c: f"\\{c}" for c in "&%$#_{}"}, "\N{MINUS SIGN}": "$-$", "<": "$<$", ">": "$>$", "|": "$|$",
}  # fmt: skip
_MARKS = {
    "better": r"$^{\blacktriangle}$", "worse": r"$^{\blacktriangledown}$", "higher": r"$^{\vartriangle}$",
    "lower": r"$^{\triangledown}$", "none": "$^{=}$", "unknown": "$^{?}$",
}  # fmt: skip
# Settings by kind of step that a paper tells.
_TOLD = {
    "pretrain": (
        "model", "image_size", "patch_size", "epochs", "effective_batch_size", "base_lr", "weight_decay",
        "warmup_fraction", "mask_ratio", "norm_pix_loss", "decoder_width", "decoder_depth",
    ),
    "evaluate": (
        "recipe", "decoder", "epochs", "batch_size", "optimizer", "lr", "weight_decay", "layer_decay",
        "crop_size",
    ),
    "probe": ("recipe", "probes", "crop_size"),
}  # fmt: skip
_NOTES = (
    r"Means over seeds with 95\% intervals. Against the reference: $\blacktriangle$ better, "
    r"$\blacktriangledown$ worse, $\vartriangle\,\triangledown$ the same beyond the first look, "
    r"$=$ no difference shown, $?$ no verdict."
)


def check_paper(folder: Path) -> None:
    """Raise ValueError unless the folder can be made, is empty, or is of an earlier call."""
    check_output_folder(folder, "--paper")
    there = folder / "paper.tex"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        head = b""
        if there.is_file():
            with open_regular(there) as file:
                head = file.read(HEAD_BYTES)
        if not head.startswith(_MARK.encode()):
            raise ValueError(f"--paper {folder}: it holds other files; name an empty or a new folder")


def write_paper(
    folder: Path, all_paths: Sequence[Layout], lines: Sequence[Line], answers: Sequence[Answer]
) -> None:
    """Replaces what an earlier call wrote."""
    found = paper_tables(lines, answers)
    charts = {"forest": forest(answers[0]), "scores": scores_chart(lines, answers[0])}
    files = {name: files_of(chart, "pdf", "svg") for name, chart in charts.items()}
    shown = {name: charts[name].caption for name in files if files[name]}
    found["methods.tex"] = _filled("methods.tex.j2", **_facts(all_paths, lines, answers))
    found["paper.tex"] = _filled(
        "paper.tex.j2", said=answers[0].sentences, tables=sorted(found), figures=shown
    )
    found["references.bib"] = Path(__file__).with_name("references.bib").read_text()
    for file, text in found.items():
        write_text(folder / file, f"{_MARK}\n{text}")
    for name, forms in files.items():
        (folder / "figures").mkdir(exist_ok=True)
        for form, data in forms.items():
            with replacing(folder / "figures" / f"{name}.{form}") as unfinished:
                unfinished.write_bytes(data)


def _filled(template: str, **known: Any) -> str:
    # LaTeX is full of braces: what is filled in stands in << >>.
    marks: dict[str, Any] = {
        "variable_start_string": "<<",
        "variable_end_string": ">>",
        "comment_start_string": "<#",
    }
    marks |= {"block_start_string": "<%", "block_end_string": "%>", "comment_end_string": "#>"}
    environment = jinja2.Environment(trim_blocks=True, **marks)
    environment.filters["tex"] = tex
    text = Path(__file__).with_name(template).read_text(encoding="utf-8")
    return environment.from_string(text).render(**known)


def tex(text: str) -> str:
    """Plain text for LaTeX; letters that its fonts do not have by their numbers."""
    said = (_SPECIAL.get(c, c if ord(c) < 0x180 else f"[U+{ord(c):04X}]") for c in text)
    return "".join(said)


def paper_tables(lines: Sequence[Line], answers: Sequence[Answer]) -> dict[str, str]:
    """File name -> a LaTeX table: methods x measures, and every difference; none where nothing is."""
    found, matrix = {}, tables.matrix(lines, answers)
    if matrix:
        rows = [[tex(line.label), *map(_cell, cells)] for line, cells in matrix.items()]
        titles = ["method", *(tex(one.short) for one in answers)]
        body = _tabular("tabular", "l" + "r" * len(answers), titles, rows)
        note = f"{tex(answers[0].epochs)}. " if answers[0].epochs else ""
        fitting = r"\resizebox{\ifdim\width>\linewidth\linewidth\else\width\fi}{!}{%"
        found["scores.tex"] = (
            f"\\begin{{table}}\\centering\\caption{{{note}{_NOTES}}}\\label{{tab:scores}}\n"
            f"{fitting}\n{body}}}\n\\end{{table}}\n"
        )
    rows = [
        [tex(one.short), tex(c.first.label), tex(c.second.label),
         "" if c.value is None else f"${c.value:+.2f}$",
         f"$[{c.shown.low:+.2f}, {c.shown.high:+.2f}]$" if c.shown else "--", str(c.seeds),
         tex(STATES[c.state]) + _MARKS[c.state]]
        for one in answers for c in one.comparisons
    ]  # fmt: skip
    if rows:
        titles = ["measure", "method", "against", "difference", "corrected interval", "seeds", "verdict"]
        found["differences.tex"] = "{\\scriptsize\n" + _tabular("longtable", "lllrrrl", titles, rows) + "}\n"
    return found


def _cell(cell: tables.Cell) -> str:
    within = f" {{\\scriptsize [{cell.within.replace(' to ', ', ')}]}}" if cell.within else ""
    return cell.score + _MARKS.get(cell.state, "") + within


def _tabular(kind: str, columns: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = f"\\begin{{{kind}}}{{{columns}}}\n\\toprule\n{' & '.join(titles)} \\\\\n\\midrule\n"
    head += "\\endhead\n" if kind == "longtable" else ""
    body = "".join(f"{' & '.join(row)} \\\\\n" for row in rows)
    return f"{head}{body}\\bottomrule\n\\end{{{kind}}}\n"


def _facts(all_paths: Sequence[Layout], lines: Sequence[Line], answers: Sequence[Answer]) -> dict[str, Any]:
    """What the paragraph on methods is filled with, from the records, results and run.yml."""
    records = [record for paths in all_paths for record in read_all_records(paths)]
    made = {record.kind: record.fingerprint for record in records}
    trained, measure = [line for line in lines if not line.is_baseline], answers[0].measure
    results = [one.result for line in lines for one in line.scored if "dataset" in one.result]
    levels = [line.level(max(at), measure) for line in trained if (at := line.epochs(measure))]
    flops = [f for level in levels if (f := level.costs["train_flops"])]
    versions = tables.joined(
        pair for paths in all_paths for pair in tables.flatten(scores.read_run_yml(paths).get("versions", {}))
    )
    return {
        "methods": [line.label for line in trained],
        "seeds": sorted({one.run.seed for line in trained for one in line.scored}),
        **{kind: _options(kind, made.get(kind, {})) for kind in _TOLD},
        "dataset": results[-1]["dataset"] if results else {},
        "hours": f"{sum(record.seconds * record.devices for record in records) / 3600:.3g}",
        "flops": [_power(of(flops)) for of in (min, max)] if flops else [],
        "versions": [f"{name} {version}" for name, version in versions],
    }


def _options(kind: str, made: Mapping[str, Any]) -> str:
    """The settings of a kind of step that a reader asks for, as far as its record has them."""
    values = {name: made[name] for name in _TOLD[kind] if made.get(name) is not None}
    plain = {n: ", ".join(v) if isinstance(v, list) else Path(str(v)).name for n, v in values.items()}
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in plain.items())


def _power(number: float) -> str:
    mantissa, _, exponent = f"{number:.2e}".partition("e")
    return f"${mantissa}\\times 10^{{{int(exponent)}}}$"
