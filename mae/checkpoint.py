"""How checkpoint files are written and read. A file that exists is complete."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from mae.config import differing_settings
from mae.paths import beside

FORMAT_VERSION = 1
NOT_TENSORS = "it is no file of torch.save, or holds more than tensors and plain values"
REQUIRED = ("model", "optimizer", "epochs_completed", "steps_completed", "config")


def save_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write beside, flush, rename: a kill at any moment leaves the old file or the new one.

    Raises RuntimeError if it cannot be written as a whole (full disk); then nothing is left.
    """
    unfinished = beside(path)
    unfinished.unlink(missing_ok=True)  # it may be a second name of a file that is whole
    try:
        with unfinished.open("wb") as file:
            torch.save({"format_version": FORMAT_VERSION, **content}, file)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except (OSError, RuntimeError) as error:
        unfinished.unlink(missing_ok=True)
        # torch wraps what the file system said in an error of its own.
        said = error if isinstance(error, OSError) else error.__context__
        if not isinstance(said, OSError):
            raise
        raise RuntimeError(
            f"{path} cannot be written: {said.strerror}. Make room and run the same command again"
        ) from error


def also_save_as(existing: Path, path: Path) -> None:
    """Give a complete file a second name, without writing gigabytes twice where links work.

    Files are only ever replaced, never changed, so that the two names do not disturb each other.
    """
    second = beside(path)
    second.unlink(missing_ok=True)
    try:
        second.hardlink_to(existing)
    except OSError:
        shutil.copyfile(existing, second)
    second.replace(path)


def load_checkpoint(path: Path, *, lazily: bool = False) -> dict[str, Any]:
    """Read a checkpoint of this package onto the CPU.

    lazily: tensors come from disk when they are used, for a look at the settings; not for a file
    that is replaced meanwhile, perhaps by another machine.

    Raises ValueError if the file is none, or is of another format.
    """
    content = read_torch_file(path, lazily=lazily)
    if not isinstance(content, dict) or "format_version" not in content:
        raise ValueError(f"{path} is not a checkpoint of `python -m mae pretrain`")
    if content["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format {content['format_version']}; this version reads {FORMAT_VERSION}"
        )
    missing = [name for name in REQUIRED if name not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}")
    return content


def read_torch_file(path: Path, *, lazily: bool = False) -> Any:
    """What a file of torch.save holds: tensors and plain values only. Raises ValueError."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        mapped = lazily and zipfile.is_zipfile(path)  # older files can only be read as a whole
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:  # torch's text advises to load it unsafely
        raise ValueError(f"{path} cannot be read as a checkpoint: {NOT_TENSORS}") from error
    except Exception as error:  # reading a file of another kind can raise anything
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(f"{path} cannot be read as a checkpoint: {reason}") from error


def check_same_settings(stored: dict[str, Any], wanted: dict[str, Any], path: Path) -> None:
    """Raise ValueError naming the settings in which a run differs from its checkpoint."""
    differences = differing_settings(stored, wanted)
    if differences:
        raise ValueError(
            f"{path} was made with other settings ({'; '.join(differences)}); "
            "use those, or another --output-dir"
        )
