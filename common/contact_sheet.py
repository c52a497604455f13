"""Contact sheets: rows of captioned pictures on one PNG, readable on a phone, where it is opened.

rows = [[(photo, "photo.jpg"), (hidden, "15 % hidden")] for photo, hidden in pairs]
save_png(contact_sheet(rows, titles=("image", "seen"), tile_width=240), path, "segments")
"""

import textwrap
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from common.files import mark, replacing, shortened

GAP = 4  # pixels between tiles, and around text
# A phone shows a sheet about 370 points wide: a thirtieth of the width is 12 points there, the
# smallest text that is read without zooming.
PHONE_SHARE = 30
CAPTION_LINES = 3  # of a tile; of what is longer, the middle is left out
BACKGROUND, INK = (255, 255, 255), (20, 20, 20)

Tile = tuple[np.ndarray, str]  # [H, W, 3] uint8 RGB of any size, and what stands above it


def contact_sheet(
    rows: Sequence[Sequence[Tile]], *, titles: Sequence[str] = (), tile_width: int
) -> Image.Image:
    """The tiles on white, row by row, each `tile_width` pixels wide and as high as that makes it.

    titles: of the columns, above the first row. Rows may be of different lengths.
    """
    columns = max(len(row) for row in [titles, *rows])
    width = columns * (tile_width + GAP) - GAP
    # Every strip is made first, since its height follows from its captions and pictures.
    strips = [_text_strip(titles, tile_width, width)] if titles else []
    for row in rows:
        pictures, captions = zip(*row, strict=True)
        if any(captions):
            strips.append(_text_strip(captions, tile_width, width))
        strips.append(_picture_strip(pictures, tile_width, width))
    return stacked(strips)


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures one below the other, from the left, as wide as the widest."""
    heights = [0, *accumulate(picture.height for picture in pictures)]
    sheet = Image.new("RGB", (max(picture.width for picture in pictures), heights[-1]), BACKGROUND)
    for picture, top in zip(pictures, heights, strict=False):
        sheet.paste(picture, (0, top))
    return sheet


def text_size(sheet_width: int) -> int:
    """The height of text in pixels."""
    return max(13, sheet_width // PHONE_SHARE)


def save_png(image: Image.Image, path: Path, kind: str) -> None:
    """Write a PNG whole or not at all. kind: the mark by which its command may replace it."""
    about = PngImagePlugin.PngInfo()
    about.add_text("Software", mark(kind))
    with replacing(path) as unfinished:
        image.save(unfinished, format="PNG", pnginfo=about)


def _text_strip(texts: Sequence[str], tile_width: int, width: int) -> Image.Image:
    # One text above each tile, wrapped to its width.
    font = ImageFont.load_default(text_size(width))
    alphabet = "abcdefghijklmnopqrstuvwxyz 15 %"
    letters = max(4, int(0.9 * tile_width * len(alphabet) / font.getlength(alphabet)))  # of a line
    texts = [shortened(text, 2 * letters) for text in texts]
    wrapped = ["\n".join(textwrap.wrap(t, letters, max_lines=CAPTION_LINES)) for t in texts]
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    height = max(draw.multiline_textbbox((0, 0), text or " ", font=font)[3] for text in wrapped)
    strip = Image.new("RGB", (width, int(height) + 2 * GAP), BACKGROUND)
    for column, text in enumerate(wrapped):
        place = column * (tile_width + GAP) + GAP, GAP
        ImageDraw.Draw(strip).multiline_text(place, text, fill=INK, font=font)
    return strip


def _picture_strip(images: Sequence[np.ndarray], tile_width: int, width: int) -> Image.Image:
    heights = [max(1, round(image.shape[0] * tile_width / image.shape[1])) for image in images]
    strip = Image.new("RGB", (width, max(heights) + GAP), BACKGROUND)
    for column, (image, height) in enumerate(zip(images, heights, strict=True)):
        # Small pictures are enlarged pixel by pixel, so that a model's patches keep their edges.
        larger = tile_width > image.shape[1]
        how = Image.Resampling.NEAREST if larger else Image.Resampling.BILINEAR
        tile = Image.fromarray(image).resize((tile_width, height), how)
        strip.paste(tile, (column * (tile_width + GAP), 0))
    return strip
