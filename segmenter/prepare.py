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
from segmenter.dataset import SPLITS, TRAIN, VAL, is_ade20k, read_description
from segmenter.labels import check_labels

logger = logging.getLogger(__name__)

ADE20K_NAME = "ADEChallengeData2016"
_PLACE = "data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip"
ADE20K_URLS = (f"http://{_PLACE}", f"https://{_PLACE}")
# The source gives no digest; this one is in the dataset loaders of several open projects.
ADE20K_DIGEST = "md5:7328b3957e407ddae1d3cbf487f149ef"
ADE20K_PAIRS = {TRAIN: 20_210, VAL: 2_000}


def prepare_ade20k(folder: Path, *, urls: Sequence[str], digest: str | None) -> Path:
    """Download and unpack ADE20K below `folder`, unless it is there; then check every pair.

    Returns the ADEChallengeData2016 folder. Raises ValueError if it is wrong or partial,
    RuntimeError if it cannot be downloaded.
    """
    check_output_folder(folder, "FOLDER")
    unpacked = folder / ADE20K_NAME
    if os.path.lexists(unpacked) and not is_ade20k(unpacked):
        raise ValueError(f"{unpacked} is in the way: it is not ADE20K; remove it")
    ready = next(filter(is_ade20k, (folder, unpacked)), None)
    if ready is not None:
        check_dataset(ready, ADE20K_PAIRS)
        return ready
    archive = folder / f"{ADE20K_NAME}.zip"
    check_output_file(archive, "FOLDER", makes_folder=True)
    if not archive.exists():  # else somebody brought it, or a check failed after the download
        download(urls, archive, digest=digest)
    elif digest is not None and not has_digest(archive, digest):
        raise ValueError(f"{archive} has not the digest {digest}; remove it or give its own")
    unpack(archive, folder, ADE20K_NAME)
    try:
        check_dataset(unpacked, ADE20K_PAIRS)
    except ValueError as error:  # of the download, not of what the user gave
        raise RuntimeError(f"{error}; {archive} is kept") from None
    archive.unlink()
    return unpacked


def check_dataset(path: Path, expected: Mapping[str, int] | None = None) -> dict[str, int]:
    """Look at every pair of the splits that the dataset names; returns their numbers.

    expected: the splits that have to be there, with their pairs. Raises ValueError.
    """
    logger.info("checking %s", path)
    description = read_description(path)
    found, problems = {}, []
    for split in expected or SPLITS:
        folders = (description.images.get(split), description.annotations.get(split))
        if not expected and not any(folder and folder.is_dir() for folder in folders):
            continue  # as test servers' datasets do
        try:
            found[split] = description.pairs(split)
        except ValueError as error:
            problems.append(str(error))
            continue
        if expected and len(found[split]) != expected[split]:
            problems.append(f"{len(found[split])} of {expected[split]} pairs in the {split} split")
    if problems:
        raise ValueError(f"{path} is not whole: {'; '.join(problems)}")
    if not found:
        raise ValueError(f"{path}: neither of the splits {', '.join(SPLITS)} is there")
    every_pair = [pair for pairs in found.values() for pair in pairs]
    check_labels(description, every_pair, completely=True)
    return {split: len(pairs) for split, pairs in found.items()}


def unpack(archive: Path, folder: Path, name: str) -> None:
    """Unpack `<name>/...` of a zip into `folder`; it appears under its name when it is complete.

    Raises ValueError, before anything is written, if a member would leave the folder or is a link;
    RuntimeError if the disk does not take it.
    """
    unfinished = beside(folder / name)
    shutil.rmtree(unfinished, ignore_errors=True)  # of a call that was killed
    try:
        with zipfile.ZipFile(archive) as file:
            for member in file.infolist():
                below = path_below(Path(), member.filename, f"{archive} is refused")
                if stat.S_ISLNK(member.external_attr >> 16):  # Unix's mode
                    raise ValueError(f"{archive} is refused: {member.filename!r} is a link")
                if below.parts[0] != name:
                    raise ValueError(f"{archive} is refused: {member.filename!r} is not in {name}/")
            logger.info("unpacking %s", archive)
            file.extractall(unfinished)
        (unfinished / name).replace(folder / name)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise RuntimeError(
                f"{folder} cannot be written to: {error.strerror}. Make room and run the same "
                "command again"
            ) from error
        raise ValueError(f"{archive} is not a sound zip file: {error.strerror or error}") from None
    # What is in a damaged archive can make zipfile raise anything; RuntimeError: it is encrypted.
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise ValueError(f"{archive} is not a sound zip file: {error}") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
