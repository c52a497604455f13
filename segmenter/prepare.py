"""`prepare`: get ADE20K, and check datasets down to every label. No torch here."""

import errno
import logging
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from common.download import download, has_digest
from common.files import beside, check_output_file, check_output_folder, path_below
from segmenter.dataset import TEST, TRAIN, VAL, Pair, Split, is_ade20k, read_description
from segmenter.labels import check_split

logger = logging.getLogger(__name__)

ADE20K_NAME = "ADEChallengeData2016"
ADE20K_URL = "://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
# The source gives no digest; this one is in the dataset loaders of several open projects.
ADE20K_DIGEST = "md5:7328b3957e407ddae1d3cbf487f149ef"
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
ADE20K_PAIRS: dict[Split, int] = {TRAIN: 20_210, VAL: 2_000}


def prepare_ade20k(folder: Path, *, own_urls: Sequence[str], digest: str | None) -> Path:
    """Download and unpack ADE20K below `folder`, unless it is there; then check every pair.

    own_urls: tried first. digest: of the zip, by default the known one, or "none". Returns the
    ADEChallengeData2016 folder. Raises ValueError, or RuntimeError if it cannot be downloaded.
    """
    check_output_folder(folder, "FOLDER")
    unpacked = folder / ADE20K_NAME
    if os.path.lexists(unpacked) and not is_ade20k(unpacked):
        raise ValueError(f"{unpacked} is in the way: it is not ADE20K; remove it")
    for ready in filter(is_ade20k, (folder, unpacked)):
        check_dataset(ready, ADE20K_PAIRS)
        return ready
    archive = folder / f"{ADE20K_NAME}.zip"
    check_output_file(archive, "FOLDER", makes_folder=True)
    # A mirror's zip may be packed otherwise: then none, and its files are checked all the same.
    known = None if digest == "none" else digest or ADE20K_DIGEST
    if not archive.exists():  # else somebody brought it, or a check failed after the download
        download([*own_urls, f"http{ADE20K_URL}", f"https{ADE20K_URL}"], archive, digest=known)
    elif known is not None and not has_digest(archive, known):
        raise ValueError(f"{archive} has not the digest {known}; remove it or give its own")
    unpack(archive, folder, ADE20K_NAME)
    try:
        check_dataset(unpacked, ADE20K_PAIRS)
    except ValueError as error:  # of the download, not of what the user gave
        raise RuntimeError(f"{error}; {archive} is kept") from None
    archive.unlink()
    return unpacked


def check_dataset(path: Path, expected: Mapping[Split, int] | None = None) -> dict[Split, int]:
    """Look at every pair of the splits that are there, or expected; returns their numbers."""
    logger.info("checking %s", path)
    description = read_description(path)
    found: dict[Split, list[Pair]] = {}
    problems = []
    for split in expected or (TRAIN, VAL, TEST):
        folders = (folder.get(split) for folder in (description.images, description.annotations))
        if not expected and not any(folder and folder.is_dir() for folder in folders):
            continue  # as test servers' datasets do
        try:
            found[split] = description.pairs(split)
        except ValueError as error:
            problems.append(str(error))
            continue
        if expected and len(found[split]) != expected[split]:
            problems.append(f"{len(found[split])} of {expected[split]} pairs in the {split} split")
    if problems or not found:
        said = "; ".join(problems) or "neither its train split nor its val split is there"
        raise ValueError(f"{path} is not whole: {said}")
    for split, pairs in found.items():
        check_split(description, split, pairs, completely=True)
    return {split: len(pairs) for split, pairs in found.items()}


def unpack(archive: Path, folder: Path, name: str) -> None:
    """Unpack `<name>/...` of a zip into `folder`; it appears under its name when it is complete.

    Raises ValueError if a member would leave it or is a link, RuntimeError if the disk is full.
    """
    unfinished = beside(folder / name)
    shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                below = path_below(Path(), member.filename, f"{archive} is refused")
                is_link = stat.S_ISLNK(member.external_attr >> 16)  # Unix's mode
                if is_link or below.parts[0] != name:
                    problem = "is a link" if is_link else f"is not in {name}/"
                    raise ValueError(f"{archive} is refused: {member.filename!r} {problem}")
            logger.info("unpacking %s", archive)
            file.extractall(unfinished)
        (unfinished / name).replace(folder / name)
    # What is in a damaged archive can make zipfile raise anything; RuntimeError: it is encrypted.
    except (OSError, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            text = f"{folder} cannot be written to: {error.strerror}. Make room and run this again"
            raise RuntimeError(text) from error
        raise ValueError(f"{archive} is not a sound zip file: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
