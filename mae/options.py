"""The options of `pretrain`: names, help, and how they become a configuration."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import click
import yaml

from mae.config import (
    MODELS,
    DataConfig,
    MethodConfig,
    ModelConfig,
    OptimisationConfig,
    PretrainConfig,
    RunConfig,
)
from mae.masking import METHODS

# Dashes and underscores are the same, in names and in choices.
CONTEXT: dict[str, Any] = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
GROUPS = {
    "data": DataConfig,
    "method": MethodConfig,
    "model": ModelConfig,
    "optimisation": OptimisationConfig,
    "run": RunConfig,
}
PATH = click.Path(path_type=Path)


def build_config(options: dict[str, Any]) -> PretrainConfig:
    """Options to the configuration. Raises click's usage error if their values do not fit."""
    groups = {}
    try:
        for name, group in GROUPS.items():
            fields = dataclasses.fields(group)
            groups[name] = group(**{field.name: options[field.name] for field in fields})
        return PretrainConfig(**groups)
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _read_config_file(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Take defaults from a YAML file of `option: value` lines; the command line wins."""
    if path is None:
        return
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.BadParameter(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise click.BadParameter(f"{path} has to hold lines of the form 'option: value'")
    known = {str(param.name) for param in ctx.command.params} - {"config", "check", "help"}
    defaults = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise click.BadParameter(f"{path}: unknown option {key!r}{hint}")
        if value is not None:
            defaults[name] = value
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


class _AutoOnOff(click.Choice[str]):
    """auto, on or off; YAML reads the last two as true and false."""

    def __init__(self) -> None:
        super().__init__(["auto", "on", "off"])

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Click's hook."""
        words = {True: "on", False: "off"} if isinstance(value, bool) else {}
        return super().convert(words.get(value, value), param, ctx)


def _default(name: str) -> Any:
    """The default of an option, written once, in its dataclass."""
    for group in GROUPS.values():
        for field in dataclasses.fields(group):
            if field.name == name:
                return None if field.default is dataclasses.MISSING else field.default
    raise AssertionError(name)


def _option(name: str, kind: Any, help_text: str, **more: Any) -> click.Option:
    flag = f"--{name.replace('_', '-')}"
    default = None if more.get("required") else _default(name)
    return click.Option(
        [flag, name], type=kind, default=default, show_default=default is not None,
        help=help_text, **more,
    )  # fmt: skip


def _switch(name: str, help_text: str) -> click.Option:
    flag = name.replace("_", "-")
    declaration = f"--{flag}/--no-{flag}"
    return click.Option([declaration, name], default=_default(name), help=help_text)


PRETRAIN_OPTIONS: list[click.Parameter] = [
    click.Option(
        ["--config"], type=PATH, is_eager=True, expose_value=False, callback=_read_config_file,
        help="YAML file of 'option: value' lines; the command line wins.",
    ),
    click.Option(["--check"], is_flag=True, help="Only check options, paths and checkpoints."),
    # where from, where to
    _option("in1k_dir", PATH, "Folder with train/, and perhaps val/ and masks/.", required=True),
    _option("masks_dir", PATH, "Segments: a folder or a packed store. Default: IN1K_DIR/masks."),
    _option("output_dir", PATH, "Where log and checkpoints go.", required=True),
    _option("init", PATH, "Official MAE checkpoint to start from."),
    _switch("allow_missing_segments", "Go on if most images have no segment."),
    _switch("use_unmasked_images", "Train `patches` on images without segments too."),
    _option("val_images", int, "Most images of val/ for the held-out loss."),
    # what is hidden
    _option("mask_method", click.Choice(list(METHODS)), "What is hidden from the encoder."),
    _option("coverage_ratio", float, "Wanted coverage of the segment, percent of the image."),
    _option("hide", click.Choice(["segment", "background"]), "Which side of the segment."),
    _option("mask_ratio", float, "Share of the patches that `patches` removes."),
    # the model
    _option("model", click.Choice(list(MODELS)), "Size of the encoder."),
    _option("image_size", int, "Pixels per side."),
    _option("patch_size", int, "Pixels per side of a patch. Default: the model's."),
    _option("decoder_width", int, "Width of the decoder."),
    _option("decoder_depth", int, "Blocks of the decoder."),
    _option("decoder_heads", int, "Attention heads of the decoder."),
    _switch("norm_pix_loss", "Normalise each patch of the target."),
    # optimisation
    _option("epochs", int, "Of the whole run, whose schedule this is."),
    _option("stop_after", int, "End this round after so many epochs. Default: at the end."),
    _option("warmup_fraction", float, "Share of the run in which the rate rises."),
    _option("base_lr", float, "Learning rate per 256 images."),
    _option("min_lr", float, "Learning rate at the end."),
    _option("weight_decay", float, "Of weight matrices; biases and norms have none."),
    _option("clip_grad", float, "Largest gradient norm. Default: off."),
    _option("effective_batch_size", int, "Images per step, on any number of devices."),
    _option("batch_size", int, "Most images per device at once."),
    _option("seed", int, "Of order, augmentation, masks and initial weights."),
    # how it runs
    _option("device", click.Choice(["auto", "cpu", "cuda"]), "auto: a GPU if there is one."),
    _option("precision", click.Choice(["auto", "bf16", "fp32"]), "auto: bf16 where a GPU has it."),
    _option("compile", _AutoOnOff(), "torch.compile; auto: on a GPU."),
    _option("workers", int, "Loader processes per device. Default: by the number of cores."),
    _option("resume", click.Choice(["auto", "never", "required"]), "Continue what is there?"),
    _option("save_every_minutes", float, "Also save inside an epoch."),
]  # fmt: skip
