"""The classes of a dataset: its own, or those of a dataset that mmsegmentation knows. No torch."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from segmenter.dataset import DatasetDescription

# mmsegmentation knows their names; how many there are is asked more often, and without torch.
NUM_CLASSES = {"ADE20KDataset": 150, "CityscapesDataset": 19, "PascalContextDataset": 60}


@dataclass(frozen=True, kw_only=True)
class Classes:
    """names and palette [K, 3] uint8 RGB of the classes."""

    names: tuple[str, ...]
    palette: np.ndarray

    def __len__(self) -> int:
        return len(self.names)


def read_classes(description: DatasetDescription) -> Classes:
    """Names and colours: the description's own, or mmsegmentation's. Raises ValueError."""
    names: Sequence[str] = description.classes
    palette: Sequence[Sequence[int]] = description.palette
    if isinstance(description.classes, str):
        with quiet_imports():  # seconds
            import mmseg.datasets
        known = getattr(mmseg.datasets, description.classes, None)
        if known is None:
            raise ValueError(
                f"{description.source}: mmsegmentation has no dataset {description.classes}"
            )
        names = known.METAINFO["classes"]
        palette = palette or known.METAINFO["palette"]
    if not len(palette):
        palette = np.random.default_rng(42).integers(32, 256, (len(names), 3)).tolist()
    return Classes(names=tuple(names), palette=np.array(palette, dtype=np.uint8))


def count_classes(description: DatasetDescription) -> int:
    """How many classes there are. Raises ValueError for an unknown dataset of mmsegmentation."""
    if not isinstance(description.classes, str):
        return len(description.classes)
    if description.classes not in NUM_CLASSES:
        return len(read_classes(description))
    return NUM_CLASSES[description.classes]


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Drop what mmseg and mmcv say on import about optional parts that nothing here uses.

    "Could not import OneDL" comes by print, whatever the logging level; the warnings are about
    renamed modules and operations that were not compiled.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield
