"""Segments of images, in whatever form they are kept; see `open_segments`."""

from pathlib import Path

from mae.segments.forms import SegmentSource, open_folder
from mae.segments.segment import Segment

__all__ = ["Segment", "SegmentSource", "open_segments"]


def open_segments(masks_dir: Path) -> SegmentSource:
    """Open a folder of segments, whatever its form.

    Raises ValueError, in one line, if there are none.
    """
    if not masks_dir.is_dir():
        raise ValueError(f"{masks_dir} is no folder of segments")
    return open_folder(masks_dir)
