"""The folder for a paper: LaTeX that compiles, and numbers that are those of the page."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.plan.layout import Layout
from pipeline.report.answer import answers
from pipeline.report.page import write_report
from pipeline.report.paper import tex
from pipeline.report.scores import make_lines
from tests.pipeline.finished_run import write_run
from tests.pipeline.programs import run_benchmark

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    folder = tmp_path_factory.mktemp("paper")
    methods, sources = ("patches", "four_channels"), ("own", "blob")
    paths = write_run(
        folder / "run_1 & 50%", methods, seeds=(0, 1, 2), chance=0.3, sources=sources, probes=True
    )
    write_report([paths.root], paths.report_html, paper=folder / "paper")
    return paths


def test_tables_have_the_scores_differences_and_verdicts(run: Layout) -> None:
    paper = run.root.parent / "paper"
    first, *_ = found = answers(make_lines([run]))
    scores, differences = ((paper / f"{name}.tex").read_text() for name in ("scores", "differences"))
    level = first.levels["four_channels 15%"]
    assert level.spread
    low, high = level.spread.within(100).split(" to ")
    pattern = rf"four\\_channels 15\\% & {level.score:.2f}\$.*?\$ {{\\scriptsize \[{low}, {high}\]}}"
    assert re.search(pattern, scores)
    assert "\\toprule" in scores and "\\bottomrule" in scores
    rows = [line for line in differences.splitlines() if line.count("&") == 6]
    assert len(rows) == 1 + sum(len(one.comparisons) for one in found)
    [row] = [r for r in rows if r.startswith("finetuned & four\\_channels 15\\% & patches ")]
    [c] = [
        c for c in first.comparisons if (c.first.label, c.second.label) == ("four_channels 15%", "patches")
    ]
    assert c.shown and f"$[{c.shown.low:+.2f}, {c.shown.high:+.2f}]$" in row


def test_the_methods_paragraph_tells_versions_seeds_and_budgets(run: Layout) -> None:
    text = (run.root.parent / "paper/methods.tex").read_text()
    assert "(seeds 0, 1, 2)" in text
    assert "torch 2.14.1" in text
    assert r"$6.00\times 10^{18}$ to $1.44\times 10^{19}$ FLOPs" in text or r"\times 10^{18}$" in text
    cited = set(re.findall(r"\\cite{(\w+)}", text))
    sources = set(re.findall(r"@\w+{(\w+),", (run.root.parent / "paper/references.bib").read_text()))
    assert cited <= sources


def test_figures_are_pdf_and_svg_that_stand_alone(run: Layout) -> None:
    figures = {path.name: path.read_bytes() for path in (run.root.parent / "paper/figures").iterdir()}
    assert sorted(figures) == ["forest.pdf", "forest.svg", "scores.pdf", "scores.svg"]
    for name, data in figures.items():
        assert data.startswith(b"%PDF") if name.endswith("pdf") else b"<svg" in data and b"var(" not in data
    assert b"four_channels 15%" in figures["scores.svg"], "with a legend"


def test_the_folder_is_replaced_by_its_own_command_only(run: Layout, tmp_path: Path) -> None:
    paper = tmp_path / "paper"
    paper.mkdir()
    (paper / "thesis.tex").write_text("mine")
    refused = run_benchmark("report", run.root, "--paper", paper)
    assert refused.returncode == 2
    assert "it holds other files" in refused.stderr
    assert [path.name for path in paper.iterdir()] == ["thesis.tex"]
    write_report([run.root], tmp_path / "page.html", paper=run.root.parent / "paper")


def test_text_is_escaped_for_latex() -> None:
    assert tex(r"a_b & 50% #1 {x} \ ~ ^") == (
        r"a\_b \& 50\% \#1 \{x\} \textbackslash{} \textasciitilde{} \textasciicircum{}"
    )
    assert tex("\N{MINUS SIGN}1 é 画") == "$-$1 é [U+753B]"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no TeX here")
def test_the_paper_compiles(run: Layout, tmp_path: Path) -> None:
    folder = shutil.copytree(run.root.parent / "paper", tmp_path / "paper")
    for program in (("pdflatex",), ("bibtex",), ("pdflatex",), ("pdflatex",)):
        flags = ("-interaction=nonstopmode", "-halt-on-error") if program == ("pdflatex",) else ()
        done = subprocess.run([*program, *flags, "paper"], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
    assert "undefined" not in done.stdout
    assert (folder / "paper.pdf").stat().st_size > 20_000
