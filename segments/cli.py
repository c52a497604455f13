"""The command line of `python -m segments`, which `python -m mae masks` is another name of."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import click

from common.command import CONTEXT, PATH, command
from common.console import EXIT_FAILED, EXIT_STOPPED, log_to_stderr, run_program, say
from common.files import check_output_file, check_output_folder, is_marked
from common.images import IMAGE_SUFFIXES, open_images
from common.options import MOST_PROCESSES, OptionGroup, option
from common.progress import duration
from segments.check import check
from segments.config import GENERATORS, PERCENT, PRESETS, SamSettings, default_masks, made_for
from segments.forms import open_any_form
from segments.generate import Generator, estimate_price, generate, images_by_key, parse_shard
from segments.pack import merge, pack, unpack
from segments.store import Summary, segment_key

PICTURE = "segments"  # the kind that `inspect` draws


@dataclass(frozen=True, kw_only=True)
class _Speed(OptionGroup):
    title: ClassVar[str] = "Speed"
    processes: int | None = option(
        "Default: one per core.", None, at_least=1, at_most=MOST_PROCESSES, neutral=True
    )


@dataclass(frozen=True, kw_only=True)
class _MergeOptions(OptionGroup):
    title: ClassVar[str] = "Output"
    out: Path = option("The store to write.")
    overwrite: bool = option("Replace a finished store.", False)


@dataclass(frozen=True, kw_only=True)
class _PackOptions(_Speed):
    title: ClassVar[str] = "Output"
    out: Path | None = option("Default: masks.sqlite in MASKS_DIR, where it is found.", None)
    overwrite: bool = option("Replace a finished store.", False)
    allow_damaged: bool = option("Finish even if more than 1% are damaged.", False)


@dataclass(frozen=True, kw_only=True)
class _GenerateOptions(OptionGroup):
    title: ClassVar[str] = "Input and output"
    images: Path = option("Folder of images, at any depth.")
    val_dir: Path | None = option("The same of held-out images: their keys begin with val/.", None)
    out: Path = option("The packed store to write, such as masks.sqlite.")
    shard: str | None = option(
        "Part I, from 0, of N, written I/N. Default: what torchrun or Slurm says.", None
    )
    estimate: bool = option("Time some batches here, say what all will take, write nothing.", False)
    json: bool = option("With --estimate: as JSON.", False)


@dataclass(frozen=True, kw_only=True)
class _InspectOptions(_Speed):
    title: ClassVar[str] = "Input and output"
    images: Path | None = option("Folder of the images. Default: train beside masks.", None)
    coverage_ratio: tuple[float, ...] | None = option(
        "Coverages to look at, percent. Default: those it was made for, or 5,15,30,50.", None, **PERCENT
    )
    against: Path | None = option("Also compare what is chosen with that of these segments.", None)
    out: Path = option("The picture, with or without .png.", Path("inspected"))


@dataclass(frozen=True, kw_only=True)
class _CheckOptions(_Speed):
    title: ClassVar[str] = "Input and output"
    masks_dir: Path | None = option("Default: IN1K_DIR/masks.", None)
    out: Path = option("Where offenders are listed.", Path("offenders.txt"))


@click.group(context_settings=CONTEXT)
def masks() -> None:
    """Make, pack, look at and check the segments of a dataset."""
    log_to_stderr("%(message)s")


main = partial(run_program, masks, "python -m segments")


@command(masks, "pack", options=_PackOptions)
@click.argument("masks_dir", type=PATH)
def pack_command(masks_dir: Path, options: _PackOptions) -> int:
    """Pack segments of any form into one SQLite file; the same command goes on if interrupted."""
    return _report(pack(masks_dir, **vars(options)))


@command(masks, "unpack", speed=_Speed)
@click.argument("store", type=PATH)
@click.argument("out", type=PATH)
def unpack_command(store: Path, out: Path, speed: _Speed) -> int:
    """Write the segments of a packed store as RLE JSON again, one file per image."""
    return _report(unpack(store, out, **vars(speed)))


@command(masks, "merge", options=_MergeOptions)
@click.argument("shards", type=PATH, nargs=-1, required=True)
def merge_command(shards: tuple[Path, ...], options: _MergeOptions) -> int:
    """Join packed stores, say the shards of `generate`, into one."""
    return _report(merge(shards, **vars(options)))


def _report(summary: Summary) -> int:
    say(
        f"{summary.out}: {summary.images} images with segments, {summary.without} known to have "
        f"none, {summary.left_out} damaged and left out; {summary.already_there} were done before"
    )
    return EXIT_STOPPED if summary.interrupted else 0


@masks.group("generate", context_settings=CONTEXT)
def generators() -> None:
    """Make segments of images; what is done is skipped, and torchrun's or Slurm's ranks share."""


def _generate(options: _GenerateOptions, settings: Any, speed: _Speed | None = None) -> int:
    # What is cheap to refuse comes before a model is loaded.
    check_output_file(options.out)
    if options.out.suffix.lower() in IMAGE_SUFFIXES:
        raise ValueError(f"--out {options.out} has an image's name; give one such as masks.sqlite")
    shard = parse_shard(options.shard)
    images = images_by_key(options.images, options.val_dir, options.out.parent)
    generator: Generator
    # One needs torch, the other scikit-image: neither is loaded for the other.
    if isinstance(settings, SamSettings):
        from segments.sam import Sam

        generator = Sam(settings)
    else:
        from segments.felzenszwalb import Felzenszwalb

        generator = Felzenszwalb(settings)
    processes = speed.processes if speed else None
    if options.estimate:
        price = estimate_price(images, generator, processes=processes)
        say(json.dumps(price) if options.json else _price_text(price))
        return 0
    return _report(generate(images, options.out, generator, shard=shard, processes=processes))


def _price_text(price: dict[str, Any]) -> str:
    points = price["points_per_image"]
    visited = "" if points is None else f", {points:.0f} points an image"
    hours, rate = price["seconds"] / 3600, 1 / price["seconds_per_image"]
    return (
        f"{price['images']} images: {duration(price['seconds'])} here, {hours:.2f} hours of this "
        f"device; {rate:.1f} images/s{visited}; a store of {price['bytes'] / 2**20:.0f} MiB. "
        "N devices (--shard I/N) take 1/N of the time"
    )


# Each generator is a command of its own, so that --help shows the options that it has.
for _name, _group in GENERATORS.items():
    _text = "Any checkpoint that `transformers` can load for mask generation."
    _groups: dict[str, Any] = {"options": _GenerateOptions, "settings": _group}
    _own: dict[str, str] = {}
    if _group is not SamSettings:
        _text = "Without weights or a GPU: regions of similar colour, at several scales."
        _groups["speed"] = _Speed  # a GPU has one process
    elif _name in PRESETS:
        # `sam` with another default, below --config and the command line.
        _model, _millions = PRESETS[_name]
        _own, _text = {"model": _model}, f"{_model}, {_millions}M parameters, Apache-2.0."
    command(generators, _name, own=_own, **_groups)(_generate).help = _text


@command(masks, "inspect", options=_InspectOptions)
@click.argument("masks_dir", type=PATH)
def inspect_command(masks_dir: Path, options: _InspectOptions) -> int:
    """Print and draw what the segments of a dataset are like."""
    from common.contact_sheet import save_png  # heavy, as the generators are: not for --help
    from segments.look import collect, compare, describe, draw

    # IN1K/masks.sqlite and IN1K/masks/masks.sqlite both find IN1K/train.
    beside = [above / "train" for above in masks_dir.resolve().parents[:2]]
    folder = options.images or next(filter(Path.is_dir, beside), None)
    if options.out.is_dir():
        raise ValueError(f"--out {options.out} is a folder; name a file, without .png")
    picture = options.out.with_name(f"{options.out.name.removesuffix('.png')}.png")
    check_output_folder(picture.parent, "--out", reads=[folder] if folder else [])
    check_output_file(picture, is_own=is_marked(PICTURE))
    source = open_any_form(masks_dir)
    other = open_any_form(options.against) if options.against else None
    ratios = options.coverage_ratio or made_for(source.settings) or (5.0, 15.0, 30.0, 50.0)
    images = open_images(folder, picture.parent) if folder else None
    found = {segment_key(path): images.source / path for path in images.names} if images else {}
    statistics = collect(source, ratios, processes=options.processes)
    if statistics is None:
        return EXIT_STOPPED
    compared = compare(source, other, ratios, processes=options.processes) if other else {}
    for what, value in (describe(statistics, ratios) | compared).items():
        say(f"{what + ':':28}{value}")
    if missing := found.keys() - source.images() - source.listed_empty():
        say(f"{len(missing)} images have no segments and no list says so: {min(missing)} ...")
    drawn = {key: found[key] for key in statistics.coverages if key in found}
    if drawn:
        save_png(draw(statistics, source, drawn, ratios), picture, PICTURE)
    say(f"wrote {picture}" if drawn else "no picture: --images has none of the images")
    return 0


@command(masks, "check", options=_CheckOptions)
@click.argument("in1k_dir", type=PATH)
def check_command(in1k_dir: Path, options: _CheckOptions) -> int:
    """Check that every training image opens and its segments fit; exit code 1 if not."""
    masks_dir = options.masks_dir or default_masks(in1k_dir)
    checked, left = check(in1k_dir, masks_dir, options.out, processes=options.processes)
    if left:
        say(f"stopped, {left} images are left; run the same command again")
        return EXIT_STOPPED
    offenders = [f"  {path}: {reason}" for path, reason in checked.items() if reason]
    found = f"{len(checked)} images checked, {len(offenders)} offenders, in {options.out}"
    say("\n".join([found, *sorted(offenders)[:5]]))
    return EXIT_FAILED if offenders else 0
