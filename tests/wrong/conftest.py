"""One world for the session, and a copy of it for each case."""

import shutil
from pathlib import Path

import pytest

from tests.wrong.world import build


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pristine") / "world"


@pytest.fixture
def shared_world(pristine, capsys) -> Path:
    """For cases that change nothing in it."""
    if not pristine.exists():
        build(pristine, capsys)
    return pristine


@pytest.fixture
def world(shared_world, tmp_path) -> Path:
    """For cases that damage it."""
    shutil.copytree(shared_world, tmp_path / "world", symlinks=True)
    return tmp_path / "world"
