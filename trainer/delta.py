"""The delta artifact: only what a fine-tune has changed, which makes the fine-tuned version of its base.

`python -m trainer.delta BASE DELTA OUT` writes that version as a SavedModel. BASE is the directory of the base's
version, DELTA a file from `GET /models/{name}/versions/{version}/delta`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np

from serving.quiet import import_tensorflow

DELTA = "assets.extra/delta.npz"
CARD = "card"  # the entry with the JSON that says what the arrays are


def write(path: Path, trained: Mapping[str, np.ndarray], *, lora_scale: float, manifest: Mapping[str, Any]) -> None:
    """An `.npz` without pickles of the trained arrays, and the version's manifest."""
    card = json.dumps({"lora_scale": lora_scale, "manifest": manifest}, ensure_ascii=False)
    np.savez(path, allow_pickle=False, **trained, **{CARD: np.array(card)})


def apply(base: Mapping[str, np.ndarray], path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Effective parameters of the fine-tuned version, and its manifest.

    Raises:
        ValueError: the file is no delta, or one of another base.
    """
    from trainer.export import digest
    from trainer.methods import effective

    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    if CARD not in arrays:
        raise ValueError(f"{path} is no delta: it has no entry {CARD!r}")
    card = json.loads(str(arrays.pop(CARD)))
    manifest = card["manifest"]
    if digest(base) != manifest["base_sha256"]:
        raise ValueError(f"this is not the base of {path}, which is {manifest['base']} ({manifest['base_sha256']})")
    new = {name: value for name, value in arrays.items() if name.endswith(("/kernel", "/bias"))}
    merged = effective({**base, **new}, arrays, np.float32(card["lora_scale"]))
    return {name: np.asarray(value) for name, value in merged.items()}, manifest


@click.command()
@click.argument("base", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("delta", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("out", type=click.Path(exists=False, path_type=Path))
def main(base: Path, delta: Path, out: Path) -> None:
    """Apply DELTA to the version in BASE and write the result to OUT."""
    import_tensorflow()
    from trainer.export import export, load_params

    try:
        params, manifest = apply(load_params(base), delta)
    except ValueError as exc:
        raise click.ClickException(str(exc)) from exc
    export(out, params, invert=manifest["polarity"] == "dark_on_light", manifest=manifest)
    click.echo(f"{out}: {manifest['spec']['method']} on {manifest['base']}, sha256 {manifest['sha256']}")


if __name__ == "__main__":
    main()
