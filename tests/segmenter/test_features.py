"""Pictures of tokens: their colours are scikit-learn's components, their likeness a cosine."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA

from segmenter.features import OUTLIERS, pca_colours, similarity
from tests import toy


def test_colours_are_the_first_three_principal_components():
    torch.manual_seed(0)
    spread = torch.tensor([5.0, 3.0, 2.0, 0.1, 0.1])[:, None, None]
    maps = [spread * torch.randn(5, 6, 8), spread * torch.randn(5, 4, 4)]  # of both images together
    tokens = np.concatenate([one.flatten(1).T.numpy() for one in maps])
    places = PCA(3, svd_solver="full").fit_transform(tokens)
    found = np.concatenate([one.reshape(-1, 3) for one in pca_colours(maps)]).astype(float)
    for channel in range(3):
        low, high = np.percentile(places[:, channel], [OUTLIERS, 100 - OUTLIERS])
        expected = 255 * ((places[:, channel] - low) / (high - low)).clip(0, 1)
        differences = [np.abs(found[:, channel] - one).max() for one in (expected, 255 - expected)]
        assert min(differences) <= 1, "up to the sign of an axis"


def test_likeness_is_the_cosine_with_the_chosen_patch():
    tokens = torch.zeros(2, 1, 4)
    tokens[:, 0] = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [-1.0, 0.0]]).T
    picture = similarity(tokens, 0, 0)
    assert picture[0, 0].tolist() == [255, 0, 0]
    assert picture[0, 1:, 0].tolist() == [round(255 * 0.5**0.5), 0, 0]


def test_the_command_draws_before_and_after(dataset, tmp_path, command):
    folder = dataset.parent / "images/validation"
    images = sorted(folder.iterdir())[:2]
    words = [
        "draw-features",
        "random",
        *images,
        "--before",
        "random",
        "--model",
        "vit_toy",
        "--plugin",
        toy.PLUGIN,
    ]
    words += ["--size", 48, "--patch", "0,100", "--device", "cpu", "--out", tmp_path / "new/f.png"]
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    picture = np.asarray(Image.open(tmp_path / "new/f.png"))
    assert picture.shape[1] > 4 * 256  # image, and two pictures for each encoder
    assert (picture == (255, 0, 0)).all(-1).any()
    assert command(*words).code == 0  # its own picture it replaces
    (tmp_path / "other.png").write_bytes(b"mine")
    for change, said in (
        (["--out", tmp_path / "other.png"], "other.png"), (["--out", tmp_path / "f.jpg"], "ends in .png"),
        (["--patch", "3"], "give two numbers"), (["--before", "nowhere.pth"], "nowhere.pth does not exist"),
    ):  # fmt: skip
        outcome = command(*words, *change)
        assert (outcome.code, said in outcome.err) == (2, True), outcome.err
    assert (tmp_path / "other.png").read_bytes() == b"mine"
