"""How good the recipes are, measured on public data: `make quality`."""
