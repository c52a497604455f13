"""For all tests."""

import gc
import os
import tempfile
from multiprocessing.util import get_temp_dir
from pathlib import Path

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """As `heavy_imports` does it: every worker imports all libraries."""
    gc.disable()
    found = yield
    gc.freeze()
    gc.enable()
    return found


def pytest_collection_modifyitems(items):
    """Whole runs first, then other files with long tests: no core waits for one at the end."""
    here = Path(__file__).parent
    long = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.parent != here, item.path not in long))


@pytest.fixture(autouse=True, scope="session")
def temporary_files_in_pytests_folder(tmp_path_factory):
    """Also those that programs leave behind, such as torchrun's folders for logs."""
    get_temp_dir()  # multiprocessing removes its own at the end, when pytest's has gone
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))
    tempfile.tempdir = None  # it is looked up again
