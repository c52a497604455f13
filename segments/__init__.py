"""Segments of images. Training reads a packed store of them; `forms` says what can be packed.

from segments import open_segments
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """What Python users want, loaded when asked for."""
    if name == "open_segments":
        from segments.forms import open_segments

        return open_segments
    raise AttributeError(f"module {__name__} has no {name}")
