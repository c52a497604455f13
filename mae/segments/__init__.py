"""Segments of images. Training reads a packed store of them; `forms` says what can be packed."""

from mae.segments.forms import form_of, open_segments
from mae.segments.segment import Segment
from mae.segments.store import PackedStore

__all__ = ["PackedStore", "Segment", "form_of", "open_segments"]
