"""When a version should rather not name one class: prediction sets, and images unlike those that it has learned.

Both rest on images that the network which looks at them was not trained on: out of fold, or held out.
"""

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import tensorflow as tf
from scipy.stats import beta, betabinom

from trainer.evaluate import log_softmax
from trainer.lenet import Arrays
from trainer.network import BATCH, Network, in_batches

FEATURES = "dense1"  # the layer whose input is compared: what the convolutions see, before classes take over
REFERENCES, RANK = 256, 64  # images that are compared with, and directions that are kept of their features
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
    left_out = _left_out(len(labels), coverage)
    return float(own[left_out - 1]) if left_out else 0.0


def coverage_interval(images: int, coverage: float, measured: int | None = None) -> tuple[float, float]:
    """Between what the coverage of sets lies with a chance of 95%, given so many held-out images (Vovk 2012).

    Args:
        measured: images that it is measured on; without them, the interval of the coverage itself.
    """
    left_out = _left_out(images, coverage)
    if not left_out:
        return 1.0, 1.0
    spread = images + 1 - left_out, left_out
    if measured:
        low, high = betabinom(measured, *spread).ppf([0.025, 0.975]) / measured
    else:
        low, high = beta(*spread).ppf([0.025, 0.975])
    return float(low), float(high)


def _left_out(images: int, coverage: float) -> int:
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
class Detector:
    """The distance of an image's features to the nearest image that was learned (Sun et al. 2022).

    One minus the cosine of the two, in the directions in which the learned images vary most.
    """

    basis: np.ndarray  # (features, RANK) float32, orthonormal columns; zero where there are fewer
    references: np.ndarray  # (RANK, REFERENCES) float32, likewise

    @classmethod
    def of(cls, params: Arrays, images: Any) -> Self:
        """What a network has learned from images, (n, 28, 28, 1) float32."""
        some = np.unique(np.linspace(0, len(images) - 1, REFERENCES).astype(int))
        features = _features(Network(params), tf.gather(images, some))
        directions = np.linalg.svd(features, full_matrices=False)[2][:RANK].T
        basis = np.zeros((features.shape[1], RANK), np.float32)
        basis[:, : directions.shape[1]] = directions
        references = np.zeros((RANK, REFERENCES), np.float32)
        references[:, : len(some)] = (features @ basis).T
        return cls(basis, references)

    def distances(self, params: Arrays, images: Any) -> np.ndarray:
        """Distance of each image, (n,) float32; 0 is alike, 1 has nothing in common."""
        network = Network(params)

        def nearest(batch: Any) -> np.ndarray:
            found: np.ndarray = (_features(network, batch) @ self.basis @ self.references).max(axis=1)
            return found

        return 1 - in_batches(nearest, images)

    def arrays(self) -> Arrays:
        """What an export holds of it."""
        return {"basis": self.basis, "references": self.references}


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
        found[at : at + BATCH] = 1 - np.sort(alike, axis=1)[:, -min(KIN, len(some))]
    return found


def _features(network: Network, images: Any) -> np.ndarray:
    """Features of length one, (n, features)."""
    found = network.part(images, until=FEATURES).reshape(len(images), -1)
    found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-6)
    return found


def distance_limit(distances: np.ndarray) -> float:
    """The distance that all but `FALSE_ALARMS` of the held-out images, (n,), keep within."""
    return float(np.quantile(distances, 1 - FALSE_ALARMS, method="higher"))
