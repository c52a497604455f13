"""Names of the files in an output directory. No torch here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LOG = "log.txt"
CHECKPOINT = "checkpoint.pth"
BEST = "best.pth"
PREDICTIONS = "predictions.png"
PROGRESS = "progress.json"
RESULT = "result.json"
BOARD = "tensorboard"


def seed_dir(output_dir: Path, seed: int) -> Path:
    """Where one of several finetunings goes."""
    return output_dir / f"seed-{seed}"


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write beside and rename, so that a reader sees the old file or the new one."""
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write beside and rename."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


def read_result(output_dir: Path) -> dict[str, Any] | None:
    """result.json of a finished run, None if there is none. Raises ValueError if it is broken."""
    path = output_dir / RESULT
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(result, dict) or "settings" not in result:
        raise ValueError(f"{path} is not a result of `python -m segmenter train`")
    return result
