"""Images packed into shards that WebDataset reads and training reads at random, perhaps shrunk once.

    pack_images(Path("IN1K/train"), Path("PACKED/train"), PackOptions(short_side=320))

A shard that is there is complete: it is written aside, read back, and renamed. So the same command goes on
after a kill.
"""

import io
import logging
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

from common.files import check_output_folder, read_text, replacing, write_json
from common.formats import parsed_text
from common.images import Images, decode_rgb, open_images, read_content, too_many
from common.options import MOST_PROCESSES, OptionGroup, check_same, decisive_values, option
from common.parallel import in_order, one_pass

logger = logging.getLogger(__name__)
# Name, number of the class if there is any, and bytes of an image.
Contents = Iterator[tuple[str, int | None, bytes]]

STATE = "pack.json"  # what a folder of shards was made of
PARQUET = ".parquet"
# Hugging Face's imagenet-1k calls images n01440764_18_n01440764.JPEG: the class comes last.
HF_NAME = re.compile(r"(?P<stem>.+)_(?P<wordnet>n\d{8})(?P<suffix>\.\w+)")


@dataclass(frozen=True, kw_only=True)
class PackOptions(OptionGroup):
    """How images are packed."""

    title: ClassVar[str] = "Shards"
    short_side: int | None = option(
        "Shrink images whose shorter side is longer, once, to so many pixels. Default: as they are.",
        None,
        at_least=16,
    )
    quality: int = option("Of the JPEGs that are shrunk, 1 to 100.", 90, at_least=1, at_most=100)
    images_per_shard: int = option("Images of a shard; a parquet file makes one.", 10_000, at_least=1)
    split: str | None = option("Of parquet files of several: what their names begin with.", None)
    processes: int | None = option(
        "Default: one per core.", None, at_least=1, at_most=MOST_PROCESSES, neutral=True
    )


def pack_images(source: Path, out: Path, options: PackOptions) -> str | None:
    """Write the shards, or those that are left; what was done, or None if a signal stopped it.

    Raises ValueError if a path cannot be used, or the shards that are there were made otherwise;
    RuntimeError if too many images cannot be read.
    """
    check_output_folder(out, "--out", reads=[source])
    sources: list[Callable[[], Contents]]
    if parquets := _find_parquets(source, options.split):
        sources = [partial(_rows, path) for path in parquets]
        listed = [f"{path.name} {path.stat().st_size}" for path in parquets]
    else:
        images = open_images(source)
        listed, count = images.names, -(-len(images.names) // options.images_per_shard)
        classes = {name: n for n, name in enumerate(sorted(set(map(_folder_of, listed))))}
        # Every shard holds some of all classes, for whoever reads them one after the other.
        sources = [partial(_files, images, classes, listed[n::count]) for n in range(count)]
    _begin(out, listed, options)
    shards = {out / f"{out.name}-{n:06d}.tar": contents for n, contents in enumerate(sources)}
    left = [path for path in shards if not path.exists()]
    # By their paths: what they are made of need not travel to the processes.
    results = in_order(
        lambda path: _write_shard(path, shards[path](), options), left, processes=options.processes
    )
    done = list(one_pass("pack", results, total=len(shards), done=len(shards) - len(left)))
    if len(done) < len(left):
        return None
    packed, kept = open_images(out), [name for names in done for name in names]
    for name in kept[:5]:
        logger.warning("cannot be shrunk, and is there as it was: %s", name)
    # Not before: they are there as they were, for training to skip and name.
    if too_many(len(kept), len(packed.names)):
        text = f"{len(kept)} of {len(packed.names)} images cannot be read: {kept[0]} ..."
        raise RuntimeError(f"{text}; they are packed as they were")
    size = sum(path.stat().st_size for path in shards)
    return f"{out}: {len(packed.names)} images in {len(shards)} shards, {size / 2**20:.0f} MiB"


def _begin(out: Path, listed: Sequence[str], options: PackOptions) -> None:
    """Make the folder, or go on in it. Raises ValueError if it is of something else."""
    state, wanted = out / STATE, decisive_values(options)
    wanted["images"] = sha256("\n".join(listed).encode()).hexdigest()[:16]
    if state.is_file():
        made = parsed_text(read_text(state), dict[str, Any], f"{state} is damaged; remove {out}")
        check_same(made, wanted, {}, what=f"{out}", remedy="use those, or another --out")
    elif out.is_dir() and any(out.iterdir()):  # also shards of others, which training may read
        raise ValueError(f"--out {out} is there, and this command did not make it; name another folder")
    write_json(state, wanted)


# Where images come from


def _files(images: Images, classes: dict[str, int], names: Sequence[str]) -> Contents:
    for name in names:
        folder = _folder_of(name)
        yield name, classes[folder] if folder else None, read_content(images.source / name)


def _folder_of(name: str) -> str:
    return name.rpartition("/")[0]


def _find_parquets(source: Path, split: str | None) -> list[Path]:
    """The parquet files of a split, which may go unnamed if there is only one; or none."""
    found = sorted(source.glob(f"*{PARQUET}"))
    splits = {path.name.partition("-")[0] for path in found}
    if found and split not in splits and (split or len(splits) > 1):
        raise ValueError(f"{source} has parquet files of {', '.join(sorted(splits))}: choose one by --split")
    try:
        if found:
            import pyarrow.parquet  # noqa: F401
    except ImportError:
        text = "parquet files are read by pyarrow, which is not installed: pip install pyarrow"
        raise ValueError(text) from None
    return [path for path in found if split in (None, path.name.partition("-")[0])]


def _rows(path: Path) -> Contents:
    """Of a parquet file with columns image (bytes, path) and label, as `datasets` writes them."""
    from pyarrow.parquet import ParquetFile

    try:
        batches = ParquetFile(path).iter_batches(64, columns=["image", "label"])
        for number, row in enumerate(row for batch in batches for row in batch.to_pylist()):
            image, label = row["image"], int(row["label"])
            # Without a name, one that is the same in each call, and in no other file.
            name = (image.get("path") or f"{path.stem}-{number:06d}.jpg").rpartition("/")[2]
            of_class = HF_NAME.fullmatch(name)
            folder = of_class["wordnet"] if of_class else str(label)
            base = f"{of_class['stem']}{of_class['suffix']}" if of_class else name
            yield f"{folder}/{base}", label, bytes(image["bytes"])
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:  # pyarrow's are of these
        what = "has no rows with `image` (bytes, path) and `label`, or is damaged"
        raise ValueError(f"{path} {what}: {error}") from None


# A shard


def _write_shard(path: Path, contents: Contents, options: PackOptions) -> list[str]:
    """One tar, written aside and read back before it gets its name; images that could not be shrunk."""
    written: dict[str, int] = {}  # member -> checksum
    kept = []
    with replacing(path) as unfinished:
        # The format that knows names of any length and alphabet.
        with tarfile.open(unfinished, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, label, content in contents:
                try:
                    smaller = options.short_side and shrink(content, options.short_side, options.quality)
                except ValueError as error:
                    smaller = None
                    kept.append(f"{name} ({error})")
                if smaller:
                    content = smaller
                    if not name.lower().endswith((".jpg", ".jpeg")):
                        name = f"{name.rpartition('.')[0]}.jpg"
                _add(tar, name, content, written)
                if label is not None:
                    # WebDataset takes what is alike up to the first dot for one sample.
                    folder, _, base = name.rpartition("/")
                    _add(tar, f"{folder}/{base.partition('.')[0]}.cls", str(label).encode(), written)
        _check(unfinished, written)
    return kept


def shrink(content: bytes, short_side: int, quality: int) -> bytes | None:
    """The image, upright, with a shorter side of so many pixels, as JPEG; None if it is not longer.

    Raises ValueError as `decode_rgb`.
    """
    from PIL import Image

    pixels = decode_rgb(content)
    high, wide = pixels.shape[:2]
    if min(high, wide) <= short_side:
        return None
    scale = short_side / min(high, wide)  # rounding must not make the other side the shorter one
    size = max(short_side, round(wide * scale)), max(short_side, round(high * scale))
    stored = io.BytesIO()
    smaller = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    smaller.save(stored, "JPEG", quality=quality)
    return stored.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes, written: dict[str, int]) -> None:
    if name in written:
        raise ValueError(f"two images would be called {name}: rename one")
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    tar.addfile(member, io.BytesIO(content))
    written[name] = zlib.crc32(content)


def _check(path: Path, written: dict[str, int]) -> None:
    """Read all of it back. Raises RuntimeError if it is not what was written."""
    with tarfile.open(path, "r:") as tar:
        files = {member.name: tar.extractfile(member) for member in tar}
        found = {name: zlib.crc32(file.read()) for name, file in files.items() if file}
    if found != written:
        raise RuntimeError(f"{path} does not hold what was written into it; is the disk in order?")
