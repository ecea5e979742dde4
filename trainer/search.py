"""Automatic regularization: choose a recipe by its out-of-fold predictions.

Successive halving (Jamieson & Talwalkar 2016): every candidate gets a short run on some folds, the better ones longer
runs on more. A short run has few epochs and its whole schedule, so that its end can be compared with that of a long
one. The candidates that are left at the end are compared image by image, and of those within one standard error of the
best the cheapest and most regularized is chosen (Breiman et al. 1984, here on paired differences).
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from store.errors import Diverged, SearchFailed
from trainer import evaluate
from trainer.fit import Split, Training, begin
from trainer.folds import stratified_folds
from trainer.lenet import Arrays
from trainer.network import Network
from trainer.parallel import Check, at_once, side_by_side
from trainer.spec import FEWEST_OF_A_CLASS, SEARCHED, Asked, Spec, described

Recipe = Mapping[str, Any]  # values of searched fields, as in a spec

SMALL = {"shift": 1.0, "rotate": 3.0, "scale": 0.05}
LARGE = {"shift": 2.0, "rotate": 10.0, "scale": 0.15}
OFF: Recipe = {
    "l1": 0.0, "l2_sp": 0.0, "label_smoothing": 0.0, "mixup": 0.0, "augmentation": None, "ema": 0.0,
}  # fmt: skip
LORA: Recipe = {
    **OFF, "method": "lora", "head": "keep", "learning_rate": 1e-3, "epochs": 20, "schedule": "cosine", "l2": 1e-4,
    "dropout": 0.2,
}  # fmt: skip
FULL: Recipe = {
    **OFF, "method": "full", "head": "new", "learning_rate": 1e-2, "epochs": 60, "schedule": "one_cycle", "l2": 5e-3,
    "dropout": 0.2,
}  # fmt: skip
TUNED: Recipe = {**FULL, "head": "keep", "learning_rate": 2e-3}  # for data that look like the base's
RECIPES: tuple[Recipe, ...] = (
    {**FULL, "augmentation": SMALL},  # the first is the fallback
    {**FULL, "augmentation": LARGE},
    FULL,
    {**FULL, "augmentation": {**SMALL, "flip": True}},
    {**FULL, "augmentation": {**LARGE, "cutout": 8}},
    {**LORA, "epochs": 60, "augmentation": LARGE},
)
SAME_CLASSES: tuple[Recipe, ...] = (LORA, {**TUNED, "augmentation": LARGE})  # tried first if the classes are the base's
PRIOR: Mapping[str, Sequence[Any]] = {
    "learning_rate": (0.5, 0.7, 1.4),  # times that of the recipe
    "l1": (1e-6, 1e-5),
    "l2": (1e-3, 1e-2),
    "l2_sp": (1e-3,),
    "dropout": (0.1, 0.3, 0.4),
    "label_smoothing": (0.05, 0.1),
    "mixup": (0.2,),
    "augmentation": (None, SMALL, LARGE, {**SMALL, "flip": True}, {**SMALL, "cutout": 8}, {**SMALL, "contrast": 0.3}),
    "ema": (0.98,),
}
STRENGTHS = (0.02, 0.05, 0.1, 0.2, 0.3)  # of an attack, as epsilon, where that is searched
OFTEN = ("learning_rate", "l2", "dropout", "label_smoothing", "augmentation")  # three times as often varied


@dataclass(frozen=True)
class Rung:
    """The work that a candidate gets before the next cut."""

    share: float  # of its epochs
    folds: int  # of all, the first ones
    keep: int  # candidates that go on


@dataclass(frozen=True)
class Score:
    """What a trial reached on a rung."""

    rung: Rung
    epochs: int
    losses: np.ndarray  # (n,) of the held-out images, in nats
    right: np.ndarray  # (n,) bool
    ended_s: float = 0.0  # after the search began

    @property
    def cross_entropy(self) -> float:
        """Mean over the images, in nats."""
        return float(self.losses.mean())

    def headline(self) -> dict[str, Any]:
        """Accuracy with its interval, and cross-entropy."""
        return {**evaluate.proportion(self.right), "cross_entropy": self.cross_entropy}

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        error = float(self.losses.std(ddof=1) / math.sqrt(len(self.losses)))
        return {
            **self.headline(), "epochs": self.epochs, "folds": self.rung.folds, "standard_error": error,
            "ended_s": round(self.ended_s, 3),
        }  # fmt: skip


@dataclass
class Trial:
    """A candidate and what was found about it."""

    number: int
    spec: Spec
    origin: str  # recipe, sampled, earlier
    scores: list[Score] = field(default_factory=list)  # by rung
    seconds: float = 0.0
    dropped: str = ""  # why it went no further

    def settings(self) -> dict[str, Any]:
        """The searched fields and the method's options."""
        values = described(self.spec)
        return {name: values[name] for name in (*SEARCHED, self.spec.method) if name in values}

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "trial": self.number, "origin": self.origin, "recipe": phrase(self.spec), "settings": self.settings(),
            "scores": [score.dump() for score in self.scores], "seconds": round(self.seconds, 3),
            "dropped": self.dropped or None,
        }  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Images to learn from, and what to start from."""

    data: Split
    base: Arrays
    classes: int
    same_classes: bool  # as the base's

    def part(self, some: np.ndarray) -> Split:
        """Some of the images, (n,) bool."""
        return self.data.take(np.flatnonzero(some))

    @property
    def fewest(self) -> int:
        """Images of the smallest class."""
        return int(np.bincount(self.data.labels, minlength=self.classes).min())


@dataclass(frozen=True)
class Found:
    """The outcome of a search."""

    spec: Spec
    trials: Sequence[Trial] = ()
    chosen: int | None = None
    sentence: str = ""
    worth: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "chosen": self.chosen, "sentence": self.sentence, "worth": list(self.worth),
            "trials": [trial.dump() for trial in self.trials],
        }  # fmt: skip


def search(
    asked: Asked, problem: Problem, *, uploaded: bool = False, earlier: Sequence[Recipe] = (), spent_s: float = 0.0,
    on_trial: Callable[[dict[str, Any]], None] = lambda record: None, check: Check = lambda: None,
) -> Found:  # fmt: skip
    """Choose the searched fields of a spec.

    Args:
        uploaded: validation images were uploaded; the report will rest on these, and the search does not see them.
        earlier: recipes that were chosen for earlier versions of the model.
        spent_s: seconds of `search.seconds` that are gone.
        on_trial: called with a record after each trial of a round.
        check: called about twice a second; raises to end the search.

    Raises:
        SearchFailed: no trial came to an end.
    """
    bounds = asked.fixed.search
    assert bounds is not None
    if problem.fewest < FEWEST_OF_A_CLASS:
        return Found(asked.resolve(fallback(problem)), warnings=[_TOO_FEW])
    folds = min(bounds.folds or default_folds(len(problem.data.labels)), problem.fewest)
    after = [1.0] if uploaded else [1.0] + folds * [1 - 1 / folds]
    clock = Clock(bounds.seconds, runs=makespan(after, at_once()), spent_s=spent_s)
    rounds = _Rounds(problem, asked.fixed.seed, folds, clock, on_trial, check)
    trials = list(candidates(asked, problem, earlier))
    standing = trials
    for rung in rungs(len(trials), folds, len(problem.data.labels)):
        standing = rounds.run(standing, rung)
    chosen = by_one_standard_error(standing)
    if "epsilon" in asked.auto:
        strengths = [
            Trial(len(trials) + number, asked.resolve({**described(chosen.spec), "epsilon": epsilon}), "strength")
            for number, epsilon in enumerate(STRENGTHS, start=1)
        ]
        trials += strengths
        chosen = by_one_standard_error(rounds.run(strengths, Rung(LAST_SHARE, folds, len(strengths))))
    for trial in trials:
        if trial is not chosen:
            trial.dropped = trial.dropped or "a cheaper or more regularized one is as good within a standard error"
    more: dict[str, Any] = {} if uploaded else {"folds": folds, "validation_split": 0.0}
    if bounds.seconds and "epochs" in asked.auto:
        more["epochs"] = clock.affordable(chosen.spec)
    spec = asked.resolve(recipe_of(chosen.spec), **more)
    return Found(spec, trials, chosen.number, sentence(chosen, trials), worth(chosen, trials))


class _Rounds:
    """Runs trials, round after round."""

    def __init__(
        self, problem: Problem, seed: int, folds: int, clock: "Clock", on_trial: Callable[[dict[str, Any]], None],
        check: Check,
    ) -> None:  # fmt: skip
        self._problem, self._clock, self._on_trial, self._check = problem, clock, on_trial, check
        self._folds = list(stratified_folds(problem.data.labels, seed, folds))
        self._number = 0

    def run(self, trials: Sequence[Trial], rung: Rung) -> list[Trial]:
        """Give every trial the work of a rung; returns those that go on, the best first.

        Raises:
            SearchFailed: all trials diverged.
        """
        self._number += 1
        done: list[Trial] = []
        found: dict[int, dict[int, np.ndarray]] = {trial.number: {} for trial in trials}  # logits by fold

        def work(task: tuple[Trial, int], check: Check) -> tuple[np.ndarray, float] | str:
            trial, fold = task
            if trial.dropped:
                return trial.dropped
            if done and self._clock.is_up(min(done, key=_loss).spec):
                return "no time was left"
            try:
                return self._predicted(shortened(trial.spec, rung), fold, check)
            except Diverged as exc:
                return str(exc)

        tasks = [(trial, fold) for trial in trials for fold in range(rung.folds)]
        for (trial, fold), result in side_by_side(work, tasks, self._check):
            if isinstance(result, str):
                trial.dropped = result
                continue
            found[trial.number][fold], took = result
            trial.seconds += took
            self._clock.note(trial.spec, shortened(trial.spec, rung).epochs * (1 - 1 / len(self._folds)), took)
            if len(found[trial.number]) < rung.folds:
                continue
            score = self._scored(trial.spec, rung, found[trial.number])
            trial.scores.append(score)
            done.append(trial)
            best = min(done, key=_loss)
            self._on_trial(
                {"round": self._number, "trial": trial.number, "trials": len(trials), "tried": len(done),
                 "epochs": score.epochs, "folds": rung.folds,
                 "best": {"trial": best.number, **best.scores[-1].headline()}}
            )  # fmt: skip
        if not done:
            raise SearchFailed(f"no recipe could be trained: {trials[0].dropped}", param="spec")
        done.sort(key=lambda trial: (_loss(trial), trial.number))
        for trial in done[rung.keep :]:
            trial.dropped = f"{_loss(trial) - _loss(done[0]):.3f} nats behind"
        return done[: rung.keep]

    def _predicted(self, spec: Spec, fold: int, check: Check) -> tuple[np.ndarray, float]:
        """Logits of the images of a fold, by a network that was trained without them, and how long it took."""
        problem, held_out = self._problem, self._folds[fold]
        run = training(spec, problem, problem.part(~held_out))
        params = run.finish(check)
        return Network(params).logits(problem.part(held_out).images), run.seconds

    def _scored(self, spec: Spec, rung: Rung, logits: Mapping[int, np.ndarray]) -> Score:
        """The score of the out-of-fold predictions on the folds of a rung."""
        scores = np.concatenate([logits[fold] for fold in range(rung.folds)])
        truth = np.concatenate([self._problem.data.labels[self._folds[fold]] for fold in range(rung.folds)])
        epochs = shortened(spec, rung).epochs
        return Score(rung, epochs, losses(scores, truth), evaluate.right(scores, truth), self._clock.elapsed_s)


def shortened(spec: Spec, rung: Rung) -> Spec:
    """A spec with the epochs that it gets on a rung."""
    return spec.model_copy(update={"epochs": max(1, round(rung.share * spec.epochs))})


_TOO_FEW = f"nothing was searched, because a class has fewer than {FEWEST_OF_A_CLASS} images; a fixed recipe was used"


def default_folds(images: int) -> int:
    """Folds for this many images: the more there are, the less it matters to train on fewer of them."""
    return 5 if images < 200 else 3


def fallback(problem: Problem) -> Recipe:
    """The recipe for data that are too few to compare any."""
    return LORA if problem.same_classes else RECIPES[0]


def recipe_of(spec: Spec) -> Recipe:
    """The values of a spec that may be searched."""
    return described(spec) | {"epsilon": spec.adversarial.epsilon if spec.adversarial else 0.0}


def preview_recipe(problem: Problem) -> Recipe:
    """A recipe that is trained in a moment."""
    return {**LORA, "epochs": 5} if problem.same_classes else {**FULL, "epochs": 10}


def rungs(trials: int, folds: int, images: int) -> tuple[Rung, ...]:
    """How many candidates get how much work."""
    left = math.ceil(trials / 4)
    first = min(folds, math.ceil(FIRST_IMAGES * folds / images))
    return Rung(FIRST_SHARE, first, left), Rung(LAST_SHARE, folds, left)


FIRST_IMAGES = 200  # held-out images that decide the first round, if there are as many
FIRST_SHARE, LAST_SHARE = 1 / 8, 1 / 5  # of the epochs, in the first round and in the last


def candidates(asked: Asked, problem: Problem, earlier: Iterable[Recipe] = ()) -> Iterator[Trial]:
    """The recipes to try: those chosen for earlier versions, the known good ones, and samples around these."""
    bounds = asked.fixed.search
    assert bounds is not None
    known = [*(SAME_CLASSES if problem.same_classes else ()), *RECIPES]
    rng = np.random.default_rng(bounds.seed)
    seen: list[Spec] = []

    def recipes() -> Iterator[tuple[str, Recipe]]:
        yield from (("earlier", recipe) for recipe in earlier)
        yield from (("recipe", recipe) for recipe in known)
        for _ in range(20 * bounds.trials):
            yield "sampled", sampled(known[int(rng.integers(len(known)))], rng)

    for origin, recipe in recipes():
        spec = asked.resolve(recipe)
        if spec not in seen:
            seen.append(spec)
            yield Trial(len(seen), spec, origin)
        if len(seen) == bounds.trials:
            return


def sampled(recipe: Recipe, rng: np.random.Generator) -> Recipe:
    """A recipe in which two fields, or one, have other values."""
    weights = np.array([3.0 if name in OFTEN else 1.0 for name in PRIOR])
    varied = rng.choice(list(PRIOR), 2, replace=False, p=weights / weights.sum())
    values: dict[str, Any] = {}
    for name in varied:
        value = PRIOR[name][int(rng.integers(len(PRIOR[name])))]
        if name == "learning_rate":
            value *= recipe[name]
        values[str(name)] = value
    return {**recipe, **values}


def trained(spec: Spec, problem: Problem, split: Split, check: Check = lambda: None) -> Arrays:
    """Parameters after all epochs of a spec.

    Args:
        check: called before each epoch; raises to end the run.

    Raises:
        Diverged: the loss or the weights are not finite.
    """
    return training(spec, problem, split).finish(check)


def training(spec: Spec, problem: Problem, split: Split) -> Training:
    """A run of a spec that is to begin."""
    start = begin(spec, problem.base, classes=problem.classes, same_classes=problem.same_classes)
    return Training(spec, start, split, problem.classes)


def losses(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Cross-entropy of every image at the temperature that suits all of them best (Guo et al. 2017), (n,) float64.

    How confident short training and label smoothing leave a network can be corrected by one number afterwards, so it
    must not decide between recipes.
    """
    rows = np.arange(len(labels))
    scaled = (-evaluate.log_softmax(logits / t)[rows, labels] for t in np.geomspace(0.25, 8, 31))
    return min(scaled, key=lambda one: float(one.mean()))


def _loss(trial: Trial) -> float:
    return trial.scores[-1].cross_entropy


def by_one_standard_error(standing: Sequence[Trial]) -> Trial:
    """The cheapest and most regularized trial that is as good as the best within one standard error of the difference.

    Args:
        standing: trials scored on the same images, the best first.
    """
    best = standing[0]

    def as_good(trial: Trial) -> bool:
        behind = trial.scores[-1].losses - best.scores[-1].losses
        return bool(behind.mean() <= behind.std(ddof=1) / math.sqrt(len(behind)))

    return min(filter(as_good, standing), key=lambda trial: preference(trial.spec)) if len(standing) > 1 else best


def preference(spec: Spec) -> tuple[float, float, float]:
    """Smaller is better between trials of equal score: a stronger attack, then the cheaper, the more regularized."""
    augmentation = spec.augmentation
    moved = augmentation.shift + augmentation.cutout / 4 + augmentation.flip if augmentation else 0.0
    strength = spec.l2 * 100 + spec.dropout + spec.label_smoothing * 2 + spec.mixup + moved
    epsilon = spec.adversarial.epsilon if spec.adversarial else 0.0
    return -epsilon, spec.epochs * COSTS.get(spec.method, 1.0), -strength


COSTS = {"lora": 0.6, "bias": 0.5, "head": 0.1}  # of an epoch, in epochs of `full`


ENDING_S = 0.5  # for evaluation and publication
MARGIN = 1.1  # of the training after the search, whose progress is recorded


def makespan(lengths: Sequence[float], workers: int) -> float:
    """When the last of some tasks ends, if whichever worker is free takes the next."""
    free = [0.0] * workers
    for length in lengths:
        free[free.index(min(free))] += length
    return max(free)


class Clock:
    """Keeps a search within its time. Without a bound nothing depends on the time, so the choice can be repeated."""

    def __init__(self, seconds: float | None, *, runs: float, spent_s: float = 0.0) -> None:
        """Start.

        Args:
            seconds: from the upload until the version is live.
            spent_s: seconds of these that are gone.
            runs: how long the training that follows the search takes, in runs on all images.
        """
        self._bound = math.inf if seconds is None else max(seconds / 2, seconds - ENDING_S - spent_s)
        self._began = time.perf_counter()
        self._runs = runs
        self._taken: dict[str, tuple[float, float]] = {}  # method -> epochs on all images, and their seconds

    @property
    def elapsed_s(self) -> float:
        """Seconds since the search began."""
        return time.perf_counter() - self._began

    def note(self, spec: Spec, epochs: float, seconds: float) -> None:
        """Learn from a trial, of so many epochs on all images, how long an epoch takes."""
        before = self._taken.get(spec.method, (0.0, 0.0))
        self._taken[spec.method] = before[0] + epochs, before[1] + seconds

    def _epoch_s(self, spec: Spec) -> float:
        """Seconds for an epoch in all of the runs that follow."""
        rates = {method: seconds / epochs for method, (epochs, seconds) in self._taken.items()}
        return MARGIN * self._runs * rates.get(spec.method, max(rates.values(), default=0.0))

    def is_up(self, best: Spec) -> bool:
        """Tell whether the rest of the time is needed to train the best spec so far."""
        return self.elapsed_s + best.epochs * self._epoch_s(best) > self._bound

    def affordable(self, spec: Spec) -> int:
        """Epochs that can be trained in the rest of the time; at most those of the spec."""
        epoch_s, left = self._epoch_s(spec), self._bound - self.elapsed_s
        return spec.epochs if epoch_s * spec.epochs <= left else max(1, int(left / epoch_s))


def worth(chosen: Trial, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """What each searched field is worth: the best trial with another value beside the best with the chosen one.

    Cross-entropy in nats and accuracy in the first round, in which all trials ran; the other less the chosen one.
    """
    begun = [trial for trial in trials if trial.scores]
    found = []
    for name in SEARCHED:
        values = {trial.number: trial.settings()[name] for trial in begun}
        same, others = (
            [trial for trial in begun if (values[trial.number] == values[chosen.number]) is wanted]
            for wanted in (True, False)
        )
        if others:
            one, other = (min(group, key=lambda trial: trial.scores[0].cross_entropy) for group in (same, others))
            found.append({
                "field": name, "chosen": values[one.number], "other": values[other.number],
                "cross_entropy": other.scores[0].cross_entropy - one.scores[0].cross_entropy,
                "accuracy": float(other.scores[0].right.mean() - one.scores[0].right.mean()),
            })  # fmt: skip
    return sorted(found, key=lambda one: -one["cross_entropy"])


def sentence(chosen: Trial, trials: Sequence[Trial]) -> str:
    """What was chosen and why, in plain words."""
    score = chosen.scores[-1]
    parts = [
        f"Chose {phrase(chosen.spec)}. After {score.epochs} epochs it classified {score.right.mean():.1%} of "
        f"{len(score.right)} held-out images correctly."
    ]
    augmented = chosen.spec.augmentation is not None
    if rival := _best(trials, lambda spec: (spec.augmentation is not None) is not augmented):
        start = "Without augmentation" if augmented else "Augmentation was left out: with it"
        parts.append(f"{start}, {_beside(chosen, rival)}.")
    if rival := _best(trials, lambda spec: spec.method != chosen.spec.method):
        parts.append(f"With `{rival.spec.method}`, {_beside(chosen, rival)}.")
    return " ".join(parts)


def _best(trials: Sequence[Trial], wanted: Callable[[Spec], bool]) -> Trial | None:
    """The best of some trials in the first round, in which all ran."""
    found = [trial for trial in trials if trial.scores and wanted(trial.spec)]
    return min(found, key=lambda trial: trial.scores[0].cross_entropy, default=None)


def _beside(chosen: Trial, rival: Trial) -> str:
    """How a rival did beside the trial that was chosen, in the first round."""
    one, other = chosen.scores[0], rival.scores[0]
    behind = other.losses - one.losses
    points = 100 * float(one.right.mean() - other.right.mean())
    if behind.mean() <= behind.std(ddof=1) / math.sqrt(len(behind)):
        return "there was no clear difference in the first round"
    if points > 0:
        return f"accuracy was {points:.1f} points lower in the first round"
    return f"the loss was {behind.mean():.2f} nats higher in the first round"


def phrase(spec: Spec) -> str:
    """The searched fields of a spec that are not off, as a phrase."""
    options = getattr(spec, spec.method, None)
    rank = f" of rank {options.rank}" if spec.lora and options else ""
    head = "the base's classifier" if spec.head == "keep" else "a new classifier"
    parts = [f"`{spec.method}`{rank} from {head}, {spec.epochs} epochs, learning rate {spec.learning_rate:g}"]
    for name in ("l1", "l2", "l2_sp", "dropout", "label_smoothing", "mixup", "ema"):
        if value := getattr(spec, name):
            parts.append(f"{name} {value:g}")
    moves = spec.augmentation.model_dump(exclude_defaults=True) if spec.augmentation else {}
    said = [name if value is True else f"{name} {value:g}" for name, value in moves.items()]
    return ", ".join(parts) + (f", augmentation ({', '.join(said)})" if said else ", no augmentation")
