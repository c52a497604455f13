"""Where this process's messages go."""

from __future__ import annotations

import logging
import os
import sys
from typing import TextIO


def rank() -> int:
    """This process among those of torchrun or Slurm, known before torch is imported."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def log_to_stderr() -> None:
    """Messages of the first process, warnings of all."""
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING if rank() else logging.INFO, handlers=[handler])


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Follows `sys.stderr`, which a progress bar replaces to print above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)
