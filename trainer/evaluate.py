"""The report card's numbers, all from the effective parameters at inference."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from sklearn.metrics import classification_report, confusion_matrix

BATCH = 1024


def in_batches(function: Callable[..., Any], *arrays: Any) -> np.ndarray:
    """`function` over slices of the arrays, its results joined."""
    n = len(arrays[0])
    parts = [np.asarray(function(*(array[at : at + BATCH] for array in arrays))) for at in range(0, n, BATCH)]
    return np.concatenate(parts)


def cross_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean negative log-likelihood in nats, without penalties; logits (n, classes), labels (n,)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    log_normalizer = np.log(np.exp(shifted).sum(axis=1))
    return float(np.mean(log_normalizer - shifted[np.arange(len(labels)), labels]))


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of the images whose label has the highest logit."""
    return float(np.mean(logits.argmax(axis=1) == labels))


def score(logits: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Accuracy and plain cross-entropy."""
    return {
        "images": len(labels),
        "accuracy": accuracy(logits, labels),
        "cross_entropy": cross_entropy(logits, labels),
    }


def classification(logits: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> dict[str, Any]:
    """scikit-learn's classification report and confusion matrix (rows are true classes)."""
    every = list(range(len(classes)))
    predicted = logits.argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that are never predicted, whose precision is given as 0
        report = classification_report(labels, predicted, labels=every, output_dict=True, zero_division=0)
    by_class = {name: report.pop(str(position)) for position, name in enumerate(classes)}
    return {
        "classification_report": {"classes": by_class, **report},  # a class may be called "accuracy"
        "confusion_matrix": confusion_matrix(labels, predicted, labels=every).tolist(),
    }
