"""What a tar holds: images with their offsets, tars in it, and the classes that names tell."""

import io
import os
import posixpath
import re
import shlex
import tarfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from common.files import NOT_UTF8, OF_PROGRAMS, open_regular, shortened

TAR_NAME = re.compile(r"\.(tar(\.(gz|bz2|xz|zst))?|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
# What unpacks each kind of compression, told by the first bytes: a name may say anything.
UNPACKERS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
BLOCK = tarfile.BLOCKSIZE
MOST_PADDING = 2**20  # zeros that follow a tar: up to a whole record, 10 KB as a rule
MOST_LINKS = 40  # to links, as Linux follows them
# ImageNet's classes, and its validation images, whose classes stand in the development kit.
WORDNET_ID = re.compile(r"(n\d{8})(_.*|$)")
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\b")
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
CLASS_SUFFIX, CLASS_NAME = ".cls", re.compile(r"[\w][\w.-]{0,200}")  # WebDataset's


class Part(NamedTuple):
    """A tar, or one in it: bytes `start` to `start + size` of a file."""

    tar: int
    path: str
    start: int
    size: int
    inner: str  # its name in the tar


class Found(NamedTuple):
    """What a part holds: images (name, start, size), tars (start, size, name), names of what is left out."""

    images: list[tuple[str, int, int]]
    inner: list[tuple[int, int, str]]
    left_out: list[str]


def scan(folder: Path, is_image: Callable[[str], bool], classes: dict[str, str], part: Part) -> Found:
    """What one tar holds. Raises ValueError, which names it, for what cannot be read in place."""
    path = folder / part.path
    where = f"{path}: {part.inner} in it" if part.inner else f"{path}"
    try:
        with open_regular(path) as file:
            _refuse_compressed(path, where, os.pread(file.fileno(), 6, part.start))
            file.seek(part.start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                return _look_into(tar, where, is_image, classes, part)
    except tarfile.TarError as error:
        raise ValueError(f"{where} is no whole tar: {error}; download or copy it again") from None
    except OSError as error:
        raise ValueError(f"{where} cannot be read: {error.strerror or error}") from None


def _refuse_compressed(path: Path, where: str, head: bytes) -> None:
    tool = next((tool for magic, tool in UNPACKERS.items() if head.startswith(magic)), None)
    if tool is None:
        return
    # Beside it, by a name that no other tar there has.
    unpacked = path.with_name(f"{TAR_NAME.sub('', path.name)}-unpacked.tar")
    how = f"This unpacks it: {tool} -dc {shlex.quote(str(path))} > {shlex.quote(str(unpacked))}"
    if where != str(path):  # one in a tar
        how = f"Unpack {path.name} into another folder, and what it holds by {tool} -d"
    said = "is compressed, so that no image can be read by itself"
    raise ValueError(f"{where} {said}. {how}; then move the compressed one away")


def _look_into(
    tar: tarfile.TarFile, where: str, is_image: Callable[[str], bool], classes: dict[str, str], part: Part
) -> Found:
    found = Found([], [], [])
    links, labels = dict[str, str](), dict[str, str]()
    for member in _members(tar, part.start + part.size):
        name = posixpath.normpath(member.name)
        is_label = name.endswith(CLASS_SUFFIX) and "/" not in name
        if member.isdir() or not (is_label or is_image(name) or TAR_NAME.search(name)):
            continue
        if name.startswith(("/", "../")):
            raise ValueError(f"{where}: {shortened(member.name)} leads out of its folder; pack it again")
        if NOT_UTF8.search(name) or any(p.startswith(".") or p in OF_PROGRAMS for p in name.split("/")):
            found.left_out.append(name)
        elif member.issparse():
            raise ValueError(f"{where}: {name} in it is sparse; pack it again without --sparse")
        elif member.islnk() or member.issym():
            below = "" if member.islnk() else posixpath.dirname(name)
            links[name] = posixpath.normpath(posixpath.join(below, member.linkname))
        elif not member.isreg():
            found.left_out.append(name)
        elif is_label:
            labels[name.removesuffix(CLASS_SUFFIX)] = _read_label(tar, member, where)
        elif is_image(name):
            found.images.append((name, member.offset_data, member.size))
        else:
            below = TAR_NAME.sub("", part.inner)
            found.inner.append((member.offset_data, member.size, posixpath.join(below, name)))
    places = {name: (start, size) for name, start, size in found.images} if links else {}
    for name, target in links.items():
        for _ in range(MOST_LINKS):
            target = links.get(target, target)
        if target not in places:
            advice = "no image of this tar; pack it again with --dereference"
            raise ValueError(f"{where}: {name} in it is a link to {shortened(target)}, {advice}")
        found.images.append((name, *places[target]))
    class_of = partial(_class_of, part=part, labels=labels, classes=classes)
    named = [(posixpath.join(class_of(name), name), start, size) for name, start, size in found.images]
    return found._replace(images=named)


def _members(tar: tarfile.TarFile, end: int) -> Iterator[tarfile.TarInfo]:
    """All of them up to this byte of the file. Raises TarError unless the tar ends there as it should."""
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # a million would fill the memory
        if tar.offset > end:
            raise tarfile.ReadError(f"it was cut short at byte {end}")
        yield member
    # tarfile takes damage in the middle for the end.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    rest = tar.fileobj.read(min(end - tar.offset, MOST_PADDING))
    if len(rest) < BLOCK:
        raise tarfile.ReadError(f"it was cut short at byte {end}, where its end mark should be")
    if any(rest[:BLOCK]):
        raise tarfile.ReadError(f"there is no member's header at byte {tar.offset}")
    if any(rest):
        raise tarfile.ReadError("something comes after its end mark, as where tars were joined by `cat`")


# Names


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo, where: str) -> str:
    """The class that stands beside an image in a shard."""
    file = tar.extractfile(member)
    assert file is not None
    text = file.read(256).decode("utf-8", "replace").strip()
    if not CLASS_NAME.fullmatch(text):
        raise ValueError(f"{where}: {member.name} in it is no class: {shortened(text)!r}")
    return text


def _class_of(name: str, part: Part, labels: dict[str, str], classes: dict[str, str]) -> str:
    """The folder that the image would lie in: a tar's name, or what stands beside it, tells the class."""
    if part.inner:
        return TAR_NAME.sub("", part.inner)
    if "/" in name:
        return ""
    if of_tar := WORDNET_ID.fullmatch(PurePosixPath(part.path).stem):
        return of_tar[1]
    if label := labels.get(name.partition(".")[0]):
        wordnet = WORDNET_ID.match(name)  # numbers are ImageNet's classes, sorted: the name says more
        return wordnet[1] if wordnet and label.isdecimal() else label
    of_val = VAL_IMAGE.match(name)
    return classes.get(of_val[1], "") if of_val else ""


def classes_of_val(kit: Path) -> dict[str, str]:
    """ImageNet's validation images, by number, to their classes, as its development kit has them."""
    from scipy.io import loadmat  # slow to import

    try:
        with tarfile.open(kit) as tar:
            names = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            files = [tar.extractfile(f"{kit.name[:-7]}/data/{name}") for name in names]
            meta, truth = (file.read() for file in files if file)
        rows = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        wordnet = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in rows if not row["num_children"]}
        return {f"{n:08d}": wordnet[int(number)] for n, number in enumerate(truth.split(), start=1)}
    except (tarfile.TarError, OSError, EOFError, KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{kit} cannot be read: {shortened(error)}; download it again") from None
