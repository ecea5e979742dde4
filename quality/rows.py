"""The rows of the table. Each is a function of the seed that trains and measures."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from quality.data import Data, digits, fashion, mislabel, mnist
from trainer import evaluate, report
from trainer.asked import parse_spec
from trainer.fit import Fitted, Split, Start, begin, fit
from trainer.lenet import Arrays, initial
from trainer.methods import Method
from trainer.network import Network
from trainer.worker.pretrained import pretrained

Figures = dict[str, float]
NONE: dict[str, Any] = {"method": "full", "l2": 0.0, "dropout": 0.0}
LIGHT = {**NONE, "dropout": 0.2}
AUGMENTED = {"augmentation": {"shift": 2.0, "rotate": 5.0, "scale": 0.1}}
LITTLE_MOVED = {"augmentation": {"shift": 1.0, "rotate": 5.0, "scale": 0.1}}

MOVED_A_LITTLE = {**NONE, "dropout": 0.1, "augmentation": {"shift": 1.0, "rotate": 3.0, "scale": 0.05}}
RECIPE = {**LITTLE_MOVED, "method": "full", "dropout": 0.3, "learning_rate": 3e-3}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: str
    goal: str
    measure: Callable[[int], Figures]
    seeds: int = 5


def learn(
    spec: dict[str, Any], seed: int, train: Split, others: Split, *, scratch: bool = False, same_classes: bool = False
) -> Fitted:
    """Train from the pretrained base, with a new head unless the classes are the base's, or from scratch."""
    parsed = parse_spec(json.dumps({**spec, "seed": seed}))
    if scratch:
        start = Start(initial(10, seed), frozenset(), Method("full"), lora_scale=0.0)
    else:
        start = begin(parsed, pretrained()[0], classes=10, same_classes=same_classes)
    return fit(parsed, start, train, others, classes=10)


def clean(params: Arrays, split: Split) -> float:
    """Accuracy in percent."""
    return 100 * evaluate.accuracy(Network(params).logits(split.images), split.labels)


def of_all(
    data: Callable[[], Data], spec: dict[str, Any], count: int | None = None, **how: bool
) -> Callable[[int], Figures]:
    """Trained on all training images, or on `count` of them; accuracy on all test images."""

    def measure(seed: int) -> Figures:
        found = data()
        train, others = found.sample(count or len(found.labels) - 1000, seed)
        return {"test": clean(learn(spec, seed, train, others, **how).params, found.test())}

    return measure


def of_digits(count: int, spec: dict[str, Any]) -> Callable[[int], Figures]:
    """scikit-learn's digits, which have the base's classes. All digits that are not trained on are the test set."""

    def measure(seed: int) -> Figures:
        data = digits(count, seed)
        train, test = data.sample(count, seed)[0], data.test()
        return {"test": clean(learn(spec, seed, train, train, same_classes=True).params, test)}

    return measure


def paired(count: int, spec: dict[str, Any], *, wrong_labels: float = 0.0) -> Callable[[int], Figures]:
    """Fashion-MNIST with a recipe, and without any regularizer, on the same images and for as many epochs.

    The gap is train minus test accuracy, where train accuracy is on the (possibly wrong) training labels.
    """

    def measure(seed: int) -> Figures:
        data = fashion()
        train, others = data.sample(count, seed)
        labels = train.labels.copy()
        rng = np.random.default_rng([seed, 23])
        mislabel(labels, wrong_labels, 10, rng)
        train = Split(train.images, labels)
        figures: Figures = {}
        for name, recipe in (("none", {**spec, **NONE, "augmentation": None}), ("recipe", spec)):
            params = learn(recipe, seed, train, others).params
            figures[f"{name}_test"] = clean(params, data.test())
            figures[f"{name}_gap"] = clean(params, train) - figures[f"{name}_test"]
        figures["test_gain"] = figures["recipe_test"] - figures["none_test"]
        figures["gap_shrinks_by"] = figures["none_gap"] - figures["recipe_gap"]
        return figures

    return measure


def attacked(params: Arrays, epsilon: float) -> Figures:
    """Accuracy on the first 1,000 test images, and on 1,000 random ones.

    Clean, under APGD (100 steps each of CE and DLR), under Square with 5,000 queries, and under the worse of the two.
    """
    model, figures = functools.partial(Network, params), Figures()
    for name, split in (("first", mnist().test(1000)), ("drawn", mnist().test(1000, drawn=True))):
        *_, pgd = report.withstood_pgd(model, split, epsilon)
        *_, square = report.withstood_square(model, split, epsilon, queries=5000)
        figures[f"{name}_clean"] = clean(params, split)
        standing = {"pgd": pgd, "square": square, "worst": pgd & square}
        figures |= {f"{name}_{attack}": 100 * float(left.mean()) for attack, left in standing.items()}
    return figures


def robust(spec: dict[str, Any], epsilon: float, *, scratch: bool = False) -> Callable[[int], Figures]:
    """Adversarial training on MNIST, from the pretrained base or from scratch."""

    def measure(seed: int) -> Figures:
        train, others = mnist().sample(59_000, seed)
        fitted = learn(spec, seed, train, others, scratch=scratch, same_classes=True)
        return {**attacked(fitted.params, epsilon), "kept_epoch": fitted.kept_epoch}

    return measure


def undefended(seed: int) -> Figures:
    """The pretrained base, without adversarial training."""
    return attacked(pretrained()[0], 0.3)


def _attack(name: str, epsilon: float, **more: Any) -> dict[str, Any]:
    attack = {"attack": name, "epsilon": epsilon, **more}
    return {**NONE, "learning_rate": 2e-3, "epochs": 10, "adversarial": attack}


ROWS = {
    "mnist": Row("MNIST 60k, from scratch", "99.3", of_all(mnist, {**LIGHT, **AUGMENTED, "epochs": 20}, scratch=True)),
    "fashion-60k": Row(
        "Fashion-MNIST 60k, `full`", "91",
        of_all(fashion, {**MOVED_A_LITTLE, "epochs": 30, "learning_rate": 3e-3}),
    ),
    "fashion-10k": Row(
        "Fashion-MNIST 10k, `full`", "88.5",
        of_all(fashion, {**MOVED_A_LITTLE, "epochs": 30, "learning_rate": 5e-3}, 10_000),
    ),
    "fashion-1000": Row(
        "Fashion-MNIST N = 1,000", "82.5",
        of_all(fashion, {**LIGHT, **LITTLE_MOVED, "epochs": 60, "learning_rate": 3e-3}, 1000),
    ),
    "fashion-100": Row(
        "Fashion-MNIST N = 100", "67",
        of_all(fashion, {**LIGHT, **AUGMENTED, "epochs": 100, "learning_rate": 2e-3}, 100),
    ),
    "digits-100": Row("digits (scikit-learn), N = 100", "92", of_digits(100, {})),
    "paired-500": Row(
        "Fashion-MNIST N = 500, recipe against none", "gap 10 smaller, test at most 0.5 worse",
        paired(500, {**RECIPE, "l2": 1e-2, "epochs": 25}),
    ),
    "wrong-labels": Row(
        "Fashion-MNIST N = 1,000, 30% wrong labels, recipe against none", "test 7 better, gap 30 smaller",
        paired(1000, {**RECIPE, "epochs": 40}, wrong_labels=0.3),
    ),
    "undefended": Row("MNIST, undefended, epsilon 0.3", "worst at most 2", undefended, seeds=1),
    "pgd-0.1": Row(
        "MNIST, `pgd`, epsilon 0.1", "worst 97.5, clean 99", robust(_attack("pgd", 0.1, steps=5), 0.1), seeds=1
    ),
    "fgsm-0.1": Row(
        "MNIST, `fgsm`, epsilon 0.1", "worst within 3 of `pgd`",
        robust(_attack("fgsm", 0.1, weight=1.0, spread=0.0), 0.1), seeds=1,
    ),
    "pgd-0.3": Row(
        "MNIST, `pgd`, epsilon 0.3", "worst 92, clean 98",
        robust({**_attack("pgd", 0.3), "epochs": 12}, 0.3, scratch=True), seeds=1,
    ),
}  # fmt: skip
