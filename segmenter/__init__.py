"""Segmenter: a ViT encoder and a mask transformer; start at `python -m segmenter --help`."""
