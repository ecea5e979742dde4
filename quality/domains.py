"""`python -m quality domains`: the automatic search beside fixed recipes, an SVM and an oracle, on small data sets.

Every result is a file, `quality/results/domains/<set>-<seed>-<approach>.json`, so an interrupted run resumes where it
stopped. All approaches train on the same images and are measured on the same test images, which none of them sees; only
the oracle is chosen by them, to say how much there is to gain.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from quality.data import digits, fashion, mislabel
from store.errors import Diverged
from trainer import evaluate
from trainer.asked import Asked, parse_asked
from trainer.fit import Split
from trainer.folds import stratified, stratified_folds
from trainer.jobs.duplicates import near_copies
from trainer.network import Network
from trainer.parallel import Check, side_by_side
from trainer.recipes import FULL, LARGE, LORA, Recipe, known, phrase, sampled
from trainer.search import Problem, search, training
from trainer.spec import Spec
from trainer.worker.pretrained import pretrained

FOLDER = Path(os.environ.get("TEMPER_DOMAINS", Path(__file__).parents[2] / "shared" / "data"))
ORACLE = 60  # random configurations
RESEEDED = 4  # further runs of the best one, with other seeds
HELD_OUT = 0.2  # by a fixed recipe, for its report


@dataclass(frozen=True)
class Domain:
    """Images of one kind; `each` of every class to train on."""

    each: int
    read: Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]
    same_classes: bool = False
    goal: float = 0.0
    wrong: float = 0.0  # share of the training labels that are replaced by others


def _file(name: str) -> Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    def read() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        with np.load(FOLDER / f"{name}.npz") as arrays:
            x, y, x_test, y_test = (arrays[key] for key in ("x_train", "y_train", "x_test", "y_test"))
        borders = np.concatenate([x[:, side].ravel() for side in (0, -1)] + [x[:, :, side].ravel() for side in (0, -1)])
        x, x_test = ((array / np.float32(255))[..., None] for array in (x, x_test))
        if np.median(borders) > 127:  # as the service decides
            x, x_test = 1.0 - x, 1.0 - x_test
        return x, y.astype(np.int32), x_test, y_test.astype(np.int32)

    return read


def _fashion() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    data = fashion()
    return data.images, data.labels, data.test_images, data.test_labels


def _digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    data = digits(900, seed=0)  # the other half is the test set
    return data.images, data.labels, data.test_images, data.test_labels


DOMAINS: Mapping[str, Domain] = {
    "semeion": Domain(10, _file("semeion"), same_classes=True, goal=97.5),
    "olivetti": Domain(5, _file("olivetti"), goal=95.0),
    "coil20": Domain(5, _file("coil20"), goal=91.0),
    "fashion-100": Domain(10, _fashion, goal=72.0),
    "fashion-1000": Domain(100, _fashion, goal=84.0),
    "fashion-500": Domain(50, _fashion),
    "wrong-labels": Domain(100, _fashion, wrong=0.3),
    "digits-300": Domain(30, _digits, same_classes=True),
}
PLAIN: Recipe = {**FULL, "min_steps": 20}
NONE: Recipe = {**PLAIN, "l2": 0.0, "dropout": 0.0}  # no regularization at all
FIXED: Mapping[str, Recipe] = {
    "before": LORA,
    "full": PLAIN,
    "full, augmented": {**PLAIN, "augmentation": LARGE},
    "lora, augmented": {**LORA, "epochs": 60, "augmentation": LARGE},
}
APPROACHES = ("auto", "none", *FIXED, "svm", "oracle")


def measure(name: str, approach: str, seed: int) -> dict[str, Any]:
    """Test accuracy and gap in percent, and seconds, of one approach on one drawing of a set."""
    domain = DOMAINS[name]
    x, y, x_test, y_test = domain.read()
    chosen = stratified(y, seed, lambda _: domain.each)
    x, y = x[chosen], y[chosen]
    if domain.wrong:
        mislabel(y, domain.wrong, int(y.max()) + 1, np.random.default_rng([seed, 23]))
    began = time.perf_counter()
    found: dict[str, Any] = {}
    if approach == "svm":
        found["test"] = svm(x, y, x_test, y_test, seed)
    else:
        groups = near_copies((255 * x[..., 0]).astype(np.uint8))
        problem = Problem(Split(tf.constant(x), y), pretrained()[0], int(y.max()) + 1, domain.same_classes, groups)
        test = Split(tf.constant(x_test), y_test)
        if approach == "oracle":
            found |= oracle(problem, test, seed)
        elif approach == "auto":
            result = search(everything(seed), problem)
            result = result.confirmed(_out_of_fold(result.spec, problem), y)
            found |= {**_accuracies(result.spec, problem, problem.data, test), "sentence": result.sentence}
        elif approach == "none":
            found |= _accuracies(everything(seed).resolve(NONE), problem, problem.data, test)
        else:
            learned = ~stratified(y, seed, lambda n: max(1, round(HELD_OUT * n)))
            spec = everything(seed).resolve(FIXED[approach])
            found |= _accuracies(spec, problem, problem.part(learned), test)
    return found | {"seconds": round(time.perf_counter() - began, 1)}


def oracle(problem: Problem, test: Split, seed: int) -> dict[str, Any]:
    """The best of random configurations by test accuracy: what no honest choice can be expected to reach.

    The best of many is also the luckiest. What its recipe is worth is its mean accuracy with other seeds, `reseeded`.
    """
    rng = np.random.default_rng([seed, 31])
    good = known(problem.same_classes, len(problem.data.labels))
    recipes = [sampled(good[int(rng.integers(len(good)))], rng) for _ in range(ORACLE)]

    def work(spec: Spec, check: Check) -> float:
        try:
            return _accuracies(spec, problem, problem.data, test)["test"]
        except Diverged:
            return 0.0

    found = side_by_side(work, [everything(seed).resolve(recipe) for recipe in recipes])
    spec, best = max(found, key=lambda one: one[1])
    others = [spec.model_copy(update={"seed": seed + 100 * number}) for number in range(1, 1 + RESEEDED)]
    again = [accuracy for _, accuracy in side_by_side(work, others)]
    return {"test": best, "reseeded": sum(again) / len(again), "recipe": phrase(spec)}


def _out_of_fold(spec: Spec, problem: Problem) -> np.ndarray:
    """Logits of every image by a network that was trained without its fold, as a job works them out."""
    logits = np.zeros((len(problem.data.labels), problem.classes), np.float32)

    def work(held_out: np.ndarray, check: Check) -> np.ndarray:
        run = training(spec, problem, problem.part(~held_out))
        return Network(run.finish(check)).logits(problem.part(held_out).images)

    for held_out, found in side_by_side(work, folds_of(spec, problem)):
        logits[held_out] = found
    return logits


def folds_of(spec: Spec, problem: Problem) -> Iterator[np.ndarray]:
    """Which images each fold of a spec holds out, (n,) bool."""
    return stratified_folds(problem.data.labels, spec.seed, spec.folds or 0, problem.groups)


def svm(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, y_test: np.ndarray, seed: int) -> float:
    """Accuracy in percent of an RBF SVM on pixels, cross-validated: ten lines of scikit-learn."""
    folds = StratifiedKFold(min(5, int(np.bincount(y).min())), shuffle=True, random_state=seed)
    grid = {"svc__C": [1, 10, 100], "svc__gamma": ["scale", 1e-3, 3e-3, 1e-2]}
    model = GridSearchCV(make_pipeline(StandardScaler(with_std=False), SVC()), grid, cv=folds)
    model.fit(x.reshape(len(x), -1), y)
    return 100 * float(model.score(x_test.reshape(len(x_test), -1), y_test))


def everything(seed: int) -> Asked:
    """A fine-tune without a spec."""
    return parse_asked(json.dumps({"search": {}, "seed": seed}))


def _accuracies(spec: Spec, problem: Problem, train: Split, test: Split) -> dict[str, float]:
    """Test accuracy, and by how much that on the training images (and their labels, right or wrong) is higher."""
    network = Network(training(spec, problem, train).finish())
    seen, unseen = (100 * evaluate.accuracy(network.logits(one.images), one.labels) for one in (train, test))
    return {"test": unseen, "gap": seen - unseen}
