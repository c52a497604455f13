"""The command line of `python -m mae`. Heavy libraries are imported when a command runs."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import click

from common.command import CONTEXT, PATH, command
from common.console import EXIT_STOPPED, log_to_stderr, run_program, say
from common.options import OptionGroup, option, option_facts
from engine.config import PluginConfig
from mae.config import GROUPS, PretrainConfig
from mae.download import OFFICIAL_FILES
from mae.masking import METHODS


class _Commands(click.Group):
    """Loads `masks` when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), "masks"])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name == "masks":
            return importlib.import_module("segments.cli").masks
        return super().get_command(ctx, cmd_name)


@click.group(cls=_Commands, context_settings=CONTEXT)
def cli() -> None:
    """Masked-autoencoder pretraining with random patches or Segment-Anything segments hidden."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 success, 1 failed, 2 bad input, 75 stopped by a signal."""
    run_program(cli, "python -m mae", arguments)


@command(cli, **GROUPS)
@click.option("--check", is_flag=True, help="Only check options, paths and checkpoints.")
@click.option("--json", "as_json", is_flag=True, help="With --check: print what was found.")
@click.option(
    "--will-make", is_flag=True,
    help="With --check or --time-steps: segments are packed or made before the run.",
)  # fmt: skip
@click.option(
    "--time-steps", type=click.IntRange(1), metavar="N",
    help="Time N steps, print seconds as JSON; writes nothing.",
)  # fmt: skip
def pretrain(
    check: bool, as_json: bool, will_make: bool, time_steps: int | None, **groups: Any
) -> int:
    """Pretrain a masked autoencoder, or continue: the same command goes on where it stopped."""
    config = PretrainConfig(**groups)
    if check:
        from mae.check import check_pretraining

        facts = check_pretraining(config, will_make=will_make)
        if as_json:
            say(json.dumps(facts))
        return 0
    log_to_stderr()
    if time_steps is not None:
        from mae.pretrain import time_pretraining

        seconds = time_pretraining(config, time_steps)
        if seconds is not None:
            say(json.dumps(seconds))
        return 0
    from mae.pretrain import pretrain as train

    return 0 if train(config) else EXIT_STOPPED


@dataclass(frozen=True, kw_only=True)
class _Folders(PluginConfig):
    in1k_dir: Path | None = option("Also say in which form its masks/ are.", None)
    masks_dir: Path | None = option("The same for segments elsewhere.", None)


@command(cli, folders=_Folders)
def methods(folders: _Folders) -> None:
    """Print, as JSON, the masking methods and the options of `pretrain`; for benchmark.py."""
    from segments.cli import generators
    from segments.config import STORE_NAME
    from segments.forms import form_of

    masks = folders.masks_dir or (folders.in1k_dir and folders.in1k_dir / "masks")
    segments = None
    if masks:
        form = form_of(masks)
        segments = {
            "path": str(masks),
            "form": form,
            "needs_packing": form not in ("packed store", "none"),
            "needs_making": form == "none",
            "store": str(masks / STORE_NAME),  # where training looks for it by itself
        }
    facts = {
        "methods": {
            name: {
                "uses_segments": method.uses_segments,
                "all_segments": method.all_segments,
                "settings": list(method.settings),
            }
            for name, method in METHODS.items()
        },
        "generators": {
            name: [parameter.name for parameter in generator.params]
            for name, generator in generators.commands.items()
        },
        "options": option_facts(GROUPS.values()),
        "official_checkpoints": list(OFFICIAL_FILES),
        "segments": segments,
    }
    say(json.dumps(facts))


@dataclass(frozen=True, kw_only=True)
class _ReconstructOptions(PluginConfig):
    out: Path = option("The PNG to write.")
    masks_dir: Path | None = option(
        "Packed segments of the given images, by their names; else the patterns of the fixed set "
        "serve in turn.", None
    )  # fmt: skip


@command(cli, options=_ReconstructOptions)
@click.argument("checkpoint", type=PATH)
@click.argument("images", nargs=-1, type=PATH)
def reconstruct(checkpoint: Path, images: tuple[Path, ...], options: _ReconstructOptions) -> None:
    """Draw original, what the encoder sees, prediction, and prediction pasted into the original.

    Without IMAGES: the fixed set that the checkpoint carries along.
    """
    from mae.reconstruct import reconstruct_files

    reconstruct_files(checkpoint, images, out=options.out, masks_dir=options.masks_dir)


@dataclass(frozen=True, kw_only=True)
class _ExportOptions(PluginConfig):
    out: Path = option("A .safetensors or .pth file.")


@command(cli, options=_ExportOptions)
@click.argument("checkpoint", type=PATH)
def export(checkpoint: Path, options: _ExportOptions) -> None:
    """Write the encoder as a plain 3-channel ViT, whatever the masking method was.

    Prints the line of Python that loads it with timm.
    """
    from mae.export import export_encoder

    say(export_encoder(checkpoint, options.out))


@dataclass(frozen=True, kw_only=True)
class _FetchOptions(OptionGroup):
    title: ClassVar[str] = "Options"
    model: str = option("Whose checkpoint.", choices=lambda: OFFICIAL_FILES)
    out: Path = option("Where to keep it.")
    url: str | None = option("Another source of the same file.", None)


@command(cli, options=_FetchOptions)
def fetch(options: _FetchOptions) -> None:
    """Download an official MAE checkpoint: resumable, and checked against its digest."""
    from mae.download import fetch_official

    log_to_stderr()
    fetch_official(options.model, options.out, url=options.url)
