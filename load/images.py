"""Labelled images to ask about: clean, noisy and adversarial.

`python -m` this module makes the adversarial ones: it needs TensorFlow, whose threads do not go with gevent, so the
load test runs it as a process of its own, before the load begins.
"""

import io
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import orjson
from PIL import Image

from load.settings import FORMS, KINDS, LoadSettings, weights
from store.processes import has_tensorflow

MOST_IMAGES = 512  # of each kind; bodies are made beforehand, because making them takes the generator's time
PGD_STEPS = 10
PIXELS = (28, 28)


@dataclass(frozen=True)
class Labelled:
    """Images (n, 28, 28) uint8 and the names of their classes."""

    images: np.ndarray
    labels: list[str]


@dataclass(frozen=True)
class Query:
    """A request for predictions, as it is sent."""

    name: str  # in statistics
    path: str
    content_type: str
    body: bytes
    model: str
    kind: str = ""
    labels: tuple[str, ...] = ()  # the right answers; () where they are not known
    version: int = 0  # that must answer; 0 for any that the label stands for


def read_images(path: Path) -> Labelled:
    """Read an `.npz`.

    Raises:
        ValueError: it has no `images` (n, 28, 28) uint8 and `labels` (n,), or none at all.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = arrays["images"], arrays["labels"]
    except (OSError, ValueError, KeyError) as exc:
        raise ValueError(f"--images {path}: {exc}") from exc
    if images.dtype != np.uint8 or images.shape[1:] != PIXELS or not len(images) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"--images {path}: expected images (n, 28, 28) uint8 and labels (n,), "
            f"got {images.shape} {images.dtype} and {labels.shape}"
        )
    return Labelled(images, [str(label) for label in labels.tolist()])


def digits() -> Labelled:
    """scikit-learn's 1,797 handwritten digits by 43 people, resized from 8x8.

    Raises:
        ValueError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as exc:
        raise ValueError("without scikit-learn there are no images of its own: give --images FILE.npz") from exc
    found = load_digits()
    small = np.rint(found.images / 16 * 255).astype(np.uint8)
    big = [np.asarray(Image.fromarray(image).resize(PIXELS, Image.Resampling.BILINEAR)) for image in small]
    return Labelled(np.stack(big), [str(label) for label in found.target.tolist()])


def noisy(found: Labelled, deviation: float, seed: int) -> Labelled:
    """Add seeded Gaussian noise of this standard deviation, where a pixel has 0 to 1."""
    noise = np.random.default_rng([seed, 1]).normal(0, 255 * deviation, found.images.shape)
    return Labelled(np.clip(np.rint(found.images + noise), 0, 255).astype(np.uint8), found.labels)


def adversarial(found: Labelled, epsilon: float) -> Labelled:
    """Change every pixel by at most `epsilon` so that the base model errs (PGD of ten steps, Madry et al. 2018).

    They are made against the base model. Against a fine-tuned one they are a transfer attack, which is weaker.

    Raises:
        ValueError: TensorFlow is missing, the labels are not the digits that the base knows, or the process failed.
    """
    if not has_tensorflow():
        raise ValueError("TensorFlow is not installed")
    if unknown := set(found.labels) - set("0123456789"):
        raise ValueError(f"the base model, which they are made against, does not know the class {min(unknown)!r}")
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "given.npz", Path(folder) / "made.npz"
        np.savez(given, images=found.images, labels=np.array(found.labels).astype(np.int32))
        command = [sys.executable, "-m", __spec__.name, str(given), str(made), "--epsilon", str(epsilon)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"making them failed: {done.stderr.strip().splitlines()[-1:]}")
        with np.load(made) as arrays:
            return Labelled(arrays["images"], found.labels)


def choose_images(settings: LoadSettings) -> tuple[dict[str, Labelled], dict[str, str]]:
    """Images by kind, at most `MOST_IMAGES` of each, and why a kind that was asked for is left out.

    Raises:
        ValueError: there are no images.
    """
    if settings.prepared:
        with np.load(settings.prepared) as arrays:
            kinds = [kind for kind in KINDS if kind in arrays]
            return {kind: Labelled(arrays[kind], arrays[f"{kind}_labels"].tolist()) for kind in kinds}, {}
    every = read_images(settings.images) if settings.images else digits()
    order = np.random.default_rng(settings.seed).permutation(len(every.labels))[:MOST_IMAGES]
    clean = Labelled(every.images[order], [every.labels[number] for number in order])
    asked = {kind for kind, weight in weights(settings.kinds, KINDS).items() if weight}
    found, missing = {}, {}
    if "clean" in asked:
        found["clean"] = clean
    if "noisy" in asked:
        found["noisy"] = noisy(clean, settings.noise, settings.seed)
    if "adversarial" in asked:
        try:
            found["adversarial"] = adversarial(clean, settings.epsilon)
        except ValueError as exc:
            missing["adversarial"] = str(exc)
    if not found:
        raise ValueError(f"--kinds {settings.kinds}: none of these can be made: {missing}")
    return found, missing


def save_images(path: Path, found: dict[str, Labelled]) -> None:
    """Write images for `prepared` of other processes, which then need not make them."""
    arrays: dict[str, Any] = {kind: one.images for kind, one in found.items()}
    arrays |= {f"{kind}_labels": np.array(one.labels) for kind, one in found.items()}
    np.savez(path, **arrays)


def query(model: str, form: str, kind: str, images: np.ndarray, labels: list[str], version: int = 0) -> Query:
    """Build a request from images (n, 28, 28) uint8; a PNG shows the first one only."""
    pinned = f"&version={version}" if version else ""
    path = f"/predict?model={model}{pinned}"
    name, answers = f"POST /predict {form}", tuple(labels)
    match form:
        case "json":
            body: dict[str, object] = {"model": model, "range": "byte", "instances": images.tolist()}
            if version:
                body["version"] = version
            return Query(name, "/predict", "application/json", orjson.dumps(body), model, kind, answers, version)
        case "png":
            encoded = io.BytesIO()
            Image.fromarray(images[0]).save(encoded, "PNG")
            return Query(name, path, "image/png", encoded.getvalue(), model, kind, answers[:1], version)
        case _:
            return Query(name, path, "application/octet-stream", images.tobytes(), model, kind, answers, version)


class Traffic:
    """Draws the next request by the weights of models, forms and kinds, from bodies that were made beforehand."""

    def __init__(self, settings: LoadSettings, found: dict[str, Labelled], seed: int = 0) -> None:
        self._random = np.random.default_rng([settings.seed, seed, 2])
        kinds = {name: weight for name, weight in weights(settings.kinds, KINDS).items() if name in found}
        forms = weights(settings.forms, FORMS)
        pairs = [
            (model, form, kind, forms[form] * kinds[kind])
            for model in settings.model_names for form in forms for kind in kinds if forms[form] * kinds[kind]
        ]  # fmt: skip
        self._shares = np.cumsum([weight for *_, weight in pairs]) / sum(weight for *_, weight in pairs)
        self._queries = [
            [
                query(model, form, kind, found[kind].images[k : k + 1], [found[kind].labels[k]], settings.version or 0)
                for k in range(len(found[kind].labels))
            ]
            for model, form, kind, _ in pairs
        ]

    def next(self) -> Query:
        """A request for one image."""
        chosen = self._queries[int(self._shares.searchsorted(self._random.random(), side="right"))]
        return chosen[int(self._random.integers(len(chosen)))]


@click.command()
@click.argument("given", type=click.Path(exists=True, path_type=Path))
@click.argument("made", type=click.Path(path_type=Path))
@click.option("--epsilon", default=0.1, show_default=True, help="Greatest change of a pixel, from 0 to 1.")
def main(given: Path, made: Path, epsilon: float) -> None:
    """Change the images of the `.npz` GIVEN so that the base model errs, and write them to MADE."""
    from serving.quiet import import_tensorflow

    import_tensorflow()
    import tensorflow as tf

    from trainer import attacks
    from trainer.lenet import logits
    from trainer.worker.pretrained import pretrained

    with np.load(given) as arrays:
        images, labels = tf.constant(arrays["images"][..., None] / np.float32(255)), tf.constant(arrays["labels"])
    params = {name: tf.constant(value) for name, value in pretrained()[0].items()}
    size = tf.constant(epsilon, tf.float32)
    found = attacks.pgd(
        lambda x: attacks.cross_entropy(labels, logits(params, x)), images,
        attacks.in_ball(images, size, tf.constant([0, 0])), size, tf.constant(PGD_STEPS),
        attacks.STEP_SHARE * size / PGD_STEPS,
    )  # fmt: skip
    # Rounding to bytes towards the clean image keeps the change within epsilon.
    clean, changed = images.numpy()[..., 0] * 255, found.numpy()[..., 0] * 255
    rounded = np.where(changed > clean, np.floor(changed + 1e-3), np.ceil(changed - 1e-3))
    np.savez(made, images=np.clip(rounded, 0, 255).astype(np.uint8))


if __name__ == "__main__":
    main()
