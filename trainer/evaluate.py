"""Metrics of the report card, from logits (n, classes) and labels (n,)."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import binomtest, norm
from sklearn.metrics import classification_report, confusion_matrix

ALPHA = 0.05  # two-sided: how unlikely a difference must be by chance to count as clear
BINS = 10
SPREAD = 0.4  # of the logarithm of a temperature, before anything is seen


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities (n, classes), float64."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    normalized: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return normalized


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood in nats, without penalties."""
    return float(-np.mean(log_softmax(logits)[np.arange(len(labels)), labels]))


def right(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Whether each image is classified correctly, (n,) bool."""
    found: np.ndarray = logits.argmax(axis=1) == labels
    return found


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that are classified correctly."""
    return float(right(logits, labels).mean())


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy with its 95% confidence interval (Wilson 1927), and cross-entropy without penalties."""
    return {**proportion(right(logits, labels)), "cross_entropy": cross_entropy(logits, labels)}


def proportion(hits: np.ndarray) -> dict[str, Any]:
    """Accuracy with its 95% confidence interval (Wilson 1927), from whether each image is right, (n,) bool."""
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, method="wilson")
    return {
        "images": len(hits), "accuracy": float(hits.mean()),
        "accuracy_interval": [float(interval.low), float(interval.high)],
    }  # fmt: skip


@dataclass(frozen=True)
class Compared:
    """A figure of one network less that of another, with its interval."""

    value: float
    interval: tuple[float, float]

    @property
    def clear(self) -> bool:
        """Tell whether it is no chance: the interval leaves out zero."""
        return not self.interval[0] <= 0 <= self.interval[1]


def compared(right: np.ndarray, right_of_other: np.ndarray, *, confidence: float = 1 - ALPHA) -> Compared:
    """The accuracy of one network less that of another on the same images, at least one.

    The interval is that of Tango (1998): the differences that a score test does not reject. At zero that test is
    McNemar's (1947), whether the images that only one of the two gets right are divided between them by chance. It has
    a width where the two never differ, because on other images they may.

    Args:
        right, right_of_other: whether each is right, (n,) bool.
        confidence: of the interval, as a share.
    """
    n = len(right)
    won, lost = int((right & ~right_of_other).sum()), int((~right & right_of_other).sum())
    value, z = (won - lost) / n, float(norm.ppf((1 + confidence) / 2))

    def rejected(delta: float) -> float:
        """Above zero where the score test rejects a difference of `delta`."""
        linear = (2 * n - won + lost) * delta - won - lost
        root = math.sqrt(max(0.0, linear**2 + 8 * n * lost * delta * (1 - delta)))
        losses = (root - linear) / (4 * n)  # their most likely share, given `delta`
        return (won - lost - n * delta) ** 2 - z**2 * n * (2 * losses + delta * (1 - delta))

    inside = 1e-9  # at the value itself both sides are zero if the two never differ
    low = brentq(rejected, -1.0, value - inside) if value - inside > -1 else -1.0
    high = brentq(rejected, value + inside, 1.0) if value + inside < 1 else 1.0
    return Compared(value, (float(low), float(high)))


def compared_apart(one: Compared, other: Compared) -> Compared:
    """A figure less one of other images, each with its interval (Newcombe 1998; Zou & Donner 2008)."""
    value = one.value - other.value
    low = math.hypot(one.value - one.interval[0], other.interval[1] - other.value)
    high = math.hypot(one.interval[1] - one.value, other.value - other.interval[0])
    return Compared(value, (value - low, value + high))


def classification(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """scikit-learn's classification report and confusion matrix (rows are true classes)."""
    every = list(range(len(classes)))
    predicted = logits.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on classes that are never predicted; their precision is reported as 0
        report = classification_report(labels, predicted, labels=every, output_dict=True, zero_division=0)
    by_class = {name: report.pop(str(position)) for position, name in enumerate(classes)}
    return {
        "classification_report": {"classes": by_class, **report},  # a class may be called "accuracy"
        "confusion_matrix": confusion_matrix(labels, predicted, labels=every).tolist(),
    }


def calibration(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Expected calibration error and reliability bins of equal width (Guo et al. 2017).

    A bin holds the images whose highest probability is in (lower, upper]. The error is the mean of
    |accuracy - confidence| over the bins, weighted by their images.
    """
    confidence, hits = np.exp(log_softmax(logits).max(axis=1)), right(logits, labels)
    place, bins = _bins(confidence), []
    for index in range(BINS):
        inside = place == index
        bin_ = {"lower": index / BINS, "upper": (index + 1) / BINS, "images": int(inside.sum())}
        if inside.any():
            bin_ |= {"confidence": float(confidence[inside].mean()), "accuracy": float(hits[inside].mean())}
        bins.append(bin_)
    return {"expected_calibration_error": calibration_error(confidence, hits), "bins": bins}


def calibration_error(confidence: np.ndarray, hits: np.ndarray) -> float:
    """Expected calibration error, from the highest probability of each image and whether it is right, (n,) each."""
    gaps = np.bincount(_bins(confidence), weights=hits - confidence)
    return float(np.abs(gaps).sum() / len(hits))


def _bins(confidence: np.ndarray) -> np.ndarray:
    place: np.ndarray = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return place


def temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """What logits have to be divided by for the lowest cross-entropy (Guo et al. 2017).

    Labels are smoothed as if there were one more image that could be of any class (after Platt 1999); otherwise the
    temperature tends to zero where all images are right.
    """
    n, classes = logits.shape
    targets = np.full((n, classes), 1.0 / (classes * (n + 1)))
    targets[np.arange(n), labels] += n / (n + 1)

    def loss(log: float) -> float:
        return float(-np.sum(targets * log_softmax(logits / math.exp(log))))

    return math.exp(minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded").x)


def serving_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """The temperature to serve with: the most probable one, given the labels and that 1 is likely.

    Without a prior, log T ~ N(0, `SPREAD`^2), a few images that are all right would make it tend to zero. Smoothed
    labels, as `temperature` has them, do the opposite: on 40 digits they tripled the calibration error.
    """
    each = np.arange(len(labels))

    def loss(log: float) -> float:
        surprise = -log_softmax(logits / math.exp(log))[each, labels].sum()
        return float(surprise + log**2 / (2 * SPREAD**2))

    return math.exp(minimize_scalar(loss, bounds=(-4.0, 4.0), method="bounded").x)


def cross_fitted(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logits divided by the temperature that suits the other half of the images, so that none judges itself."""
    found, half = np.empty_like(logits), np.random.default_rng(0).permutation(len(labels)) % 2 == 0
    for part in (half, ~half):
        found[part] = logits[part] / np.float32(serving_temperature(logits[~part], labels[~part]))
    return found


def sparsity(params: dict[str, np.ndarray]) -> dict[str, Any]:
    """Share of exact zeros in the served kernels, in all and by layer."""
    kernels = {name.removesuffix("/kernel"): value for name, value in params.items() if name.endswith("/kernel")}
    zeros = {layer: int((kernel == 0).sum()) for layer, kernel in kernels.items()}
    return {
        "zeros": sum(zeros.values()) / sum(kernel.size for kernel in kernels.values()),
        "by_layer": {layer: zeros[layer] / kernel.size for layer, kernel in kernels.items()},
    }
