"""What a machine needs to compile, and processes that have to agree on where they go on."""

import shutil
import sysconfig

from common import devices


def test_compiling_needs_a_compiler_and_pythons_header(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}" if name else None)
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert devices.lacks_to_compile() == ""
    (tmp_path / "Python.h").unlink()
    assert "Python.h (Debian: python3-dev)" in devices.lacks_to_compile()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "gcc" in devices.lacks_to_compile()
