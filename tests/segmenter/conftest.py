"""Fixtures of the segmenter's tests: tiny datasets and one trained run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.segmenter.boxes import REPOSITORY, Outcome, call, train_arguments, write_dataset

SAMPLES = REPOSITORY / "../shared/data"


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """The same arithmetic here and in processes that torchrun starts."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """7 training and 3 test pairs: odd on purpose."""
    return write_dataset(tmp_path_factory.mktemp("boxes"))


@pytest.fixture
def own_dataset(tmp_path) -> Path:
    """The same, to be broken by a test."""
    return write_dataset(tmp_path / "data")


def sample(name: str) -> Path:
    path = SAMPLES / name
    if not path.exists():
        pytest.skip(f"the sample data is not here: {path}")
    return path


@pytest.fixture(scope="session")
def camvid() -> Path:
    return sample("camvid-sample/dataset.yml")


@pytest.fixture(scope="session")
def ade20k() -> Path:
    return sample("ade20k-sample")


@pytest.fixture(scope="session")
def finished(dataset, tmp_path_factory) -> Path:
    """The output directory of a run that nothing disturbed."""
    output_dir = tmp_path_factory.mktemp("finished") / "run"
    assert call(*train_arguments(dataset, output_dir)).code == 0
    return output_dir


@pytest.fixture
def command(capsys) -> Callable[..., Outcome]:
    """`call`, with what it printed."""
    return lambda *arguments: call(*arguments, capsys=capsys)
