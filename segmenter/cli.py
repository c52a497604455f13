"""The command line of `python -m segmenter`. Heavy libraries are imported when a command runs."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

import click

from segmenter.commands import evaluate, predict, prepare
from segmenter.console import log_to_stderr, rank
from segmenter.options import CONTEXT, TRAIN_OPTIONS, build_config

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2


@click.group(context_settings=CONTEXT)
def cli() -> None:
    """Finetune a ViT for semantic segmentation, score it, and predict with it."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 success, 1 failed, 2 bad input, 75 stopped by a signal."""
    try:
        code = cli.main(args=arguments, prog_name="python -m segmenter", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = EXIT_BAD_INPUT
    except click.ClickException as error:
        code = _report(error.format_message(), error.exit_code)
    except click.Abort:
        code = _report("interrupted", EXIT_FAILED)
    except ValueError as error:
        code = _report(str(error), EXIT_BAD_INPUT)
    except (RuntimeError, OSError) as error:
        logging.getLogger(__name__).debug("failed", exc_info=error)
        code = _report(str(error), EXIT_FAILED)
    sys.exit(code if isinstance(code, int) else 0)


def _report(message: str, code: int) -> int:
    prefix = f"process {rank()}: " if rank() else ""
    click.echo(f"{prefix}Error: {message}", err=True)
    return code


def _train(check: bool, **options: Any) -> int:
    """Finetune, or continue: the same command goes on where it stopped."""
    config = build_config(options)
    from segmenter.precheck import check_training, is_finished

    check_training(config)
    if check or is_finished(config):
        return 0
    from segmenter.interruption import EXIT_INTERRUPTED
    from segmenter.train import finetune

    log_to_stderr()
    return 0 if finetune(config) else EXIT_INTERRUPTED


cli.add_command(
    click.Command(
        "train",
        callback=_train,
        params=TRAIN_OPTIONS,
        help=_train.__doc__,
        context_settings=CONTEXT,
    )
)
for command in (evaluate, predict, prepare):
    cli.add_command(command)
