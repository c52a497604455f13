from __future__ import annotations

import base64
import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from common.formats import ProbeResult
from common.step_files import LOG, PREDICTIONS, RESULT
from pipeline.plan.layout import Layout, RunId, is_results_csv
from pipeline.plan.records import Record, read_record, write_record
from pipeline.report.answer import answers
from pipeline.report.figures import Point, Series, line_chart, ticks
from pipeline.report.page import write_all, write_report
from pipeline.report.scores import MEASURES, make_lines, read_evaluations
from pipeline.report.tables import COLUMNS, matrix, results_csv, terminal_table
from tests.pipeline.finished_run import write_evaluation, write_run
from tests.pipeline.programs import REPO_ROOT, run_benchmark


def text_of(page: Path) -> str:
    """The page's words, without tags and images."""
    html = re.sub(r"<style.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.S)
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


def rows_of(paths: Layout, row: str = "score", measure: str = "finetuning") -> list[dict[str, str]]:
    """Rows of one kind of results.csv."""
    lines = make_lines([paths])
    rows = csv.DictReader(io.StringIO(results_csv(lines, answers(lines))))
    return [one for one in rows if (one["row"], one["measure"]) == (row, measure)]


def test_results_csv_has_a_row_per_score(tmp_path: Path) -> None:
    rows = rows_of(write_run(tmp_path / "run", methods=("patches", "four_channels")))
    assert [(row["method"], row["epochs"]) for row in rows] == [
        *(("scratch", "0"), ("patches", "5"), ("patches", "10")),
        *(("four_channels", "5"), ("four_channels", "10")),
    ]
    assert [row["coverage_ratio"] for row in rows] == ["", "", "", "15", "15"]
    assert float(rows[-1]["mean_iou"]) == float(rows[-1]["score"]) == 34


def test_pandas_reads_scores_means_and_differences_from_results_csv(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    seeds, methods = (0, 1, 2), ("patches", "segments")
    paths = write_run(
        tmp_path / "run", methods, seeds=seeds, chance=0.3, probes=True, sources=("own", "blob")
    )
    write_all(paths)
    table = pandas.read_csv(paths.results_csv)
    last = table[(table.epochs == 10) & (table.measure == "linear")]
    scores = last[last.row == "score"].groupby(["method", "segments_from"]).score
    means = last[last.row == "mean"].set_index(["method", "segments_from"])
    assert means.score.to_numpy() == pytest.approx(scores.mean().loc[means.index].to_numpy(), abs=1e-4)
    assert set(means.seeds) == {3}
    [own] = [c for one in answers(make_lines([paths])) for c in one.comparisons
             if one.measure is MEASURES["linear"] and c.is_control]  # fmt: skip
    [row] = last[(last.row == "difference") & (last.against == "segments 15% blob")].to_dict("records")
    assert (row["low"], row["high"]) == pytest.approx((own.difference.low, own.difference.high), abs=1e-4)
    assert row["score"] == pytest.approx(own.value, abs=1e-4)
    assert row["verdict"] == own.state


def shown(paths: Layout) -> list[str]:
    """What the terminal shows of a run."""
    lines = make_lines([paths])
    return terminal_table(lines, answers(lines)).splitlines()


def test_the_table_has_scores_probes_and_differences(tmp_path: Path) -> None:
    methods = ("patches", "segments")
    lines = shown(write_run(tmp_path / "run", methods, epochs=(10,), probes=True, seeds=(0, 1, 2)))
    assert lines[0].endswith("device-hours")
    assert lines[0].split()[:6] == ["method", "epochs", "seeds", "finetuned", "linear", "probe"]
    [patches] = [line.split() for line in lines if line.startswith("patches  ")][:1]
    assert patches[:5] == ["patches", "10", "3", "31.00", "27.00"]
    blank = lines.index("")
    assert lines[blank + 1] == "by complete finetuning, after 10 epochs of pretraining"
    assert lines[blank + 3].split()[:4] == ["segments", "15%", "patches", "+2.00"]


def test_cost_is_left_out_of_a_table_that_is_too_wide(tmp_path: Path) -> None:
    methods, sources = ("four_channels", "segment_patches"), ("own", "borrowed")
    lines = shown(write_run(tmp_path / "run", methods, sources=sources, probes=True, seeds=(0, 1)))
    assert max(map(len, lines)) <= 110
    assert "RankMe" in lines[0] and "FLOPs" not in lines[0]


def test_cost_adds_up_over_the_rounds_and_is_left_out_where_it_is_not_known(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("four_channels",), epochs=(2, 4, 6))
    record = read_record(paths, "pretrain_four_channels_4")
    assert record is not None
    write_record(paths, replace(record, seconds=3600, devices=8))
    paths.record("pretrain_four_channels_6").unlink()
    rows = rows_of(paths)[1:]
    hours = [row["device_hours"] for row in rows]
    assert hours == [f"{216 / 3600:.4f}", f"{216 / 3600 + 8:.4f}", ""]
    assert [row["train_flops"] for row in rows] == ["1.44e+18", "2.88e+18", "4.32e+18"]
    (paths.pretrain_dir("four_channels") / LOG).unlink()
    assert {e.costs["train_flops"] for e in read_evaluations(paths)} == {None}


def test_making_segments_is_a_cost_of_the_methods_that_hide_them(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("patches", "segments"), epochs=(2, 4))

    def with_segments() -> list[str]:
        return [row["device_hours_with_segments"] for row in rows_of(paths)][1:]

    assert with_segments() == [""] * 4, "they were there: what they cost is not known"
    for epochs in (2, 4):
        record = read_record(paths, f"pretrain_segments_{epochs}")
        assert record is not None
        fingerprint = {**record.fingerprint, "segments_from": "own"}
        write_record(paths, replace(record, fingerprint=fingerprint))
    made = Record(name="generate_masks", state="done", run="masks", kind="generate", fingerprint={})
    write_record(paths, replace(made, seconds=3600, devices=2))
    hours = [*(90 / 3600, 180 / 3600), *(2 + 216 / 3600, 2 + 432 / 3600)]
    assert with_segments() == [f"{one:.4f}" for one in hours]


def test_a_probe_of_an_earlier_version_whitened_nothing(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("patches",), epochs=(5,), probes=True)
    file = paths.probe_dir("patches", 5) / RESULT
    result = json.loads(file.read_text())
    del result["knn_raw"]
    file.write_text(json.dumps(result))
    found = {
        one.measure: one.score for one in read_evaluations(paths, ProbeResult) if one.folder == file.parent
    }
    assert MEASURES["knn"] not in found
    assert found[MEASURES["knn_raw"]] == result["knn"]["mean_iou"]


def test_results_of_earlier_versions_are_recognised() -> None:
    assert is_results_csv(b"method,coverage_ratio,seed,eval_seed,epochs,pixel_accuracy")
    assert is_results_csv(",".join(COLUMNS).encode())


def test_the_answer_comes_first(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", seeds=(0, 1))
    write_all(paths)
    words = text_of(paths.report_html)
    first = "by complete finetuning, segments 15% and four_channels 15% are shown better than patches"
    assert words.index(first) < words.index("Better than plain MAE?") < words.index("Over pretraining")
    assert "yes patches +4.00 (" in words


def test_a_run_in_progress_gives_a_report_of_what_there_is(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("patches",))
    (paths.eval_dir("patches", 10) / RESULT).unlink()
    with (paths.pretrain_dir("patches") / LOG).open("a") as log:
        log.write('{"epoch": 11, "train_lo')  # is being written, or a kill has cut it
    (paths.eval_dir("patches", 10) / PREDICTIONS).write_bytes(b"\x89PNG half")
    paths.plan.write_text(json.dumps([{"name": name, "needs": [], "folder": name} for name in "ab"]))
    write_all(paths)
    words = text_of(paths.report_html)
    assert "0 of 2 steps are done" in words
    assert "After 5 epochs of pretraining, by complete finetuning, patches reaches 25.00%" in words
    assert "Pretraining loss" in words


def test_a_run_without_an_evaluation_has_a_report(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=(), epochs=(1,), seeds=())
    paths.pretrain_output.mkdir()
    assert "no evaluation has finished" in write_all(paths)
    assert "No evaluation has finished yet" in text_of(paths.report_html)


def test_several_directories_of_equal_settings_share_lines(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", methods=("patches",))
    second = write_run(tmp_path / "b", methods=("patches",), seeds=(1,))
    page = tmp_path / "both.html"
    write_report([first.root, second.root], page)
    assert "patches reaches 30.50% (95% interval" in text_of(page)


def test_a_seed_counts_once_however_often_it_was_scored(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", methods=("patches",))
    second = write_run(tmp_path / "b", methods=("patches",))
    for folder in first.eval_output.iterdir():
        result = json.loads((folder / RESULT).read_text())
        score = result["mean_iou"]
        result["seeds"] = [{"seed": n, "mean_iou": score + n - 1} for n in range(3)]
        (folder / RESULT).write_text(json.dumps(result))
    page = tmp_path / "both.html"
    write_report([first.root, second.root], page)
    assert "patches reaches 30.00%." in text_of(page)


def test_a_later_call_about_something_else_does_not_rename_results(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("four_channels",))
    run = yaml.safe_load(paths.run_yml.read_text())
    run["settings"]["coverage_ratio"] = [30.0]
    paths.run_yml.write_text(yaml.safe_dump(run))
    write_all(paths)
    assert "four_channels 15%" in text_of(paths.report_html)
    assert "30%" not in paths.results_csv.read_text()


def test_methods_stand_in_the_order_of_the_call_then_by_the_alphabet(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("segments", "patches"), epochs=(5,))
    for method in ("zebra", "ant"):
        write_evaluation(paths, RunId(method=method), 5, 1.0)
    order = [evaluation.run.method for evaluation in read_evaluations(paths)]
    assert order == ["scratch", "segments", "patches", "ant", "zebra"]
    write_all(paths)
    assert "better than patches" in text_of(paths.report_html), "the reference, wherever it stands"


def test_settings_of_the_version_before_are_shown(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("four_channels",))
    text = (REPO_ROOT / "tests/fixtures/earlier_run/run/run.yml").read_text()
    paths.run_yml.write_text(text.replace("@", "/"))
    write_all(paths)
    words = text_of(paths.report_html)
    assert "four_channels 15% reaches" in words
    assert "experiment: pretrain_epochs 3" in words
    assert "schedule: base_lr 0.01" in words


def test_finetunings_of_one_checkpoint_are_averaged_and_told_apart(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("patches",), epochs=(10,), seeds=(0, 1))
    for seed, score in ((0, 40), (1, 41)):
        write_evaluation(paths, RunId(method="patches", seed=seed), 10, score, eval_seed=1)
    rows = [row for row in rows_of(paths) if row["method"] == "patches"]
    assert [(row["seed"], row["eval_seed"]) for row in rows] == [
        *(("0", "0"), ("0", "1"), ("1", "1"), ("1", "2"))
    ]
    assert [row["minutes"] for row in rows] == ["1.50", "0.00", "1.50", "0.00"]
    write_all(paths)
    assert "patches reaches 35.50% (95% interval" in text_of(paths.report_html)


def test_directories_of_other_settings_are_kept_apart_and_differences_shown(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a", methods=("patches",))
    second = write_run(tmp_path / "b", methods=("patches",))
    run = yaml.safe_load(second.run_yml.read_text())
    run["settings"]["finetune"]["batch_size"] = 16
    second.run_yml.write_text(yaml.safe_dump(run))
    record = read_record(second, "evaluate_patches_10")
    write_record(second, replace(record, fingerprint={**record.fingerprint, "batch_size": 16}))
    page = tmp_path / "both.html"
    write_report([first.root, second.root], page)
    words = text_of(page)
    assert "patches (a)" in words
    assert "finetune: batch_size not given 16" in words
    (tmp_path / "other").mkdir()
    same = second.root.rename(tmp_path / "other/a")
    write_report([first.root, same], page)
    assert f"patches ({same})" in text_of(page), "folders of one name are told by their paths"


def test_classes_that_change_most_are_named(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("patches", "segments"))
    write_all(paths)
    assert "disc 30.0 32.0 +2.0" in text_of(paths.report_html)


def test_the_page_asks_for_nothing_from_outside_and_runs_nothing(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run")
    write_all(paths)
    html = paths.report_html.read_text()
    assert "<script" not in html
    assert re.findall(r'(?:src|href)="(?!data:|#)', html) == []
    assert "url(" not in html
    assert len(html) < 2_500_000


def test_the_page_holds_its_downloads_and_its_contents_lead_somewhere(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segments"), seeds=(0, 1), probes=True)
    write_all(paths)
    html = paths.report_html.read_text()
    anchors = re.findall(r"<nav>.*?</nav>", html, re.S)[0].count("href=")
    assert anchors == len(re.findall(r'href="#(\w+)"(?=.*\bid="\1")', html, re.S)) >= 8
    found = re.findall(r'download="([^"]+)" href="data:[^;]+;base64,([^"]+)"', html)
    files = {name: base64.b64decode(data) for name, data in found}
    assert list(files) == ["results.csv", "scores.tex", "differences.tex", "forest.svg", "scores.svg"]
    assert files["results.csv"] == paths.results_csv.read_bytes()
    assert b"toprule" in files["scores.tex"]
    assert b"<svg" in files["forest.svg"] and b"var(" not in files["forest.svg"], "other programs know no var"


def test_pictures_are_in_the_page_no_wider_than_it_needs(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("patches",))
    Image.new("RGB", (3000, 30), "red").save(paths.eval_dir("patches", 10) / PREDICTIONS)
    write_all(paths)
    found = re.findall(r'src="data:image/webp;base64,([^"]+)"', paths.report_html.read_text())
    shown = [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]
    assert {(one.format, one.size) for one in shown} == {("WEBP", (1000, 10)), ("WEBP", (300, 100))}


def test_the_matrix_marks_methods_by_their_verdicts(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segments"), seeds=(0, 1, 2), chance=0.05, probes=True)
    lines = make_lines([paths])
    found = answers(lines)
    rows = {line.label: cells for line, cells in matrix(lines, found).items()}
    assert list(rows) == ["patches", "segments 15%", "scratch"], "what was pretrained comes first"
    assert [cell.state for cell in rows["segments 15%"]] == ["better", "higher", "higher", "higher", ""]
    assert rows["patches"][0].score == f"{found[0].levels['patches'].score:.2f}"
    assert {cell.state for cell in rows["patches"]} == {""}


def test_text_from_a_run_cannot_break_the_page(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("patches",))
    result = paths.eval_dir("patches", 10) / RESULT
    content = json.loads(result.read_text())
    content["dataset"]["name"] = "<b>&"
    result.write_text(json.dumps(content))
    write_all(paths)
    assert "&lt;b&gt;&amp;" in paths.report_html.read_text()


def test_other_folders_and_unfinished_evaluations_are_passed_over(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("patches",))
    (paths.eval_output / "notes").mkdir()
    (paths.eval_output / "patches_20").mkdir()
    write_evaluation(paths, RunId(method="fifth"), 3, 1.0)
    assert [e.run.method for e in read_evaluations(paths)][-1] == "fifth"
    write_all(paths)


@pytest.mark.slow
def test_the_report_command_writes_csv_and_page_or_says_what_is_wrong(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("patches",))
    done = run_benchmark("report", paths.root)
    assert (done.returncode, done.stdout.strip()) == (0, str(paths.report_html))
    assert paths.results_csv.exists()
    wrong = run_benchmark("report", tmp_path)
    assert wrong.returncode == 2
    assert wrong.stderr == f"Error: {tmp_path} is not the output directory of a run\n"


@pytest.mark.parametrize(
    ("values", "whole", "expected"),
    [
        ([0.0, 1.0], False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        ([5.0], True, [4.0, 5.0, 6.0]),
        ([1, 50], True, [0, 10, 20, 30, 40, 50]),
        ([0.0, 2.0], True, [0.0, 1.0, 2.0]),
    ],
)
def test_ticks_are_round_numbers_around_the_values(
    values: list[float], whole: bool, expected: list[float]
) -> None:
    assert ticks(values, whole=whole) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[0.0], [0.0, 0.0], [-3.2, 1e-7], [1e9, 1e9 + 1]])
def test_ticks_enclose_any_values(values: list[float]) -> None:
    found = ticks(values)
    assert 2 <= len(found) <= 7
    assert found[0] <= min(values) <= max(values) <= found[-1]


def test_a_chart_has_axes_with_titles_a_legend_and_no_text_drawn_as_paths() -> None:
    points = [Point(1, 2.0), Point(2, 3.0, low=2.5, high=3.5)]
    series = {"epochs": [Series("a<b", points, (0, 0))]}
    wide, narrow = svgs(line_chart(series, "caption", y_title="$%", is_wide=True).views["epochs"])
    for drawing in (wide, narrow):
        assert all(f">{text}</text>" in drawing for text in ("epochs", "$%", "3.5"))
    assert list(line_chart(series, "caption", y_title="$%").legend) == ["a<b"]


def svgs(drawn: str) -> list[str]:
    return re.findall("<svg.*?</svg>", drawn)


def test_long_lines_are_short_text_and_keep_their_peak_and_their_end() -> None:
    points = [Point(i, 10.0 * (i == 5003)) for i in range(10_001)]
    drawn = line_chart({"x": [Series("a", points, (0, 0))]}, "", y_title="y").views["x"]
    assert len(drawn) < 10_000
    (path,) = re.findall(r'd="M ([^"]*)"[^>]*#0072b2', drawn)
    corners = [tuple(map(float, corner.split())) for corner in path.split(" L ")]
    assert min(y for _, y in corners) == 34, "the plot's upper edge"
    assert corners[-1] == (334, 256), "its lower right corner"


def test_one_style_looks_the_same_in_every_chart_and_no_two_ids_clash() -> None:
    points = [Point(1, 2.0), Point(2, 3.0)]
    first, second = (
        line_chart({"e": [Series("a", points, style) for style in styles]}, name, y_title="y")
        for name, styles in (("one", [(3, 0), (0, 1)]), ("two", [(0, 1)]))
    )
    look = re.findall('style="([^"]*0072b2[^"]*)"', second.views["e"])
    assert "stroke-dasharray: 7,3" in look[1]
    assert set(look) == set(re.findall('style="([^"]*0072b2[^"]*)"', first.views["e"]))
    drawn = first.views["e"] + second.views["e"] + first.legend["a"] + second.legend["a"]
    ids = re.findall(r'\bid="([^"]*)"', drawn)
    assert len(ids) == len(set(ids)) > 4
    assert set(re.findall('href="#([^"]*)"', drawn)) == set(ids)
