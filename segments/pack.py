"""From files to a packed store and back, and several stores into one."""

import json
from collections import defaultdict
from collections.abc import Collection, Generator, Sequence
from itertools import islice
from pathlib import Path

from common.files import beside, check_output_file, check_output_folder, path_below, write_text
from common.formats import rle_annotation
from common.parallel import Failure, each, in_order, one_pass
from common.step_files import shard_of
from segments.config import STORE_NAME, check_made_alike, made_for
from segments.forms import open_folder
from segments.segment import Segment, ordered, segment_from_counts
from segments.store import PackedImage, PackedStore, Summary, pack_image, write_store

MOST_NAMED = 10  # of missing shards


def pack(
    masks_dir: Path, out: Path | None, *, overwrite: bool, allow_damaged: bool, processes: int | None
) -> Summary:
    """Write a packed store of a folder of any form, or go on writing it.

    Images whose files are damaged are named, recorded and left out; RuntimeError if those are more
    than 1% and that is not allowed. Raises ValueError if `out` is there.
    """
    source = open_folder(masks_dir)
    out = out or masks_dir / STORE_NAME
    _refuse_to_overwrite(out, overwrite)
    # In this order, so that a store that was killed and one that was not are the same bytes.
    keys = sorted(source.images() | source.listed_empty())

    def pack_one(key: str) -> PackedImage:
        return pack_image(key, source.segments(key))

    summary = write_store(
        out, keys, lambda left: each(pack_one, left, processes=processes), what="pack",
        source=source.name, settings={}, allow_failed=allow_damaged,
    )  # fmt: skip
    if summary.too_many_failed and not (allow_damaged or summary.interrupted):
        raise RuntimeError(
            f"{summary.left_out} of {len(keys)} images are damaged, more than 1%, so {out} was "
            "not finished. Mend them and run again, or leave them out by --allow-damaged"
        )
    return summary


def unpack(store_path: Path, out: Path, *, processes: int | None) -> Summary:
    """Write every image's segments as RLE JSON again; what is there is kept."""
    check_output_folder(out, "OUT")
    store = PackedStore(store_path)
    keys = sorted(store.images() | store.listed_empty())
    # Every name is judged before anything is written: a store may come from anywhere.
    files = {key: path_below(out, f"{key}.json", str(store_path)) for key in keys}
    todo = [key for key, path in files.items() if not path.exists()]

    def sound(key: str) -> list[Segment]:
        segments = store.segments(key)
        try:  # zlib's checksum says nothing of a store that others have written
            return [segment_from_counts(s.height, s.width, s.counts) for s in segments]
        except ValueError as error:
            raise ValueError(f"{store_path}: {key}: {error}") from None

    def write(key: str) -> None:
        annotations = [rle_annotation(s.height, s.width, s.counts) for s in sound(key)]
        write_text(files[key], json.dumps(annotations))

    for _ in in_order(lambda key: len(sound(key)), todo, processes=processes):
        pass  # every segment, too
    already_there = len(files) - len(todo)
    written = in_order(write, todo, processes=processes)
    new = sum(1 for _ in one_pass("unpack", written, total=len(files), done=already_there))
    return Summary(
        out=out, images=len(store.images()), without=len(store.listed_empty()), left_out=0,
        already_there=already_there, interrupted=new < len(todo),
    )  # fmt: skip


def merge(shards: Sequence[Path], out: Path, *, overwrite: bool) -> Summary:
    """Join stores into one: shards of the same images, or stores made for different ratios.

    Raises ValueError if their settings differ otherwise, they disagree about an image, one has no
    segments for the ratios of another, or shards by their names (`-I-of-N`) are not complete.
    """
    _refuse_to_overwrite(out, overwrite, reads=shards)
    _refuse_missing_shards(shards)
    stores = [PackedStore(path) for path in shards]
    owners: dict[tuple[float, ...], dict[str, PackedStore]] = defaultdict(dict)
    for store in stores:
        check_made_alike(store.path, store.settings, stores[0].settings, for_any_ratio=True)
        # Stores for the same ratios are shards of each other.
        owner = owners[tuple(made_for(store.settings))]
        for key in store.images() | store.listed_empty():
            other = owner.setdefault(key, store)
            if other is not store and other.segments(key) != store.segments(key):
                raise ValueError(f"{other.path} and {store.path} disagree about {key}")
    every = set().union(*owners.values())
    # An image without segments for one of the ratios would look as if it had the nearest ones.
    for ratios, owner in owners.items():
        if lacking := every.difference(owner):
            raise ValueError(
                f"for a coverage of {', '.join(f'{ratio:g}' for ratio in ratios)} %, no store has "
                f"segments of {len(lacking)} images, such as {min(lacking)}; make them first"
            )
    return join(stores, out, every, made_for(*(store.settings for store in stores)))


def join(stores: Sequence[PackedStore], out: Path, keys: Collection[str], ratios: Sequence[float]) -> Summary:
    """Write a store of these images, each with its segments in all of the stores, for these ratios.

    `out` may be one of the stores: it is replaced when all is done.
    """
    there = [(store, store.images()) for store in stores]
    failures = {key: why for store in stores for key, why in store.failures().items()}
    failed = failures.keys() - set(keys)

    def row(key: str) -> PackedImage | Failure:
        if key in failed:
            return Failure(key, failures[key])
        # One segment may be the nearest to two ratios.
        found = {one for store, images in there if key in images for one in store.segments(key)}
        return pack_image(key, ordered(found))

    def rows(left: list[str]) -> Generator[PackedImage | Failure, None, None]:
        try:
            yield from map(row, left)
        except ValueError:  # one of the stores is damaged: nobody wants what was written so far
            beside(out).unlink()
            raise

    return write_store(
        out, [*sorted(failed), *sorted(keys)], rows, what="merge", source=stores[0].meta["source"],
        settings=stores[0].settings | ({"for_coverage": ratios} if ratios else {}),
    )  # fmt: skip


def _refuse_to_overwrite(out: Path, overwrite: bool, reads: Sequence[Path] = ()) -> None:
    """--overwrite may replace a store, never a photograph that was named by mistake."""
    check_output_file(out, reads=reads, is_own=lambda head: head.startswith(b"SQLite format 3\0"))
    if out.exists() and not overwrite:
        raise ValueError(f"{out} is finished; add --overwrite to replace it")


def _refuse_missing_shards(paths: Sequence[Path]) -> None:
    shards = [shard for path in paths if (shard := shard_of(path))]
    counts = {count for _, count in shards}
    if len(shards) < len(paths) or len(counts) > 1:
        return  # stores of other origin
    there, count = {index for index, _ in shards}, counts.pop()
    missing = (str(index) for index in range(count) if index not in there)  # there may be billions
    if first := list(islice(missing, MOST_NAMED)):
        raise ValueError(
            f"of the {count} shards {', '.join(first)}{' ...' if next(missing, '') else ''} are missing "
            "(they count from 0); finish them first, or rename the others to merge what there is"
        )
