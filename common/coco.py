"""COCO's RLE JSON as Segment Anything's `amg.py` writes it; https://cocodataset.org/#format-data."""

from typing import Any


def rle_annotation(height: int, width: int, counts: bytes) -> dict[str, Any]:
    """One segment of an image of height x width pixels, from COCO's compressed run lengths.

    area: in pixels. bbox: x, y, width, height. The code has to be sound, which nothing checks here.
    """
    from pycocotools import mask as coco_rle  # whoever plans with this need not load it

    rle = {"size": [height, width], "counts": counts}
    left, top, box_width, box_height = (int(value) for value in coco_rle.toBbox(rle))
    return {
        "segmentation": {**rle, "counts": counts.decode("ascii")},
        "area": int(coco_rle.area(rle)),
        # amg.py subtracts the first pixel from the last: a box of one pixel is 0 wide, not 1.
        "bbox": [left, top, max(0, box_width - 1), max(0, box_height - 1)],
    }
