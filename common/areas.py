"""Areas of each validation image, as areas.npz keeps them: mean IoU, and what chance in the images makes.

draws = draw_images(Path("eval_output/patches_50/areas.npz"))  # [DRAWS] mean IoU, in percent
"""

import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np

from common.files import open_regular

DRAWS = 1000  # of the images; the standard error is then known to 2%
# With fewer, drawing anew tells too little: of one image, one of seven intervals was wrong.
LEAST_IMAGES = 10


def mean_iou(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    """[..., K] areas by class -> [...] in percent: the mean over the classes that occur."""
    occurs = union > 0
    iou = np.divide(intersection, union, out=np.zeros(union.shape), where=occurs)
    return 100 * iou.sum(-1) / np.maximum(1, occurs.sum(-1))


def draw_images(path: Path) -> np.ndarray:
    """Mean IoU in percent, had other images been drawn: [DRAWS], a bootstrap of an areas.npz.

    [0] of fewer than LEAST_IMAGES images. The draws are the same for every file of the same images,
    so that differences are paired.
    Raises ValueError that names the file if it is damaged.
    """
    names, areas = read_areas(path)
    if len(names) < LEAST_IMAGES:
        return np.zeros(0)
    intersection, predicted, label = areas.astype("float32").transpose(1, 0, 2)  # 3 x [N, K]
    counts = _counts(names)  # float32 knows a sum of pixels to one in a million
    union = counts @ (predicted + label - intersection)
    return mean_iou(counts @ intersection, union)


def images_of(path: Path) -> int:
    """Tells the images of an areas.npz from others: equal where the draws are."""
    return zlib.crc32("\n".join(map(str, *_stored(path, "images"))).encode())


@lru_cache(maxsize=2)
def _counts(names: tuple[str, ...]) -> np.ndarray:
    """[DRAWS, N]: how often each image is in each draw of N with replacement."""
    rng, images = np.random.default_rng(zlib.crc32("\n".join(names).encode())), len(names)
    return rng.multinomial(images, [1 / images] * images, size=DRAWS).astype("float32")


def read_areas(path: Path) -> tuple[tuple[str, ...], np.ndarray]:
    """Names of the images and their areas [N, 3, K] in pixels: intersection, prediction, label."""
    names, areas = _stored(path, "images", "areas")
    fits = areas.ndim == 3 and names.shape == areas.shape[:1] and areas.shape[1] == 3 and areas.size
    if not fits or areas.dtype.kind not in "iu" or (areas < 0).any():
        raise ValueError(f"{path} is damaged: areas of {areas.dtype} {list(areas.shape)}")
    return tuple(map(str, names)), areas


def _stored(path: Path, *names: str) -> list[np.ndarray]:
    """Some arrays of a file, which reads no others. Raises ValueError that names it if it is damaged."""
    try:
        with open_regular(path) as file, np.lib.npyio.NpzFile(file) as stored:
            return [stored[name] for name in names]
    # Damage can make numpy raise anything, a MemoryError for all that the file claims to hold.
    except Exception as error:
        raise ValueError(f"{path} is damaged: {str(error) or type(error).__name__}") from None
