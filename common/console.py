"""How a program ends, and where its messages go."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn, TextIO

import click

from common.interruption import end_children

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: saved; the same command goes on


def run_program(cli: click.Command, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit: 0 done, 1 failed, 2 bad input, 75 stopped by a signal.

    What a user can fix (ValueError, click's usage errors) and what the machine refuses (OSError,
    RuntimeError) end in one line. A command's return value is its exit code.
    """
    try:
        code = cli.main(args=arguments, prog_name=name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = EXIT_BAD_INPUT
    except click.ClickException as error:
        code = _report(error.format_message(), error.exit_code)
    except click.Abort:
        code = _report("interrupted", EXIT_FAILED)
    except ValueError as error:
        code = _report(str(error), EXIT_BAD_INPUT)
    except OSError as error:
        about = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        code = _report(about, EXIT_FAILED)
    except RuntimeError as error:
        logging.getLogger(__name__).debug("failed", exc_info=error)
        code = _report(str(error), EXIT_FAILED)
    finally:
        end_children()
    sys.exit(code if isinstance(code, int) else 0)


def _report(message: str, code: int) -> int:
    if message.startswith("Caught "):  # torch: an error of a loader process, with its traceback
        message = message.strip().splitlines()[-1].partition(": ")[2]
    click.echo(f"{f'process {rank()}: ' if rank() else ''}Error: {message}", err=True)
    return code


def rank() -> int:
    """This process among those of torchrun or Slurm, known before torch is imported."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)


def log_to_stderr(form: str = "%(asctime)s %(message)s") -> None:
    """Messages of the first process, warnings of all."""
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING if rank() else logging.INFO, handlers=[handler])


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Follows `sys.stderr`, which a progress bar replaces to print above itself."""

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)
