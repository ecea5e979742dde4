"""The report card. The quick part is computed before publishing, the costly part when no job is waiting.

Every number can be recomputed from the exported parameters, the data set and the spec.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from store.errors import enumerated
from store.records import Abstention
from store.settings import ATTACK_IMAGES
from trainer import attacks, evaluate, fit
from trainer.abstention import (
    Detector,
    beyond,
    coverage_interval,
    described_sets,
    distance_limits,
    set_threshold,
    set_threshold_rank,
)
from trainer.fit import Fitted, Split
from trainer.lenet import HEAD, Arrays
from trainer.methods import direct_kernels, trained_kernels
from trainer.network import Network, in_batches
from trainer.spec import Spec, Vat

EPSILON = 0.1  # of the report's attacks where the spec trains against none
PGD = "APGD-CE and APGD-DLR in turn"  # Croce & Hein (2020)
PGD_STEPS, PGD_RESTARTS = 100, 2  # 100 steps twice find more than 40 steps five times
QUICK_STEPS = 20  # before publishing
BOOTSTRAPS, FEW_BOOTSTRAPS, MANY = 1000, 200, 20_000  # resamples, and those of many images
GLANCE_IMAGES, GLANCE_STEPS = 64, 10  # the same without adversarial training, when nobody expects robustness
MASKING_IMAGES, MASKING_SHARE = 2, 0.01  # a weaker attack must win by more than both to be a sign of masking
BEHIND = 0.2  # how far PGD may fall short of FGSM before the report warns
SQUARE_QUERIES, SQUARE_PART = 1000, 250
PGD_PART = 64  # images of one piece, half a second's work that a queued job waits for

Model = Callable[[], Network]


@dataclass(frozen=True)
class HeldOut:
    """What a report rests on: images that the network which classifies them was not trained on."""

    split: Split
    logits: np.ndarray  # (n, classes)
    attacked: Split  # images that attacks are run on
    params: Arrays  # of a network that was trained without these
    distances: np.ndarray  # (n, 2) squared, to the nearest image that the network which classifies it has learned
    out_of_fold: bool = False  # each image was classified by a network of its own fold

    def cooled(self, temperature: float) -> "HeldOut":
        """The same with logits divided by a temperature."""
        params = fit.cooled(self.params, temperature)
        return dataclasses.replace(self, logits=self.logits / np.float32(temperature), params=params)

    @classmethod
    def apart(cls, fitted: Fitted, train: Split, validation: Split) -> "HeldOut":
        """Validation images, classified by the network that will be served, which has learned from `train`."""
        logits, distances = seen_by(fitted.params, train, validation)
        return cls(validation, logits, validation, fitted.params, distances)


def seen_by(params: Arrays, train: Split, held_out: Split) -> tuple[np.ndarray, np.ndarray]:
    """What a network makes of images that it was not trained on: logits (n, classes), and distances (n, 2)."""
    detector = Detector.of(params, train.images)
    return Network(params).logits(held_out.images), detector.distances(params, held_out.images)


def quick(
    fitted: Fitted, train: Split, held_out: HeldOut, classes: tuple[str, ...], spec: Spec, base: Arrays | None = None,
    *, attack_images: int = ATTACK_IMAGES, attack_well: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """The part that is computed before publishing; all but `train` is measured on held-out images.

    Args:
        base: parameters that training started from, if they had the same classes.
        attack_images: most images that attacks are run on.
        attack_well: run them on all of these also without adversarial training.
    """
    validation, logits = held_out.split, held_out.logits
    before = None if base is None else evaluate.accuracy(Network(base).logits(validation.images), validation.labels)
    on_train = evaluate.score(fitted.network.logits(train.images), train.labels)
    on_validation = evaluate.score(logits, validation.labels)
    attacked = _quick_robustness(Network(held_out.params), held_out.attacked, spec, attack_images, attack_well)
    params, delta = fitted.params, fitted.trained
    sparse = evaluate.sparsity(params)
    return {
        "warnings": [
            *_warnings(on_validation["accuracy"], before, validation, classes),
            *_attack_warnings(spec, attacked, fitted), *_set_warnings(spec.coverage, len(validation.labels)),
        ],
        "base": None if before is None else {"accuracy": before},
        "train": on_train,
        "validation": {
            **on_validation, **evaluate.classification(logits, validation.labels, classes),
            "out_of_fold": held_out.out_of_fold,
        },
        "generalization_gap": {
            "accuracy": on_train["accuracy"] - on_validation["accuracy"],
            "cross_entropy": on_validation["cross_entropy"] - on_train["cross_entropy"],
        },
        "calibration": evaluate.calibration(logits, validation.labels),
        "robustness": attacked,
        "regularization": {
            "epochs": fitted.gradient_shares,
            "warnings": fit.warnings(fitted.gradient_shares, spec, zeros=sparse["zeros"] > 0),
        },
        "sparsity": {**sparse, **_promise(spec, fitted)},
        "parameters": {
            "trained": sum(value.size for value in delta.values()),
            "total": sum(value.size for value in params.values()),
        },
        "training": {
            "epochs": len(fitted.history), "kept_epoch": fitted.kept_epoch, "ended_by": fitted.ended_by,
            "overfitted_attack_in_epoch": fitted.overfitted_epoch,
        },
        "history": fitted.history,
    }  # fmt: skip


def _warnings(accuracy: float, before: float | None, validation: Split, classes: tuple[str, ...]) -> list[str]:
    """Reasons not to rely on this version."""
    counts = np.bincount(validation.labels, minlength=len(classes))
    found = []
    if accuracy <= counts.max() / counts.sum():
        found.append("accuracy is no better than always predicting the most frequent class")
    elif before is not None and accuracy < before:
        found.append(
            f"the base classified {before:.1%} of the validation images correctly, this version {accuracy:.1%}"
        )
    missing = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if missing:
        found.append(f"no validation images of {enumerated(missing)}: their accuracy is unknown")
    return found


def _set_warnings(coverage: float | None, images: int) -> list[str]:
    """Too few images were held out to leave any class out of a prediction set."""
    if coverage is None or set_threshold_rank(images, coverage):
        return []
    least = math.ceil(1 / (1 - coverage) - 1 - 1e-9)
    return [
        f"a coverage of {coverage:g} needs {least} held-out images; with {images} every prediction set has all classes"
    ]


def _attack_warnings(spec: Spec, attacked: dict[str, Any], fitted: Fitted) -> list[str]:
    """Where adversarial training missed its aim. Without any, nobody expects robustness."""
    if spec.adversarial is None:
        return []
    found = fgsm_flatters(spec, attacked)
    if fitted.overfitted_epoch is not None and fitted.ended_by != "catastrophic_overfitting":
        found.append(
            f"the attack was overfitted from epoch {fitted.overfitted_epoch} on, and accuracy under PGD never rose "
            f"above {fit.ROBUST:.0%}: train with more steps (pgd, trades), a smaller epsilon or a larger weight"
        )
    return found


def fgsm_flatters(spec: Spec, attacked: dict[str, Any]) -> list[str]:
    """The warning that FGSM leaves much more than PGD, if it does."""
    strong, weak = attacked["accuracy"], attacked["accuracy_under_fgsm"]
    if spec.adversarial is None or weak - strong <= BEHIND:
        return []
    return [
        f"at epsilon {attacked['epsilon']:g} accuracy is {weak:.1%} under FGSM but {strong:.1%} under PGD: "
        "the network withstands one step and not several; rely on the figure under PGD"
    ]


def on_test(fitted: Fitted, train: Split, test: Split, rule: Abstention) -> dict[str, Any]:
    """The score of the network that will be served on images which nothing was trained or chosen on."""
    logits, distances = seen_by(fitted.params, train, test)
    error = evaluate.calibration(logits, test.labels)["expected_calibration_error"]
    sets = {} if rule.coverage is None else described_sets(logits, test.labels, rule.threshold)
    return {
        **evaluate.score(logits, test.labels), "expected_calibration_error": error,
        "covered": sets.get("covered"), "none_of_these": float(beyond(distances, rule.limits or (np.inf,)).mean()),
    }  # fmt: skip


def abstention(held_out: HeldOut, coverage: float | None) -> dict[str, Any]:
    """When the version should rather not name one class."""
    logits, labels, n = held_out.logits, held_out.split.labels, len(held_out.split.labels)
    limits, false_alarms = distance_limits(held_out.distances)
    found = {"coverage": coverage, "limits": limits, "false_alarms": false_alarms, "images": n}
    if coverage is None:
        return found
    threshold = set_threshold(logits, labels, coverage)
    sets = described_sets(logits, labels, threshold)
    del sets["covered"]  # by construction; `coverage_interval` says what it is worth
    return found | {"threshold": threshold, "coverage_interval": coverage_interval(n, coverage), **sets}


def cross_validation(found: HeldOut, folds: Iterator[np.ndarray]) -> dict[str, Any]:
    """The score on out-of-fold predictions, and the accuracy on each fold, given as (n,) bool."""
    logits, labels = found.logits, found.split.labels
    each = [evaluate.accuracy(logits[chosen], labels[chosen]) for chosen in folds]
    return {"folds": each, **evaluate.score(logits, labels)}


def reset_peak_memory() -> None:
    """Begin to measure the peak memory of a job: a worker runs many."""
    with contextlib.suppress(OSError):  # a kernel without it; the peak is then that of the worker since its start
        Path("/proc/self/clear_refs").write_text("5")
    if tf.config.list_logical_devices("GPU"):
        tf.config.experimental.reset_memory_stats("GPU:0")


def cost(seconds: dict[str, float], fitted: Fitted) -> dict[str, Any]:
    """What the job cost. `peak_memory_bytes` is the peak of the worker since `reset_peak_memory`."""
    status = Path("/proc/self/status").read_text()
    found = {
        "seconds": seconds,
        "images_per_second": round(fitted.images_per_second),
        "peak_memory_bytes": int(status.partition("VmHWM:")[2].split()[0]) * 1024,
    }
    if tf.config.list_logical_devices("GPU"):
        found["peak_gpu_memory_bytes"] = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    return found


def epsilon_of(spec: Spec) -> float:
    """Epsilon of the report's attacks."""
    attack = spec.adversarial
    return EPSILON if attack is None or isinstance(attack, Vat) else attack.epsilon


def _promise(spec: Spec, fitted: Fitted) -> dict[str, Any]:
    """The kernels in which L1 can make exact zeros, and those that it only shrinks."""
    if spec.l1 == 0:
        return {}
    direct = direct_kernels(fitted.trained)
    indirect = sorted(set(trained_kernels(fitted.trained)) - set(direct))
    names = [[name.removesuffix("/kernel") for name in group] for group in (direct, indirect)]
    return {"exact_zeros_in": names[0], "shrunk_without_zeros": names[1]}


def _quick_robustness(network: Network, validation: Split, spec: Spec, images: int, well: bool) -> dict[str, Any]:
    """Accuracy under a short APGD, and under FGSM. Without adversarial training fewer images and steps will do."""
    well, epsilon = well or spec.adversarial is not None, epsilon_of(spec)
    split, standing = _quickly_attacked(network, validation, epsilon, images, well)
    weak = evaluate.accuracy(fgsm(network, split, epsilon), split.labels)
    accuracy = float(standing.mean())
    return {"attack": "pgd", "epsilon": epsilon, "accuracy": accuracy, "accuracy_under_fgsm": weak}


def _quickly_attacked(
    network: Network, validation: Split, epsilon: float, images: int, well: bool
) -> tuple[Split, np.ndarray]:  # fmt: skip
    """The images of a short APGD, and whether each withstands it, (n,) bool."""
    split = _sample(validation, images if well else min(images, GLANCE_IMAGES))
    steps = QUICK_STEPS if well else GLANCE_STEPS
    *_, standing = withstood_pgd(lambda: network, split, epsilon, steps=steps)
    return split, standing


def beside_twin(
    ours: tuple[Fitted, HeldOut], twin: tuple[Fitted, HeldOut], train: Split, spec: Spec, attack_images: int
) -> dict[str, Any]:  # fmt: skip
    """What regularization changed: this version less its twin, which was trained without any, on the same images.

    Both are calibrated for the comparison, by the other half of the images. The interval of the calibration error,
    which is no share of the images, is a paired bootstrap (Efron 1979).
    """
    epsilon, labels = epsilon_of(spec), ours[1].split.labels
    right, sure, learned, withstood = [], [], [], []
    for fitted, held_out in (ours, twin):
        logits = evaluate.cross_fitted(held_out.logits, labels)
        right.append(evaluate.right(logits, labels))
        sure.append(np.exp(evaluate.log_softmax(logits).max(axis=1)))
        learned.append(evaluate.right(fitted.network.logits(train.images), train.labels))
        network = Network(held_out.params)
        withstood.append(_quickly_attacked(network, held_out.attacked, epsilon, attack_images, well=True)[1])

    errors = [evaluate.calibration_error(*these) for these in zip(sure, right, strict=True)]
    rng, drawn = np.random.default_rng(0), list[float]()
    for _ in range(BOOTSTRAPS if len(labels) <= MANY else FEW_BOOTSTRAPS):
        some = rng.integers(0, len(labels), len(labels))
        mine, its = (evaluate.calibration_error(*(of[some] for of in these)) for these in zip(sure, right, strict=True))
        drawn.append(mine - its)
    accuracy, in_training, robust = (evaluate.compared(*both) for both in (right, learned, withstood))
    differences = {
        "accuracy": accuracy, "generalization_gap": evaluate.compared_apart(in_training, accuracy),
        "expected_calibration_error": evaluate.Compared(errors[0] - errors[1], (*np.quantile(drawn, [0.025, 0.975]),)),
        "robust_accuracy": robust,
    }  # fmt: skip
    hits, train_hits, robust_hits = (float(both[1].mean()) for both in (right, learned, withstood))
    return {
        "accuracy": hits, "train_accuracy": train_hits, "generalization_gap": train_hits - hits,
        "expected_calibration_error": errors[1], "robust_accuracy": robust_hits,
        "differences": {name: dataclasses.asdict(one) for name, one in differences.items()},
    }  # fmt: skip


def _sample(validation: Split, most: int) -> Split:
    """The images that attacks are run on: all, or `most` of them."""
    some = np.random.default_rng(0).permutation(len(validation.labels))[:most]
    return validation.take(np.sort(some))


def fgsm(network: Network, split: Split, epsilon: float) -> np.ndarray:
    """Logits (n, classes) under FGSM."""
    size = tf.constant(epsilon, tf.float32)
    return in_batches(lambda x, y: network.fgsm(x, tf.constant(y), size), split.images, split.labels)


def withstood_pgd(
    model: Model, split: Split, epsilon: float, steps: int = PGD_STEPS, restarts: int = PGD_RESTARTS
) -> Iterator[np.ndarray]:
    """Images that are still classified correctly, (n,) bool, after each piece of APGD; a job waits for one piece.

    Restarts take turns with the two losses, APGD-CE first, and run on the images that are left. An image counts as
    lost when any point on the way was misclassified, not only the last.
    """
    standing = evaluate.right(model().logits(split.images), split.labels)
    size, count = tf.constant(epsilon, tf.float32), tf.constant(steps)
    for restart in range(restarts):
        left, options = np.flatnonzero(standing), (tf.constant([restart, 1]), tf.constant(restart % 2 == 1))
        for at in range(0, len(left), PGD_PART):
            part = split.take(left[at : at + PGD_PART])
            margins = model().apgd(part.images, tf.constant(part.labels), size, count, *options)[1].numpy()
            standing[left[at : at + PGD_PART]] = margins <= 0
            yield standing
        yield standing


def withstood_square(
    model: Model, split: Split, epsilon: float, queries: int = SQUARE_QUERIES, seed: int = 0
) -> Iterator[np.ndarray]:
    """Images that are still classified correctly, (n,) bool, after each part of the queries."""
    standing = evaluate.right(model().logits(split.images), split.labels)
    left = np.flatnonzero(standing)
    part, chance, size = split.take(left), tf.constant([seed, 2]), tf.constant(epsilon, tf.float32)
    at = attacks.stripes(part.images, size, chance + [7, 0])
    for first in range(0, queries, SQUARE_PART):
        if len(left):
            last = min(queries, first + SQUARE_PART)
            span = (tf.constant(first), tf.constant(last), tf.constant(queries))
            at, height = model().square(part.images, tf.constant(part.labels), at, size, *span, chance)
            safe = height.numpy() <= 0
            standing[left[~safe]] = False
            keep = np.flatnonzero(safe)
            left, part, at = left[keep], part.take(keep), tf.gather(at, keep)
        yield standing


def robustness(
    model: Model, validation: Split, epsilon: float, images: int = ATTACK_IMAGES
) -> Iterator[dict[str, Any] | None]:
    """Accuracy under attacks over a grid of epsilons.

    Args:
        model: returns the network with its parameters loaded; called before each piece of work.
        images: most images to attack.

    Yields:
        None after each piece of work, when other work may run, and finally the figures.
    """
    split = _sample(validation, images)
    clean = evaluate.right(model().logits(split.images), split.labels)
    curve = [{"epsilon": 0.0, **dict.fromkeys(("fgsm", "pgd", "square", "worst"), float(clean.mean()))}]
    for size in sorted({epsilon / 2, epsilon, min(1.0, 2 * epsilon)}):
        one_step = evaluate.right(fgsm(model(), split, size), split.labels)
        yield None
        against_pgd = yield from _last(withstood_pgd(model, split, size))
        against_square = yield from _last(withstood_square(model, split, size))
        results = {"fgsm": one_step, "pgd": against_pgd, "square": against_square}
        results["worst"] = clean & one_step & against_pgd & against_square
        curve.append({"epsilon": size, **{name: float(standing.mean()) for name, standing in results.items()}})
    unbounded = yield from _last(withstood_pgd(model, split, 1.0, restarts=1))
    masking = gradient_masking(curve, float(unbounded.mean()), len(split.labels))
    at_epsilon = next(point for point in curve if point["epsilon"] == epsilon)
    yield {
        "attack": "pgd",
        "accuracy": at_epsilon["pgd"],
        "accuracy_under_fgsm": at_epsilon["fgsm"],
        "images": len(split.labels),
        "curve": curve,
        "settings": {
            "pgd": PGD, "pgd_steps": PGD_STEPS, "pgd_restarts": PGD_RESTARTS, "square_queries": SQUARE_QUERIES,
        },
        "accuracy_at_epsilon_1": float(unbounded.mean()),
        "gradient_masking": masking,
        "trusted": not masking,
    }  # fmt: skip


def _last(attack: Iterator[np.ndarray]) -> Generator[None, None, np.ndarray]:
    """The last result of an attack; yields None after each part."""
    standing = np.empty(0, bool)
    for standing in attack:  # noqa: B007
        yield None
    return standing


def gradient_masking(curve: list[dict[str, float]], at_epsilon_1: float, images: int) -> list[str]:
    """Signs that the gradients hide the way to adversarial examples (Athalye et al. 2018).

    A weaker attack that finds an image or two which a stronger one has missed is no sign: attacks are random.

    Args:
        curve: accuracy under `fgsm`, `pgd` and `square` at each `epsilon`.
        at_epsilon_1: accuracy under PGD at epsilon 1.
        images: how many the accuracies are of.
    """
    tolerance = max(MASKING_IMAGES / images, MASKING_SHARE) + 1e-9  # of the difference of two float means
    reasons = []
    for point in curve:
        if point["pgd"] - point["square"] > tolerance:
            reasons.append(f"Square, which sees no gradient, beats PGD at epsilon {point['epsilon']:g}")
        if point["pgd"] - point["fgsm"] > tolerance:
            reasons.append(f"FGSM, a single step, beats PGD at epsilon {point['epsilon']:g}")
    if at_epsilon_1 > 0.1 and at_epsilon_1 > tolerance:
        reasons.append(f"PGD at epsilon 1, where any image is allowed, leaves {at_epsilon_1:.0%} correct")
    return reasons


def forgetting(params: Arrays, base: Arrays, sample: Split, *, same_classes: bool) -> dict[str, Any]:
    """Accuracy on the base's own task, before and after.

    If the classes differ, the base's classifier is put on top of the fine-tuned layers.
    """
    if not same_classes:
        params = params | {name: value for name, value in base.items() if name.startswith(f"{HEAD}/")}
    before, after = (evaluate.accuracy(Network(one).logits(sample.images), sample.labels) for one in (base, params))
    return {"images": len(sample.labels), "base": before, "accuracy": after, "lost": before - after}
