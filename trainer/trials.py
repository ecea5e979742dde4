"""Trials of a search: their scores, which one is chosen, and why."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trainer import evaluate, objectives
from trainer.recipes import counted, phrase
from trainer.spec import SEARCHED, Choose, Spec, described


@dataclass(frozen=True)
class Rung:
    """The work that a candidate gets before the next cut."""

    share: float  # of its epochs
    folds: int  # of all, the first ones
    keep: int | None = None  # candidates that go on; all from the last round, in which objectives are measured


@dataclass(frozen=True)
class Score:
    """What a trial reached on a rung."""

    rung: Rung
    epochs: int
    losses: np.ndarray  # (n,) of the held-out images, in nats
    right: np.ndarray  # (n,) bool
    ended_s: float = 0.0  # after the search began
    objectives: Mapping[str, float] = field(default_factory=dict)

    @property
    def cross_entropy(self) -> float:
        """Mean over the images, in nats."""
        return float(self.losses.mean())

    def headline(self) -> dict[str, Any]:
        """Accuracy with its interval, and cross-entropy."""
        return {**evaluate.proportion(self.right), "cross_entropy": self.cross_entropy}

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.headline(), "epochs": self.epochs, "folds": self.rung.folds,
            "standard_error": standard_error(self.losses), "ended_s": round(self.ended_s, 3),
            "objectives": dict(self.objectives),
        }  # fmt: skip


@dataclass(eq=False)
class Trial:
    """A candidate and what was found about it."""

    number: int
    spec: Spec
    origin: str  # recipe, sampled, earlier, variant
    scores: list[Score] = field(default_factory=list)  # by rung
    seconds: float = 0.0
    dropped: str = ""  # why it went no further
    of: "Trial | None" = None  # whose variant it is; that one was in the first round
    predictions: np.ndarray | None = None  # out-of-fold logits (n, classes) of the last round on all folds

    @property
    def finished(self) -> bool:
        """Whether it took part in the last round."""
        return bool(self.scores) and self.scores[-1].rung.keep is None

    def settings(self) -> dict[str, Any]:
        """The searched fields and the method's options."""
        values = described(self.spec)
        also = ("adversarial",) if self.spec.adversarial else ()
        return {name: values[name] for name in (*SEARCHED, self.spec.method, *also) if name in values}

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "trial": self.number, "origin": self.origin, "recipe": phrase(self.spec), "settings": self.settings(),
            "scores": [score.dump() for score in self.scores], "seconds": round(self.seconds, 3),
            "dropped": self.dropped or None,
        }  # fmt: skip


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy of every image at the temperature that suits all of them best (Guo et al. 2017), (n,) float64.

    How confident short training and label smoothing leave a network can be corrected by one number afterwards, so it
    must not decide between recipes.
    """
    scaled = logits / evaluate.temperature(logits, labels)
    found: np.ndarray = -evaluate.log_softmax(scaled)[np.arange(len(labels)), labels]
    return found


def loss_of(trial: Trial) -> float:
    """Cross-entropy in the last round that it ran in, in nats."""
    return trial.scores[-1].cross_entropy


def by_one_standard_error(standing: Sequence[Trial]) -> Trial:
    """The cheapest and most regularized trial that is as good as the best within one standard error of the difference.

    Args:
        standing: trials scored on the same images, the best first.
    """
    best = standing[0].scores[-1]
    as_good = [trial for trial in standing if _as_good(trial.scores[-1], best)]
    return min(as_good, key=lambda trial: preference(trial.spec)) if len(standing) > 1 else standing[0]


def _as_good(one: Score, best: Score) -> bool:
    """Whether a score is within one standard error of another on the same images."""
    behind = one.losses - best.losses
    return bool(behind.mean() <= standard_error(behind))


def standard_error(values: np.ndarray) -> float:
    """Of the mean of some values, (n,)."""
    return float(values.std(ddof=1) / math.sqrt(len(values)))


@dataclass(frozen=True)
class Choice:
    """The trial that was chosen."""

    trial: Trial
    front: Sequence[Trial] = ()  # those that no other beats in every objective
    why: Sequence[str] = ()
    warnings: Sequence[str] = ()

    def beside(self, trial: Trial) -> str:
        """Why a finalist was not chosen."""
        behind = loss_of(trial) - loss_of(self.trial)
        if not self.front and behind > 0:
            return f"{behind:.3f} nats behind the chosen one"
        if not self.front:
            return "a cheaper or more regularized one is as good within a standard error"
        if trial in self.front:
            return "on the Pareto front"
        return "another is as good in every objective, and better in one"


def among(standing: Sequence[Trial], choose: Choose, names: Sequence[str]) -> Choice:
    """Choose between trials by several objectives.

    Limits come first, then weights; without weights the rule of one standard error within the limits; with neither all
    objectives weigh the same.

    Args:
        standing: trials scored on the same images, the lowest loss first.
    """
    points = [trial.scores[-1].objectives for trial in standing]
    efficient = [standing[at] for at in objectives.front(points)]
    within, warning = objectives.allowed(points, choose)
    within = [within[at] for at in objectives.front([points[at] for at in within])]
    left = [standing[at] for at in within]
    weights = {str(name): weight for name, weight in choose.weights.items()} or (
        {} if choose.limits else dict.fromkeys(names, 1.0)
    )
    chosen = left[objectives.best([points[at] for at in within], weights)] if weights else by_one_standard_error(left)
    reached = ", ".join(f"{name.replace('_', ' ')} {value:.1%}" for name, value in chosen.scores[-1].objectives.items())
    epochs = counted(chosen.scores[-1].epochs, "epoch")
    front = f"{len(efficient)} of {len(standing)} recipes"
    why = f"On the Pareto front: {front}. After {epochs} the chosen one had {reached}."
    return Choice(chosen, efficient, [why], [f"{warning}, as measured after {epochs}"] if warning else [])


def preference(spec: Spec) -> tuple[float, bool, float, float]:
    """Smaller is better between trials of equal score.

    A stronger attack comes first, then the base's classifier, the cheaper recipe, the more regularized one.
    """
    augmentation = spec.augmentation
    moved = augmentation.shift + augmentation.cutout / 4 + augmentation.flip if augmentation else 0.0
    strength = spec.l2 * 100 + spec.dropout + spec.label_smoothing * 2 + spec.mixup + moved
    epsilon = spec.adversarial.epsilon if spec.adversarial else 0.0
    return -epsilon, spec.head == "new", spec.epochs * COSTS.get(spec.method, 1.0), -strength


COSTS = {"lora": 0.6, "bias": 0.5, "head": 0.1}  # of an epoch, in epochs of `full`


def worth(chosen: Trial, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What searched fields are worth: the best trial that has another value, and differs in little else.

    Cross-entropy in nats and accuracy in the first round, in which all trials ran; the other less the chosen one.
    """
    chosen = chosen.of or chosen
    mine, found = chosen.settings(), []
    settings = {trial: trial.settings() for trial in trials if trial.scores and not trial.of}
    differ = {trial: {name for name in SEARCHED if its[name] != mine[name]} for trial, its in settings.items()}
    for name in SEARCHED:
        others = [trial for trial, names in differ.items() if name in names and len(names) <= ALIKE]
        if others:
            other = min(others, key=lambda trial: trial.scores[0].cross_entropy)
            found.append({
                "field": name, "chosen": mine[name], "other": settings[other][name],
                "cross_entropy": other.scores[0].cross_entropy - chosen.scores[0].cross_entropy,
                "accuracy": float(other.scores[0].right.mean() - chosen.scores[0].right.mean()),
            })  # fmt: skip
    return sorted(found, key=lambda one: -one["cross_entropy"])


ALIKE_SCORES = "there was no clear difference in the first round"
AHEAD = "the loss was lower in the first round"
ALIKE = 3  # searched fields in which two trials may differ and still be compared by one of these


def sentence(spec: Spec, chosen: Trial, trials: Sequence[Trial]) -> str:
    """What was chosen and why, in plain words."""
    score = chosen.scores[-1]
    parts = [
        f"Chose {phrase(spec)}. In a run of {counted(score.epochs, 'epoch')} it classified {score.right.mean():.1%} of "
        f"{len(score.right)} held-out images correctly."
    ]
    augmented = chosen.spec.augmentation is not None
    method = chosen.spec.method
    if rival := _best(trials, lambda spec: (spec.augmentation is not None) is not augmented and spec.method == method):
        beside = _beside(chosen, rival)
        start = "Without augmentation" if augmented else "With augmentation"
        if not augmented and beside not in (ALIKE_SCORES, AHEAD):
            start = "Augmentation was left out: with it"
        parts.append(f"{start}, {beside}.")
    if rival := _best(trials, lambda spec: spec.method != method):
        parts.append(f"With `{rival.spec.method}`, {_beside(chosen, rival)}.")
    return " ".join(parts)


def _best(trials: Sequence[Trial], wanted: Callable[[Spec], bool]) -> Trial | None:
    """The best of some trials in the first round, in which all ran."""
    found = [trial for trial in trials if trial.scores and not trial.of and wanted(trial.spec)]
    return min(found, key=lambda trial: trial.scores[0].cross_entropy, default=None)


def _beside(chosen: Trial, rival: Trial) -> str:
    """How a rival did beside the trial that was chosen, in the first round."""
    one, other = (chosen.of or chosen).scores[0], rival.scores[0]
    points = 100 * float(one.right.mean() - other.right.mean())
    if not _as_good(one, other):
        return AHEAD
    if _as_good(other, one):
        return ALIKE_SCORES
    if points > 0:
        return f"accuracy was {points:.1f} points lower in the first round"
    return f"the loss was {other.cross_entropy - one.cross_entropy:.2f} nats higher in the first round"
