"""The delta artifact: the arrays that a fine-tune changed, from which the version can be rebuilt on its base.

`python -m trainer.delta BASE DELTA OUT` does that and writes a SavedModel. BASE is the directory of the base's version,
DELTA a file from `GET /models/{model}/versions/{version}/delta`.
"""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from serving.quiet import import_tensorflow
from store.records import Manifest

DELTA = "assets.extra/delta.npz"
CARD = "card"  # the entry with the JSON that says what the arrays are


def write(path: Path, trained: Mapping[str, np.ndarray], *, lora_scale: float, manifest: Mapping[str, Any]) -> None:
    """An `.npz` without pickles of the trained arrays, and the version's manifest."""
    card = json.dumps({"lora_scale": lora_scale, "manifest": manifest}, ensure_ascii=False)
    np.savez(path, allow_pickle=False, **trained, **{CARD: np.array(card)})


def apply(base: Mapping[str, np.ndarray], path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Effective parameters of the fine-tuned version, and its manifest.

    Raises:
        ValueError: the file is not a delta, or it belongs to another base.
    """
    from trainer.export import digest
    from trainer.methods import effective

    arrays, card = _read(path)
    manifest = card["manifest"]
    if digest(base) != manifest["base_sha256"]:
        raise ValueError(f"{path} belongs to another base, {manifest['base']} (SHA-256 {manifest['base_sha256']})")
    new = {name: value for name, value in arrays.items() if name.endswith(("/kernel", "/bias"))}
    merged = effective({**base, **new}, arrays, np.float32(card["lora_scale"]))
    return {name: np.asarray(value) for name, value in merged.items()}, manifest


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a delta, and its card."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            arrays = dict(file)
        card = json.loads(str(arrays.pop(CARD)))
        if not {"base", "base_sha256", "polarity", "spec"} <= set(card["manifest"]) or "lora_scale" not in card:
            raise ValueError("its card is incomplete")
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as exc:
        raise ValueError(f"{path} is not a delta ({exc})") from exc
    return arrays, card


@click.command()
@click.argument("base", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("delta", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(base: Path, delta: Path, out: Path) -> None:
    """Apply DELTA to the version in BASE and write the result to OUT, a new directory."""
    if out.exists():
        raise click.ClickException(f"{out} exists already; name a new directory")
    import_tensorflow()
    import tensorflow as tf

    from trainer.export import export, load_params

    try:
        params = load_params(base)
    except tf.errors.OpError as exc:
        raise click.ClickException(f"{base} is not the directory of a model's version: {exc.message}") from exc
    try:
        params, manifest = apply(params, delta)
    except ValueError as exc:
        raise click.ClickException(str(exc)) from exc
    manifest = {**manifest, "abstention": None}  # the delta has no detector
    try:
        export(out, params, invert=manifest["polarity"] == "dark_on_light", manifest=manifest)
    except OSError as exc:
        raise click.ClickException(f"cannot write {out}: {exc.strerror or exc}") from exc
    method = Manifest.read(manifest).trained_with["method"]
    click.echo(f"{out}: {method} on {manifest['base']}, sha256 {manifest['sha256']}")


if __name__ == "__main__":
    main()
