"""How a program ends, where its messages go, and what a table looks like there."""

import atexit
import errno
import gc
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn, TextIO

import click

from common.environment import rank
from common.files import shortened
from common.interruption import end_children

# 75 is EX_TEMPFAIL: saved; the same command goes on.
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_STOPPED = 1, 2, 75
MOST_LINES = 4  # of an error
MOST_LETTERS = 900  # of a line
OF_THE_PATH = (errno.EACCES, errno.ELOOP, errno.ENAMETOOLONG)  # what a user can mend


def run_program(cli: click.Command, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit: 0 done, 1 failed, 2 bad input, 75 stopped by a signal.

    What a user can fix (ValueError, click's usage errors, a path that leads nowhere) and what the
    machine refuses (other OSErrors, RuntimeError) end in one line. A command's return value is its exit code.
    """
    _open_standard_streams()
    atexit.register(gc.freeze)  # to look for garbage in all of torch takes a second of the exit
    try:
        code = cli.main(args=arguments, prog_name=name, standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()  # the help itself, not a line about it
        code = EXIT_BAD_INPUT
    except click.ClickException as error:
        code = _report(error.format_message(), error.exit_code)
    except ValueError as error:
        code = _report(str(error), EXIT_BAD_INPUT)
    except OSError as error:
        about = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        code = _report(about, EXIT_BAD_INPUT if error.errno in OF_THE_PATH else EXIT_FAILED)
    except RuntimeError as error:  # click's Abort is one that says nothing
        code = _report(str(error) or "interrupted", EXIT_FAILED)
    finally:
        end_children()
        # Processes that end while they are connected abort now and then, after all work is done.
        distributed = sys.modules.get("torch.distributed")
        if distributed and distributed.is_available() and distributed.is_initialized():
            distributed.destroy_process_group()
    lost = _close_output()
    sys.exit(code if isinstance(code, int) and code else EXIT_FAILED if lost else 0)


@contextmanager
def heavy_imports() -> Iterator[None]:
    """Without looking for garbage: what torch makes while it is imported stays, 700,000 objects."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _report(message: str, code: int) -> int:
    lines = message.strip().splitlines()
    if message.startswith("Caught "):  # torch: an error of a loader process, with its traceback
        lines = [lines[-1].partition(": ")[2]]
    message = _shown("\n".join(lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."]))
    with suppress(OSError, ValueError):  # nobody may be listening; the exit code says it, too
        click.echo(f"{f'process {rank()}: ' if rank() else ''}Error: {message}", err=True)
    return code


def _shown(text: str) -> str:
    """Lines that are not too long, and do nothing to a terminal: names in them are other people's."""
    return "\n".join(shortened(line, MOST_LETTERS) for line in text.splitlines())


def say(message: str, *, err: bool = False) -> None:
    """Print, if somebody still listens: long work does not end with a terminal or a pipe."""
    try:
        click.echo(message, err=err)
    except BrokenPipeError:
        _turn_away(sys.stderr if err else sys.stdout)


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Lines with columns of equal width; `right` are those that end alike."""
    rows = [[shortened(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'>' if i in right else '<'}{width}}}" for i, width in enumerate(widths))
    return "\n".join(form.format(*row).rstrip() for row in rows)


def _open_standard_streams() -> None:
    # A program may be started without them; a file would then get their numbers, and their text:
    # https://docs.python.org/3/library/sys.html#sys.__stdin__
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r+" if number else "r"))  # noqa: PTH123, SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show is no error
            stream.reconfigure(errors="backslashreplace")


def _turn_away(stream: TextIO) -> None:
    # What is still to be written to a stream that is gone shall vanish.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _close_output() -> bool:
    """Whether output was lost; a reader that has gone did not want it."""
    lost = False
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError) as error:
            lost = lost or not isinstance(error, BrokenPipeError)
            _turn_away(stream)  # or Python would try again, and exit with 120
    return lost


def log_to_stderr(form: str = "%(asctime)s %(message)s") -> None:
    """Messages of the first process, warnings of all."""
    handler = _CurrentStderr()
    handler.setFormatter(logging.Formatter(form, datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING if rank() else logging.INFO, handlers=[handler])


class _CurrentStderr(logging.StreamHandler[TextIO]):
    """Follows `sys.stderr`, which a progress bar replaces to print above itself."""

    def format(self, record: logging.LogRecord) -> str:
        return _shown(super().format(record))

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(sys.stderr)
        super().emit(record)
