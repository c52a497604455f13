"""The flags of a run: click options, the YAML file behind them, and the settings they become."""

from __future__ import annotations

import difflib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import yaml

from pipeline import settings as s

SECTIONS = ("pretrain", "finetune", "sbatch")  # a YAML file's nested parts, KEY=VALUE on the line


def normalize(token: str) -> str:
    """Makes - and _ equal in option names and choice values."""
    return token.replace("_", "-")


class Commands(click.Group):
    """A click group whose errors are one line, without the usage text before it."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Click's entry: runs and exits; a user's error has exit code 2."""
        extra["standalone_mode"] = False
        try:
            sys.exit(super().main(*args, **extra))
        except click.ClickException as error:
            click.echo(f"Error: {error.format_message()}", err=True)
            sys.exit(error.exit_code)
        except click.Abort:
            sys.exit(130)


class CommaList(click.ParamType):
    """Values separated by commas, or a list in YAML; becomes a tuple."""

    def __init__(self, item: type, choices: tuple[str, ...] = ()) -> None:
        self.item = item
        self.choices = {normalize(choice): choice for choice in choices}
        self.name = f"{item.__name__},..."

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[Any, ...]:
        """Click's hook: text, number or list to a tuple of `item`."""
        parts = value if isinstance(value, list | tuple) else str(value).split(",")
        return tuple(self._one(str(part).strip(), param, ctx) for part in parts)

    def _one(self, text: str, param: Any, ctx: Any) -> Any:
        if self.choices:
            if normalize(text) not in self.choices:
                self.fail(f"{text!r} is not one of {', '.join(self.choices.values())}", param, ctx)
            return self.choices[normalize(text)]
        try:
            return self.item(text)
        except ValueError:
            self.fail(f"{text!r} is not a {self.item.__name__}", param, ctx)


class AbsolutePath(click.ParamType):
    """A path that may be written with ~; becomes absolute.

    keep_links: symbolic links stay as they are, so that data may move behind them.
    """

    name = "path"

    def __init__(self, *, keep_links: bool = False) -> None:
        self.keep_links = keep_links

    def convert(self, value: Any, param: Any, ctx: Any) -> Path:
        """Click's hook: text to an absolute path (it need not exist)."""
        path = Path(value).expanduser()
        return Path(os.path.abspath(path)) if self.keep_links else path.resolve()  # noqa: PTH100


_PATH, _DATA_PATH = AbsolutePath(), AbsolutePath(keep_links=True)


class _PlainLoader(yaml.SafeLoader):
    """YAML 1.2 as far as it matters: `compile: off` and `time: 24:00:00` stay words."""


_PLAIN = {
    "bool": (r"true|True|false|False", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        "-+.0123456789",
    ),
}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in _PLAIN]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, (_form, _first) in _PLAIN.items():
    _PlainLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_form})$"), list(_first)
    )


def _load_config(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """--config: the file's top level becomes the options' defaults, its sections are kept aside."""
    if value is None:
        return None
    try:
        loaded = yaml.load(value.read_text(encoding="utf-8"), _PlainLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise click.UsageError(f"--config {value} cannot be read: {reason}") from None
    if not isinstance(loaded, Mapping):
        raise click.UsageError(f"--config {value} has to hold `option: value` lines")
    names = {normalize(p.name): p.name for p in ctx.command.params if p.name and p.name != "config"}
    defaults: dict[str, Any] = {}
    for key, given in loaded.items():
        name = names.get(normalize(str(key)))
        if name is None:
            near = difflib.get_close_matches(normalize(str(key)), names, n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise click.UsageError(f"--config {value}: there is no option {key!r}{hint}")
        if name in defaults or name in ctx.meta.get("sections", {}):
            raise click.UsageError(f"--config {value} gives {key} twice")
        if name in SECTIONS:
            if not isinstance(given, Mapping):
                raise click.UsageError(f"--config {value}: {key} has to hold `option: value` lines")
            section = {str(k).replace("-", "_"): v for k, v in given.items()}
            ctx.meta.setdefault("sections", {})[name] = section
        else:
            defaults[name] = given
    ctx.default_map = defaults
    return value


def _key_values(ctx: click.Context, param: click.Parameter, value: Any) -> dict[str, object]:
    """KEY=VALUE options over the YAML file's section of the same name."""
    merged = dict(ctx.meta.get("sections", {}).get(param.name, {}))
    for text in value:
        key, equals, given = text.partition("=")
        if not equals or not key:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", ctx, param)
        merged[key.strip().lstrip("-").replace("-", "_")] = yaml.load(given, _PlainLoader)
    return merged


_OPTIONS = [
    click.option("--config", type=_PATH, is_eager=True, callback=_load_config,
                 help="YAML file with any of these options; the command line wins."),
    click.option("--in1k-dir", type=_DATA_PATH, help="Images: train/, perhaps val/ and masks/."),
    click.option("--masks-dir", type=_DATA_PATH, help="Segments.  [default: IN1K-DIR/masks]"),
    click.option("--ade20k-dir", type=_DATA_PATH, help="ADEChallengeData2016, to evaluate on."),
    click.option("--eval-dataset", type=_DATA_PATH, help="YAML file of another dataset."),
    click.option("--output-dir", type=_PATH, default=".", show_default=True),
    click.option("--mask-method", type=CommaList(str, s.METHODS), default="four_channels",
                 show_default=True, help=f"One or several of {', '.join(s.METHODS)}."),
    click.option("--coverage-ratio", type=CommaList(float), default="15", show_default=True,
                 help="Wanted share of the image to hide, in percent; one or several."),
    click.option("--seed", type=CommaList(int), default="0", show_default=True,
                 help="One or several."),
    click.option("--model", default="vit_large", show_default=True, help="Encoder."),
    click.option("--pretrain-epochs", type=int, default=50, show_default=True),
    click.option("--eval-freq", type=int, default=5, show_default=True,
                 help="Evaluate every so many epochs, and at the end."),
    click.option("--eval-epochs", type=CommaList(int),
                 help="Evaluate at these instead; 0 = before pretraining."),
    click.option("--recipe", default="segmenter", show_default=True, help="Finetuning recipe."),
    click.option("--stack", is_flag=True, help="Start from the official MAE checkpoint."),
    click.option("--mae-checkpoint", type=_DATA_PATH, help="A local copy of it, else downloaded."),
    click.option("--eval", "eval_only", metavar="N|scratch|mae",
                 help="Evaluate only the checkpoint after N epochs, a random or the MAE ViT."),
    click.option("--num-gpus", type=int, help="GPUs per machine, 0 = CPU.  [default: all]"),
    click.option("--num-processes", type=int, help="With --num-gpus 0.  [default: 1]"),
    click.option("--eval-gpus", type=CommaList(int),
                 help="Evaluate on these, such as 6,7, beside pretraining on the others."),
    click.option("--overlap", is_flag=True, help="Evaluate beside pretraining on the CPU too."),
    click.option("--pretrain", multiple=True, callback=_key_values, metavar="KEY=VALUE",
                 help="An option of python -m mae pretrain."),
    click.option("--finetune", multiple=True, callback=_key_values, metavar="KEY=VALUE",
                 help="An option of python -m segmenter train."),
    click.option("--keep-going/--fail-fast", default=True, show_default=True,
                 help="After a failed step, go on with what does not need it."),
    click.option("--launcher", type=click.Choice(["local", "slurm"]), default="local",
                 show_default=True),
    click.option("--nodes", type=int, default=1, show_default=True, help="Slurm: per step."),
    click.option("--gpus-per-node", type=int, help="Slurm, 0 = CPU.  [default: --num-gpus]"),
    click.option("--partition", help="Slurm."),
    click.option("--time", help="Slurm: limit of a job, which then continues in a new one."),
    click.option("--qos", help="Slurm."),
    click.option("--sbatch", multiple=True, callback=_key_values, metavar="KEY=VALUE",
                 help="Slurm: a further sbatch parameter."),
    click.option("--wait", is_flag=True, help="Slurm: follow the jobs to their end."),
]  # fmt: skip


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the flags of a run, in the order of --help."""
    for option in reversed(_OPTIONS):
        function = option(function)
    return function


def settings_from(given: Mapping[str, Any]) -> s.Settings:
    """The checked settings; raises click.UsageError for what a user can fix."""
    try:
        return _settings(given)
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _settings(given: Mapping[str, Any]) -> s.Settings:
    eval_only = given["eval_only"]
    if given["in1k_dir"] is None and eval_only is None:
        raise ValueError("--in1k-dir is missing: the folder with train/ and masks/")
    if given["ade20k_dir"] and given["eval_dataset"]:
        raise ValueError("give --ade20k-dir or --eval-dataset, not both")
    eval_dataset = given["ade20k_dir"] or given["eval_dataset"]
    if eval_dataset is None:
        raise ValueError("--ade20k-dir (or --eval-dataset FILE.yml) is missing")
    points = given["eval_epochs"]
    if points is None:
        points = s.eval_points(given["pretrain_epochs"], given["eval_freq"])
        if given["pretrain_epochs"] % given["eval_freq"] and given["eval_only"] is None:
            click.echo(
                f"Note: {given['pretrain_epochs']} epochs are not a multiple of --eval-freq "
                f"{given['eval_freq']}: a shorter last round ends at {points[-1]}",
                err=True,
            )
    _refuse_what_the_plan_sets(given)
    _mention_what_is_not_used(given)
    schedule, pretrain = _split_schedule(given["pretrain"])
    return s.Settings(
        output_dir=given["output_dir"],
        data=s.Data(
            in1k_dir=given["in1k_dir"] or Path(),
            masks_dir=given["masks_dir"],
            eval_dataset=eval_dataset,
        ),
        experiment=s.Experiment(
            mask_methods=given["mask_method"],
            coverage_ratios=given["coverage_ratio"],
            seeds=given["seed"],
            model=given["model"].replace("-", "_"),
            pretrain_epochs=given["pretrain_epochs"],
            eval_epochs=tuple(sorted(points)),
            recipe=_recipe(given["recipe"]),
            stack=given["stack"],
            mae_checkpoint=given["mae_checkpoint"],
            eval_only=eval_only,
        ),
        schedule=schedule,
        compute=_compute(given),
        cluster=s.Cluster(
            nodes=given["nodes"],
            gpus_per_node=given["gpus_per_node"],
            partition=given["partition"],
            time=given["time"],
            qos=given["qos"],
            sbatch=given["sbatch"],
            wait=given["wait"],
        ),
        launcher=given["launcher"],
        keep_going=given["keep_going"],
        pretrain=pretrain,
        finetune=given["finetune"],
    )


# Options of the parts that have a flag of their own here, or follow from the plan.
_PLANNED = {
    "pretrain": {
        "in1k_dir": "--in1k-dir", "masks_dir": "--masks-dir", "mask_method": "--mask-method",
        "coverage_ratio": "--coverage-ratio", "model": "--model", "epochs": "--pretrain-epochs",
        "seed": "--seed", "init": "--stack", "device": "--num-gpus", "output_dir": "--output-dir",
        "stop_after": "--eval-epochs",
    },
    "finetune": {
        "dataset": "--ade20k-dir or --eval-dataset", "model": "--model",
        "seed": "--seed", "device": "--num-gpus", "output_dir": "--output-dir",
        "init": "--mask-method, --stack or --eval",
    },
}  # fmt: skip


def _refuse_what_the_plan_sets(given: Mapping[str, Any]) -> None:
    for section, flags in _PLANNED.items():
        for key in given[section].keys() & flags.keys():
            raise ValueError(f"--{section} {key}=... would contradict the plan; use {flags[key]}")
    if given["mae_checkpoint"] and not given["stack"] and given["eval_only"] != "mae":
        raise ValueError("--mae-checkpoint is of use only with --stack or --eval mae; add one")


def _mention_what_is_not_used(given: Mapping[str, Any]) -> None:
    """What may well stand in a file for several machines, but does nothing now."""
    names = ("gpus_per_node", "partition", "time", "qos", "sbatch", "wait")
    unused = [name for name in names if given[name]] + ["nodes"] * (given["nodes"] > 1)
    if given["launcher"] == "local" and unused:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unused)
        click.echo(f"Note: {flags}: only used with --launcher slurm", err=True)
    small = [ratio for ratio in given["coverage_ratio"] if 0 < ratio < 1]
    if small:
        click.echo(f"Note: --coverage-ratio is in percent: {small[0]:g} % of the image", err=True)


def _recipe(given: str) -> str:
    """A recipe's name as it is; a YAML file's path absolute, because the parts run elsewhere."""
    is_file = given.endswith((".yml", ".yaml"))
    return str(Path(given).expanduser().resolve()) if is_file else given


def _split_schedule(
    options: Mapping[str, object],
) -> tuple[s.PretrainSchedule, dict[str, object]]:
    """Takes the schedule's fields out of the pretrain options."""
    names = {field.name: field.type for field in fields(s.PretrainSchedule)}
    chosen = {}
    for name in names.keys() & options.keys():
        kind = int if name.endswith("batch_size") else float
        try:
            chosen[name] = kind(str(options[name]))
        except ValueError:
            raise ValueError(
                f"pretrain option {name}: {options[name]!r} is not {kind.__name__}"
            ) from None
    rest = {name: value for name, value in options.items() if name not in names}
    return s.PretrainSchedule(**chosen), rest  # type: ignore[arg-type]


def _compute(given: Mapping[str, Any]) -> s.Compute:
    """Devices: all GPUs there are unless told; --eval-gpus are taken off pretraining.

    The GPUs of the machine that submits jobs say nothing about those of the nodes.
    """
    eval_gpus = given["eval_gpus"] or ()
    total = given["num_gpus"]
    if given["launcher"] == "slurm":
        total = total if given["gpus_per_node"] is None else given["gpus_per_node"]
        if total is None:
            raise ValueError("--launcher slurm needs --gpus-per-node N (0 = CPU)")
        if eval_gpus:
            raise ValueError(
                "--eval-gpus is for one machine: with --launcher slurm evaluations are jobs with "
                "GPUs of their own, beside pretraining; leave it out"
            )
    if total is None:
        total = len(visible_gpus())
    if any(not 0 <= gpu < total for gpu in eval_gpus):
        there = f"there are GPUs 0 to {total - 1}" if total else "there is no GPU here"
        raise ValueError(f"--eval-gpus {','.join(map(str, eval_gpus))}: {there}")
    num_gpus = total - len(eval_gpus)
    if eval_gpus and not num_gpus:
        raise ValueError("--eval-gpus leaves no GPU for pretraining")
    return s.Compute(
        num_gpus=num_gpus,
        num_processes=given["num_processes"] or max(num_gpus, 1),
        eval_gpus=eval_gpus,
        overlap=given["overlap"],
    )


def visible_gpus() -> list[str]:
    """Indices or ids of the GPUs this process may use, found without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part.strip() for part in visible.split(",") if part.strip()]
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i, _ in enumerate(listing.stdout.strip().splitlines())]
