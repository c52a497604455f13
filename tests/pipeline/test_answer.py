"""The sentences agree with the intervals, and say what they do not show."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import yaml

from common.step_files import AREAS, LOG, RESULT
from pipeline.plan.layout import Layout, RunId
from pipeline.report.answer import Answer, answer
from pipeline.report.answer import _comparisons as comparisons_of
from pipeline.report.figures import Chart, Point, Series, line_chart
from pipeline.report.page import write_all, write_report
from pipeline.report.scores import (
    COSTS,
    FINETUNING,
    MEASURES,
    Level,
    Line,
    make_lines,
    read_evaluations,
)
from pipeline.report.statistics import interval, mean_iou, read_areas
from tests.pipeline.finished_run import write_evaluation, write_run
from tests.pipeline.programs import REPO_ROOT
from tests.pipeline.test_report import text_of

THREE = (0, 1, 2)


def answered(paths: Layout, measure: str = "finetuning") -> Answer:
    found = answer(make_lines([paths]), MEASURES[measure])
    assert found is not None
    return found


def said(found: Answer) -> str:
    return " ".join(found.sentences)


def test_areas_amount_to_the_score_in_result_json(tmp_path: Path) -> None:
    for evaluation in read_evaluations(write_run(tmp_path / "run", seeds=(0, 1), chance=1.0)):
        _, areas = read_areas(evaluation.folder / AREAS)
        intersection, predicted, label = areas.sum(0)
        score = mean_iou(intersection, predicted + label - intersection)
        assert score == pytest.approx(evaluation.score)


def test_every_verdict_follows_from_its_interval(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", seeds=THREE, chance=0.5, spread=0.3)
    found = answered(paths)
    states = set()
    for c in found.comparisons:
        assert c.seeds == 3
        assert (c.state == "none") == (c.p_value >= 0.05)
        if c.state != "none":
            assert c.difference.low > 0 if c.state == "better" else c.difference.high < 0
            assert f"{c.first.label} (by {abs(c.difference.value):.2f} points" in said(found)
        else:
            assert f"{c.first.label} ({c.difference.value:+.2f} points" in said(found)
        states.add(c.state)
    assert states == {"better", "none"}
    assert "points or more would have been shown with 80% probability" in said(found)
    assert "Better than patches: four_channels 15%" in said(found)
    assert "Better than scratch: four_channels 15%" in said(found)
    assert re.search(r"lies [\d.]+ standard deviations of the 3 scratch seeds above", said(found))


def test_one_seed_is_warned_of_and_never_called_a_difference(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", gain=2.0)
    found = answered(paths)
    assert {c.state for c in found.comparisons} == {"unknown"}
    assert all(c.difference.low > 0 for c in found.comparisons if c.first.label[0] == "f")
    assert "There is one seed in common per method, so nothing tells" in found.remarks[0]
    write_all(paths)
    words = text_of(paths.report_html)
    assert words.index("nothing tells a real difference") < words.index("is highest")
    assert "better" not in words.lower()


def test_only_seeds_that_both_have_are_compared(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", methods=("patches",), seeds=THREE, chance=0.1)
    for seed in (1, 2, 7):
        write_evaluation(paths, RunId(method="segments", seed=seed), 10, 35.0 + seed)
    for seed in (5, 6):
        write_evaluation(paths, RunId(method="preencoder", seed=seed), 10, 50.0)
    by_label = {c.first.label: c for c in answered(paths).comparisons if c.first.method != "x"}
    assert (by_label["segments"].seeds, by_label["segments"].state) == (2, "better")
    assert (by_label["preencoder"].seeds, by_label["preencoder"].state) == (0, "unknown")
    assert "no seed in common for preencoder and patches" in " ".join(answered(paths).remarks)
    assert "preencoder (no seed in common)" in said(answered(paths))


def test_without_areas_the_interval_is_of_seeds_and_that_is_said(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", seeds=THREE, chance=0.5)
    next(paths.eval_output.glob(f"segments_10/{AREAS}")).unlink()
    found = answered(paths)
    assert [c.first.label for c in found.comparisons if not c.difference.of_images] == ["segments 15%"]
    assert "without areas by image" in " ".join(found.remarks)


def test_the_fixture_of_the_version_before_has_a_report(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(REPO_ROOT / "tests/fixtures/earlier_run/run", run)
    (run / "run.yml").write_text((run / "run.yml").read_text().replace("@", "/"))
    write_report([run], run / "report.html")
    assert "four_channels 15% reaches" in text_of(run / "report.html")


def test_own_segments_are_compared_with_their_controls_only(tmp_path: Path) -> None:
    sources = ("own", "borrowed", "blob")
    paths = write_run(tmp_path / "run", ("patches", "segments"), seeds=THREE, sources=sources, chance=0.05)
    found = answered(paths)
    pairs = [(c.first.label, c.second.label) for c in found.comparisons]
    assert pairs == [
        ("segments 15%", "patches"),
        ("segments 15%", "scratch"),
        ("segments 15%", "segments 15% blob"),
        ("segments 15%", "segments 15% borrowed"),
    ]
    assert found.objects[0].startswith(
        "segments 15%: yes, the image's own segment is better than every control. Better than: blob (by 2."
    )


def test_controls_that_do_not_differ_show_nothing_about_objects(tmp_path: Path) -> None:
    paths = write_run(
        tmp_path / "run", ("segments",), seeds=THREE, sources=("own", "blob"), chance=0.5, gain=0
    )
    found = answered(paths)
    assert found.objects[0].startswith("segments 15%: not shown. No difference shown to: blob (")
    assert "would have been shown with 80% probability" in found.objects[0]


def test_equal_cost_is_told_from_equal_epochs(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segment_patches", "segments"))
    cost = "segment_patches 1.00 x (equal cost), segments 15% 2.40 x (equal epochs only)"
    assert f"Training FLOPs against patches: {cost}" in said(answered(paths))
    for log in paths.pretrain_output.glob(f"*/{LOG}"):
        log.unlink()
    assert "FLOPs" not in said(answered(paths))


def test_probes_answer_where_no_finetuning_has_been_scored(tmp_path: Path) -> None:
    methods, seeds = ("patches", "four_channels"), THREE
    paths = write_run(tmp_path / "a", methods, seeds=seeds, chance=0.3, probes=True, finetuned=False)
    write_all(paths)
    words = text_of(paths.report_html)
    assert "No finetuning has been scored yet" in words
    assert words.index("four_channels 15% is highest:") < words.index("The frozen kNN probe")
    assert "RankMe" in words
    both = write_run(tmp_path / "b", methods, seeds=seeds, chance=0.3, probes=True)
    write_all(both)
    words = text_of(both.report_html)
    assert words.index("by complete finetuning") < words.index("by the frozen linear probe")


def test_probes_of_one_score_only_are_no_error_and_damaged_ones_are_named(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches",), probes=True)
    probe = paths.probe_dir("patches", 10)
    result = json.loads((probe / RESULT).read_text())
    result |= {"rankme": 12, "image_knn": {"accuracy": 40.0}}
    del result["knn"], result["knn_raw"]
    (probe / RESULT).write_text(json.dumps(result))
    assert said(answered(paths, "image_knn")).endswith("patches reaches 40.00%.")
    assert said(answered(paths, "rankme")).endswith("patches reaches 12.00.")
    (paths.probe_dir("patches", 5) / "areas-knn.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"patches_5/areas-knn\.npz is damaged"):
        write_all(paths)


def test_gains_are_counted_from_each_methods_own_start(tmp_path: Path) -> None:
    sources, methods = ("own", "blob"), ("patches", "segments")
    paths = write_run(tmp_path / "run", methods, seeds=THREE, chance=0.05, sources=sources, untrained=True)
    found = answered(paths)
    pairs = {(c.first.label, c.second.label): c for c in found.comparisons}
    assert list(pairs) == [
        ("segments 15%", "patches"),
        ("patches", "untrained patches"),
        ("segments 15%", "untrained segments"),
        ("segments 15%", "scratch"),
        ("segments 15%", "segments 15% blob"),
    ]
    assert pairs["patches", "untrained patches"].value == pytest.approx(8, abs=0.3)
    assert pairs["segments 15%", "untrained segments"].value == pytest.approx(10, abs=0.3)
    assert "Better than untrained patches: patches (by" in said(found)
    assert re.search(r"lies [\d.]+ standard deviations of the 3 untrained segments seeds", said(found))
    write_all(paths)
    assert "untrained segments" in text_of(paths.report_html)


def test_all_comparisons_of_a_report_are_one_family(tmp_path: Path) -> None:
    """Also those of scratch with methods that are not the best, which nobody is told of."""
    paths = write_run(
        tmp_path / "run", ("patches", "segments", "preencoder"), seeds=THREE, chance=0.5,
        sources=("own", "blob"), untrained=True,
    )  # fmt: skip
    lines = make_lines([paths])
    levels = {line.label: line.level(10, FINETUNING) for line in lines}
    trained = [line.label for line in lines if not line.is_baseline]
    own = [label for label in trained if "blob" not in label]
    pairs = [(label, "patches") for label in own if label != "patches"]
    pairs += [(label, f"untrained {label.split()[0]}") for label in own]
    pairs += [(label, "scratch") for label in trained]
    pairs += [(label, f"{label} blob") for label in own if label != "patches"]
    alone = []
    for first, second in pairs:
        one, two = levels[first], levels[second]
        drawn = [one.drawn[seed] - two.drawn[seed] for seed in THREE]
        alone.append(interval([one.scores[s] - two.scores[s] for s in THREE], drawn).p_value)
    expected: dict[tuple[str, str], float] = {}
    ranked = sorted(range(len(pairs)), key=alone.__getitem__)
    largest = 0.0
    for rank, index in enumerate(ranked):
        largest = max(largest, min(1.0, alone[index] * (len(pairs) - rank)))
        expected[pairs[index]] = largest
    for c in answered(paths).comparisons:
        assert c.p_value == pytest.approx(expected[c.first.label, c.second.label])


def test_the_highest_of_several_has_an_interval_as_one_of_them(tmp_path: Path) -> None:
    level = {}
    for count, methods in ((1, ("segments",)), (3, ("segments", "preencoder", "patches"))):
        paths = write_run(tmp_path / str(count), methods, seeds=THREE, chance=0.5)
        [low, high] = re.findall(r"95% interval[a-z 0-9]* ([\d.]+) to ([\d.]+), 3", said(answered(paths)))[0]
        level[count] = (float(low), float(high))
        assert ("as the highest of 3" in said(answered(paths))) == (count == 3)
    assert level[3][1] - level[3][0] > 1.3 * (level[1][1] - level[1][0])


def test_few_images_and_no_variance_give_no_verdict(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "few", ("patches", "segments"), seeds=THREE, chance=0.2)
    for file in paths.eval_output.glob(f"*/{AREAS}"):
        names, areas = read_areas(file)
        np.savez(file, images=np.array(names[:9]), areas=areas[:9])
    found = answered(paths)
    assert {c.state for c in found.comparisons} == {"unknown"}
    assert {c.why_not for c in found.comparisons} == {"fewer than 10 validation images"}
    assert re.search(
        r"No verdict against patches: segments 15% \(\+\d\.\d\d points, fewer than 10", said(found)
    )
    assert "without a verdict: fewer than 10 validation images." in " ".join(found.remarks)
    paths = write_run(tmp_path / "same", ("patches", "segments"), seeds=THREE)
    areas = (paths.eval_dir("patches", 10) / AREAS).read_bytes()
    for file in paths.eval_output.glob(f"*_10/{AREAS}"):
        file.write_bytes(areas)  # nothing varies between images, and nothing between seeds
        result = json.loads((file.parent / RESULT).read_text())
        score = 32 if "segments" in file.parent.name else 30
        (file.parent / RESULT).write_text(json.dumps({**result, "mean_iou": score}))
    [c] = [c for c in answered(paths).comparisons if c.second.label == "patches"]
    assert (c.state, c.why_not, c.difference) == ("unknown", "nothing varies", None)
    assert c.value == pytest.approx(2)


def test_scores_on_other_images_are_not_compared(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segments"), seeds=THREE, chance=0.2)
    for file in paths.eval_output.glob(f"segments*_10/{AREAS}"):
        names, areas = read_areas(file)
        np.savez(file, images=np.array([*names[:-1], "another"]), areas=areas)
    by_second = {c.second.label: c for c in answered(paths).comparisons}
    against = by_second["patches"]
    assert (against.state, against.why_not) == ("unknown", "scored on different validation images")
    assert by_second["scratch"].state == "unknown"
    assert "without a verdict: scored on different validation images" in " ".join(answered(paths).remarks)


def test_only_the_first_look_finds_others_give_hints(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segments"), seeds=THREE, chance=0.05, probes=True)
    write_all(paths)
    words = text_of(paths.report_html)
    first, *others = re.split("This is a look beyond the first, which is complete finetuning", words)
    assert len(others) == 3
    assert "Better than patches: segments" in first
    assert all("Higher than patches: segments" in other for other in others)
    assert not any(re.search("(Better|Worse) than", other) for other in others)


def test_a_look_before_the_end_of_pretraining_is_not_the_first(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segments"), seeds=THREE, chance=0.05)
    planned = yaml.safe_load(paths.run_yml.read_text())
    planned["settings"]["pretrain_epochs"] = 50
    paths.run_yml.write_text(yaml.safe_dump(planned))
    write_all(paths)
    words = text_of(paths.report_html)
    assert "beyond the first, which is complete finetuning after 50 epochs" in words
    assert "Better than" not in words
    assert "Higher than patches: segments 15%" in words


def test_the_axis_of_scores_spans_5_points_unless_intervals_are_narrower(tmp_path: Path) -> None:
    def span(chart: Chart | None) -> float:
        assert chart
        first = next(iter(chart.views.values()))
        return float(np.ptp([float(n) for n in re.findall(r'end"[^>]*>([\d.]+)</text>', first)]))

    flat = {"methods": ("patches",), "epochs": (9, 10), "gain": 0.0}
    assert span(answered(write_run(tmp_path / "one", **flat)).chart) >= 5
    line = Series("x", [Point(i, 30 + i / 100, low=29.99, high=30.05) for i in range(3)], (0, 0))
    assert 0.24 <= span(line_chart({"epochs": [line]}, "c", y_title="%", least_span=0.24)) < 1
    top = Series("x", [Point(0, 99.9), Point(1, 100)], (0, 0))
    chart = line_chart({"e": [top]}, "c", y_title="%", least_span=5, limits=(0, 100))
    assert 5 <= span(chart) <= 6


def test_the_chart_switches_between_epochs_and_costs_without_script(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", seeds=(0, 1))

    def views() -> list[str]:
        chart = answered(paths).chart
        return list(chart.views) if chart else []

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
    chart = answered(paths).chart
    assert chart
    looks = {label: re.sub(r"#m\w+|id=\"\w+\"", "", drawn) for label, drawn in chart.legend.items()}
    assert len(set(looks.values())) == len(looks) == 10
    colours = {label: re.findall("stroke: (#.{6})", look)[0] for label, look in looks.items()}
    assert len({colours[label] for label in looks if label.startswith("segments")}) == 1
    assert len(set(colours.values())) == 4


def test_methods_without_a_common_epoch_get_no_verdict(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches",), epochs=(5,))
    write_evaluation(paths, RunId(method="segments"), 7, 30.0)
    found = answered(paths)
    assert found.sentences == ["The methods have not been evaluated at a common epoch yet."]
    assert FINETUNING is found.measure


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_a_whole_report_seldom_claims_what_is_not(seeds: int) -> None:
    """Four methods, three controls, starts and scratch, all alike, on the same images."""
    methods = ("patches", "segments", "four_channels", "preencoder")
    lines = [Line(label="scratch", family="scratch", method="scratch")]
    for method in methods:
        untrained = f"untrained {method}"
        lines.append(Line(label=untrained, family=method, method=method, is_untrained=True))
        controls = () if method == "patches" else ("borrowed", "blob", "block")
        for label in (method, *(f"{method} {control}" for control in controls)):
            lines.append(Line(label=label, family=method, method=method))
    rng, claims, experiments = np.random.default_rng(seeds), 0, 100
    for _ in range(experiments):
        images = rng.normal(size=400)  # what all owe to the choice of images
        levels = {}
        for line in lines:
            own = 0.3 * rng.normal(size=400)  # what this line owes to it
            luck = own[0]  # the draw that came true is as likely as the others
            scores = {s: 30 + luck + 0.3 * rng.normal() for s in range(seeds)}
            drawn = dict.fromkeys(range(seeds), 30 + images + own)
            levels[line.label] = Level(fmean(scores.values()), None, scores, drawn, dict.fromkeys(COSTS))
        best = max(
            (line for line in lines if not line.is_baseline), key=lambda line: levels[line.label].score
        )
        states = {c.state for c in comparisons_of(lines, best, levels)}
        claims += not states <= {"none", "unknown"}
    assert claims <= 0.06 * experiments
