"""For all tests."""

import os
import tempfile

import pytest


@pytest.fixture(autouse=True, scope="session")
def temporary_files_in_pytests_folder(tmp_path_factory):
    """Also those that programs leave behind, such as torchrun's folders for logs."""
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))
    tempfile.tempdir = None  # it is looked up again
