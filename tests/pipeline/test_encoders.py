"""Encoders of others in a plan and in its report, on several datasets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from scipy.stats import rankdata

from common.areas import DRAWS, draw_images
from common.step_files import PROBE_AREAS
from pipeline.plan.layout import Layout, dataset_of, eval_name, parse_eval_name
from pipeline.plan.steps import make_plan
from pipeline.report.encoders import benchmarks
from pipeline.report.page import write_report


def two_datasets(folder):
    for name in ("one", "two"):
        (folder / f"{name}.yml").write_text(yaml.safe_dump({
            "name": f"{name} set", "classes": ["a", "b"],
            "images": {"train": "x", "val": "x"}, "annotations": {"train": "x", "val": "x"},
        }))  # fmt: skip
    return f"{folder}/one.yml,{folder}/two.yml"


def test_reference_lines_have_names_of_ones_own(settings, tmp_path):
    (tmp_path / "own.pth").write_bytes(b"")
    words = f"--baselines scratch,dinov2=timm:vit_small_patch14_dinov2,own={tmp_path}/own.pth --probe-freq 1"
    steps = [step for step in make_plan(settings(f"{words} --pretrain-epochs 1")) if step.epochs == 0]
    by_name = {step.name: step.config for step in steps if step.kind != "pretrain"}
    assert {"probe_dinov2_0", "evaluate_dinov2_0", "probe_own_0", "probe_scratch_0"} <= set(by_name)
    assert by_name["probe_dinov2_0"].init == "timm:vit_small_patch14_dinov2"
    assert by_name["evaluate_own_0"].init == tmp_path / "own.pth"
    assert by_name["evaluate_own_0"].model.model == "auto"
    assert by_name["probe_scratch_0"].model.model != "auto"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--baselines patches=timm:x", "is no method's"), ("--baselines mae=timm:x", "is no method's"),
        ("--baselines a-b=timm:x", "letters, digits and _"), ("--baselines scrach", "or NAME=ENCODER"),
        ("--baselines a=jax:x", "no encoders of jax"), ("--baselines a=timm:x,a=hf:y/z", "are called a"),
        ("--eval 5,timm:x", "give epochs completed, or encoders"),
        ("--eval timm:vit,hf:x/vit", "two encoders are called vit"),
    ],
)  # fmt: skip
def test_wrong_names_are_explained(settings, words, said):
    with pytest.raises(Exception, match=said):
        make_plan(settings(words))


def test_an_encoder_is_called_as_it_calls_itself(settings, tmp_path):
    encoders = "random,timm:vit_small_patch14_dinov2,hf:facebook/dinov2-small"
    encoders += f",{tmp_path}/7b.pth,{tmp_path}/o.py:make"
    steps = make_plan(settings(f"--eval {encoders} --eval-seeds 0 --probe-freq 1"))
    assert [step.run for step in steps] == [
        "scratch",
        "vit_small_patch14_dinov2",
        "dinov2_small",
        "e7b",
        "make",
    ]
    assert {step.kind for step in steps} == {"probe"}


def test_each_dataset_has_scores_of_its_own(settings, tmp_path):
    datasets = two_datasets(tmp_path)
    made = settings("--pretrain-epochs 1 --probe-freq 1 --eval-seeds 2")
    made = settings(f"--pretrain-epochs 1 --probe-freq 1 --eval-seeds 2 --eval-dataset {datasets}")
    scores = [step for step in make_plan(made) if step.kind != "pretrain"]
    names = {step.folder.name for step in scores if step.run == "four_channels"}
    assert names == {
        "four_channels_1", "four_channels_1-on-two_set", "four_channels_1-evalseed1",
        "four_channels_1-on-two_set-evalseed1",
    }  # fmt: skip
    for step in scores:
        assert step.config.run.dataset.stem == ("two" if dataset_of(step.name) else "one")
    (tmp_path / "two.yml").write_text((tmp_path / "one.yml").read_text())
    with pytest.raises(ValueError, match="two are called one_set"):
        make_plan(made)


def test_names_of_evaluations_and_their_datasets_are_told_apart():
    for dataset in ("", "camvid_11", "a.b"):
        for seed in (0, 2):
            name = eval_name("my_method_7-seed1", 5, seed, dataset)
            run, epochs, number = parse_eval_name(name, dataset)
            assert (run.name, epochs, number) == ("my_method_7-seed1", 5, seed)
            assert dataset_of(name) == dataset_of(f"evaluate_{name}") == dataset
            with pytest.raises(ValueError, match="is not an evaluation"):
                parse_eval_name(name, "another")


IMAGES, CLASSES = 40, ("a", "b", "c")


def write_scores(paths, encoder, dataset, level, seed):
    """A linear probe's result and areas, of invented images."""
    rng = np.random.default_rng(seed)
    label = rng.integers(50, 100, (IMAGES, len(CLASSES)))
    right = (label * np.clip(level + 0.1 * rng.normal(size=label.shape), 0, 1)).astype(int)
    areas = np.stack([right, label, label], axis=1)
    folder = paths.probe_dir(encoder, 0, "" if dataset == "first" else dataset)
    folder.mkdir(parents=True)
    names = [f"{dataset}{n}" for n in range(IMAGES)]
    np.savez(folder / PROBE_AREAS["linear"], images=np.array(names), areas=areas)
    intersection, predicted, told = areas.sum(0)
    iou = 100 * intersection / (predicted + told - intersection)
    scores = {"pixel_accuracy": 50.0, "mean_accuracy": 50.0, "mean_iou": float(iou.mean())}
    result = {
        "format_version": 1, "linear": {**scores, "class_iou": dict(zip(CLASSES, iou.tolist(), strict=True))},
        "seed": 0, "seconds": {}, "settings": {"init": f"timm:{encoder}"}, "dataset": {"name": dataset},
        "encoder": {"parameters": 22_000_000, "flops_per_image": 4_600_000_000, "image_size": 224},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return float(iou.mean()), draw_images(folder / PROBE_AREAS["linear"])


def test_a_table_by_dataset_and_a_mean_rank_with_its_interval(tmp_path):
    paths = Layout(tmp_path)
    levels = {"first": (0.9, 0.6, 0.59), "second": (0.5, 0.8, 0.79), "third": (0.9, 0.5, 0.51)}
    encoders, scores, drawn = ("big", "mid", "small"), [], []
    for number, (dataset, of_each) in enumerate(levels.items()):
        found = [
            write_scores(paths, encoder, dataset, level, seed=10 * number + n)
            for n, (encoder, level) in enumerate(zip(encoders, of_each, strict=True))
        ]
        scores.append([score for score, _ in found])
        drawn.append([several for _, several in found])
    (one,) = benchmarks([paths])
    assert one.datasets == 3
    rows = {row["encoder"]: row for row in one.table.rows}
    ranks = np.mean([rankdata([-score for score in of_dataset]) for of_dataset in scores], axis=0)
    again = np.array([[rankdata(-np.array(several)[:, draw]) for draw in range(DRAWS)] for several in drawn])
    again = again.mean(0)  # [DRAWS, encoders]
    assert [row["encoder"] for row in one.table.rows] == [
        encoders[n] for n in np.argsort(ranks, kind="stable")
    ]
    for number, encoder in enumerate(encoders):
        low, high = np.percentile(again[:, number], [2.5, 97.5])
        assert rows[encoder]["mean rank"] == f"{ranks[number]:.2f} ({low:.2f} to {high:.2f})"
        low, high = np.percentile(drawn[1][number], [2.5, 97.5])
        expected = f"{scores[1][number]:.2f} ({low:.2f} to {high:.2f})"
        assert rows[encoder]["second, mean IoU (%)"] == expected
        assert rows[encoder]["million weights"] == "22"
        assert rows[encoder]["GFLOPs an image"] == "4.6"
    (tmp_path / "run.yml").write_text("settings: {}\n")
    write_report([tmp_path], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Encoders and datasets" in page
    assert "untrained" not in page.partition("<h1>")[2].partition("Encoders and datasets")[0]
    assert "<h1>Encoders on the same bench</h1>" in page


def test_one_dataset_and_something_pretrained_need_no_such_table(tmp_path):
    from tests.pipeline.finished_run import write_run

    assert benchmarks([write_run(tmp_path / "run", probes=True)]) == []
