"""Masked-autoencoder pretraining with four masking methods; start at `python -m mae --help`."""
