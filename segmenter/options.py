"""The options of `train`: names, help, and how they become a configuration."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any

import click
import yaml

from segmenter.config import (
    DECODERS,
    NORMALIZATIONS,
    OPTIMIZERS,
    RANDOM,
    SCHEDULES,
    VIT_SIZES,
    ModelConfig,
    OptimisationConfig,
    ProtocolConfig,
    RunConfig,
    TrainConfig,
)

# Dashes and underscores are the same, in names and in choices.
CONTEXT: dict[str, Any] = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
PATH = click.Path(path_type=Path)
RECIPES = Path(__file__).parent / "recipes"


class Choice(click.Choice[str]):
    """A choice that is named as it is written, whatever spelling was typed."""

    def convert(self, value: Any, param: Any, ctx: Any) -> str:
        """Click's hook. YAML reads on and off as true and false."""
        words = {True: "on", False: "off"} if isinstance(value, bool) else {}
        return super().convert(words.get(value, value), param, ctx)

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """What is allowed."""
        return f"{value!r} is not one of {', '.join(self.choices)}."

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        """For --help."""
        return f"[{'|'.join(self.choices)}]"


def _option(name: str, kind: Any, help_text: str, default: Any = None) -> click.Option:
    return click.Option(
        [f"--{name.replace('_', '-')}", name],
        type=kind, default=default, show_default=default is not None, help=help_text,
    )  # fmt: skip


# Every value of a recipe is also an option; the recipe gives what is not on the command line.
RECIPE_OPTIONS: list[click.Option] = [
    _option("epochs", int, "Epochs of the run."),
    _option("batch_size", int, "Images per step, on all devices together."),
    _option("optimizer", Choice(OPTIMIZERS), "How the weights are updated."),
    _option("lr", float, "Peak learning rate."),
    _option("momentum", float, "Momentum of SGD, first beta of AdamW."),
    _option("weight_decay", float, "Of weight matrices."),
    _option("layer_decay", float, "A block's rate is the next one's times this; 1: all alike."),
    _option("schedule", Choice(SCHEDULES), "How the rate falls."),
    _option("poly_power", float, "Power of the poly schedule."),
    _option("min_lr", float, "Learning rate at the end."),
    _option("warmup_fraction", float, "Share of the run in which the rate rises."),
    _option("clip_grad", float, "Largest gradient norm."),
    _option("decoder", Choice(DECODERS), "What turns tokens into classes."),
    _option("decoder_layers", int, "Blocks of the mask transformer."),
    _option("drop_path", float, "Stochastic depth of the encoder."),
    _option("dropout", float, "Dropout of the encoder."),
    _option("decoder_drop_path", float, "Stochastic depth of the decoder."),
    _option("decoder_dropout", float, "Dropout of the decoder."),
    _option("normalization", Choice(NORMALIZATIONS), "Mean and deviation of the pixels."),
    _option("image_size", int, "Scale of the images: short side; the long side is at most 4x it."),
    _option("crop_size", int, "Side of the training crops."),
    _option("window_size", int, "Side of the sliding window."),
    _option("window_stride", int, "Step of the sliding window."),
    _option("eval_every", int, "Epochs between evaluations; the last epoch is always evaluated."),
]
OPTIONAL_IN_RECIPE = ("clip_grad",)


def read_recipe(name: str) -> dict[str, Any]:
    """The values of a recipe, given by name or as a YAML file. Raises click's usage errors."""
    path = Path(name) if name.endswith((".yml", ".yaml")) else RECIPES / f"{name}.yml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.yml")))
        raise click.UsageError(f"--recipe is {name!r}; choose one of {known}, or give a YAML file")
    options: dict[str, click.Option] = {str(option.name): option for option in RECIPE_OPTIONS}
    values = read_flat_yaml(path, set(options))
    for key, value in values.items():
        try:
            kind = options[key].type
            if isinstance(kind, Choice):
                value = str(value).replace("-", "_")
            values[key] = kind.convert(value, options[key], None)
        except click.BadParameter as error:
            raise click.UsageError(f"{path}: {key}: {error.message}") from error
    missing = [key for key in options if key not in values and key not in OPTIONAL_IN_RECIPE]
    if missing:
        raise click.UsageError(f"{path} lacks {', '.join(missing)}")
    return values


def read_flat_yaml(path: Path, known: set[str]) -> dict[str, Any]:
    """`option: value` lines with keys in either spelling. Raises click's usage errors."""
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise click.UsageError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise click.UsageError(f"{path} has to hold lines of the form 'option: value'")
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"{path}: unknown option {key!r}{hint}")
        if value is not None:
            values[name] = value
    return values


def build_config(options: dict[str, Any]) -> TrainConfig:
    """Options, completed by the recipe, to the configuration. Raises click's usage errors."""
    values = read_recipe(options["recipe"])
    values |= {name: value for name, value in options.items() if value is not None}
    values["init"] = _init_path(values["init"])
    values["recipe"] = Path(values["recipe"]).stem
    groups = {
        "model": ModelConfig,
        "optimisation": OptimisationConfig,
        "protocol": ProtocolConfig,
        "run": RunConfig,
    }
    try:
        built: dict[str, Any] = {
            name: group(**_of_group(group, values)) for name, group in groups.items()
        }
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    return TrainConfig(**built)


def _of_group(group: Any, values: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(group)]
    return {name: values[name] for name in names if name in values}


def _init_path(init: str) -> Path | None:
    if init == RANDOM:
        return None
    path = Path(init)
    if not path.is_file():
        raise click.UsageError(f"--init {init} does not exist; give a checkpoint, or {RANDOM}")
    return path


def _read_config_file(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> None:
    """Take defaults from a YAML file of `option: value` lines; the command line wins."""
    if path is not None:
        known = {str(param.name) for param in ctx.command.params} - {"config", "check", "help"}
        ctx.default_map = {**(ctx.default_map or {}), **read_flat_yaml(path, known)}


def config_option() -> click.Option:
    """`--config FILE.yml`."""
    return click.Option(
        ["--config"], type=PATH, is_eager=True, expose_value=False, callback=_read_config_file,
        help="YAML file of 'option: value' lines; the command line wins.",
    )  # fmt: skip


DEVICE_OPTIONS: list[click.Option] = [
    _option("workers", int, "Loader processes per device.  [default: by the number of cores]"),
    _option("device", Choice(["auto", "cpu", "cuda"]), "auto: a GPU if there is one.", "auto"),
    _option("precision", Choice(["auto", "bf16", "fp32"]), "auto: bf16 on a GPU.", "auto"),
]
TRAIN_OPTIONS: list[click.Parameter] = [
    config_option(),
    click.Option(["--check"], is_flag=True, help="Only check options, paths and checkpoints."),
    click.Option(
        ["--dataset"], type=PATH, required=True,
        help="ADEChallengeData2016 folder, or the YAML file of a dataset.",
    ),
    click.Option(
        ["--init"], required=True, help="Checkpoint of the encoder, or 'random'.", metavar="FILE"
    ),
    click.Option(["--output-dir"], type=PATH, required=True, help="Where everything goes."),
    _option("model", Choice(list(VIT_SIZES)), "Size of the encoder.", "vit_large"),
    _option("patch_size", int, "Pixels per side.  [default: the checkpoint's, else the model's]"),
    _option("recipe", str, "segmenter, mae, fast, or a YAML file.", "segmenter"),
    *RECIPE_OPTIONS,
    _option("seed", int, "Of order, augmentation, dropout and initial weights.", 0),
    _option("eval_seeds", int, "Finetune with so many seeds; report mean and deviation.", 1),
    _option("device_batch_size", int, "Most images per device at once.  [default: no limit]"),
    _option("eval_batch_size", int, "Images whose windows are evaluated together.", 4),
    *DEVICE_OPTIONS,
    _option("compile", Choice(["auto", "on", "off"]), "auto: on a GPU.", "auto"),
    _option("resume", Choice(["auto", "never", "required"]), "Continue a run?", "auto"),
    _option("save_every_minutes", float, "Also save inside an epoch."),
]  # fmt: skip
