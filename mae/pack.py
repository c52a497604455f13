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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from common.files import check_output_folder, read_text, replacing, write_json
from common.formats import parsed_text
from common.images import Images, decode_rgb, open_images, read_content, too_many
from common.options import MOST_PROCESSES, OptionGroup, option
from common.parallel import in_order, one_pass

logger = logging.getLogger(__name__)

STATE = "pack.json"  # what a folder of shards was made of
PARQUET = ".parquet"
JPEG_SUFFIXES = (".jpg", ".jpeg")
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


class _Shard(NamedTuple):
    """Where the images of one output file come from: names of a folder's, or a parquet file."""

    out: Path
    names: Sequence[str] = ()
    parquet: Path | None = None


class _Packed(NamedTuple):
    """What became of a shard's images."""

    images: int
    shrunk: int
    kept: list[str]  # that could not be read, and are there as they were


def pack_images(source: Path, out: Path, options: PackOptions) -> str | None:
    """Write the shards, or those that are left; what was done, or None if a signal stopped it.

    Raises ValueError if a path cannot be used, or the shards that are there were made otherwise;
    RuntimeError if too many images cannot be read.
    """
    check_output_folder(out, "--out", reads=[source])
    images, parquets = _find(source, options)
    count = -(-len(images.names) // options.images_per_shard) if images else 0
    names = [f"{out.name}-{number:06d}.tar" for number in range(count or len(parquets))]
    if images:
        # Every shard holds some of all classes, for whoever reads them one after the other.
        shards = [_Shard(out / name, images.names[n::count]) for n, name in enumerate(names)]
    else:
        shards = [_Shard(out / name, parquet=path) for name, path in zip(names, parquets, strict=True)]
    _begin(out, _identity(images, parquets, options), names)
    left = [shard for shard in shards if not shard.out.exists()]
    classes = {
        name: n for n, name in enumerate(sorted({_class_of(n) for n in images.names} if images else ()))
    }
    write = partial(_write_shard, images, classes, options)
    results = in_order(write, left, processes=options.processes)
    done = list(one_pass("pack", results, total=len(shards), done=len(shards) - len(left)))
    total, kept = sum(one.images for one in done), [name for one in done for name in one.kept]
    for name in kept[:5]:
        logger.warning("cannot be shrunk, and is there as it was: %s", name)
    if too_many(len(kept), max(total, 1)):
        raise RuntimeError(
            f"{len(kept)} of {total} images cannot be read: {kept[0]} ...; they are packed as they were"
        )
    if len(done) < len(left):
        return None
    packed = open_images(out)
    if images and not options.short_side and packed.names != images.names:
        raise RuntimeError(f"{out} has other images than {source}: remove it, and pack again")
    size = sum(path.stat().st_size for path in out.glob("*.tar"))
    shrunk = f", {sum(one.shrunk for one in done)} shrunk now" if options.short_side else ""
    return f"{out}: {len(packed.names)} images in {len(shards)} shards, {size / 2**20:.0f} MiB{shrunk}"


def _find(source: Path, options: PackOptions) -> tuple[Images | None, list[Path]]:
    """Images below the folder, or the parquet files in it."""
    parquets = sorted(source.glob(f"*{PARQUET}")) if source.is_dir() else []
    if not parquets:
        return open_images(source), []
    splits = {path.name.partition("-")[0] for path in parquets}
    if options.split is None and len(splits) > 1:
        raise ValueError(f"{source} has parquet files of {', '.join(sorted(splits))}: choose one by --split")
    chosen = [path for path in parquets if options.split in (None, path.name.partition("-")[0])]
    if not chosen:
        raise ValueError(
            f"--split {options.split}: {source} has parquet files of {', '.join(sorted(splits))}"
        )
    _pyarrow()
    return None, chosen


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            "parquet files are read by pyarrow, which is not installed: pip install pyarrow"
        ) from None
    return pyarrow.parquet


def _identity(images: Images | None, parquets: list[Path], options: PackOptions) -> dict[str, Any]:
    """What has to be the same for a call to go on."""
    made = {name: value for name, value in asdict(options).items() if name != "processes"}
    listed = images.names if images else [f"{path.name} {path.stat().st_size}" for path in parquets]
    return {"images": sha256("\n".join(listed).encode()).hexdigest()[:16], **made}


def _begin(out: Path, identity: dict[str, Any], names: list[str]) -> None:
    """Make the folder, or go on in it. Raises ValueError if it is of something else."""
    state = out / STATE
    if state.is_file():
        made = parsed_text(read_text(state), dict[str, Any], f"{state} is damaged; remove {out}")
        if differing := [f"{n}: {made.get(n)} -> {v}" for n, v in identity.items() if made.get(n) != v]:
            raise ValueError(
                f"{out} was packed otherwise: {'; '.join(differing)}; use that, or another --out"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise ValueError(f"--out {out} is there, and this command did not make it; name another folder")
    write_json(state, {**identity, "shards": len(names)})


def _class_of(name: str) -> str:
    return name.rpartition("/")[0]


def _write_shard(
    images: Images | None, classes: dict[str, int], options: PackOptions, shard: _Shard
) -> _Packed:
    """One tar, written aside and read back before it gets its name."""
    written: dict[str, int] = {}  # member -> checksum
    shrunk, kept = 0, []
    with replacing(shard.out) as unfinished:
        with tarfile.open(unfinished, "w", format=tarfile.PAX_FORMAT) as tar:
            for name, label, content in _contents(images, classes, shard):
                if options.short_side is not None:
                    try:
                        smaller = shrink(content, options.short_side, options.quality)
                    except ValueError as error:
                        smaller = None
                        kept.append(f"{name} ({error})")
                    if smaller is not None:
                        content, name, shrunk = smaller, _as_jpeg(name), shrunk + 1
                _add(tar, name, content, written)
                if label is not None:
                    folder, _, base = name.rpartition("/")
                    _add(tar, f"{folder}/{base.partition('.')[0]}.cls", str(label).encode(), written)
        _check(unfinished, written)
    return _Packed(sum(not name.endswith(".cls") for name in written), shrunk, kept)


def _contents(
    images: Images | None, classes: dict[str, int], shard: _Shard
) -> Iterator[tuple[str, int | None, bytes]]:
    """Name, number of the class if there is any, and bytes of each image."""
    if images is not None:
        for name in shard.names:
            folder = _class_of(name)
            yield name, classes[folder] if folder else None, read_content(images.source / name)
    else:
        assert shard.parquet is not None
        yield from _rows(shard.parquet)


def _rows(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Of a parquet file with columns image (bytes, path) and label, as `datasets` writes them."""
    parquet, number = _pyarrow(), 0
    try:
        file = parquet.ParquetFile(path)
        for batch in file.iter_batches(64, columns=["image", "label"]):
            for row in batch.to_pylist():
                image, label = row["image"], int(row["label"])
                name = (image.get("path") or f"{path.stem}-{number:06d}.jpg").rpartition("/")[2]
                of_class = HF_NAME.fullmatch(name)
                folder = of_class["wordnet"] if of_class else str(label)
                base = f"{of_class['stem']}{of_class['suffix']}" if of_class else name
                yield f"{folder}/{base}", label, bytes(image["bytes"])
                number += 1
    except (OSError, KeyError, TypeError, AttributeError, ValueError) as error:  # pyarrow's are of these
        what = "has no rows with `image` (bytes, path) and `label`, or is damaged"
        raise ValueError(f"{path} {what}: {error}") from None


def shrink(content: bytes, short_side: int, quality: int) -> bytes | None:
    """The image, upright, with a shorter side of so many pixels, as JPEG; None if it is not longer.

    Raises ValueError as `decode_rgb`.
    """
    from PIL import Image

    pixels = decode_rgb(content)
    high, wide = pixels.shape[:2]
    if min(high, wide) <= short_side:
        return None
    scale = short_side / min(high, wide)
    size = max(short_side, round(wide * scale)), max(short_side, round(high * scale))
    smaller = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    stored = io.BytesIO()
    smaller.save(stored, "JPEG", quality=quality)
    return stored.getvalue()


def _as_jpeg(name: str) -> str:
    return name if name.lower().endswith(JPEG_SUFFIXES) else f"{name.rpartition('.')[0]}.jpg"


def _add(tar: tarfile.TarFile, name: str, content: bytes, written: dict[str, int]) -> None:
    if name in written:
        raise ValueError(f"two images would be called {name}: rename one")
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    tar.addfile(member, io.BytesIO(content))
    written[name] = zlib.crc32(content)


def _check(path: Path, written: dict[str, int]) -> None:
    """Read all of it back. Raises RuntimeError if it is not what was written."""
    found = {}
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            file = tar.extractfile(member)
            found[member.name] = zlib.crc32(file.read()) if file else -1
    if found != written:
        raise RuntimeError(f"{path} does not hold what was written into it; is the disk in order?")
