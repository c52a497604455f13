"""How programs begin and end."""

import gc
import subprocess
import sys

import pytest

from common.console import heavy_imports


def test_garbage_is_looked_for_again_after_heavy_imports_that_fail_too(monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    with heavy_imports():
        assert not gc.isenabled()
    assert gc.isenabled()
    with pytest.raises(ImportError), heavy_imports():
        raise ImportError
    assert gc.isenabled()


def test_what_heavy_imports_made_is_not_looked_at_again():
    """In a process of its own: what is frozen stays."""
    script = (
        "import gc, sys; from common.console import heavy_imports\n"
        "with heavy_imports(): made = [[] for _ in range(100_000)]; sys.modules['torch'] = gc\n"
        "frozen = gc.get_freeze_count(); assert frozen > 100_000, frozen\n"
        "with heavy_imports(): more = [[] for _ in range(100_000)]\n"  # nothing is left to import
        "assert gc.get_freeze_count() <= frozen\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
