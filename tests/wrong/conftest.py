"""One world for the session, and a copy of it for each case."""

import shutil
from pathlib import Path

import pytest

from tests.wrong.world import build


@pytest.fixture(scope="session")
def pristine(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("pristine") / "world"


@pytest.fixture
def world(pristine, tmp_path, capsys) -> Path:
    if not pristine.exists():
        build(pristine, capsys)
    shutil.copytree(pristine, tmp_path / "world", symlinks=True)
    return tmp_path / "world"
