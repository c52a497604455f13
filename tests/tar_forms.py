"""A folder of images as the tar files in which people keep them."""

import io
import tarfile
from itertools import groupby
from pathlib import Path

from common.images import find_images


def put(tar: tarfile.TarFile, name: str, content: bytes, **about) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    for key, value in about.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(content))


def by_class(folder: Path):
    for name, paths in groupby(find_images(folder), key=lambda path: path.rpartition("/")[0]):
        yield name, [folder / path for path in paths]


def tar_of_tars(folder: Path, out: Path) -> None:
    """As ILSVRC2012_img_train.tar: a tar for each class."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "ILSVRC2012_img_train.tar", "w") as outer:
        for name, paths in by_class(folder):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for path in paths:
                    put(tar, path.name, path.read_bytes())
            put(outer, f"{name}.tar", inner.getvalue())


def class_tars(folder: Path, out: Path) -> None:
    """What lay in that one, by itself: names of ImageNet's classes only."""
    out.mkdir(parents=True, exist_ok=True)
    for name, paths in by_class(folder):
        with tarfile.open(out / f"{name}.tar", "w", format=tarfile.GNU_FORMAT) as tar:
            for path in paths:
                put(tar, f"./{path.name}", path.read_bytes())


def shards(folder: Path, out: Path, count=3, format=tarfile.PAX_FORMAT) -> None:
    """WebDataset's, image and class side by side, in no order of the images' names."""
    out.mkdir(parents=True, exist_ok=True)
    paths = find_images(folder)
    for shard in range(count):
        with tarfile.open(out / f"train-{shard:06d}.tar", "w", format=format) as tar:
            for path in paths[shard::count]:
                name, _, stem = path.rpartition("/")
                put(tar, f"{stem.partition('.')[0]}.cls", name.encode())
                put(tar, f"{stem.partition('.')[0]}.json", b"{}")
                put(tar, stem, (folder / path).read_bytes())


def trees(folder: Path, out: Path) -> None:
    """A tar of the folder as it is, one of its images linked to another."""
    out.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out / "images.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        tar.add(folder, ".")


FORMS = {"tar of tars": tar_of_tars, "class tars": class_tars, "shards": shards, "trees": trees}


def simple(path: Path, *names: str, **about) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name in names:
            put(tar, name, name.encode(errors="surrogateescape") * 300, **about)
    return path


def cut(path: Path, size: int) -> None:
    with path.open("rb+") as file:
        file.truncate(size)
