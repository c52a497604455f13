"""Segments of images. Training reads a packed store of them; `forms` says what can be packed."""
