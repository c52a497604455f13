"""Scores of ViT encoders: frozen, finetuned, whoever trained them; start at `python -m segmenter --help`.

from segmenter import load_segmenter, predict_image, probe
"""

from typing import Any


def __getattr__(name: str) -> Any:
    """What Python users want, loaded when asked for."""
    if name == "load_segmenter":
        from segmenter.loading import load_segmenter

        return load_segmenter
    if name == "predict_image":
        from segmenter.predict import predict_image

        return predict_image
    if name == "probe":
        from segmenter.cli import probe_encoder

        return probe_encoder
    raise AttributeError(f"module {__name__} has no {name}")
