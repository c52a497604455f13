"""Probes as others publish them: against scikit-learn, mmsegmentation, and their own arithmetic."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from segmenter.config import PROBE_GROUPS, ProbeConfig, read_preset
from segmenter.frozen import CAPI_C, CAPI_NEIGHBOURS, Retrieval, fit_capi_knn, fit_capi_logreg
from segmenter.stepwise import PROBES, NormedLinear, rate_at
from tests import toy


def blobs(number=300, classes=4, width=6, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, number)
    centres = 1.5 * np.random.default_rng(9).normal(size=(classes, width))
    features = centres[labels] + rng.normal(size=(number, width)) * np.linspace(0.5, 3, width)
    return torch.from_numpy(features).float(), torch.from_numpy(labels)


@pytest.mark.parametrize("chosen", CAPI_NEIGHBOURS)
def test_capis_knn_is_scikit_learns_with_equal_votes(chosen):
    (train, labels), (test, _) = blobs(), blobs(seed=1)
    number, _, metric = chosen.split()
    scaler = StandardScaler().fit(train.numpy())
    peer = KNeighborsClassifier(int(number), metric={"cosine": "cosine", "L2": "euclidean"}[metric])
    peer.fit(scaler.transform(train.numpy()), labels.numpy())
    expected = peer.predict_proba(scaler.transform(test.numpy()))
    found = fit_capi_knn(train, labels, 4, chosen)(test[None])[0]
    assert np.allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("c", [CAPI_C[2], CAPI_C[4]])
def test_capis_logistic_regression_is_scikit_learns(c):
    (train, labels), (test, _) = blobs(), blobs(seed=1)
    scaler = StandardScaler().fit(train.numpy())
    peer = LogisticRegression(C=c, max_iter=5000, tol=1e-10)
    peer.fit(scaler.transform(train.numpy()), labels.numpy())
    expected = peer.predict_log_proba(scaler.transform(test.numpy()))
    with torch.no_grad():
        found = fit_capi_logreg(train, labels, 4, c)(test[None])[0].log_softmax(-1)
    assert np.allclose(found.numpy(), expected, atol=2e-2)


def test_capis_grid_is_numpys():
    assert np.allclose(CAPI_C, 10 ** np.linspace(-6, 5, 8))


def test_hummingbirds_retrieval_by_its_own_arithmetic():
    """hbird_eval.py: neighbours by the dot product of unit vectors, then cross attention at beta 0.02."""
    (train, _), (test, _) = blobs(), blobs(50, seed=1)
    shares = np.random.default_rng(2).dirichlet(np.ones(4), len(train)).astype("float32")
    found = Retrieval(train, torch.from_numpy(shares), 30, standardised=False, temperature=0.02)(test[None])[
        0
    ]
    keys = train.numpy() / np.linalg.norm(train.numpy(), axis=1, keepdims=True)
    for query, row in zip(test.numpy(), found.numpy(), strict=True):
        cosines = keys @ (query / np.linalg.norm(query))
        nearest = np.argsort(-cosines)[:30]
        weights = np.exp(cosines[nearest] / 0.02 - cosines[nearest].max() / 0.02)
        assert np.allclose(row, (weights / weights.sum()) @ shares[nearest], atol=1e-4)


def test_the_head_is_mmsegmentations_batch_norm_and_convolution():
    """BNHead of DINOv2: resize_concat of one map, SyncBN of its width, then cls_seg."""

    class BNHead(BaseDecodeHead):
        def __init__(self):
            super().__init__(6, 6, num_classes=3, dropout_ratio=0, out_channels=3)
            self.bn = torch.nn.BatchNorm2d(6)

        def forward(self, feats):
            return self.cls_seg(self.bn(feats))

    peer, head = BNHead(), NormedLinear(6, 3, 0.0)
    with torch.no_grad():
        head.head.weight.copy_(peer.conv_seg.weight[..., 0, 0])
        head.head.bias.copy_(peer.conv_seg.bias)
    for _ in range(2):  # in training, and by what it has learned
        maps = torch.randn(2, 6, 4, 5)
        expected = peer(maps).flatten(2).transpose(1, 2)
        torch.testing.assert_close(head(maps.flatten(2).transpose(1, 2)), expected)
        peer.eval(), head.eval()


def test_rates_are_those_of_the_published_schedules():
    """mmcv's poly, power 1, times its linear warm-up; and a cosine to 0 after as long a warm-up."""
    poly, cosine = PROBES["dinov2_linear"], PROBES["dinov3_linear"]
    for step in (0, 750, 1500, 20_000, 39_999):
        regular = 1e-3 * (1 - step / 40_000)
        warmed = regular * (1 - (1 - step / 1500) * (1 - 1e-6)) if step < 1500 else regular
        assert rate_at(poly, step, 40_000) == pytest.approx(warmed, rel=2e-6, abs=2e-9)
        warm = step / 1500 if step < 1500 else 0.5 * (1 + np.cos(np.pi * (step - 1500) / 38_500))
        assert rate_at(cosine, step, 40_000) == pytest.approx(3e-4 * warm)


SMALL = {"image_size": 40, "crop_size": 32, "window_size": 32, "window_stride": 24}


@pytest.mark.parametrize(
    ("preset", "names"),
    [
        ("dinov2-linear", ["dinov2_linear"]), ("dinov3-linear", ["dinov3_linear"]),
        ("capi", ["capi_knn", "capi_logreg"]), ("hummingbird", ["hummingbird"]),
    ],
)  # fmt: skip
def test_a_preset_is_probed_and_says_what_it_was_made_with(dataset, tmp_path, command, preset, names):
    words = [
        "probe", "random", "--preset", preset, "--dataset", dataset, "--plugin", toy.PLUGIN,
        "--model", "vit_toy",
        "--recipe", "fast", "--device", "cpu", "--workers", 0, "--output-dir", tmp_path / "out",
        "--patch-size", 8, "--probe-steps", 12,
    ]  # fmt: skip
    words += [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert {"linear", "knn", "rankme"}.isdisjoint(result)
    for name in names:
        assert 0 < result[name]["mean_iou"] <= 100
        assert (tmp_path / f"out/areas-{name}.npz").exists()
    if preset == "capi":
        assert result["capi_knn"]["made_with"] in CAPI_NEIGHBOURS
        assert result["capi_logreg"]["made_with"] in CAPI_C
    if preset == "dinov2-linear":
        assert result[names[0]]["made_with"]["steps"] == 12
        assert result[names[0]]["made_with"]["weight_decay"] == 1e-4


def test_a_preset_lies_above_the_recipe_and_below_what_is_given():
    from common.options import Layer, make_all

    given = {
        "dataset": "x.yml",
        "output_dir": "out",
        "recipe": "fast",
        "preset": "capi",
        "window_stride": 256,
    }
    given["window_size"] = 256
    config = ProbeConfig(init="random", **make_all(PROBE_GROUPS, [Layer(given)]))
    assert config.run.probes == ("capi_knn", "capi_logreg")
    assert (config.protocol.image_size, config.protocol.window_size) == (224, 256)
    words = config.arguments()[1:]
    again = {name[2:].replace("-", "_"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    assert ProbeConfig(init="random", **make_all(PROBE_GROUPS, [Layer(again)])) == config
    with pytest.raises(ValueError, match="choose one of capi, dinov2-linear, dinov3-linear, hummingbird"):
        read_preset("dino")


def test_a_fixed_weight_decay_is_not_chosen(dataset, tmp_path, command):
    words = [
        "probe", "random", "--dataset", dataset, "--plugin", toy.PLUGIN, "--model", "vit_toy",
        "--recipe", "fast",
        "--device", "cpu", "--workers", 0, "--output-dir", tmp_path / "out", "--probes", "linear",
        "--linear-weight-decay", 0.5,
    ]  # fmt: skip
    words += [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    assert command(*words).code == 0
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["linear"]["made_with"] == 0.5
