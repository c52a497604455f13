"""Frozen probes as runs: their tokens, what they leave, and every way of ending."""

import json
import os
import signal
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import segmenter.finetune
import segmenter.probing
from engine.config import DeviceConfig
from engine.devices import make_accelerator
from segmenter.config import EncoderConfig, ProtocolConfig, ScoringConfig
from segmenter.data import WholeImages
from segmenter.dataset import read_description
from segmenter.evaluate import each_group, evaluate_model
from segmenter.finetune import start_model
from segmenter.frozen import NearestNeighbours, fit_linear
from segmenter.probing import Tokens
from tests import toy
from tests.segmenter.boxes import IGNORE, call, run, train_arguments, write_dataset

SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou", "class_iou")
CLASSES, PATCH = 3, 16
PROTOCOL = ProtocolConfig(
    image_size=40, crop_size=32, window_size=32, window_stride=24, normalization="imagenet"
)


def probe_arguments(dataset, output_dir, init="random", **changes):
    options = {
        "plugin": toy.PLUGIN, "model": "vit_toy", "dataset": dataset, "output_dir": output_dir,
        "recipe": "fast",
        "image_size": 40, "crop_size": 32, "window_size": 32, "window_stride": 24,
        "eval_batch_size": 1, "device": "cpu", "workers": 0, **changes,
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["probe", str(init), *words]


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def answers_of(folder):
    result = result_of(folder)
    return {name: result[name] for name in ("linear", "knn", "rankme")}


@pytest.fixture(scope="module")
def probed(dataset, tmp_path_factory):
    """The output directory of a probe that nothing disturbed."""
    folder = tmp_path_factory.mktemp("probed") / "out"
    assert call(*probe_arguments(dataset, folder)).code == 0
    return folder


@pytest.fixture
def kept(dataset, monkeypatch):
    """Tokens of three images of 50 places each, room for 10 in all: 3, 3 and 4."""
    monkeypatch.setattr(segmenter.probing, "MOST_TOKENS", 10)
    description = read_description(dataset)
    model = start_model("random", EncoderConfig(model="vit_toy"), PROTOCOL, CLASSES)

    def keep(seed=0):
        tokens = Tokens(model, WholeImages(description, description.pairs("train")[:3], PROTOCOL), seed)
        for index in range(3):
            labels = (torch.arange(50) >= 8) * (1 + index)  # the first 8 have none
            features = torch.arange(50.0)[:, None] + 100 * index
            features = features.expand(-1, model.encoder.embed_dim)
            tokens._keep(index, features, labels, torch.arange(50), torch.zeros(50, 0))
        return tokens.total(make_accelerator(DeviceConfig(device="cpu")))

    return keep


def test_each_image_keeps_its_share_of_tokens_drawn_from_all_that_have_a_label(kept):
    found = kept()
    assert found.images.tolist() == found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert torch.equal(found.features[:, 0], found.places + 100.0 * found.images)
    assert found.places.min() >= 8
    assert all(torch.equal(one, other) for one, other in zip(found, kept(), strict=True))
    by_image = [set(found.places[found.images == number].tolist()) for number in range(3)]
    assert len({*map(frozenset, by_image)}) == 3, "drawn for each image by itself"
    assert max(map(max, by_image)) > 20, "not the first ones"
    assert not torch.equal(kept(seed=1).places, found.places)


def test_knn_is_whitened_along_a_chosen_number_of_directions_and_knn_raw_is_not(
    dataset, tmp_path, monkeypatch
):
    asked = []

    class Spy(NearestNeighbours):
        def __init__(self, tokens, labels, num_classes, directions=None):
            asked.append(directions)
            super().__init__(tokens, labels, num_classes, directions)

    monkeypatch.setattr(segmenter.probing, "NearestNeighbours", Spy)
    assert call(*probe_arguments(dataset, tmp_path / "out", probes="knn")).code == 0
    *tried, chosen, raw = asked
    assert tried == [8, 16]  # of 24 features
    assert chosen == result_of(tmp_path / "out")["knn"]["made_with"] in tried
    assert raw is None


def test_tokens_are_of_one_scale_whatever_validation_images_are_scored_at(dataset, tmp_path, probed):
    arguments = probe_arguments(dataset, tmp_path / "out", probes="rankme")
    assert call(*arguments, "--multi-scale").code == 0
    for name in ("rankme", "first_direction_percent", "position_percent"):
        assert result_of(tmp_path / "out")[name] == result_of(probed)[name]


def test_a_token_has_the_label_of_most_valid_pixels(dataset):
    description = read_description(dataset)
    size = EncoderConfig(model="vit_toy", patch_size=4)
    model = start_model("random", size, PROTOCOL, CLASSES)
    tokens = Tokens(model, WholeImages(description, [], PROTOCOL), 0)
    labels = torch.full((5, 6), IGNORE, dtype=torch.uint8)
    labels[:3, :3] = torch.tensor([[2, 2, IGNORE], [2, 1, IGNORE], [1, IGNORE, IGNORE]])
    labels[4, 5] = 0
    assert tokens._majority(labels)[0].tolist() == [3, 0, 0, 1]


a_linear_probe = partial(fit_linear, weight_decay=1e-5)


class Oracle(nn.Module):
    """An encoder whose tokens are the labels: boxes' classes have colours of their own."""

    embed_dim = CLASSES
    colours = torch.tensor([[90.0, 60, 30], [200, 30, 40], [90, 160, 220]])

    def forward(self, pixels):
        """[B, 3, H, W] normalised pixels to [B, N, 3]."""
        mean, std = self.mean[:, 0, 0], self.std[:, 0, 0]
        patches = nn.functional.avg_pool2d(pixels, self.patch).flatten(2).transpose(1, 2)
        nearest = torch.cdist(patches * std + mean, self.colours).argmin(-1)
        return nn.functional.one_hot(nearest, CLASSES).float()


class Noise(Oracle):
    def forward(self, pixels):
        return torch.randn(super().forward(pixels).shape)


def probed_with(dataset, encoder, decoder_of):
    """Scores by the parts of `probe` with another encoder, of patches of 2 pixels."""
    description = read_description(dataset)
    size = EncoderConfig(model="vit_toy", patch_size=2)
    model = start_model("random", size, PROTOCOL, CLASSES)
    encoder.mean, encoder.std, encoder.patch = model.mean, model.std, 2
    model.encoder, model.decoder = encoder, nn.Identity()
    scoring = ScoringConfig(device="cpu", workers=0)
    accelerator = make_accelerator(DeviceConfig(device="cpu"))
    train = WholeImages(description, description.pairs("train"), PROTOCOL)
    tokens = Tokens(model, train, 0)
    each_group(accelerator, model, train, scoring, tokens.add)
    found = tokens.total(accelerator)
    model.decoder = decoder_of(found.features, found.labels, CLASSES)
    val = WholeImages(description, description.pairs("val"), PROTOCOL)
    return evaluate_model(accelerator, model, val, scoring)


@pytest.mark.parametrize("decoder_of", [a_linear_probe, NearestNeighbours])
def test_tokens_that_are_the_labels_score_near_100(dataset, decoder_of):
    scores = probed_with(dataset, Oracle(), decoder_of).scores("gbs")
    assert scores["pixel_accuracy"] > 92  # the borders of patches are not those of boxes
    assert scores["mean_iou"] > 85


def test_tokens_of_noise_score_what_the_majority_class_scores(tmp_path):
    dataset = write_dataset(tmp_path, train=60)  # enough tokens for noise to be only that
    areas = probed_with(dataset, Noise(), a_linear_probe)
    labels = areas.by_image.sum(0)[2].double()
    iou_of_majority = 100 * (labels.max() / labels.sum()).item() / CLASSES
    assert areas.scores("gbs")["mean_iou"] == pytest.approx(iou_of_majority, abs=1)


def test_a_probe_leaves_scores_areas_and_nothing_else(probed, dataset):
    assert {path.name for path in probed.iterdir()} == {
        "result.json", "areas-linear.npz", "areas-knn.npz", "areas-knn_raw.npz", "features.png", ".lock",
    }  # fmt: skip
    result = result_of(probed)
    assert set(result) == {
        "format_version", "linear", "knn", "knn_raw", "rankme", "first_direction_percent",
        "position_percent", "seed", "seconds", "model", "encoder", "init",
        "protocol", "dataset", "versions", "device", "num_processes", "settings",
    }  # fmt: skip
    assert (result["init"], result["seed"], result["model"]) == ("random", 0, "vit_toy")
    assert result["protocol"]["window_stride"] == 24
    assert 1 <= result["rankme"] <= 24
    for name in ("linear", "knn", "knn_raw"):
        with np.load(probed / f"areas-{name}.npz", allow_pickle=False) as file:
            intersection, predicted, label = file["areas"].sum(0)
            assert file["images"].tolist() == ["100", "101", "102"]
        iou = 100 * intersection / (predicted + label - intersection)
        assert iou.tolist() == pytest.approx(list(result[name]["class_iou"].values()))
        assert set(SCORES) <= set(result[name])


def test_only_the_probes_that_are_asked_for_are_made(dataset, tmp_path):
    assert call(*probe_arguments(dataset, tmp_path / "out", probes="rankme")).code == 0
    assert {"linear", "knn"}.isdisjoint(result_of(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("areas*"))


def test_workers_change_nothing_and_seeds_do(dataset, probed, tmp_path):
    assert call(*probe_arguments(dataset, tmp_path / "two", workers=2)).code == 0
    assert answers_of(tmp_path / "two") == answers_of(probed)
    assert call(*probe_arguments(dataset, tmp_path / "seed", seed=1)).code == 0
    assert answers_of(tmp_path / "seed") != answers_of(probed)


def test_two_processes_find_what_one_finds(dataset, probed, tmp_path):
    run(probe_arguments(dataset, tmp_path / "two"), tmp_path / "output.txt", processes=2)
    assert result_of(tmp_path / "two")["num_processes"] == 2
    assert answers_of(tmp_path / "two")["rankme"] == pytest.approx(result_of(probed)["rankme"])
    for name in ("linear", "knn"):
        for key in SCORES[:3]:
            found = result_of(tmp_path / "two")[name][key]
            assert found == pytest.approx(result_of(probed)[name][key], abs=0.5)


def test_random_is_the_encoder_that_train_begins_with(dataset, tmp_path, monkeypatch):
    """A training at the smallest rate leaves it; the decoder and dropout are no part of it."""
    arguments = train_arguments(dataset, tmp_path / "run", epochs=1, lr=1e-12, weight_decay=0)
    assert call(*arguments, "--seed", 5).code == 0
    trained = torch.load(tmp_path / "run/checkpoint.pth", weights_only=True)["model"]
    seen = []

    def spy(*arguments):
        seen.append(start_model(*arguments))
        return seen[0]

    monkeypatch.setattr(segmenter.probing, "start_model", spy)
    arguments = probe_arguments(dataset, tmp_path / "out", seed=5, probes="rankme")
    assert call(*arguments).code == 0
    for name, weight in seen[0].encoder.state_dict().items():
        torch.testing.assert_close(weight, trained[f"encoder.{name}"], atol=1e-6, rtol=0)


def test_a_folded_fourth_channel_changes_nothing(dataset, tmp_path):
    """The constant 1 of the fourth channel is a bias: by hand, on random weights."""
    torch.manual_seed(0)
    whole = start_model("random", EncoderConfig(model="vit_toy"), PROTOCOL, 3).encoder.state_dict()
    kernel = torch.randn(24, 4, PATCH, PATCH) * 0.02
    bias = whole["patch_embed.proj.bias"]
    folded = {
        "patch_embed.proj.weight": kernel[:, :3],
        "patch_embed.proj.bias": bias + kernel[:, 3].sum((1, 2)),
    }
    torch.save({"model": {**whole, "patch_embed.proj.weight": kernel}}, tmp_path / "four.pth")
    torch.save({"model": {**whole, **folded}}, tmp_path / "three.pth")
    found = []
    for name in ("four", "three"):
        arguments = probe_arguments(dataset, tmp_path / name, tmp_path / f"{name}.pth")
        assert call(*arguments).code == 0
        found.append(answers_of(tmp_path / name))
    assert found[0]["rankme"] == pytest.approx(found[1]["rankme"], rel=1e-4)
    for name in ("linear", "knn"):
        assert found[0][name]["mean_iou"] == pytest.approx(found[1][name]["mean_iou"], abs=0.5)


def test_no_more_tokens_are_kept_than_the_bound_allows(dataset, tmp_path, monkeypatch):
    """7 images of 9 windows' tokens each, and room for 10 in all: one or two of each image."""
    monkeypatch.setattr(segmenter.probing, "MOST_TOKENS", 10)
    kept = []

    def spy(tokens, labels, num_classes, weight_decay):
        kept.append(tokens)
        return fit_linear(tokens, labels, num_classes, weight_decay)

    monkeypatch.setattr(segmenter.probing, "fit_linear", spy)
    assert call(*probe_arguments(dataset, tmp_path / "out", probes="linear")).code == 0
    assert kept[-1].shape == (10, 24)
    assert {len(tokens) for tokens in kept[:-1]} < {7, 8, 9}, "a fifth of the images is left out"


def test_done_is_done_and_other_settings_are_refused(dataset, probed, command):
    before = {path: path.stat().st_mtime_ns for path in probed.iterdir()}
    assert command(*probe_arguments(dataset, probed)).code == 0
    for check in ([], ["--dry-run", "check"]):
        outcome = command(*probe_arguments(dataset, probed, seed=3), *check)
        assert outcome.code == 2
        assert "seed: 0 -> 3" in outcome.err
    assert before == {path: path.stat().st_mtime_ns for path in probed.iterdir()}


def test_a_folder_of_another_run_is_refused(dataset, finished, probed, command):
    outcome = command(*probe_arguments(dataset, finished))
    assert (outcome.code, "is of a run of another kind" in outcome.err) == (2, True)
    outcome = command(*train_arguments(dataset, probed))
    assert (outcome.code, "is of a run of another kind" in outcome.err) == (2, True)


def test_check_says_what_is_wrong_and_writes_nothing(dataset, tmp_path, command):
    check = ("--dry-run", "check")
    outcome = command(*probe_arguments(dataset, tmp_path / "out"), *check)
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    outcome = command(*probe_arguments(dataset, tmp_path / "out", tmp_path / "no.pth"), *check)
    assert (outcome.code, "ENCODER" in outcome.err) == (2, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("at", ["tokens", "linear"])
def test_a_signal_ends_it_and_leaves_nothing_half_written(dataset, probed, tmp_path, monkeypatch, at):
    original = segmenter.probing._Probing.over

    def interrupted(run, name, *arguments, **more):
        if name == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(run, name, *arguments, **more)

    monkeypatch.setattr(segmenter.probing._Probing, "over", interrupted)
    assert call(*probe_arguments(dataset, tmp_path / "out")).code == 75
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]
    monkeypatch.undo()
    assert call(*probe_arguments(dataset, tmp_path / "out")).code == 0
    assert answers_of(tmp_path / "out") == answers_of(probed)


def test_one_unreadable_training_image_is_skipped_and_two_are_too_many(
    own_dataset, tmp_path, command, caplog, monkeypatch
):
    monkeypatch.setattr(segmenter.check, "MOST_CHECKED", 1)
    for number, code in ((4, 0), (5, 1)):
        image = own_dataset.parent / f"images/training/{number:03d}.jpg"
        image.write_bytes(b"no image")
        assert command(*probe_arguments(own_dataset, tmp_path / str(number))).code == code
        assert f"skipped an unreadable image: {image}" in caplog.text
    assert not (tmp_path / "5/result.json").exists()


def test_images_of_class_folders_are_told_apart(dataset, tmp_path, caplog):
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(8):  # two classes, of two colours
        path = tmp_path / f"val/{'red' if number % 2 else 'blue'}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 60, (40, 40, 3), dtype=np.uint8)
        pixels[..., 0 if number % 2 else 2] += 180
        Image.fromarray(pixels).save(path)
    arguments = probe_arguments(dataset, tmp_path / "out", image_folder=tmp_path / "val")
    assert call(*arguments).code == 0
    assert result_of(tmp_path / "out")["image_knn"] == {
        "accuracy": 100, "num_images": 8, "num_classes": 2,
    }  # fmt: skip
    arguments = probe_arguments(dataset, tmp_path / "one", image_folder=tmp_path / "val/red")
    assert call(*arguments).code == 0
    assert "image_knn" not in result_of(tmp_path / "one")


def test_seconds_are_told_and_nothing_is_written(dataset, tmp_path, command):
    outcome = command(*probe_arguments(dataset, tmp_path / "probe"), "--dry-run", "time")
    assert outcome.code == 0, outcome.err
    told = json.loads(outcome.out)
    assert set(told) == {"setup_seconds", "evaluation_seconds"}
    assert min(told.values()) > 0
    assert list(tmp_path.iterdir()) == []
