"""What frozen tokens are asked: against scikit-learn, and what is known by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

import segmenter.frozen
from segmenter.frozen import NearestNeighbours, TrainingTokens, choose, fit_linear, rankme, spread

CLASSES = 3
a_linear_probe = partial(fit_linear, weight_decay=1e-5)


@pytest.fixture
def features():
    """Tokens of three overlapping classes, of unequal scales; and as many to be classified."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 400)
    centres = rng.normal(size=(CLASSES, 12))
    tokens = (centres[labels] + 1.5 * rng.normal(size=(400, 12))) * rng.uniform(0.1, 9, 12) + 2
    tokens, labels = torch.from_numpy(tokens).float(), torch.from_numpy(labels)
    return tokens[:300], labels[:300], tokens[300:]


def test_the_linear_probe_is_scikit_learns_logistic_regression(features):
    tokens, labels, others = features
    decoder = fit_linear(tokens, labels, CLASSES, 1e-4)
    mean, deviation = tokens.mean(0), tokens.std(0, correction=0)
    peer = LogisticRegression(C=1 / (1e-4 * len(tokens)), tol=1e-8, max_iter=5000).fit(
        (tokens - mean) / deviation, labels
    )
    expected = torch.from_numpy(peer.predict_proba((others - mean) / deviation)).float()
    found = decoder(others[None])[0].softmax(-1)
    assert torch.equal(found.argmax(1), expected.argmax(1))
    torch.testing.assert_close(found, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("at_once", [2**26, 700])
def test_neighbours_are_scikit_learns(features, monkeypatch, at_once):
    monkeypatch.setattr(segmenter.frozen, "MOST_SIMILARITIES", at_once)
    tokens, labels, others = features
    votes = NearestNeighbours(tokens, labels, CLASSES)(others.unflatten(0, (4, 25))).flatten(0, 1)
    mean, deviation = tokens.mean(0), tokens.std(0, correction=0)
    peer = KNeighborsClassifier(
        20, metric="cosine", weights=lambda distances: np.exp((1 - distances) / 0.07)  # DINO's
    ).fit((tokens - mean) / deviation, labels)  # fmt: skip
    expected = torch.from_numpy(peer.predict_proba((others - mean) / deviation)).float()
    torch.testing.assert_close(votes, expected, atol=1e-4, rtol=0)


def test_whitened_neighbours_are_scikit_learns_after_its_pca(features):
    tokens, labels, others = features
    votes = NearestNeighbours(tokens, labels, CLASSES, 5)(others[None])[0]
    pca = PCA(5, whiten=True, svd_solver="full").fit(tokens.double().numpy())
    weights = lambda distances: np.exp((1 - distances) / segmenter.frozen.TEMPERATURE)  # noqa: E731
    peer = KNeighborsClassifier(segmenter.frozen.NEIGHBOURS, metric="cosine", weights=weights)
    peer.fit(pca.transform(tokens.double().numpy()), labels)
    expected = torch.from_numpy(peer.predict_proba(pca.transform(others.double().numpy()))).float()
    torch.testing.assert_close(votes, expected, atol=1e-3, rtol=0)


def training_tokens(features, labels, images=None, places=None):
    count = torch.arange(len(labels))
    return TrainingTokens(
        features, labels, count if images is None else images, count if places is None else places
    )


def test_the_value_is_chosen_on_a_fifth_of_the_images_alone():
    """A class is where the value says, in the images that are held out; elsewhere it is another."""
    labels = torch.arange(100) % 2
    images = torch.arange(100) // 4
    asked = []

    class Told(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, tokens):
            right = torch.nn.functional.one_hot(tokens[..., 0].long(), 2).float()
            return right if self.value == 3 else right.flip(-1) if self.value == 1 else right * 0

    def fit(tokens, told, num_classes, value):
        asked.append((tokens, told, num_classes, value))
        return Told(value)

    found = training_tokens(torch.stack([labels.float(), images.float()], 1), labels, images)
    assert choose(fit, (1, 2, 3, 4), found, 2) == 3
    assert [value for *_, value in asked] == [1, 2, 3, 4]
    for tokens, told, num_classes, _ in asked:
        assert set(tokens[:, 1].tolist()) == {n for n in range(25) if n % 5 != 4}
        assert (len(told), num_classes) == (80, 2)
    few = training_tokens(found.features[:8], labels[:8], images[:8])
    assert choose(fit, (1, 2, 3, 4), few, 2) == 3  # nothing is held out: the middle one


def test_the_value_is_chosen_by_mean_iou_not_by_accuracy_nor_by_recall():
    """Of 90 tokens of a class and 10 of another, one value finds nine more and takes 30 too many."""
    labels = torch.arange(100) // 90
    predicted = {
        "most": labels * 0,
        "greedy": torch.where(torch.arange(100) < 60, 0, 1),
        "careful": torch.where(torch.arange(100) < 85, 0, 1) * torch.where(torch.arange(100) < 96, 1, 0),
    }

    class Told(torch.nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, tokens):
            return torch.nn.functional.one_hot(predicted[self.value], 2).float()[None]

    held_out = training_tokens(torch.zeros(100, 3), labels, torch.full((100,), 4))
    train = training_tokens(torch.zeros(5, 3), labels[:5], torch.arange(4).repeat(2)[:5])
    found = TrainingTokens(*(torch.cat(parts) for parts in zip(train, held_out, strict=True)))
    fit = lambda tokens, told, num_classes, value: Told(value)  # noqa: E731
    assert choose(fit, ("most", "greedy", "careful"), found, 2) == "careful"


def test_what_the_variance_consists_of_by_hand():
    rng = np.random.default_rng(0)
    places = torch.arange(4).repeat(500)
    of_place = torch.tensor([-3.0, -1, 1, 3])[places]
    alone = torch.from_numpy(rng.normal(size=2000)).float()
    found = training_tokens(torch.stack([of_place, alone], 1), places, places=places)
    told = spread(found)
    assert told["position_percent"] == pytest.approx(50, abs=1)  # all of the one, none of the other
    assert told["first_direction_percent"] == pytest.approx(50, abs=2)
    chance = training_tokens(torch.from_numpy(rng.normal(size=(2000, 3))).float(), places)
    assert spread(chance._replace(places=torch.arange(2000) % 400))["position_percent"] < 2
    line = alone[:, None] * torch.tensor([[1.0, -2, 5]])
    assert spread(training_tokens(line, places))["first_direction_percent"] == pytest.approx(100)


@pytest.mark.parametrize("decoder_of", [a_linear_probe, NearestNeighbours])
def test_half_precision_of_the_encoder_does_not_blur_the_probes(features, decoder_of):
    tokens, labels, others = features
    decoder = decoder_of(tokens, labels, CLASSES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = decoder(others[None])
    assert torch.equal(found, decoder(others[None]))


def test_an_image_does_not_vote_for_itself():
    """Two of each class lie on one line, the fifth is alone of its class."""
    tokens = torch.eye(3)[[0, 0, 1, 1, 2]]
    voters = NearestNeighbours(tokens, torch.tensor([0, 0, 1, 1, 2]), 3)
    votes = voters.of_the_others()
    assert votes.argmax(1)[:4].tolist() == [0, 0, 1, 1]
    assert votes[4, 2] == 0


def test_rankme_of_known_matrices():
    assert rankme(torch.eye(64)) == pytest.approx(64)
    assert rankme(torch.arange(1.0, 9)[:, None] * torch.ones(1, 5)) == pytest.approx(1, abs=1e-6)
    values = torch.tensor([3.0, 2, 1])  # by hand: exp of the entropy of 1/2, 1/3, 1/6
    entropy = math.log(2) / 2 + math.log(3) / 3 + math.log(6) / 6
    assert rankme(values.diag()) == pytest.approx(math.exp(entropy))
