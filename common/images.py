"""Image files: which there are, and the one reader of them. Arrays are [H, W, 3] uint8 RGB.

H x W are pixels of the image as people see it: turned as EXIF or XMP says. Also here: those that
cannot be used, which are skipped, named and counted.
"""

from __future__ import annotations

import io
import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np

from common.files import read_bytes, relative_files, shortened
from common.tars import TAR, TarImages, TarMember, open_tars, tars_among

if TYPE_CHECKING:  # not every command that lists images opens some
    from PIL import Image

Item = TypeVar("Item")
ImagePath = Path | TarMember  # what `source / name` is
logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
OTHER_SUFFIXES = (".avif", ".gif", ".heic", ".heif", ".jfif", ".jp2", ".jpe", ".pbm", ".pgm", ".pnm", ".tga")
MOST_UNREADABLE = 0.01  # share of the images; one image is forgiven in any case
MOST_IN_A_ROW = 100
MOST_PIXELS = 178_956_970  # as many as Pillow takes by itself
MOST_PIXELS_VARIABLE = "SEGMAE_MAX_IMAGE_PIXELS"
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # markers before the size: baseline, extended, progressive
ORIENTATION, UPRIGHT = 0x0112, 1  # EXIF
XMP_ORIENTATION = re.compile(rb"tiff:Orientation(?:=\"|>)(\d)")
GREY_OR_COLOUR = (1, 3)  # channels of a JPEG; four are CMYK
# libjpeg's words for bytes that belong to nothing: cameras leave a few; more of them are
# what the picture lacks.
EXTRANEOUS, FEW_BYTES = re.compile(r"(\d+) extraneous bytes before marker"), 64


class Images(NamedTuple):
    """Images below a folder: `source / name` can be read; names are posix paths, sorted."""

    source: Path | TarImages
    names: list[str]


def open_images(folder: Path, index_dir: Path | None = None) -> Images:
    """Images below a folder, at any depth: files, or where there are none, those in tar files.

    index_dir: where tars are indexed whose folder cannot be written; see `open_tars`. Raises
    ValueError if there are none.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; images are expected there")
    every = [path for path in relative_files(folder) if not path.rpartition("/")[2].startswith(".")]
    found = sorted(filter(_is_image, every))
    if others := [path for path in every if path.lower().endswith(OTHER_SUFFIXES)]:
        text = "%s: %d images are left out, such as %s; those that are read end in %s"
        logger.warning(text, folder, len(others), min(others), " ".join(IMAGE_SUFFIXES))
    if found:
        if tars := [path for path in every if path.lower().endswith(TAR)]:
            text = "%s: %d tars are left out, since there are image files: %s"
            logger.warning(text, folder, len(tars), min(tars))
        return Images(folder, found)
    if tars := tars_among(folder, every):
        in_tars = open_tars(folder, tars, _is_image, index_dir)
        if names := in_tars.names():
            return Images(in_tars, names)
    where = f"below {folder}" + (f", nor in the {len(tars)} tars there" if tars else "")
    raise ValueError(f"no image {where} (looked for {' '.join(IMAGE_SUFFIXES)})")


def has_classes(folder: Path, index_dir: Path | None = None) -> bool:
    """Whether a folder, if it is there, has a folder for each class: by a look, unless it holds tars."""
    entries = list(os.scandir(folder)) if folder.is_dir() else []
    if not any(entry.is_dir() for entry in entries) and any(e.name.lower().endswith(TAR) for e in entries):
        with suppress(ValueError):  # whoever trains on it will say so
            return (
                len({name.partition("/")[0] for name in open_images(folder, index_dir).names if "/" in name})
                > 1
            )
    return sum(entry.is_dir() for entry in entries) > 1


def find_images(folder: Path) -> list[str]:
    """The names of these images alone."""
    return open_images(folder).names


def locate_image(path: Path) -> ImagePath:
    """An image file, or what a folder of tars calls so: IN1K/train/n01440764/n01440764_18.JPEG."""
    if not path.exists():
        folder = next(folder for folder in path.absolute().parents if folder.is_dir())
        if any(entry.suffix.lower() == TAR for entry in folder.iterdir()):
            return open_images(folder).source / path.absolute().relative_to(folder).as_posix()
    return path


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES)


def read_content(path: ImagePath) -> bytes:
    """All bytes of an image, wherever it lies. Raises ValueError that names it."""
    return path.read() if isinstance(path, TarMember) else read_bytes(path)


def read_rgb(path: ImagePath) -> np.ndarray:
    """All pixels of an image of any kind, see `decode_rgb`. Raises ValueError naming the file."""
    content = read_content(path)
    try:
        return decode_rgb(content)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as an image: {error}") from None


def decode_rgb(content: bytes | bytearray) -> np.ndarray:
    """All pixels of an image file's content, without transparency; of several pictures the first.

    16 bits become 8, and grey of no fixed range is stretched to 0-255. Raises ValueError if it is
    damaged, no image, or of more than $SEGMAE_MAX_IMAGE_PIXELS.
    """
    header, pixels = jpeg_header(content), None
    if header is not None:
        refuse_huge(header.height, header.width)
        pixels = _decode_jpeg(content)
        if pixels is not None and header.is_upright:
            return pixels
    from PIL import Image, ImageOps

    image = opened = load_image(content, decode=pixels is None)
    if pixels is not None:
        image = Image.fromarray(pixels)
        image.info = opened.info  # EXIF and XMP, by which it is turned
    with suppress(Exception):  # of a damaged block
        image = ImageOps.exif_transpose(image)
    return np.array(_to_rgb(image))


def read_reduced(path: ImagePath, side: int) -> tuple[np.ndarray, tuple[int, int]]:
    """Pixels of an image, and its own (height, width). Raises ValueError as `read_rgb`.

    A large upright JPEG has fewer pixels, but no side is shorter than `side`.
    """
    import simplejpeg

    content = read_content(path)
    header = jpeg_header(content)
    if header is not None and header.is_upright and min(header.height, header.width) >= 2 * side:
        with suppress(ValueError):  # `read_rgb` judges what is huge, damaged or of another kind
            refuse_huge(header.height, header.width)
            least = {"min_height": side, "min_width": side, "min_factor": 2}
            return simplejpeg.decode_jpeg(content, "RGB", **least), (header.height, header.width)
    pixels = read_rgb(path)
    return pixels, (pixels.shape[0], pixels.shape[1])


def _decode_jpeg(content: bytes | bytearray) -> np.ndarray | None:
    import simplejpeg

    # Damage, which Pillow passes over (it fills what is missing with grey), is a ValueError.
    try:
        return simplejpeg.decode_jpeg(content, "RGB", strict=True)
    except ValueError as error:
        said = str(error)
    extraneous = EXTRANEOUS.search(said)
    if extraneous and int(extraneous[1]) <= FEW_BYTES:
        return simplejpeg.decode_jpeg(content, "RGB", strict=False)
    if said.startswith(("Corrupt JPEG", "Premature end")):
        raise ValueError(said)
    return None  # only Pillow may know this kind


def load_image(
    source: ImagePath | bytes | bytearray, *, draft: tuple[int, int] | None = None, decode: bool = True
) -> Image.Image:
    """An image file by Pillow, first picture, as it lies in the file.

    draft: width and height; a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size if it stays
    larger. decode: False for a look at size and mode. Raises ValueError, which names a path.
    """
    from PIL import Image

    name = "" if isinstance(source, bytes | bytearray) else f"{source} cannot be read as an image: "
    content = source if isinstance(source, bytes | bytearray) else read_content(source)
    Image.MAX_IMAGE_PIXELS = None  # the limit is ours
    refuse_huge(0, 0)  # a wrong limit is no damage of the image
    try:
        image = Image.open(io.BytesIO(content))
        refuse_huge(image.height, image.width)
        if draft is not None:
            image.draft("RGB", draft)
        if decode:
            image.load()
        else:
            image.getexif()
    except MemoryError:
        raise
    except Exception as error:  # what is in a damaged file can make Pillow raise anything
        reason = str(error) or type(error).__name__
        if "cannot identify" in reason:
            reason = "it is no image" if content else "it is empty"
        raise ValueError(f"{name}{shortened(reason)}") from None
    return image


def refuse_huge(height: int, width: int) -> None:
    """Raise ValueError for an image of more pixels than allowed; RuntimeError for a wrong limit."""
    most = os.environ.get(MOST_PIXELS_VARIABLE) or str(MOST_PIXELS)
    if not re.fullmatch("[0-9]{1,19}", most):
        raise RuntimeError(f"{MOST_PIXELS_VARIABLE} is {shortened(most)}; give a whole number")
    if height * width > int(most):
        remedy = f"{MOST_PIXELS_VARIABLE}=N allows more"
        raise ValueError(f"it has {width} x {height} pixels, more than {most}; {remedy}")


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode of Pillow to RGB; Pillow itself would clip what has more than 8 bits."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        is_16_bits = image.mode.startswith("I;16")
        low, high = (0, 65535) if is_16_bits else (values.min(), values.max())
        stretched = (values - low) * (255 / max(high - low, 1e-9))
        return Image.fromarray(stretched.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")  # or Pillow warns
    return image.convert("RGB")


@dataclass(frozen=True)
class JpegHeader:
    """Of a JPEG as it lies in the file: pixels, channels, and where its height stands, 2 bytes."""

    height: int
    width: int
    channels: int
    height_at: int
    is_upright: bool


def jpeg_header(content: bytes | bytearray) -> JpegHeader | None:
    """What a JPEG states; None for any other file, and for one that does not end as it should."""
    # From marker to marker: much faster than Pillow.
    if not content.startswith(b"\xff\xd8\xff") or b"\xff\xd9" not in content[-64:]:
        return None
    at, upright = 2, True
    while at + 10 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4])
        if marker in JPEG_FRAMES:
            height, width = (int.from_bytes(content[n : n + 2]) for n in (at + 5, at + 7))
            header = JpegHeader(height, width, content[at + 9], at + 5, upright)
            return header if height * width else None
        if marker == 0xE1:  # APP1: EXIF or XMP
            upright = upright and _is_upright(bytes(content[at + 4 : at + 2 + length]))
        at += 2 + length
    return None


def _is_upright(block: bytes) -> bool:
    """Whether an APP1 block does not turn the image: Pillow judges those that may."""
    if not block.startswith(b"Exif\0\0"):
        turned = XMP_ORIENTATION.search(block)
        return turned is None or int(turned[1]) == UPRIGHT
    from PIL import Image

    exif = Image.Exif()
    try:
        exif.load(block)
        return exif.get(ORIENTATION, UPRIGHT) == UPRIGHT
    except Exception:  # a damaged block: whatever Pillow makes of it
        return False


def evenly_spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, evenly spread."""
    count = min(len(items), most)
    return [items[index * len(items) // count] for index in range(count)]


def next_usable(load: Callable[[int], Item], index: int, images: int) -> tuple[Item, tuple[str, ...]]:
    """What `load` makes of the image, or of the next one without a ValueError; and those errors."""
    skipped: list[str] = []
    for offset in range(min(images, MOST_IN_A_ROW)):
        try:
            return load((index + offset) % images), tuple(skipped)
        except ValueError as error:
            skipped.append(str(error))
    raise RuntimeError(f"{len(skipped)} images in a row cannot be used: {skipped[0]} ...")


def too_many(unreadable: float, images: int) -> bool:
    """Whether so many of the images are more than accidents."""
    return unreadable > max(1.0, MOST_UNREADABLE * images)


class Unreadable:
    """The images that one process could not use."""

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}  # in order

    def note(self, texts: Iterable[str]) -> None:
        """Name each image once. texts: path and reason."""
        for text in texts:
            if text not in self.texts:
                self.texts[text] = None
                logger.warning("skipped an unreadable image: %s", text)

    def check(self, unreadable: float, images: int) -> None:
        """Raise RuntimeError if too many are unreadable, over all processes."""
        if too_many(unreadable, images):
            names = ", ".join(list(self.texts)[:5]) or "named by another process"
            count = f"{unreadable:.0f} of {images} images"
            raise RuntimeError(f"{count} are unreadable (more than {MOST_UNREADABLE:.0%}): {names}")
