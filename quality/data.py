"""Data sets, light on dark, as (n, 28, 28, 1) float32 in [0, 1] with labels (n,) int32."""

import functools
import gzip
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow as tf

from quality.digits import all_digits
from trainer.fit import Split

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian: apt-get install dataset-fashion-mnist


@dataclass(frozen=True)
class Data:
    """Training and test images. Settings are chosen on training images only."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def test(self, count: int | None = None, *, drawn: bool = False) -> Split:
        """The first `count` test images (default: all), or `count` random ones: some copies are sorted by class."""
        order = (
            np.random.default_rng(0).permutation(len(self.test_labels)) if drawn else np.arange(len(self.test_labels))
        )
        return split(self.test_images[order[:count]], self.test_labels[order[:count]])

    def sample(self, count: int, seed: int) -> tuple[Split, Split]:
        """`count` training images, balanced over the classes, and up to 1,000 others for validation."""
        rng = np.random.default_rng([seed, 17])
        classes = np.unique(self.labels)
        each = [rng.permutation(np.flatnonzero(self.labels == label)) for label in classes]
        chosen = np.concatenate([members[: count // len(classes)] for members in each])
        others = rng.permutation(np.setdiff1d(np.arange(len(self.labels)), chosen))[:1000]
        return split(self.images[chosen], self.labels[chosen]), split(self.images[others], self.labels[others])


def split(images: np.ndarray, labels: np.ndarray) -> Split:
    """Images on the device."""
    return Split(tf.constant(images), labels)


def mislabel(labels: np.ndarray, share: float, classes: int, rng: np.random.Generator) -> None:
    """Replace a share of the labels by others, in place."""
    wrong = rng.random(len(labels)) < share
    labels[wrong] = (labels[wrong] + rng.integers(1, classes, wrong.sum())) % classes


def _float(images: np.ndarray) -> np.ndarray:
    return (images / np.float32(255))[..., None]


@functools.cache
def mnist() -> Data:
    """MNIST, from `TEMPER_MNIST` (an .npz in Keras's layout) or through keras.datasets."""
    path = os.environ.get("TEMPER_MNIST")
    if path:
        with np.load(path) as arrays:
            x, y, x_test, y_test = (arrays[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    else:
        (x, y), (x_test, y_test) = tf.keras.datasets.mnist.load_data()
    order = np.random.default_rng(0).permutation(len(y))  # some copies are sorted by class
    return Data(_float(x[order]), y[order].astype(np.int32), _float(x_test), y_test.astype(np.int32))


@functools.cache
def fashion() -> Data:
    """Fashion-MNIST (Xiao et al. 2017) from Debian's package."""

    def read(part: str) -> tuple[np.ndarray, np.ndarray]:
        with gzip.open(FASHION / f"{part}-images-idx3-ubyte.gz") as file:
            images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        with gzip.open(FASHION / f"{part}-labels-idx1-ubyte.gz") as file:
            return images, np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int32)

    (x, y), (x_test, y_test) = read("train"), read("t10k")
    return Data(_float(x), y, _float(x_test), y_test)


def digits(count: int, seed: int) -> Data:
    """scikit-learn's digits: `count` to train on, balanced over the classes, and the others to test on."""
    found, targets = all_digits()
    images, labels = _float(found), targets.astype(np.int32)
    rng = np.random.default_rng([seed, 17])
    each = [rng.permutation(np.flatnonzero(labels == label))[: count // 10] for label in range(10)]
    chosen = np.isin(np.arange(len(labels)), np.concatenate(each))
    return Data(images[chosen], labels[chosen], images[~chosen], labels[~chosen])
