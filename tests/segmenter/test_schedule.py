import dataclasses

import pytest

from segmenter.config import OptimisationConfig

POLY = OptimisationConfig(
    epochs=10, batch_size=8, optimizer="sgd", lr=1e-3, momentum=0.9, weight_decay=0.0,
    layer_decay=1.0, schedule="poly", poly_power=0.9, min_lr=1e-5, warmup_fraction=0.0,
    eval_every=3,
)  # fmt: skip


def test_poly_falls_from_the_rate_to_the_least():
    assert POLY.rate_at(0.0) == pytest.approx(1e-3)
    assert POLY.rate_at(0.5) == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5**0.9)
    assert POLY.rate_at(1.0) == pytest.approx(1e-5)


def test_warmup_is_linear_and_cosine_follows():
    cosine = dataclasses.replace(POLY, schedule="cosine", warmup_fraction=0.2, min_lr=0.0)
    assert cosine.rate_at(0.1) == pytest.approx(0.5e-3)
    assert cosine.rate_at(0.2) == pytest.approx(1e-3)
    assert cosine.rate_at(0.6) == pytest.approx(0.5e-3)
    assert cosine.rate_at(1.0) == pytest.approx(0.0, abs=1e-12)


def test_the_last_epoch_is_always_evaluated():
    assert [dataclasses.replace(POLY, epochs=n).evaluations for n in (1, 3, 4, 6)] == [1, 1, 2, 2]
