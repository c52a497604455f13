"""A ViT of two blocks: its runs take tenths of seconds and its checkpoints kilobytes.

For tests to import, and for the commands that they call as a --plugin.
"""

from pathlib import Path

from engine.vit import VIT_SIZES, VitSize

TOY = VIT_SIZES.setdefault("vit_toy", VitSize(width=24, depth=2, heads=3))
PLUGIN = Path(__file__)
