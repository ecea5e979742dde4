"""The gate: what a version must fulfil to get its label, judged by its report card and beside the version before.

A condition whose figure cannot be measured fails, and says why.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from store.errors import enumerated
from store.records import Condition, ReportCard, Score
from trainer.evaluate import Compared, compared, compared_apart, proportion
from trainer.spec import Gate

FEWEST = 10  # images that versions are compared on
DOUBT = 0.8  # confidence, as a share, with which a version that passes must be worse to be doubted


@dataclass(frozen=True)
class Relabelled:
    """The images that the data of two versions share, or that are near copies, and whether they mean the same."""

    shared: int = 0
    count: int = 0  # of these, how many are of another class now
    mostly: tuple[str, ...] = ()  # classes most of whose images are of another one now

    def __str__(self) -> str:
        """The same in words."""
        which = f", most of those of {enumerated(self.mostly)}" if self.mostly else ""
        return f"{self.count} of the {self.shared} images that both were given are of another class than before{which}"


@dataclass(frozen=True)
class Comparison:
    """What a version and the one before made of the same images, none of which the one before was trained on."""

    before: str  # that version, as name:version
    right: np.ndarray  # (n,) bool
    right_before: np.ndarray  # (n,) bool
    earlier: np.ndarray  # (n,) bool, the images that were held out for the one before
    taught: np.ndarray  # (n,) bool, of these, the ones that the version, or what it began with, was trained on
    left_out: int  # images held out for the version that the one before, or what either began with, was trained on
    relabelled: Relabelled
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

    Of these sets of images it must not get clearly fewer right than the one before:

    - those that were held out for either of them, and that neither was trained on;
    - of these, those that were held out for the one before: a version of other data, whose labels mean something else,
      is good on its own images;
    - all that were held out for the one before. What the version has learned of them does not count for it, and yet
      counts against it.

    Where too few can be compared in pairs, the accuracies of both are, each on the images that were held out for it.
    There is no comparison if most images of a class are of another one now.
    """
    before, relabelled, clean, earlier = found.before, found.relabelled, ~found.taught, found.earlier
    if relabelled.mostly:
        return not_compared(f"it cannot be compared with {before}: {relabelled}", passed=False)
    sets = {
        "held-out images": clean,
        f"images that were held out for {before}": clean & earlier,
        f"images that were held out for {before}, some of which it has learned,": earlier,
    }
    large = {what: some for what, some in sets.items() if some.sum() >= FEWEST}
    tested = {what: compared(found.right[some], found.right_before[some]) for what, some in large.items()}
    what = next((what for what, result in tested.items() if _is_worse(result)), "held-out images")
    if what not in tested:
        return _not_worse_apart(found)
    result, some = tested[what], sets[what]
    doubts = [*_doubts(found)]
    notes = [f"{found.left_out} are left out because one of them has learned them"] if found.left_out else []
    text = (
        f"{_percent(found.right[some].mean())} of {some.sum()} {what} are right, and "
        f"{_percent(found.right_before[some].mean())} with {before}: {_verdict(result, [*notes, *doubts])}"
    )
    likely = compared(found.right[some], found.right_before[some], confidence=DOUBT)
    return _on_difference(result, doubt=bool(doubts) or _is_worse(likely), message=text)


def _doubts(found: Comparison) -> Iterator[str]:
    """Why a comparison says little of what is asked of the version before."""
    before, new = found.before, ~found.earlier
    if (n := int(found.earlier.sum())) < FEWEST:
        yield f"of those that were held out for {before} there are only {n}"
    if found.own_before is not None and new.sum() >= FEWEST:
        own, share = found.own_before, proportion(found.right_before[new])
        strange = Compared(share["accuracy"], share["accuracy_interval"])
        if _is_worse(compared_apart(strange, Compared(own.accuracy, own.accuracy_interval))):
            yield (
                f"{before} gets {_percent(strange.value)} of the {new.sum()} that are new to it right, and "
                f"{_percent(own.accuracy)} of its own: they are of another kind, or labelled otherwise"
            )
    if found.relabelled.count:
        yield str(found.relabelled)


def _is_worse(found: Compared) -> bool:
    return found.clear and found.value < 0


def _verdict(found: Compared, notes: Iterable[str]) -> str:
    words = "not worse" if found.value >= 0 else "clearly worse" if found.clear else "worse, which may be chance"
    low, high = (100 * end for end in found.interval)
    return f"{words} ({'; '.join([f'by {low:+.1f} to {high:+.1f} points', *notes])})"


def _on_difference(found: Compared, doubt: bool, message: str) -> Condition:
    passed = not _is_worse(found)
    return Condition(
        condition="not_worse", limit=None, value=found.value, interval=found.interval, passed=passed,
        doubt=passed and doubt, message=message,
    )  # fmt: skip


def _not_worse_apart(found: Comparison) -> Condition:
    own, other, before = found.own, found.own_before, found.before
    few = f"too few can be compared one by one: {(~found.taught).sum()}"
    if other is None or not (own.images and other.images):
        return not_compared(f"nothing was compared with {before}: {few}", passed=True, doubt=True)
    result = compared_apart(*(Compared(one.accuracy, one.accuracy_interval) for one in (own, other)))
    text = (
        f"{_percent(own.accuracy)} of {own.images} held-out images are right, and {_percent(other.accuracy)} of the "
        f"{other.images} that were held out for {before}: {_verdict(result, [few])}"
    )
    return _on_difference(result, doubt=True, message=text)


def not_compared(why: str, *, passed: bool, doubt: bool = False) -> Condition:
    """The condition that a version is not worse where there is nothing to compare, or no way to."""
    return Condition(
        condition="not_worse", limit=None, value=None, interval=None, passed=passed, doubt=doubt, message=why
    )


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
