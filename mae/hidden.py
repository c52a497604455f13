"""What is hidden, on some of the training images: how much of them ever, in how many parts, where.

A segment that is always the same hides a small part of its image and shows the rest in every epoch;
one that is drawn anew hides it all in turn. So these numbers stand beside the loss in log.txt.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from common.images import evenly_spread
from mae.crops import Crop
from mae.data import MaskedImages
from segments.segment import count_islands, sides_touched

SAMPLE_SIZE = 32  # images
GRID = 64  # points per side of an image at which it is known whether they were ever hidden


@dataclass(eq=False)
class Hidden:
    """Of `SAMPLE_SIZE` images, evenly spread; the same in every epoch."""

    images: MaskedImages
    ever: np.ndarray = field(default_factory=lambda: np.zeros((SAMPLE_SIZE, GRID, GRID), bool))
    epochs_seen: int = 0

    def in_epoch(self, epoch: int) -> dict[str, float]:
        """Columns of log.txt, with what an epoch hides, counted from 0; without damaged images.

        ever_hidden_percent: of the pixels of an image, in this epoch or before; of a crop of it:
        hidden_islands, the median; hidden_at_edges_percent: of crops, those whose hidden part
        touches two edges or more.
        """
        # What is hidden is a function of the epoch: a run that was stopped looks at all before.
        while self.epochs_seen < epoch:
            self.in_epoch(self.epochs_seen)
        self.epochs_seen = epoch + 1
        chosen = evenly_spread(range(len(self.images)), SAMPLE_SIZE)
        usable, islands, sides = [], [], []
        for number, index in enumerate(chosen):
            try:
                image, pattern = self.images.draw(epoch, index)
            except ValueError:  # the loader has named it
                continue
            visible = self.images.method.visible_map(torch.from_numpy(pattern[None]))
            hidden = (visible[0, 0] == 0).numpy()
            _add(self.ever[number], hidden, image.crop, image.height, image.width)
            usable.append(number)
            islands.append(count_islands(hidden))
            sides.append(sides_touched(hidden))
        if not usable:
            return {}
        return {
            "ever_hidden_percent": 100 * float(self.ever[usable].mean()),
            "hidden_islands": float(np.median(islands)),
            "hidden_at_edges_percent": 100 * float(np.mean(np.array(sides) > 1)),
        }


def _add(ever: np.ndarray, hidden: np.ndarray, crop: Crop, height: int, width: int) -> None:
    """Marks the points [GRID, GRID] of an image that a crop [S, S] of it hides."""
    side, seen, points = len(hidden), hidden[:, ::-1] if crop.flip else hidden, []
    for length, start, size in ((height, crop.top, crop.height), (width, crop.left, crop.width)):
        places = ((np.arange(GRID) + 0.5) / GRID * length - start) / size  # from 0 to 1: in the crop
        there = np.flatnonzero((places >= 0) & (places < 1))
        points.append((there, (places[there] * side).astype(int)))
    (rows, of_rows), (columns, of_columns) = points
    ever[np.ix_(rows, columns)] |= seen[np.ix_(of_rows, of_columns)]
