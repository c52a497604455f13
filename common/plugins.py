"""--plugin FILE.py: masking methods or model sizes from outside of the project."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from pathlib import Path


def load_plugin(path: Path) -> None:
    """Import the file, once; what it defines registers itself. Raises ValueError if it cannot."""
    name = f"segmae_plugin_{path.resolve()}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path) if path.suffix == ".py" else None
    if spec is None or spec.loader is None:
        raise ValueError(f"--plugin {path}: give a Python file")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout may be for a program to read
            spec.loader.exec_module(module)
    # It is the user's code: whatever it raises, the user can mend; an exit would look like success.
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--plugin {path}: {type(error).__name__}: {reason}") from error
