"""Accuracy and robustness of the recipes on public data: `make quality`."""
