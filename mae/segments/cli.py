"""The command line of `python -m mae masks`. Heavy libraries are imported when a command runs."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from mae.segments.generate import Generator, Shard
    from mae.segments.writing import Summary

# Dashes and underscores are the same, in names and in choices.
CONTEXT: dict[str, Any] = {
    "token_normalize_func": lambda token: token.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
    "max_content_width": 100,
}
PATH = click.Path(path_type=Path)
EXIT_FAILED, EXIT_INTERRUPTED = 1, 75

processes_option = click.option(
    "--processes", type=click.IntRange(min=1), help="Default: one per core."
)
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace a finished store.")


@click.group(context_settings=CONTEXT)
def masks() -> None:
    """Make, pack, look at and check the segments of a dataset."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)


@masks.command(context_settings=CONTEXT)
@click.argument("masks_dir", type=PATH)
@click.option("--out", type=PATH, help="Default: masks.sqlite in MASKS_DIR, where it is found.")
@overwrite_option
@click.option("--allow-damaged", is_flag=True, help="Finish even if more than 1% are damaged.")
@processes_option
def pack(
    masks_dir: Path, out: Path | None, overwrite: bool, allow_damaged: bool, processes: int | None
) -> int:
    """Pack segments of any form into one SQLite file; the same command goes on if interrupted."""
    from mae.segments.pack import pack as pack_masks

    return _report(
        pack_masks(
            masks_dir,
            out,
            overwrite=overwrite,
            allow_damaged=allow_damaged,
            processes=_cores(processes),
        )
    )


@masks.command(context_settings=CONTEXT)
@click.argument("store", type=PATH)
@click.argument("out", type=PATH)
@processes_option
def unpack(store: Path, out: Path, processes: int | None) -> int:
    """Write the segments of a packed store as RLE JSON again, one file per image."""
    from mae.segments.pack import unpack as unpack_store

    return _report(unpack_store(store, out, processes=_cores(processes)))


@masks.command(context_settings=CONTEXT)
@click.argument("shards", type=PATH, nargs=-1, required=True)
@click.option("--out", type=PATH, required=True, help="The store to write.")
@overwrite_option
def merge(shards: tuple[Path, ...], out: Path, overwrite: bool) -> int:
    """Join packed stores, say the shards of `generate`, into one."""
    from mae.segments.pack import merge as merge_stores

    return _report(merge_stores(shards, out, overwrite=overwrite))


@masks.command(context_settings=CONTEXT)
@click.option("--images", type=PATH, required=True, help="Folder of images, at any depth.")
@click.option("--out", type=PATH, required=True, help="A folder, or a store if named *.sqlite.")
@click.option("--generator", type=click.Choice(["sam", "felzenszwalb"]), required=True)
@click.option("--shard", "shard_text", metavar="I/N", help="Part I, from 0, of N.")
@processes_option
@click.option("--model", default=None, help="sam: a SAM or SAM 2 on the hub, or a folder.")
@click.option("--points-per-side", type=int, help="sam: points along a side of the grid.")
@click.option("--pred-iou-thresh", type=float, help="sam: least predicted quality, 0 to 1.")
@click.option("--stability-score-thresh", type=float, help="sam: least stability, 0 to 1.")
@click.option("--stability-score-offset", type=float, help="sam: how far the cutoff is moved.")
@click.option("--box-nms-thresh", type=float, help="sam: overlap above which boxes are the same.")
@click.option("--points-per-batch", type=int, help="sam: points at once.")
@click.option("--batch-size", type=int, help="sam: images at once.")
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32"]), help="sam.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="sam.")
@click.option("--scales", help="felzenszwalb: such as 50,150,400.")
@click.option("--sigma", type=float, help="felzenszwalb: width of the smoothing, pixels.")
@click.option("--longest-side", type=int, help="felzenszwalb: images are shrunk to it, pixels.")
@click.option("--min-coverage", type=float, help="felzenszwalb: least, percent of the image.")
@click.option("--max-coverage", type=float, help="felzenszwalb: most, percent of the image.")
@click.option("--duplicate-iou", type=float, help="felzenszwalb: overlap that makes a duplicate.")
def generate(
    images: Path,
    out: Path,
    generator: str,
    shard_text: str | None,
    processes: int | None,
    device: str,
    **settings: Any,
) -> int:
    """Make segments of images; what is done is skipped, and torchrun's or Slurm's ranks share."""
    from mae.segments.generate import Shard
    from mae.segments.generate import generate as generate_segments

    shard = Shard.from_environment() if shard_text is None else _parse_shard(shard_text)
    if not images.is_dir():
        raise ValueError(f"--images {images} is not a folder")
    made = _generator(generator, device, {k: v for k, v in settings.items() if v is not None})
    return _report(generate_segments(images, out, made, shard=shard, processes=_cores(processes)))


@masks.command(context_settings=CONTEXT)
@click.argument("masks_dir", type=PATH)
@click.option("--images", type=PATH, help="Folder of the images. Default: train beside masks.")
@click.option(
    "--coverage-ratio",
    "ratios",
    type=click.FloatRange(0, 100),
    multiple=True,
    default=(5.0, 15.0, 30.0, 50.0),
    help="May be repeated. Default: 5, 15, 30, 50.",
)
@click.option("--out", type=PATH, default=Path("segments"), help="Writes OUT.png and OUT.html.")
@click.option("--limit", type=click.IntRange(1), default=2000, help="Most images to read.")
@click.option("--rows", type=click.IntRange(0), default=8, help="Images on the contact sheet.")
@processes_option
def inspect(
    masks_dir: Path,
    images: Path | None,
    ratios: tuple[float, ...],
    out: Path,
    limit: int,
    rows: int,
    processes: int | None,
) -> None:
    """Print and draw what the segments of a dataset are like."""
    from mae.listing import find_images, segment_key
    from mae.segments import open_segments
    from mae.segments.look import write_pictures
    from mae.segments.statistics import collect, describe

    source = open_segments(masks_dir)
    folder = images or _train_beside(masks_dir)
    paths = find_images(folder) if folder else []
    found = {segment_key(path): folder / path for path in paths if folder}
    statistics = collect(source, limit=limit, processes=_cores(processes))
    for what, value in describe(statistics, ratios):
        click.echo(f"{what + ':':28}{value}")
    missing = found.keys() - source.images() - source.listed_empty()
    if missing:
        click.echo(
            f"{len(missing)} images have no segments and no list says so: {min(missing)} ..."
        )
    title = f"Segments in {masks_dir.resolve().name} ({source.name})"
    written = write_pictures(
        statistics, source, found, ratios=ratios, title=title, out=out, rows=rows
    )
    click.echo(f"wrote {written[0]} and {written[1]}")


def _train_beside(masks_dir: Path) -> Path | None:
    folder = masks_dir.resolve().parent
    return next((f / "train" for f in (folder, folder.parent) if (f / "train").is_dir()), None)


@masks.command(context_settings=CONTEXT)
@click.argument("in1k_dir", type=PATH)
@click.option("--masks-dir", type=PATH, help="Default: IN1K_DIR/masks.")
@click.option("--out", type=PATH, default=Path("offenders.txt"), show_default=True)
@processes_option
def check(in1k_dir: Path, masks_dir: Path | None, out: Path, processes: int | None) -> int:
    """Check that every training image opens and its segments fit; exit code 1 if not."""
    from mae.segments.check import check as check_dataset

    result = check_dataset(
        in1k_dir, masks_dir or in1k_dir / "masks", out, processes=_cores(processes)
    )
    if result.interrupted:
        click.echo(f"stopped after {result.checked} of {result.total}; run the same command again")
        return EXIT_INTERRUPTED
    click.echo(f"{result.checked} images checked, {len(result.offenders)} offenders, in {out}")
    for path, reason in list(result.offenders.items())[:5]:
        click.echo(f"  {path}: {reason}")
    return EXIT_FAILED if result.offenders else 0


def _generator(name: str, device: str, given: dict[str, Any]) -> Generator:
    """Raises ValueError for options of the other generator."""
    from dataclasses import fields

    from mae.segments.felzenszwalb import Felzenszwalb
    from mae.segments.sam import Sam, SamSettings

    kind = SamSettings if name == "sam" else Felzenszwalb
    foreign = sorted(given.keys() - {field.name for field in fields(kind)})
    if foreign:
        raise ValueError(f"--{foreign[0].replace('_', '-')} is no option of --generator {name}")
    if name == "sam":
        local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0
        return Sam(SamSettings(**given), device=device, local_rank=int(local_rank))
    if "scales" in given:
        try:
            given["scales"] = tuple(float(scale) for scale in given["scales"].split(","))
        except ValueError:
            raise ValueError(f"--scales {given['scales']}: write numbers, as in 50,150") from None
    return Felzenszwalb(**given)


def _parse_shard(text: str) -> Shard:
    from mae.segments.generate import Shard

    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ValueError(f"--shard {text}: write it as 0/4, the first of four")
    return Shard(index=int(index), count=int(count))


def _cores(processes: int | None) -> int:
    from mae.segments.parallel import available_cores

    return processes or available_cores()


def _report(summary: Summary) -> int:
    click.echo(
        f"{summary.out}: {summary.images} images with segments, {summary.without} known to have "
        f"none, {summary.left_out} damaged and left out; {summary.already_there} were done before"
    )
    return EXIT_INTERRUPTED if summary.interrupted else 0
