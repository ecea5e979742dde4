"""When a version should rather not name one class: prediction sets, and images unlike those that it has learned.

Both rest on images that the network which looks at them was not trained on: out of fold, or held out.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import tensorflow as tf
from scipy.stats import beta, betabinom

from trainer.evaluate import log_softmax
from trainer.lenet import Arrays
from trainer.network import BATCH, Network, in_batches

FEATURES = "dense1"  # the layer whose input is compared: what the convolutions see, before classes take over
SIZE = 784  # of these features, and of an image
REFERENCES, RANK = 256, 64  # images that are compared with, and directions that are kept of their vectors
PARTS: dict[str, tuple[int, ...]] = {  # of a view
    "basis": (SIZE, RANK), "references": (RANK, REFERENCES), "squares": (REFERENCES,), "blur": ()
}  # fmt: skip
OUT_OF_REACH, BLUR = 1e9, 1e-3
KIN, SAMPLE = 5, 2000  # neighbours that make an image one of a kind, and images among which they are looked for
FALSE_ALARMS = 0.02  # share of images of the data that are called unlike it


def set_threshold(logits: np.ndarray, labels: np.ndarray, coverage: float) -> float:
    """The least probability of a class that belongs to a prediction set (Sadinle et al. 2019; Vovk et al. 2005).

    Of n + 1 exchangeable images, the n held-out ones and a new one, the new one's class has on average with at least
    this chance a probability that is not among the smallest floor((n + 1) (1 - coverage)) - so it is in the set of all
    classes that are as probable as this threshold. A set may be empty: then no class is plausible.

    Args:
        logits: (n, classes) of held-out images.
        labels: (n,) int32.

    Returns:
        0 where n is too small to leave out any class.
    """
    own = np.sort(np.exp(log_softmax(logits)[np.arange(len(labels)), labels]))
    left_out = set_threshold_rank(len(labels), coverage)
    return float(own[left_out - 1]) if left_out else 0.0


def coverage_interval(images: int, coverage: float, measured: int | None = None) -> tuple[float, float]:
    """Between what the coverage of sets lies with a chance of 95%, given so many held-out images (Vovk 2012).

    Args:
        measured: images that it is measured on; without them, the interval of the coverage itself.
    """
    left_out = set_threshold_rank(images, coverage)
    if not left_out:
        return 1.0, 1.0
    spread = images + 1 - left_out, left_out
    if measured:
        low, high = betabinom(measured, *spread).ppf([0.025, 0.975]) / measured
    else:
        low, high = beta(*spread).ppf([0.025, 0.975])
    return float(low), float(high)


def set_threshold_rank(images: int, coverage: float) -> int:
    """How many of so many held-out images may have a class that is less probable than those in the sets."""
    return int((images + 1) * (1 - coverage) + 1e-9)


def described_sets(logits: np.ndarray, labels: np.ndarray, threshold: float) -> dict[str, Any]:
    """Share of images whose class is in their set, mean size of the sets, and shares of empty sets and single classes.

    Args:
        logits: (n, classes).
        labels: (n,) int32.
    """
    inside = np.exp(log_softmax(logits)) >= threshold
    sizes = inside.sum(axis=1)
    return {
        "covered": float(inside[np.arange(len(labels)), labels].mean()), "mean_size": float(sizes.mean()),
        "single": float((sizes == 1).mean()), "empty": float((sizes == 0).mean()),
    }  # fmt: skip


@dataclass(frozen=True)
class View:
    """Images as vectors, and those that were learned; of an inner product only the main directions are kept."""

    basis: np.ndarray  # (SIZE, RANK) float32, orthonormal columns; zero where there are fewer
    references: np.ndarray  # (RANK, REFERENCES) float32, likewise
    squares: np.ndarray  # (REFERENCES,) float32, their squared lengths; out of reach where there are fewer
    blur: float  # squared distance below which rounding decides

    @classmethod
    def of(cls, vectors: np.ndarray) -> Self:
        """What is kept of learned images, (n, SIZE) float32 with n up to REFERENCES."""
        directions = np.linalg.svd(vectors, full_matrices=False)[2][:RANK].T
        basis = np.zeros((SIZE, RANK), np.float32)
        basis[:, : directions.shape[1]] = directions
        references = np.zeros((RANK, REFERENCES), np.float32)
        references[:, : len(vectors)] = (vectors @ basis).T
        squares = np.full(REFERENCES, OUT_OF_REACH, np.float32)
        squares[: len(vectors)] = np.square(vectors).sum(axis=1)
        return cls(basis, references, squares, BLUR * max(1.0, float(squares[: len(vectors)].mean())))

    def distances(self, vectors: np.ndarray) -> np.ndarray:
        """Squared distance of each of (n, SIZE) to the nearest learned one, (n,)."""
        nearest: np.ndarray = (self.squares - 2 * (vectors @ self.basis @ self.references)).min(axis=1)
        found: np.ndarray = np.maximum(np.square(vectors).sum(axis=1) + nearest, self.blur)
        return found


@dataclass(frozen=True)
class Detector:
    """How far an image is from the nearest one that was learned (Sun et al. 2022), by features and by pixels.

    Features, what the convolutions see, are of length one and tell other things apart; pixels tell apart what the
    convolutions have no eye for, such as noise.
    """

    features: View
    pixels: View

    @classmethod
    def of(cls, params: Arrays, images: Any) -> Self:
        """What a network has learned from images, (n, 28, 28, 1) float32."""
        some = tf.gather(images, np.unique(np.linspace(0, len(images) - 1, REFERENCES).astype(int)))
        return cls(View.of(_features(Network(params), some)), View.of(_pixels(some)))

    def distances(self, params: Arrays, images: Any) -> np.ndarray:
        """Squared distance of each image by features and by pixels, (n, 2)."""
        network = Network(params)

        def both(batch: Any) -> np.ndarray:
            found = self.features.distances(_features(network, batch)), self.pixels.distances(_pixels(batch))
            return np.stack(found, axis=1)

        return in_batches(both, images)

    def arrays(self, limits: Sequence[float]) -> Arrays:
        """What an export holds of it, so that a `distance` above 1 is beyond one of the limits."""
        found = {"scales": 1 / np.asarray(limits, np.float32)}
        for name, view in (("features", self.features), ("pixels", self.pixels)):
            found |= {f"{name}/{part}": np.asarray(getattr(view, part), np.float32) for part in PARTS}
        return found


def isolation(params: Arrays, images: Any) -> np.ndarray:
    """Distance of each image, (n,), to the `KIN`th nearest of the others: a few of a kind do not hide each other.

    Args:
        images: (n, 28, 28, 1) float32; of many, a sample stands for the others.
    """
    network, n = Network(params), len(images)
    some = np.unique(np.linspace(0, n - 1, SAMPLE).astype(int))
    others = _features(network, tf.gather(images, some))
    found = np.empty(n, np.float32)
    for at in range(0, n, BATCH):
        alike = _features(network, images[at : at + BATCH]) @ others.T
        alike[some[None, :] == np.arange(at, at + len(alike))[:, None]] = -1.0  # the image itself
        nth = alike.shape[1] - min(KIN, len(some))
        found[at : at + BATCH] = 1 - np.partition(alike, nth, axis=1)[:, nth]
    return found


def _features(network: Network, images: Any) -> np.ndarray:
    """Features of length one, (n, SIZE)."""
    found = network.part(images, until=FEATURES).reshape(len(images), -1)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)
    return found


def _pixels(images: Any) -> np.ndarray:
    return np.asarray(images).reshape(len(images), -1)


def distance_limits(distances: np.ndarray) -> tuple[tuple[float, ...], float]:
    """The squared distances, one of each kind, that new images of the data keep within, and how many do not.

    As with `set_threshold`: of n + 1 exchangeable images, the new one is beyond the k-th smallest of n distances with a
    chance of (n + 1 - k) / (n + 1); k is the least for which that is below half of `FALSE_ALARMS`, or n.

    Args:
        distances: of held-out images, (n, 2).

    Returns:
        The limits, and the most that the rate of false alarms can be expected to be.
    """
    n, kinds = distances.shape
    rank = min(n, math.ceil((n + 1) * (1 - FALSE_ALARMS / kinds)))
    limits = tuple(float(limit) for limit in np.sort(distances, axis=0)[rank - 1])
    return limits, min(1.0, kinds * (n + 1 - rank) / (n + 1))


def beyond(distances: np.ndarray, limits: Sequence[float]) -> np.ndarray:
    """Which images are unlike those that were learned, (n,) bool."""
    found: np.ndarray = (distances / np.asarray(limits)).max(axis=1) > 1
    return found
