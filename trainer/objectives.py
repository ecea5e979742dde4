"""Several objectives of a search: what each trial reaches, which trials no other beats, and which one is chosen.

All are shares between 0 and 1, of which more is better.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from trainer import evaluate
from trainer.fit import PROBE_IMAGES, Split, sample, withstands
from trainer.lenet import Arrays
from trainer.network import Network
from trainer.spec import OBJECTIVES, Choose

Point = Mapping[str, float]


class Extra(NamedTuple):
    """What is measured on the network of a fold, beside its predictions."""

    robust: np.ndarray  # whether images are right under attack, (n,) bool
    sparsity: float


def measure(objectives: Sequence[str], params: Arrays, held_out: Split, epsilon: float, seed: int) -> Extra:
    """Attack the network of a fold on some of the images that it was trained without, if that is an objective."""
    robust = np.zeros(0, bool)
    if "robust_accuracy" in objectives:
        robust = withstands(Network(params), sample(held_out, PROBE_IMAGES), epsilon, seed)
    return Extra(robust, evaluate.sparsity(params)["zeros"])


def combined(objectives: Sequence[str], logits: np.ndarray, labels: np.ndarray, extras: Sequence[Extra]) -> Point:
    """The objectives of a trial, from its out-of-fold predictions and what was measured on each fold."""
    robust = np.concatenate([one.robust for one in extras])
    scaled = logits / evaluate.temperature(logits, labels)  # as `calibrate` does
    values = {
        "accuracy": evaluate.accuracy(logits, labels),
        "robust_accuracy": float(robust.mean()) if len(robust) else 0.0,
        "sparsity": float(np.mean([one.sparsity for one in extras])),
        "calibration": 1.0 - evaluate.calibration(scaled, labels)["expected_calibration_error"],
    }
    return {name: values[name] for name in OBJECTIVES if name in objectives}


def front(points: Sequence[Point]) -> list[int]:
    """Positions of the points that no other point beats: as good in every objective, and better in one."""

    def beats(one: Point, other: Point) -> bool:
        return all(one[name] >= other[name] for name in other) and any(one[name] > other[name] for name in other)

    return [at for at, point in enumerate(points) if not any(beats(other, point) for other in points)]


def allowed(points: Sequence[Point], choose: Choose) -> tuple[list[int], str]:
    """Positions of the points within all limits, and a warning if there are none: then of the nearest."""
    limits = choose.bounds()
    shortfalls = [sum(max(0.0, least - point[name]) for name, least in limits) for point in points]
    nearest = min(shortfalls)
    found = [at for at, shortfall in enumerate(shortfalls) if shortfall <= nearest + 1e-12]
    if nearest == 0:
        return found, ""
    return found, f"no recipe meets all of {', '.join(choose.limits)}; the one that comes nearest was chosen"


def best(points: Sequence[Point], weights: Mapping[str, float]) -> int:
    """Position of the point with the largest weighted sum; the first of equals."""
    return max(range(len(points)), key=lambda at: sum(weight * points[at][name] for name, weight in weights.items()))
