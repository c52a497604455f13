"""The command line of `python -m segmenter`. Heavy libraries are imported when a command runs."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import click

from common.command import CONTEXT, PATH, command, dry_run
from common.console import EXIT_STOPPED, aligned, heavy_imports, log_to_stderr, run_program, say
from common.environment import rank, world_size
from common.files import check_output_file, write_json
from common.formats import ProbeResult, read_json
from common.step_files import RESULT
from engine.config import DeviceConfig
from segmenter.config import (
    GROUPS,
    PROBE_GROUPS,
    SCORES,
    EncoderConfig,
    ProbeConfig,
    ScoringConfig,
    TrainConfig,
    check_encoder,
    parse_encoder,
)
from segmenter.use_config import EvaluateConfig, FeaturesConfig, PictureConfig, ProtocolChanges


class EncoderArgument(click.ParamType):
    """An argument that names an encoder, as --init does."""

    name = "encoder"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | str:
        """Click's hook."""
        try:
            return parse_encoder(value)
        except ValueError as error:
            self.fail(f"{value}: {error}", param, ctx)


ENCODER = EncoderArgument()


@click.group(context_settings=CONTEXT)
def cli() -> None:
    """Finetune a ViT for semantic segmentation, score it, and predict with it."""


main = partial(run_program, cli, "python -m segmenter")


@command(cli, **GROUPS)
@dry_run("check", "time")
def train(dry_run: str | None, **groups: Any) -> int:
    """Finetune, or continue: the same command goes on where it stopped."""
    from segmenter.check import check_run, check_some_labels, earlier_output, look_inside
    from segmenter.dataset import read_description

    config = TrainConfig(**groups)
    dataset = read_description(config.run.dataset)
    check_run(config, dataset, processes=world_size())
    look_inside(config)  # loads torch, if there is something to look into
    found = earlier_output(config, dataset) if dry_run != "time" else None  # which begins anew
    # What is finished is finished: the same command again does nothing.
    if found is not None and found.name == RESULT:
        return 0
    log_to_stderr()
    check_some_labels(dataset)
    if dry_run == "check":
        return 0
    with heavy_imports():
        from engine.trainer import time_training
        from segmenter.finetune import Finetuning, finetune
    if not dry_run:
        return 0 if finetune(config, dataset) else EXIT_STOPPED
    time_training(Finetuning(config, dataset))
    return 0


@command(cli, **PROBE_GROUPS)
@click.argument("encoder", type=ENCODER, metavar="ENCODER")
@dry_run("check", "time")
def probe(encoder: Path | str, dry_run: str | None, **groups: Any) -> int:
    """Score what a frozen encoder knows: minutes instead of a finetuning's hours.

    ENCODER is random, a file, timm:NAME|FOLDER, hf:NAME|FOLDER or FILE.py:FUNCTION.
    """
    from segmenter.check import check_run, check_some_labels, earlier_output, look_inside
    from segmenter.dataset import read_description

    # An argument, since there is no probe without something to probe.
    config = ProbeConfig(init=encoder, **groups)
    dataset = read_description(config.run.dataset)
    check_run(config, dataset, processes=world_size())
    look_inside(config)
    if dry_run != "time" and earlier_output(config, dataset) is not None:
        return 0
    log_to_stderr()
    check_some_labels(dataset)
    if dry_run == "check":
        return 0
    with heavy_imports():
        from segmenter.probing import probe as run_probes
        from segmenter.probing import time_probing
    if dry_run:
        time_probing(config, dataset)
        return 0
    return 0 if run_probes(config, dataset) else EXIT_STOPPED


@command(cli, evaluation=EvaluateConfig, changes=ProtocolChanges, devices=ScoringConfig)
@click.argument("checkpoint", type=PATH, required=False)
def evaluate(
    checkpoint: Path | None, evaluation: EvaluateConfig, changes: ProtocolChanges, devices: ScoringConfig
) -> None:
    """Score CHECKPOINT, or the label maps given by --predictions, on a dataset."""
    if (checkpoint is None) == (evaluation.predictions is None):
        raise click.UsageError("give either a CHECKPOINT or --predictions DIR")
    if evaluation.out is not None:
        reads = [path for path in (checkpoint, evaluation.dataset) if path is not None]
        own = f'"{SCORES[0]}"'.encode()  # what begins such a file
        check_output_file(evaluation.out, reads=reads, is_own=lambda head: own in head[:40])
    with heavy_imports():
        from segmenter.evaluate import evaluate_checkpoint, evaluate_predictions
    log_to_stderr()
    if checkpoint is not None:
        result = evaluate_checkpoint(checkpoint, evaluation, changes, devices)
    else:
        result = evaluate_predictions(evaluation)
    if rank() == 0:  # all processes have the same scores
        if evaluation.out is not None:
            write_json(evaluation.out, result)
        scores = {name.replace("_", " "): result[name] for name in SCORES}
        rows = {"class": "IoU %", **result["class_iou"], **scores}
        texts = (f"{v:.2f}" if isinstance(v, float) else v or "absent" for v in rows.values())
        say(aligned([*zip(rows, texts, strict=True)]))
        say(f"protocol: {json.dumps(result['protocol'])}")


@command(cli, pictures=PictureConfig, changes=ProtocolChanges, devices=DeviceConfig)
@click.argument("checkpoint", type=PATH)
@click.argument("images", type=PATH, nargs=-1, required=True)
def predict(
    checkpoint: Path, images: tuple[Path, ...], pictures: PictureConfig, changes: ProtocolChanges,
    devices: DeviceConfig,
) -> None:  # fmt: skip
    """Write label maps and overlays of IMAGES (files or folders)."""
    from segmenter.predict import predict_files

    log_to_stderr()
    predict_files(checkpoint, images, pictures.out, changes, devices)


@command(cli, "draw-features", features=FeaturesConfig, model=EncoderConfig, devices=DeviceConfig)
@click.argument("encoder", type=ENCODER)
@click.argument("images", type=PATH, nargs=-1, required=True)
def draw_features(
    encoder: Path | str, images: tuple[Path, ...], features: FeaturesConfig, model: EncoderConfig,
    devices: DeviceConfig,
) -> None:  # fmt: skip
    """Draw ENCODER's patch tokens of IMAGES: principal components as colours, likeness to a patch."""
    check_encoder(encoder, "ENCODER")
    if features.before is not None:
        check_encoder(features.before, "--before")
    from engine.devices import make_accelerator
    from segmenter.features import draw_files

    log_to_stderr()
    draw_files(encoder, images, features, model, make_accelerator(devices))
    say(str(features.out))


@cli.group(context_settings=CONTEXT)
def prepare() -> None:
    """Download ADE20K, or check a dataset down to every label."""


@prepare.command(context_settings=CONTEXT)
@click.argument("folder", type=PATH)
@click.option("--url", multiple=True, help="Address to try first; may be given several times.")
@click.option("--digest", help="md5:... or sha256:... of the zip, or 'none'.")
def ade20k(folder: Path, url: tuple[str, ...], digest: str | None) -> None:
    """Make FOLDER/ADEChallengeData2016, or check the one that lies there."""
    from segmenter.prepare import prepare_ade20k

    if digest and not re.fullmatch(r"none|(md5|sha256):\w+", digest):
        raise click.UsageError(f"--digest is {digest!r}; give md5:<hex>, sha256:<hex> or none")
    log_to_stderr()
    ready = prepare_ade20k(folder, own_urls=url, digest=digest)
    say(f"{ready} is complete: give it as --dataset")


@prepare.command(context_settings=CONTEXT)
@click.argument("dataset", type=PATH)
def check(dataset: Path) -> None:
    """Look at every pair of DATASET: a YAML file, or an ADEChallengeData2016 folder."""
    from segmenter.prepare import check_dataset

    pairs = check_dataset(dataset)
    counts = ", ".join(f"{count} {split} pairs" for split, count in pairs.items())
    say(f"{dataset}: {counts}, all sound")


def probe_encoder(
    encoder: Path | str, dataset: Path | str, output_dir: Path | str, **options: Any
) -> dict[str, Any]:
    """From Python, what `python -m segmenter probe` leaves in result.json; what is there is read.

    options: of that command, such as model="vit_base", probes=("linear", "knn"). Raises ValueError for
    what is wrong with them, RuntimeError if a signal stopped it.
    """
    words = ["probe", str(encoder), "--dataset", str(dataset), "--output-dir", str(output_dir)]
    for name, value in options.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{flag}")
        else:
            several = value if isinstance(value, list | tuple) else [value]
            words += [f"--{flag}", ",".join(map(str, several))]
    try:
        code = cli.main(args=words, standalone_mode=False)
    except click.ClickException as error:
        raise ValueError(error.format_message()) from error
    if code:
        raise RuntimeError("stopped by a signal; the same call begins anew")
    return read_json(Path(output_dir) / RESULT, ProbeResult)
