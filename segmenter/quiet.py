"""Keep users' terminals clean while the mm libraries are imported."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Drop what mmseg and mmcv say on import about optional parts that nothing here uses.

    "Could not import OneDL" comes by print, whatever the logging level; the warnings are about
    renamed modules and operations that were not compiled.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
