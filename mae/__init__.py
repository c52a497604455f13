"""Masked-autoencoder pretraining by masking methods of one class each; start at `python -m mae --help`.

from mae import load_encoder     # timm's ViT out of a checkpoint
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """What Python users want, loaded when asked for: torch takes seconds, and the planner does without."""
    if name == "load_encoder":
        from mae.weights import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__} has no {name}")
