"""`python -m quality trust`: what a version's honesty is worth on images that nothing was trained or chosen on.

Prediction sets: how often they have the right class. "None of these": how many images of the data it turns away, and
how many of other kinds. Wrong labels: how many of those that were put in are found, how many of the named ones are
wrong, and what training without these is worth. Every result is a file, `quality/results/trust/<set>-<seed>.json`.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from quality.data import mislabel
from quality.domains import DOMAINS, Domain, everything, folds_of
from trainer import evaluate, inspection
from trainer.abstention import (
    Detector,
    beyond,
    coverage_interval,
    described_sets,
    distance_limits,
    set_threshold,
)
from trainer.fit import Split
from trainer.folds import stratified
from trainer.jobs.duplicates import near_copies
from trainer.lenet import Arrays
from trainer.network import Network
from trainer.parallel import Check, side_by_side
from trainer.report import seen_by
from trainer.search import Problem, search, training
from trainer.worker.pretrained import pretrained

COVERAGE = 0.95
STRANGERS = 200  # images of each other kind
WRONG = {
    "fashion-1000, 10% wrong": dataclasses.replace(DOMAINS["fashion-1000"], wrong=0.1),
    "digits-300, 10% wrong": dataclasses.replace(DOMAINS["digits-300"], wrong=0.1),
}
SETS = {
    name: DOMAINS[name] for name in ("semeion", "olivetti", "coil20", "fashion-100", "fashion-1000", "digits-300")
} | WRONG
OTHERS = ("semeion", "olivetti", "coil20", "fashion-100", "digits-300")  # kinds of images


@dataclasses.dataclass(frozen=True)
class Automatic:
    """What a fine-tune without a spec makes of a problem."""

    params: Arrays
    logits: np.ndarray  # out of fold, (n, classes)
    distances: np.ndarray  # out of fold, (n, 2)
    labels: inspection.Labels


def automatic(problem: Problem, seed: int) -> Automatic:
    """Search, train on every fold and on all images, as a job does."""
    result = search(everything(seed), problem)
    spec, n = result.spec, len(problem.data.labels)
    folds = list(folds_of(spec, problem))

    def networks() -> dict[int, Arrays]:
        def work(number: int, check: Check) -> Arrays:
            part = problem.part(~folds[number - 1]) if number else problem.data
            return training(spec, problem, part).finish(check)

        return dict(side_by_side(work, range(1 + len(folds))))

    def out_of_fold(found: Mapping[int, Arrays]) -> tuple[np.ndarray, np.ndarray]:
        logits, distances = np.zeros((n, problem.classes), np.float32), np.zeros((n, 2), np.float32)
        for number, fold in enumerate(folds, start=1):
            logits[fold], distances[fold] = seen_by(found[number], problem.part(~fold), problem.part(fold))
        return logits, distances

    found = networks()
    logits, distances = out_of_fold(found)
    if (confirmed := result.confirmed(logits, problem.data.labels)) is not result:
        spec = confirmed.spec
        found = networks()
        logits, distances = out_of_fold(found)
    doubted = inspection.doubted([logits, *result.predictions], problem.data.labels)
    return Automatic(found[0], logits, distances, doubted)


def measure(name: str, seed: int) -> dict[str, Any]:
    """The figures of one drawing of a set, in percent but for sizes."""
    domain, began = SETS[name], time.perf_counter()
    x, y, x_test, y_test = domain.read()
    chosen = stratified(y, seed, lambda _: domain.each)
    x, truth = x[chosen], y[chosen]
    y = truth.copy()
    if domain.wrong:
        mislabel(y, domain.wrong, int(y.max()) + 1, np.random.default_rng([seed, 23]))
    problem, test = _problem(x, y, domain), Split(tf.constant(x_test), y_test)
    found = automatic(problem, seed)
    cooler = np.float32(evaluate.serving_temperature(found.logits, y))
    logits, distances = seen_by(found.params, problem.data, test)
    threshold = set_threshold(found.logits / cooler, y, COVERAGE)
    sets = described_sets(logits / cooler, y_test, threshold)
    low, high = coverage_interval(len(y), COVERAGE, len(y_test))
    limits, _ = distance_limits(found.distances)
    figures = {
        "test": 100 * evaluate.accuracy(logits, y_test), "covered": 100 * sets["covered"], "low": 100 * low,
        "high": 100 * high, "size": sets["mean_size"], "empty": 100 * sets["empty"],
        "false_alarms": 100 * float(beyond(distances, limits).mean()),
    }  # fmt: skip
    detector = Detector.of(found.params, problem.data.images)
    figures |= {
        f"turned_away_{other}": 100 * float(beyond(detector.distances(found.params, images), limits).mean())
        for other, images in _strangers(name).items()
    }
    if domain.wrong:
        wrong, named = y != truth, found.labels.wrong > inspection.WRONG
        figures |= {
            "named": int(named.sum()), "precision": 100 * float(wrong[named].mean()),
            "recall": 100 * float(named[wrong].mean()),
        }  # fmt: skip
        again = automatic(_problem(x[~named], y[~named], domain), seed)
        figures["test_without"] = 100 * evaluate.accuracy(Network(again.params).logits(test.images), y_test)
    return figures | {"seconds": round(time.perf_counter() - began)}


def _problem(x: np.ndarray, y: np.ndarray, domain: Domain) -> Problem:
    groups = near_copies((255 * x[..., 0]).astype(np.uint8))
    return Problem(Split(tf.constant(x), y), pretrained()[0], int(y.max()) + 1, domain.same_classes, groups)


def _strangers(name: str) -> dict[str, np.ndarray]:
    """Test images of other kinds, and noise."""
    kind = name.partition("-")[0]
    found = {other: DOMAINS[other].read()[2][:STRANGERS] for other in OTHERS if not other.startswith(kind)}
    found["noise"] = np.random.default_rng(0).random((STRANGERS, 28, 28, 1)).astype(np.float32)
    return found
