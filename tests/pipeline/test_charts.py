"""The charts of scores: axes, switches without script, colours, markers."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from common.step_files import LOG
from pipeline.plan.layout import Layout
from pipeline.report.answer import answers
from pipeline.report.charts import scores_chart
from pipeline.report.figures import Chart, Point, Series, line_chart
from pipeline.report.page import write_all
from pipeline.report.scores import (
    make_lines,
)
from tests.pipeline.finished_run import write_run


def chart_of(paths: Layout) -> Chart:
    return scores_chart(make_lines([paths]), answers(make_lines([paths]))[0])


def test_the_axis_of_scores_spans_5_points_unless_intervals_are_narrower(tmp_path: Path) -> None:
    def span(chart: Chart) -> float:
        first = next(iter(chart.views.values()))
        return float(np.ptp([float(n) for n in re.findall(r'end"[^>]*>([\d.]+)</text>', first)]))

    flat: Any = {"methods": ("patches",), "epochs": (9, 10), "gain": 0.0}
    assert span(chart_of(write_run(tmp_path / "one", **flat))) >= 5
    line = Series("x", [Point(i, 30 + i / 100, low=29.99, high=30.05) for i in range(3)], (0, 0))
    assert 0.24 <= span(line_chart({"epochs": [line]}, "c", y_title="%", least_span=0.24)) < 1
    top = Series("x", [Point(0, 99.9), Point(1, 100)], (0, 0))
    chart = line_chart({"e": [top]}, "c", y_title="%", least_span=5, limits=(0, 100))
    assert 5 <= span(chart) <= 6


def test_the_chart_switches_between_epochs_and_costs_without_script(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", seeds=(0, 1))

    def views() -> list[str]:
        return list(chart_of(paths).views)

    known = ["epochs of pretraining", "device-hours of pretraining", "training FLOPs (x 1e18)"]
    assert views() == known
    write_all(paths)
    html = paths.report_html.read_text()
    assert len(re.findall(r'type="radio"[^>]*id="([\w-]+)"[^>]*><label for="\1">', html)) == 3
    assert html.count(" checked>") == 1
    for log in paths.pretrain_output.glob(f"*/{LOG}"):
        log.unlink()
    assert views() == known[:2], "what is known"
    shutil.rmtree(paths.records)
    write_all(paths)
    assert 'type="radio"' not in paths.report_html.read_text(), "nothing to choose from"


def test_lines_of_one_method_share_a_colour_and_no_two_lines_look_alike(tmp_path: Path) -> None:
    sources = ("own", "borrowed", "blob", "block")
    paths = write_run(tmp_path / "run", ("patches", "segments", "four_channels"), sources=sources)
    chart = chart_of(paths)
    looks = {label: re.sub(r"#m\w+|id=\"\w+\"", "", drawn) for label, drawn in chart.legend.items()}
    assert len(set(looks.values())) == len(looks) == 10 - ("scratch" not in looks)
    colours = {
        label: re.findall("stroke: (var[^;]*)", look)[0]
        for label, look in looks.items()
        if label != "scratch"
    }
    assert len({colours[label] for label in looks if label.startswith("segments")}) == 1
    assert len(set(colours.values())) == 3


def test_marker_and_dash_are_the_sources_and_the_colour_is_the_methods(tmp_path: Path) -> None:
    sources = ("block", "blob", "borrowed", "own")
    paths = write_run(tmp_path / "run", ("segments", "patches", "four_channels"), sources=sources)
    lines = [line for line in make_lines([paths]) if not line.is_baseline]
    named = [line.label.removeprefix("segments 15%").strip() for line in lines if line.method == "segments"]
    assert named == ["", "borrowed", "blob", "block"]
    legend = chart_of(paths).legend
    for source in ("borrowed", "blob", "block"):
        looks = [re.findall(r"dasharray: ([^;\"]*)|d=\"(M [^\"]*)\"", legend[f"{m} 15% {source}"])
                 for m in ("segments", "four_channels")]  # fmt: skip
        assert looks[0] == looks[1] != []


def test_a_baseline_far_away_does_not_press_the_methods_into_one_line() -> None:
    methods = [Series(str(i), [Point(5, 45 + i), Point(10, 46 + i)], (i, 0)) for i in range(3)]
    far, near = (
        Series("scratch", [Point(0, at, at - 1, at + 1), Point(10, at)], (-1, 0), is_level=True)
        for at in (14, 44)
    )
    chart = line_chart({"epochs": [*methods, far]}, "c", y_title="%")
    assert chart.beyond == ["scratch 14.00, below the axis"]
    axis = [float(n) for n in re.findall(r'end"[^>]*>([\d.]+)</text>', chart.views["epochs"])]
    assert min(axis) >= 44
    assert "scratch" not in chart.legend
    assert "scratch" in line_chart({"epochs": [*methods, near]}, "c", y_title="%").legend
