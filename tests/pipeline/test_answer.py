"""The sentences agree with the intervals, and say what they do not show."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest
import yaml

from common.areas import mean_iou, read_areas
from common.step_files import AREAS, LOG, RESULT
from pipeline.plan.layout import Layout, RunId
from pipeline.report.answer import Answer, answer, answers
from pipeline.report.comparisons import compare as comparisons_of
from pipeline.report.page import page_of, write_all, write_report
from pipeline.report.scores import (
    COSTS,
    FINETUNING,
    MEASURES,
    Level,
    Line,
    make_lines,
    read_evaluations,
)
from pipeline.report.statistics import interval
from tests.pipeline.finished_run import write_evaluation, write_run
from tests.pipeline.programs import REPO_ROOT
from tests.pipeline.test_report import text_of

THREE = (0, 1, 2)


def answered(paths: Layout, measure: str = "finetuning") -> Answer:
    found = answer(make_lines([paths]), MEASURES[measure])
    assert found is not None
    return found


def said(found: Answer) -> str:
    """The sentences, and what the verdicts say."""
    told = (one for v in found.verdicts for one in v[2:])
    return " ".join([*found.sentences, *(f"{one.short}: {'; '.join(one.parts)}." for one in told)])


def objects(found: Answer, label: str) -> str:
    [said] = [v.objects for v in found.verdicts if v.line.label == label]
    return f"{said.short}: {'; '.join(said.parts)}"


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
        else:
            assert c.difference.low <= 0 <= c.difference.high, "the interval that the verdict stands on"
        assert f"{c.against} {c.value:+.2f} ({c.difference.low:+.2f} to" in said(found)
        states.add(c.state)
    assert states == {"better", "none"}
    assert "or more would have been shown with 80% probability" in said(found)
    assert "four_channels 15% is shown better than patches" in found.sentences[0]


def test_one_seed_is_warned_of_and_never_called_a_difference(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", gain=2.0)
    found = answered(paths)
    assert {c.state for c in found.comparisons} == {"unknown"}
    assert all(c.difference.low > 0 for c in found.comparisons if c.first.label[0] == "f")
    assert "There is one seed in common per method, so nothing tells" in found.remarks[0]
    write_all(paths)
    words = text_of(paths.report_html)
    assert "no method is shown better than patches" in words
    assert " yes " not in words
    assert "+8.00, 1 seed in common" in words
    assert "+8.00 (" not in words, "an interval of the images alone looks like the surest result"


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
    assert "no verdict: patches no seed in common" in said(answered(paths))


def test_without_areas_the_interval_is_of_seeds_and_that_is_said(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", seeds=THREE, chance=0.5)
    next(paths.eval_output.glob(f"segments_10/{AREAS}")).unlink()
    found = answered(paths)
    assert {c.first.label for c in found.comparisons if not c.difference.of_images} == {"segments 15%"}
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
        ("patches", "scratch"),
        ("segments 15%", "scratch"),
        ("segments 15%", "segments 15% borrowed"),
        ("segments 15%", "segments 15% blob"),
    ]
    assert objects(found, "segments 15%").startswith("yes: borrowed +1.")
    assert "object matters: yes for segments 15%." in said(found)


def test_controls_that_do_not_differ_show_nothing_about_objects(tmp_path: Path) -> None:
    paths = write_run(
        tmp_path / "run", ("segments",), seeds=THREE, sources=("own", "blob"), chance=0.5, gain=0
    )
    found = answered(paths)
    assert "by complete finetuning, segments 15% reaches 30." in found.sentences[0], "there is no reference"
    assert objects(found, "segments 15%").startswith("not shown: blob ")
    assert "would have been shown with 80% probability" in objects(found, "segments 15%")


def test_equal_cost_is_told_from_equal_epochs(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segment_patches", "segments"))
    assert "1.00 x its FLOPs (equal cost)" in said(answered(paths))
    assert "2.40 x its FLOPs (equal epochs only)" in said(answered(paths))
    for log in paths.pretrain_output.glob(f"*/{LOG}"):
        log.unlink()
    assert "FLOPs" not in said(answered(paths))


def test_probes_answer_where_no_finetuning_has_been_scored(tmp_path: Path) -> None:
    methods, seeds = ("patches", "four_channels"), THREE
    paths = write_run(tmp_path / "a", methods, seeds=seeds, chance=0.3, probes=True, finetuned=False)
    write_all(paths)
    words = text_of(paths.report_html)
    assert "No finetuning has been scored yet" in words
    assert "by the frozen linear probe, four_channels 15% is shown better than patches" in words
    assert "RankMe" in words
    both = write_run(tmp_path / "b", methods, seeds=seeds, chance=0.3, probes=True)
    write_all(both)
    words = text_of(both.report_html)
    assert "by complete finetuning, four_channels 15% is shown better" in words


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
        ("patches", "scratch"),
        ("segments 15%", "scratch"),
        ("segments 15%", "segments 15% blob"),
    ]
    assert pairs["patches", "untrained patches"].value == pytest.approx(8, abs=0.3)
    assert pairs["segments 15%", "untrained segments"].value == pytest.approx(10, abs=0.3)
    assert re.search(r"yes: untrained \+[78].*, \+[\d.]+ standard deviations of its 3 seeds", said(found))
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


def test_few_images_and_no_variance_give_no_verdict(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "few", ("patches", "segments"), seeds=THREE, chance=0.2)
    for file in paths.eval_output.glob(f"*/{AREAS}"):
        names, areas = read_areas(file)
        np.savez(file, images=np.array(names[:9]), areas=areas[:9])
    found = answered(paths)
    assert {c.state for c in found.comparisons} == {"unknown"}
    assert {c.why_not for c in found.comparisons} == {"fewer than 10 validation images"}
    assert re.search(r"no verdict: patches \+\d\.\d\d, fewer than 10 validation images", said(found))
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
    by_second = {c.second.label: c for c in answered(paths).comparisons if c.first.method == "segments"}
    against = by_second["patches"]
    assert (against.state, against.why_not) == ("unknown", "scored on different validation images")
    assert by_second["scratch"].state == "unknown"
    assert "without a verdict: scored on different validation images" in " ".join(answered(paths).remarks)


def test_only_the_first_look_finds_others_give_hints(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segments"), seeds=THREE, chance=0.05, probes=True)
    write_all(paths)
    words = text_of(paths.report_html)
    assert words.count("What is looked at first is complete finetuning. Whatever else differs is a hint") == 1
    lines = make_lines([paths])
    first, *others = answers(lines)
    assert {c.state for c in first.comparisons} == {"better"}
    assert {c.state for one in others for c in one.comparisons} == {"higher"}
    assert "yes, a hint" in said(others[0])


def test_a_look_before_the_end_of_pretraining_is_not_the_first(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segments"), seeds=THREE, chance=0.05)
    planned = yaml.safe_load(paths.run_yml.read_text())
    planned["settings"]["pretrain_epochs"] = 50
    paths.run_yml.write_text(yaml.safe_dump(planned))
    write_all(paths)
    words = text_of(paths.report_html)
    assert "What is looked at first is complete finetuning after 50 epochs" in words
    assert "shown better" not in words
    assert "segments 15% is higher, as a hint, than patches" in words


def test_a_mean_over_other_seeds_names_no_winner_and_baselines_are_ranked(tmp_path: Path) -> None:
    """four_channels' mean over its seeds is the highest; on the seeds that all have it is lower."""
    paths = write_run(tmp_path / "run", ("patches",), seeds=(0, 1), epochs=(10,), spread=0.1)
    for seed, score in ((0, 12.0), (1, 12.3)):
        result = paths.eval_dir(RunId(method="patches", seed=seed).name, 10)
        shutil.rmtree(result)
        write_evaluation(paths, RunId(method="patches", seed=seed), 10, score)
        write_evaluation(paths, RunId(method="four_channels", seed=seed), 10, score - 0.9 + 1.4 * seed)
        shutil.rmtree(paths.eval_dir(RunId(method="scratch", seed=seed).name, 0))
        write_evaluation(paths, RunId(method="scratch", seed=seed), 0, score + 2 + seed)
    write_evaluation(paths, RunId(method="four_channels", seed=2), 10, 20.0)
    found = answered(paths)
    assert found.levels["four_channels"].score > found.levels["patches"].score + 2
    headline, *others = found.sentences
    assert headline.endswith("no method is shown better than patches; all lie below scratch (not shown).")
    assert (
        "Over the seeds 0 and 1 that all share: scratch 14.65, patches 12.15, four_channels 11.95." in others
    )
    write_all(paths)
    assert "highest" not in text_of(paths.report_html).replace("bold: the highest mean IoU", "")


def test_of_one_seed_no_interval_stands_where_those_of_seeds_stand(tmp_path: Path) -> None:
    paths = write_run(tmp_path / "run", ("patches", "segments"), epochs=(10,))
    found = answered(paths)
    assert all(c.difference and c.shown is None for c in found.comparisons)
    write_all(paths)
    html = paths.report_html.read_text()
    assert re.findall(r'data-name="corrected interval">([^<]*)<', html) == [""] * 3
    assert "+2.00, no verdict" in html


def test_directories_that_end_at_different_epochs_are_compared_at_their_ends(tmp_path: Path) -> None:
    methods = ("patches", "segments")
    short = write_run(tmp_path / "short", methods, epochs=(5,), seeds=THREE, chance=0.1)
    long = write_run(tmp_path / "long", methods, epochs=(10, 20), seeds=THREE, chance=0.1)
    found = answers(make_lines([short, long]))[0]
    pairs = {(c.first.label, c.second.label): c for c in found.comparisons if c.kind != "start"}
    assert {pair: c.kind for pair, c in pairs.items()} == {
        ("segments 15% (short)", "patches (short)"): "method",
        ("segments 15% (long)", "patches (long)"): "method",
        ("patches (long)", "patches (short)"): "directory",
        ("segments 15% (long)", "segments 15% (short)"): "directory",
    }
    assert pairs["patches (long)", "patches (short)"].value == pytest.approx(15, abs=0.3)
    assert {c.seeds for c in pairs.values()} == {3}
    assert "The runs end after different epochs (short: 5, long: 20)" in " ".join(found.remarks)
    assert "are shown better than patches of the same directory" in found.sentences[0]


def test_a_page_of_several_directories_replaces_nobodys_own(tmp_path: Path, monkeypatch: Any) -> None:
    first, second = (write_run(tmp_path / name, ("patches",), epochs=(5,)) for name in "ab")
    write_all(first)
    own = first.report_html.read_bytes()
    monkeypatch.chdir(tmp_path)
    page = page_of([first.root, second.root])
    write_report([first.root, second.root], page)
    assert page.resolve() == tmp_path / "report-a-b.html" and page.exists()
    assert first.report_html.read_bytes() == own
    assert page_of([first.root]) == first.report_html


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
        states = {c.state for c in comparisons_of(lines, levels)}
        claims += not states <= {"none", "unknown"}
    assert claims <= 0.06 * experiments
