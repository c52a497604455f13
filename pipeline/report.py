"""report.html."""

from __future__ import annotations

from pathlib import Path


def write_report(folders: list[Path], page: Path) -> None:
    """Placeholder until the report is written."""
