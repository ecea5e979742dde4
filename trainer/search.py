"""Automatic regularization: choose a recipe by its out-of-fold predictions.

Successive halving (Jamieson & Talwalkar 2016): every candidate gets a short run on some folds, the better ones longer
runs on more. A run is short in epochs, with its whole schedule, so that its end can be compared with that of a long
one. Candidates that stand at the end are compared image by image, and among those within one standard error of the
best the most regularized is chosen (the one-standard-error rule of Breiman et al. 1984, on paired differences).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf

from store.errors import Diverged
from trainer import evaluate
from trainer.fit import Split, Training, begin, serve
from trainer.lenet import Arrays
from trainer.spec import Spec


@dataclass(frozen=True)
class Rung:
    """Part of the work that a candidate gets before the next cut."""

    share: float  # of its epochs
    folds: int  # of all, the first ones
    keep: int  # candidates that go on


@dataclass
class Trial:
    """A candidate and what was found about it."""

    number: int
    spec: Spec
    origin: str  # recipe, sampled, earlier
    scores: dict[float, dict[int, np.ndarray]] = field(default_factory=dict)  # share of epochs -> fold -> logits
    seconds: float = 0.0
    dropped: str = ""  # why it went no further

    def logits(self, share: float) -> np.ndarray:
        """Out-of-fold logits (images of the folds done, classes), by fold."""
        return np.concatenate([self.scores[share][fold] for fold in sorted(self.scores[share])])


@dataclass(frozen=True)
class Problem:
    """Images to learn from, and what to start from."""

    images: Any  # (n, 28, 28, 1) float32, on the device, light on dark
    labels: np.ndarray  # (n,) int32
    base: Arrays
    classes: int
    same_classes: bool  # as the base's
    folds: Sequence[np.ndarray]  # which images are held out, (n,) bool

    def part(self, some: np.ndarray) -> Split:
        return Split(tf.gather(self.images, np.flatnonzero(some)), self.labels[some])

    def held_out(self, folds: int) -> np.ndarray:
        """Labels in the order of `Trial.logits`."""
        return np.concatenate([self.labels[chosen] for chosen in self.folds[:folds]])


def trained(problem: Problem, spec: Spec, split: Split) -> Arrays:
    """Parameters after all epochs of a spec.

    Raises:
        Diverged: the loss or the weights are not finite.
    """
    start = begin(spec, problem.base, classes=problem.classes, same_classes=problem.same_classes)
    run = Training(spec, start, split, problem.classes)
    for _ in range(spec.epochs):
        run.epoch()
    params = {name: np.asarray(value) for name, value in run.model.params().items()}
    if not all(np.isfinite(value).all() for value in params.values()):
        raise Diverged("the weights are not finite")
    return params


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy of every image at the temperature that suits all of them best (Guo et al. 2017), (n,) float64.

    What training length and label smoothing do to confidence alone is one number that can be put right afterwards; it
    must not decide between recipes.
    """
    rows = np.arange(len(labels))
    scaled = (-evaluate.log_softmax(logits / t)[rows, labels] for t in np.geomspace(0.25, 8, 31))
    return min(scaled, key=lambda one: float(one.mean()))


def search(
    problem: Problem, candidates: Sequence[Trial], rungs: Sequence[Rung], *, until: float = np.inf,
    on_trial: Callable[[Trial, float, int], None] = lambda *_: None,
) -> list[Trial]:  # fmt: skip
    """Run the candidates rung by rung. Returns those that finished the last rung that was begun, best first."""
    standing = list(candidates)
    for rung in rungs:
        done = []
        for trial in standing:
            if time.monotonic() > until and done:
                trial.dropped = trial.dropped or "no time was left"
                continue
            began = time.perf_counter()
            spec = trial.spec.model_copy(update={"epochs": max(1, round(rung.share * trial.spec.epochs))})
            scores = trial.scores.setdefault(rung.share, {})
            try:
                for fold in range(rung.folds):
                    if fold not in scores:
                        params = trained(problem, spec, problem.part(~problem.folds[fold]))
                        scores[fold] = serve(params).logits(problem.part(problem.folds[fold]).images)
            except Diverged as exc:
                trial.dropped = str(exc)
                continue
            finally:
                trial.seconds += time.perf_counter() - began
            done.append(trial)
            on_trial(trial, rung.share, rung.folds)
        labels = problem.held_out(rung.folds)
        done.sort(key=lambda trial: float(losses(trial.logits(rung.share), labels).mean()))
        standing, cut = done[: rung.keep], done[rung.keep :]
        for trial in cut:
            trial.dropped = f"behind {rung.keep} others after {rung.share:.0%} of the epochs on {rung.folds} folds"
    return standing
