"""The gate: what a version must fulfil to get its label, judged by its report card and beside the version before.

A condition whose figure cannot be measured fails, and says why.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, fisher_exact

from store.errors import enumerated
from store.records import Condition, ReportCard, Score
from trainer.spec import Gate

ALPHA = 0.05  # two-sided: how unlikely a difference must be to count as clear
FEWEST = 10  # images that versions are compared on


@dataclass(frozen=True)
class Comparison:
    """What a version and the one before made of the same images, none of which the one before was trained on."""

    before: str  # that version, as name:version
    right: np.ndarray  # (n,) bool
    right_before: np.ndarray  # (n,) bool
    left_out: int  # images that the one before was trained on
    own: Score  # on the images that were held out for the version
    own_before: Score | None  # likewise for the one before, if its report has that


def fixed_conditions(gate: Gate, card: ReportCard) -> Iterator[Condition]:
    """The conditions on the version alone."""
    score, attacked, gap = card.validation, card.robustness, card.generalization_gap
    if gate.accuracy is not None:
        interval = score.accuracy_interval if score else None
        yield _at_least("accuracy", gate.accuracy, score.accuracy if score else None, "accuracy", interval)
    if gate.robust_accuracy is not None:
        name = f"accuracy under {attacked.attack.upper()} at epsilon {attacked.epsilon:g}" if attacked else "robustness"
        yield _at_least("robust_accuracy", gate.robust_accuracy, attacked.accuracy if attacked else None, name)
    if gate.calibration_error is not None:
        error = card.calibration.expected_calibration_error if card.calibration else None
        yield _at_most("calibration_error", gate.calibration_error, error, "the calibration error")
    if gate.generalization_gap is not None:
        value = gap.accuracy if gap else None
        yield _at_most("generalization_gap", gate.generalization_gap, value, "the generalization gap")
    if gate.forgetting is not None:
        lost = card.forgetting.lost if card.forgetting else None
        text = "the loss of accuracy on the base's own task"
        yield _at_most("forgetting", gate.forgetting, lost, text, "no images of that task are left")
    if gate.class_recall is not None:
        yield _recall(gate.class_recall, card)


def same_classes(classes: tuple[str, ...], before: str, classes_before: tuple[str, ...]) -> Condition:
    """The condition that a version has the classes of the one before."""
    added = [name for name in classes if name not in classes_before]
    missing = [name for name in classes_before if name not in classes]
    parts = [f"it adds {enumerated(added)}"] * bool(added) + [f"it lacks {enumerated(missing)}"] * bool(missing)
    text = (
        f"the classes are not those of {before}: {' and '.join(parts)}" if parts else f"the classes are as in {before}"
    )
    return Condition(condition="same_classes", limit=None, value=None, interval=None, passed=not parts, message=text)


def not_worse(found: Comparison) -> Condition:
    """The condition that a version is not clearly worse than the one before.

    McNemar's exact test (McNemar 1947): of the images that only one of the two classified correctly, is the share that
    the version did too small to be chance? Its exact interval (Clopper & Pearson 1934), scaled by how many these are of
    all images, is that of the difference in accuracy. Where too few images can be compared in pairs, Fisher's exact
    test (1922) compares the accuracy of each on the images that were held out for it.
    """
    n, before = len(found.right), found.before
    if n < FEWEST:
        return _not_worse_apart(found)
    won, lost = int((found.right & ~found.right_before).sum()), int((~found.right & found.right_before).sum())
    differ = won + lost
    interval: list[float] | None = None
    difference, chance = (won - lost) / n, 1.0
    if differ:
        test = binomtest(won, differ)
        exact, chance = test.proportion_ci(1 - ALPHA), float(test.pvalue)
        interval = [(2 * float(share) - 1) * differ / n for share in (exact.low, exact.high)]
    clear = chance < ALPHA and lost > won
    out = f"; {found.left_out} that {before} was trained on are left out" if found.left_out else ""
    text = (
        f"{_percent(found.right.mean())} of {n} held-out images are right, and {_percent(found.right_before.mean())} "
        f"with {before}: {'clearly worse' if clear else 'not clearly worse'} (p = {chance:.2g}{out})"
    )
    return _difference(difference, interval, passed=not clear, message=text)


def _not_worse_apart(found: Comparison) -> Condition:
    own, other, before = found.own, found.own_before, found.before
    few = f"there are only {len(found.right)} held-out images that {before} was not trained on"
    if other is None or not (own.images and other.images):
        return _difference(None, None, passed=True, message=f"{few}, so nothing was compared")
    table = [[round(one.accuracy * one.images), one.images - round(one.accuracy * one.images)] for one in (own, other)]
    chance = float(fisher_exact(table).pvalue)
    clear = chance < ALPHA and own.accuracy < other.accuracy
    text = (
        f"{_percent(own.accuracy)} of {own.images} held-out images are right, and {_percent(other.accuracy)} of the "
        f"{other.images} that were held out for {before}: {'clearly worse' if clear else 'not clearly worse'} "
        f"(p = {chance:.2g}; {few})"
    )
    return _difference(own.accuracy - other.accuracy, None, passed=not clear, message=text)


def not_compared(why: str, *, passed: bool) -> Condition:
    """The condition that a version is not worse where there is nothing to compare, or no way to."""
    return _difference(None, None, passed=passed, message=why)


def _difference(value: float | None, interval: list[float] | None, *, passed: bool, message: str) -> Condition:
    return Condition.model_validate({
        "condition": "not_worse", "limit": None, "value": value, "interval": interval, "passed": passed,
        "message": message,
    })  # fmt: skip


def _recall(wanted: float | dict[str, float], card: ReportCard) -> Condition:
    """The condition on the recall of classes."""
    classes = card.validation.classification_report.get("classes", {}) if card.validation else {}
    limits = wanted if isinstance(wanted, dict) else dict.fromkeys(classes, wanted)
    measured = {name: classes[name]["recall"] for name in limits if classes.get(name, {}).get("support")}
    low = {name: recall for name, recall in measured.items() if recall < limits[name]}
    unknown = [name for name in limits if name not in measured]
    worst = min(measured, key=lambda name: measured[name] - limits[name], default=None)
    limit, value = (None, None) if worst is None else (limits[worst], float(measured[worst]))
    parts = [f"the recall of {name!r} is {_percent(low[name])}, less than {_percent(limits[name])}" for name in low]
    parts = [*parts[:5], f"{len(parts) - 5} more classes are below their limit"] if len(parts) > 5 else parts
    if unknown or not limits:
        parts.append(
            f"the recall of {enumerated(unknown) or 'any class'} cannot be measured: no image of it is held out"
        )
    good = f"the recall of every class is high enough, the lowest beside its limit that of {worst!r}"
    return Condition(
        condition="class_recall", limit=limit, value=value, interval=None, passed=not parts,
        message="; ".join(parts) or good,
    )  # fmt: skip


def _at_least(
    condition: str, limit: float, value: float | None, name: str, interval: tuple[float, float] | None = None
) -> Condition:
    return _limited(condition, limit, value, value is not None and value >= limit, ("at least", "less than"), name,
                    interval=interval)  # fmt: skip


def _at_most(
    condition: str, limit: float, value: float | None, name: str, why: str = "it is not measured"
) -> Condition:
    return _limited(condition, limit, value, value is not None and value <= limit, ("at most", "more than"), name, why)


def _limited(
    condition: str, limit: float, value: float | None, passed: bool, words: tuple[str, str], name: str,
    why: str = "it is not measured", interval: tuple[float, float] | None = None,
) -> Condition:  # fmt: skip
    text = f"{name} is {_percent(value)}, {words[not passed]} {_percent(limit)}" if value is not None else (
        f"{name} cannot be judged: {why}"
    )  # fmt: skip
    return Condition(
        condition=condition, limit=limit, value=value, interval=interval, passed=passed, message=text
    )  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
