"""The command line of `python -m mae`. Heavy libraries are imported when a command runs."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from mae.options import CONTEXT, PRETRAIN_OPTIONS, build_config

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2


class _Commands(click.Group):
    """Loads `masks` when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "masks"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "masks":
            return importlib.import_module("mae.segments.cli").masks
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings=CONTEXT)
def cli() -> None:
    """Masked-autoencoder pretraining with random patches or Segment-Anything segments hidden."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 success, 1 failed, 2 bad input, 75 stopped by a signal."""
    try:
        code = cli.main(args=arguments, prog_name="python -m mae", standalone_mode=False)
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
    rank = _rank()
    if message.startswith("Caught "):  # an error of a loader process comes with its traceback
        message = message.strip().splitlines()[-1].partition(": ")[2]
    click.echo(f"{f'process {rank}: ' if rank else ''}Error: {message}", err=True)
    return code


def _pretrain(check: bool, **options: Any) -> int:
    """Pretrain a masked autoencoder, or continue: the same command goes on where it stopped."""
    config = build_config(options)
    if check:
        from mae.precheck import check_pretraining

        check_pretraining(config)
        return 0
    from mae.interruption import EXIT_INTERRUPTED
    from mae.train import pretrain

    _log_to_stderr()
    return 0 if pretrain(config) else EXIT_INTERRUPTED


cli.add_command(
    click.Command(
        "pretrain",
        callback=_pretrain,
        params=PRETRAIN_OPTIONS,
        help=_pretrain.__doc__,
        context_settings=CONTEXT,
    )
)


@cli.command(context_settings=CONTEXT)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("images", nargs=-1, type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The PNG to write.")
@click.option(
    "--masks-dir",
    type=click.Path(path_type=Path),
    help="Segments of the given images, by their names; else those of the fixed set serve in turn.",
)
def reconstruct(
    checkpoint: Path, images: tuple[Path, ...], out: Path, masks_dir: Path | None
) -> None:
    """Draw original, what the encoder sees, prediction, and prediction pasted into the original.

    Without IMAGES: the fixed set that the checkpoint carries along.
    """
    from mae.reconstruct import reconstruct_files

    reconstruct_files(checkpoint, images, out=out, masks_dir=masks_dir)


@cli.command(context_settings=CONTEXT)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), required=True, help="A .safetensors or .pth file."
)
@click.option(
    "--naming",
    type=click.Choice(["timm", "official"]),
    default="timm",
    show_default=True,
    help="Names of the weights.",
)
def export(checkpoint: Path, out: Path, naming: str) -> None:
    """Write the encoder as a plain 3-channel ViT, whatever the masking method was."""
    from mae.export import export_encoder

    export_encoder(checkpoint, out, naming)


@cli.command(context_settings=CONTEXT)
@click.option("--model", type=click.Choice(["vit_base", "vit_large", "vit_huge"]), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Where to keep it.")
@click.option("--url", help="Another source of the same file.")
def fetch(model: str, out: Path, url: str | None) -> None:
    """Download an official MAE checkpoint: resumable, and checked against its digest."""
    from mae.download import fetch_official

    fetch_official(model, out, url=url)


def _log_to_stderr() -> None:
    level = logging.WARNING if _rank() else logging.INFO
    logging.basicConfig(
        level=level, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", handlers=[_ToStderr()]
    )


class _ToStderr(logging.Handler):
    """Writes to whatever stderr is at the moment: a progress bar puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), file=sys.stderr)


def _rank() -> int:
    """This process among those of torchrun or Slurm, known before torch is imported."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or 0)
