"""The command line of `python -m mae`. Heavy libraries are imported when a command runs."""

import textwrap
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import click

from common.command import CONTEXT, PATH, command, dry_run
from common.console import EXIT_STOPPED, aligned, heavy_imports, log_to_stderr, run_program, say
from common.environment import world_size
from common.files import check_output_file
from common.options import OptionGroup, option
from engine.config import PluginConfig
from engine.vit import IMAGE_CHANNELS
from mae.config import GROUPS, OFFICIAL_FILES, PretrainConfig
from mae.masking import METHODS
from mae.pack import PackOptions, pack_images

RELEASE = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_{}.pth"


@click.group(context_settings=CONTEXT)
def cli() -> None:
    """Masked-autoencoder pretraining with random patches or Segment-Anything segments hidden."""


main = partial(run_program, cli, "python -m mae")


@command(cli, **GROUPS)
@dry_run("check", "time")
def pretrain(dry_run: str | None, **groups: Any) -> int:
    """Pretrain a masked autoencoder, or continue: the same command goes on where it stopped."""
    config = PretrainConfig(**groups)
    if dry_run == "check":
        from mae.check import check_pretraining, look_inside

        known: dict[Any, Any] = {}  # the images are listed once
        check_pretraining(config, processes=world_size(), known=known)
        look_inside(config, known)
        return 0
    log_to_stderr()  # stdout is for the seconds
    with heavy_imports():
        from engine.trainer import time_training
        from mae.pretrain import Pretraining
        from mae.pretrain import pretrain as train
    if dry_run == "time":
        time_training(Pretraining(config))
        return 0
    return 0 if train(config) else EXIT_STOPPED


@cli.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("words", nargs=-1, type=click.UNPROCESSED)
def masks(words: tuple[str, ...]) -> None:
    """Another name of `python -m segments`."""
    from segments.cli import main as of_segments

    of_segments(words)


@command(cli, plugin=PluginConfig)
def methods(plugin: PluginConfig) -> None:
    """Show the masking methods, those of --plugin included, and the options of each."""
    rows = [("method", "segments", "tokens", "channels", "options of pretrain")]
    for name, method in METHODS.items():
        segments = "all" if method.all_segments else "one" if method.uses_segments else "-"
        tokens, channels = "some" if method.removes_tokens else "all", method.extra_channels
        options = " ".join(f"--{option.replace('_', '-')}" for option in method.settings)
        first, *more = textwrap.wrap(options, 50, break_on_hyphens=False) or [""]
        rows.append((name, segments, tokens, str(IMAGE_CHANNELS + channels), first))
        rows += [("", "", "", "", line) for line in more]
    say(aligned(rows))
    say("\nsegments: of an image that a pattern is drawn from; tokens, channels: the encoder's")
    for name, method in METHODS.items():
        # A plugin's class need not have a docstring.
        said = (method.__doc__ or "").partition("\n")[0]
        say(textwrap.fill(f"{name}: {said}", 100, subsequent_indent="  "))


@dataclass(frozen=True, kw_only=True)
class _ReconstructOptions(PluginConfig):
    out: Path = option("The PNG to write.")
    masks_dir: Path | None = option(
        "Packed segments of the images. Default: patterns of the fixed set, in turn.", None
    )


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
    out: Path = option("A .safetensors or .pth file; with --to, a folder.")
    to: Literal["timm", "transformers", "mmseg"] | None = option(
        "Write the folder that this library loads, with a model card.", None
    )
    license: str | None = option("Of the weights, for the model card, as the hub calls it: mit, ...", None)
    push: str | None = option(
        "Upload the folder to this repository of the Hugging Face hub, OWNER/NAME.", None
    )

    def __post_init__(self) -> None:
        if self.to is None and (self.push or self.license):
            raise ValueError("--push and --license are about a folder: say for which library by --to")


@command(cli, options=_ExportOptions)
@click.argument("checkpoint", type=PATH)
def export(checkpoint: Path, options: _ExportOptions) -> None:
    """Write the encoder as a plain 3-channel ViT, whatever the masking method was.

    Prints the lines of Python that load it.
    """
    if options.to is None:
        from mae.weights import export_encoder

        say(export_encoder(checkpoint, options.out))
    else:
        from mae.export import export_folder

        more = {"licence": options.license, "push": options.push}
        say(export_folder(checkpoint, options.to, options.out, **more))


@cli.group(context_settings=CONTEXT)
def images() -> None:
    """Prepare the images of a dataset."""


@dataclass(frozen=True, kw_only=True)
class _ShardsOptions(OptionGroup):
    title: ClassVar[str] = "Output"
    out: Path = option("Folder of the shards, such as PACKED/train: they are called after it.")


@command(images, "pack", output=_ShardsOptions, options=PackOptions)
@click.argument("source", type=PATH)
def pack_command(source: Path, output: _ShardsOptions, options: PackOptions) -> int:
    """Pack images of class folders, tars, or parquet files of imagenet-1k into WebDataset shards.

    With --short-side they are shrunk once. The same command goes on if interrupted.
    """
    log_to_stderr("%(message)s")
    packed = pack_images(source, output.out, options)
    if packed is not None:
        say(packed)
    return EXIT_STOPPED if packed is None else 0


@dataclass(frozen=True, kw_only=True)
class _FetchOptions(OptionGroup):
    title: ClassVar[str] = "Options"
    model: str = option("Whose checkpoint.", choices=lambda: OFFICIAL_FILES)
    out: Path = option("Where to keep it.")
    url: str | None = option("Another source of the same file.", None)


@command(cli, options=_FetchOptions)
def fetch(options: _FetchOptions) -> None:
    """Download an official MAE checkpoint: resumable, and checked against its digest."""
    from common.download import download, has_digest

    log_to_stderr()
    digest, out = OFFICIAL_FILES[options.model], options.out
    check_output_file(out)
    if not out.exists():
        download([options.url or RELEASE.format(options.model)], out, digest=digest)
    elif not has_digest(out, digest):
        raise ValueError(f"{out} exists, and its digest does not begin with {digest}")
    else:
        say(f"{out} is there already", err=True)
