"""The commands beside `train`: evaluate, predict, prepare."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from segmenter.console import log_to_stderr, rank
from segmenter.options import CONTEXT, DEVICE_OPTIONS, PATH, config_option

PROTOCOL_OPTIONS = ("image_size", "window_size", "window_stride")


def _with_options(*more: click.Option) -> Callable[[Any], Any]:
    """Options shared by commands: devices, protocol, --config."""
    shared = [
        config_option(),
        *more,
        click.Option(["--multi-scale"], is_flag=True, help="Scales 0.5 to 1.75, and flipped."),
        *(
            click.Option([f"--{name.replace('_', '-')}"], type=click.IntRange(min=1),
                         help="In place of the checkpoint's.")
            for name in PROTOCOL_OPTIONS
        ),
        *DEVICE_OPTIONS,
    ]  # fmt: skip

    def add(command: click.Command) -> click.Command:
        command.params += shared
        return command

    return add


@_with_options(
    click.Option(["--dataset"], type=PATH, required=True, help="ADE20K folder or dataset YAML."),
    click.Option(["--split"], type=click.Choice(["train", "val"]), default="val"),
    click.Option(["--save-predictions"], type=PATH, help="Folder for the label maps."),
    click.Option(["--predictions"], type=PATH, help="Score the label maps of this folder instead."),
    click.Option(["--out"], type=PATH, help="JSON file for the scores."),
    click.Option(["--eval-batch-size"], type=click.IntRange(min=1), default=4, show_default=True,
                 help="Images whose windows are evaluated together."),
)  # fmt: skip
@click.command(context_settings=CONTEXT)
@click.argument("checkpoint", type=PATH, required=False)
def evaluate(checkpoint: Path | None, **options: Any) -> None:
    """Score CHECKPOINT, or the label maps given by --predictions, on a dataset."""
    if (checkpoint is None) == (options["predictions"] is None):
        raise click.UsageError("give either a CHECKPOINT or --predictions DIR")
    _check_paths(checkpoint, options)
    log_to_stderr()
    if checkpoint is None:
        from segmenter.scoring import evaluate_predictions

        result = evaluate_predictions(options["predictions"], options["dataset"], options["split"])
    else:
        from segmenter.devices import make_accelerator
        from segmenter.scoring import evaluate_checkpoint

        result = evaluate_checkpoint(
            make_accelerator(device=options["device"], precision=options["precision"]),
            checkpoint,
            options["dataset"],
            changes=_changes(options),
            multi_scale=options["multi_scale"],
            group_size=options["eval_batch_size"],
            workers=options["workers"],
            predictions_dir=options["save_predictions"],
            split=options["split"],
        )
    if rank() == 0:
        _show(result.plain())
        if options["out"] is not None:
            from segmenter.layout import write_json

            write_json(options["out"], result.plain())


@_with_options(
    click.Option(["--out"], type=PATH, required=True, help="Folder for the pictures."),
    click.Option(["--attention"], is_flag=True, help="Also draw what the model attends to."),
)
@click.command(context_settings=CONTEXT)
@click.argument("checkpoint", type=PATH)
@click.argument("images", type=PATH, nargs=-1, required=True)
def predict(checkpoint: Path, images: tuple[Path, ...], out: Path, **options: Any) -> None:
    """Write label maps and overlays of IMAGES (files or folders)."""
    for path in (checkpoint, *images):
        if not path.exists():
            raise click.UsageError(f"{path} does not exist")
    from segmenter.devices import make_accelerator
    from segmenter.predict import predict_files

    log_to_stderr()
    predict_files(
        make_accelerator(device=options["device"], precision=options["precision"]),
        checkpoint,
        images,
        out,
        changes=_changes(options),
        multi_scale=options["multi_scale"],
        attention=options["attention"],
    )


@click.group(context_settings=CONTEXT)
def prepare() -> None:
    """Download ADE20K, or check a dataset down to every label."""


@prepare.command(context_settings=CONTEXT)
@click.argument("folder", type=PATH)
@click.option("--url", multiple=True, help="Address to try first; may be given several times.")
@click.option("--digest", help="md5:... or sha256:... of the zip, or 'none'.")
@click.option("--keep-zip", is_flag=True, help="Do not delete the zip after unpacking.")
def ade20k(folder: Path, url: tuple[str, ...], digest: str | None, keep_zip: bool) -> None:
    """Make FOLDER/ADEChallengeData2016, or check the one that lies there."""
    from segmenter.prepare import ADE20K_DIGEST, ADE20K_URLS, prepare_ade20k

    if digest is not None and digest != "none" and not re.fullmatch(r"(md5|sha256):\w+", digest):
        raise click.UsageError(f"--digest is {digest!r}; give md5:<hex>, sha256:<hex> or none")
    log_to_stderr()
    wanted = ADE20K_DIGEST if digest is None else digest
    ready = prepare_ade20k(
        folder,
        urls=(*url, *ADE20K_URLS),
        digest=None if wanted == "none" else wanted,
        keep_zip=keep_zip,
    )
    click.echo(f"{ready} is complete: give it as --dataset")


@prepare.command(context_settings=CONTEXT)
@click.argument("dataset", type=PATH)
def check(dataset: Path) -> None:
    """Look at every pair of DATASET: a YAML file, or an ADEChallengeData2016 folder."""
    from segmenter.prepare import check_dataset

    checked = check_dataset(dataset, _count_classes)
    counts = ", ".join(f"{count} {split} pairs" for split, count in checked.pairs.items())
    click.echo(f"{checked.name}: {counts}, all sound")


def _count_classes(description: Any) -> int:
    """The number of classes; only mmsegmentation knows it for some datasets."""
    if not isinstance(description.classes, str):
        return len(description.classes)
    from segmenter.data import read_classes

    return len(read_classes(description))


def _check_paths(checkpoint: Path | None, options: dict[str, Any]) -> None:
    from segmenter.dataset import read_description

    read_description(options["dataset"]).pairs(options["split"])
    if checkpoint is not None and not checkpoint.is_file():
        raise click.UsageError(f"{checkpoint} does not exist")


def _changes(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in PROTOCOL_OPTIONS if options[name] is not None}


def _show(result: dict[str, Any]) -> None:
    """The scores as a table on standard output."""
    names = [*result["class_iou"], "pixel accuracy"]
    width = max(len(name) for name in names)
    click.echo(f"{'class':<{width}}  IoU %")
    for name, value in result["class_iou"].items():
        click.echo(f"{name:<{width}}  {'absent' if value is None else f'{value:.2f}'}")
    click.echo("")
    for key in ("pixel_accuracy", "mean_accuracy", "mean_iou"):
        click.echo(f"{key.replace('_', ' '):<{width}}  {result[key]:.2f}")
    click.echo(f"protocol: {json.dumps(result['protocol'])}")
