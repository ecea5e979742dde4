"""Automatic regularization: choose a recipe by its out-of-fold predictions.

Successive halving (Jamieson & Talwalkar 2016): every candidate gets a short run on some folds, the better ones longer
runs on more. A short run has few epochs and its whole schedule, so that its end can be compared with that of a long
one. The candidates that are left at the end are compared image by image, and of those within one standard error of the
best the cheapest and most regularized is chosen (Breiman et al. 1984, here on paired differences).
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from store.errors import Diverged, InvalidSpec, SearchFailed
from trainer import evaluate
from trainer.asked import Asked, default_folds
from trainer.checkpoints import Checkpoint, State
from trainer.fit import Split, Training, begin
from trainer.folds import stratified_folds
from trainer.lenet import Arrays
from trainer.network import Network
from trainer.objectives import Extra, combined, measure
from trainer.parallel import Check, Paused, at_once, side_by_side
from trainer.recipes import Recipe, augmentation_kind, candidates, fallback, phrase, recipe_of, variants
from trainer.spec import FEWEST_OF_A_CLASS, Choose, Search, Spec
from trainer.trials import (
    Choice,
    Rung,
    Score,
    Trial,
    among,
    by_one_standard_error,
    loss_of,
    losses,
    sentence,
    standard_error,
    worth,
)


@dataclass(frozen=True)
class Problem:
    """Images to learn from, and what to start from."""

    data: Split
    base: Arrays
    classes: int
    same_classes: bool  # as the base's
    groups: np.ndarray | None = None  # (n,) int; images with the same number are held out together

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
    front: Sequence[int] = ()  # numbers of the trials that no other beats in every objective
    short: tuple[int, np.ndarray] | None = None  # epochs in the last round, and the images (n,) then right out of fold
    predictions: Sequence[np.ndarray] = ()  # out-of-fold logits (n, classes) of each trial of the last round

    def confirmed(self, logits: np.ndarray, labels: np.ndarray) -> "Found":
        """The same, or with the fewer epochs of the last round if all of them overfit: wrong labels are learned late.

        Args:
            logits: out-of-fold predictions of `spec`, (n, classes).
            labels: (n,) int32.
        """
        if self.short is None:
            return self
        epochs, right = self.short
        now = evaluate.right(logits, labels)
        lost = right.astype(float) - now
        if lost.mean() <= OVERFITTED * standard_error(lost):
            return self
        text = (
            f"But {self.spec.epochs} epochs overfit: after them {now.mean():.1%} of the held-out images were "
            f"classified correctly, after {epochs} {right.mean():.1%}; so it was trained for {epochs}."
        )
        spec = self.spec.model_copy(update={"epochs": epochs})
        return replace(self, spec=spec, sentence=f"{self.sentence} {text}", short=None)

    def dump(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "chosen": self.chosen, "sentence": self.sentence, "worth": list(self.worth),
            "front": list(self.front),
            "trials": [trial.dump() for trial in self.trials],
        }  # fmt: skip


def search(
    asked: Asked, problem: Problem, *, uploaded: bool = False, earlier: Sequence[Recipe] = (), spent_s: float = 0.0,
    on_trial: Callable[[dict[str, Any]], None] = lambda record: None, check: Check = lambda: None,
    checkpoint: Checkpoint | None = None,
) -> Found:  # fmt: skip
    """Choose the searched fields of a spec. Trials that a checkpoint has are not run again.

    Args:
        uploaded: validation images were uploaded; the report will rest on these, and the search does not see them.
        earlier: recipes that were chosen for earlier versions of the model.
        spent_s: seconds of `search.seconds` already used.
        on_trial: called with a record after each trial of a round that is run.
        check: called about twice a second; raises to end the search.

    Raises:
        SearchFailed: no trial came to an end.
    """
    bounds = asked.fixed.search
    assert bounds is not None
    if problem.fewest < FEWEST_OF_A_CLASS:
        return Found(asked.resolve(fallback(problem.same_classes)), warnings=[_TOO_FEW])
    wanted_folds = min(bounds.folds or default_folds(len(problem.data.labels)), problem.fewest)
    held_out = list(stratified_folds(problem.data.labels, asked.fixed.seed, wanted_folds, problem.groups))
    folds = len(held_out)
    after = (1 + asked.fixed.twin) * ([1.0] if uploaded else [1.0] + folds * [1 - 1 / folds])
    memory = _Memory.of(checkpoint or Checkpoint(), spent_s, earlier)
    clock = Clock(
        bounds.seconds, runs=makespan(after, at_once()), spent_s=memory.spent_s, used_s=memory.used_s,
        stopped=memory.ended,
    )  # fmt: skip
    rounds = _Rounds(problem, bounds, asked.fixed.seed, held_out, clock, memory, on_trial, check)
    trials: list[Trial] = []
    lost: set[Trial] = set()  # diverged

    def add(found: Iterable[tuple[str, Spec]], of: Trial | None = None) -> list[Trial]:
        numbered = enumerate(found, start=1 + len(trials))
        added = [Trial(number, spec, origin, of=of) for number, (origin, spec) in numbered]
        trials.extend(added)
        return added

    standing = add(candidates(asked, problem.same_classes, len(problem.data.labels), memory.earlier))
    for rung in rungs(len(standing), folds, len(problem.data.labels)):
        done: list[Trial] = []
        while not done:
            done = rounds.run(standing, rung, after=standing[0] if standing[0].scores else None)
            done = done or [trial for trial in standing if trial.scores and trial.dropped == NO_TIME]
            if not done:  # all diverged: the next ones get their turn
                lost.update(standing)
                reason = standing[0].dropped
                spare = [trial for trial in trials if trial.scores and trial not in lost]
                standing = sorted(spare, key=loss_of)[:FINALISTS]
                if not standing:
                    raise SearchFailed(f"no recipe could be trained: {reason}", param="spec")
        standing = done
    chosen = by_one_standard_error(standing)
    tried = [trial.spec for trial in trials]
    new = [(origin, spec) for origin, spec in variants(asked, chosen.spec) if spec not in tried]
    if more := add(new, of=chosen):
        ranked = rounds.run(more, Rung(LAST_SHARE, folds), after=chosen)
        if "epsilon" in asked.auto and (compared := [trial for trial in (chosen, *ranked) if trial.finished]):
            chosen = by_one_standard_error(sorted(compared, key=loss_of))
        standing = sorted([*standing, *ranked], key=loss_of)
    choice = Choice(chosen)
    if len(bounds.objective) > 1:
        measured = [trial for trial in standing if trial.finished]
        if measured:
            choice = among(measured, bounds.choose or Choose(), bounds.objective)
        else:
            choice = Choice(chosen, warnings=["search.seconds left no time to measure the objectives"])
    for trial in trials:
        trial.dropped = "" if trial is choice.trial else trial.dropped or choice.beside(trial)
    fields: dict[str, Any] = {"validation_split": 0.0, "head": choice.trial.spec.head}
    if not uploaded:
        fields["folds"] = wanted_folds  # of which near copies may leave fewer, then as now
    warnings, wanted = list(choice.warnings), choice.trial.spec.epochs
    if late := sum(trial.dropped == NO_TIME for trial in trials):
        warnings.append(
            f"search.seconds left no time for {late} of {len(trials)} recipes; give it more for a better version"
        )
    affordable = max(choice.trial.scores[-1].epochs, clock.affordable(choice.trial.spec))
    if affordable < wanted and "epochs" in asked.auto:
        fields["epochs"] = affordable
        warnings.append(
            f"search.seconds left time for {affordable} of {wanted} epochs; give it more for a better version"
        )
    elif affordable < wanted:
        warnings.append(f"search.seconds was too short for the {wanted} epochs that the spec asks for")
    spec = asked.resolve(recipe_of(choice.trial.spec), **fields)
    last, short = choice.trial.scores[-1], None
    again = spec.model_copy(update={"epochs": spec.epochs + last.epochs})
    if "epochs" in asked.auto and last.rung.folds == folds and not clock.is_up(again):
        short = last.epochs, rounds.in_order(last.right)
    memory.stop(clock.elapsed_s, ended=True)
    return Found(
        spec, trials, choice.trial.number, " ".join([sentence(spec, choice.trial, trials), *choice.why]),
        worth(choice.trial, trials), warnings, [trial.number for trial in choice.front], short,
        [trial.predictions for trial in trials if trial.predictions is not None],
    )  # fmt: skip


class _Rounds:
    """Runs trials, round after round."""

    def __init__(
        self, problem: Problem, bounds: Search, seed: int, folds: Sequence[np.ndarray], clock: "Clock",
        memory: "_Memory", on_trial: Callable[[dict[str, Any]], None], check: Check,
    ) -> None:  # fmt: skip
        self._bounds, self._seed, self._memory = bounds, seed, memory
        self._problem, self._clock, self._on_trial, self._check = problem, clock, on_trial, check
        self._folds = folds  # which images each holds out, (n,) bool
        self._parts = [(problem.part(~fold), problem.part(fold)) for fold in self._folds]
        self._number = 0
        self._dropped: list[int] = []  # trials, since the last record
        self._places: list[Callable[[Spec], bool]] = [lambda spec: spec.augmentation is not None]
        if problem.same_classes:
            self._places.append(lambda spec: spec.head == "keep")

    def run(self, trials: Sequence[Trial], rung: Rung, after: Trial | None = None) -> list[Trial]:
        """Give every trial the work of a rung; returns those that go on, the best first.

        Always among them are one with augmentation and, where the classes are the base's, one that starts from the
        base's classifier, and the best one of each kind of augmentation that is not hopeless: short runs undervalue
        them. On coil20, mirroring was 0.3 nats behind the best after a sixteenth of the epochs, and 0.1 nats ahead of
        it after a quarter.

        Args:
            after: what was chosen before; if the time is needed to train that, no trial begins.
        """
        self._number += 1
        done: list[Trial] = []
        found: dict[int, dict[int, Predicted]] = {trial.number: {} for trial in trials}  # by fold
        failed: dict[int, dict[int, str]] = {}  # why there is no prediction, by fold
        known, late = set(self._memory.results), False

        def key(trial: Trial, fold: int) -> str:
            return _key(shortened(trial.spec, rung), fold, self._measures(rung))

        def work(task: tuple[Trial, int], check: Check) -> Predicted | str:
            nonlocal late
            trial, fold = task
            if key(*task) in known:
                return self._memory.results[key(*task)]
            if self._memory.ended:
                return NO_TIME
            best = min(done, key=loss_of, default=after)
            if late or (best and self._clock.is_up(best.spec, meanwhile=shortened(trial.spec, rung))):
                late = late or trial is after  # a cheap one must not win because the best had no time
                return NO_TIME
            try:
                return self._predicted(trial.spec, rung, fold, check)
            except (Diverged, InvalidSpec) as exc:  # an earlier version's recipe may not suit this base
                return str(exc)

        tasks = [(trial, fold) for trial in trials for fold in range(rung.folds)]
        try:
            for (trial, fold), result in side_by_side(work, tasks, self._check):
                if result != NO_TIME and key(trial, fold) not in known:
                    self._memory.note(key(trial, fold), result, self._clock.elapsed_s)
                if isinstance(result, str):
                    failed.setdefault(trial.number, {})[fold] = result
                    continue
                found[trial.number][fold] = result
                trial.seconds += result.seconds
                epochs = shortened(trial.spec, rung).epochs * (1 - 1 / len(self._folds))
                self._clock.note(trial.spec, epochs, result.seconds)
                if len(found[trial.number]) < rung.folds:
                    continue
                score = self._scored(trial.spec, rung, found[trial.number])
                trial.scores.append(score)
                if rung.folds == len(self._folds) and self._problem.classes * len(self._problem.data.labels) <= LARGEST:
                    parts = [found[trial.number][fold].logits for fold in range(rung.folds)]
                    trial.predictions = self.in_order(np.concatenate(parts))
                done.append(trial)
                best = min(done, key=loss_of)
                if not known.issuperset(key(trial, fold) for fold in range(rung.folds)):
                    self._on_trial(
                        {"round": self._number, "trial": trial.number, "trials": len(trials), "tried": len(done),
                         "recipe": phrase(trial.spec), "accuracy": float(score.right.mean()),
                         "cross_entropy": score.cross_entropy, "epochs": score.epochs, "folds": rung.folds,
                         "dropped": self._dropped, "best": {"trial": best.number, **best.scores[-1].headline()}}
                    )  # fmt: skip
                    self._dropped = []
        except Paused:
            self._memory.stop(self._clock.elapsed_s, ended=False)
            raise
        for trial in trials:
            if reasons := failed.get(trial.number):
                trial.dropped = next((reasons[fold] for fold in sorted(reasons) if reasons[fold] != NO_TIME), NO_TIME)
        done.sort(key=lambda trial: (loss_of(trial), trial.number))
        kept = done
        if rung.keep is not None:
            near = [trial for trial in done if loss_of(trial) <= HOPELESS * loss_of(done[0])]
            first = set({augmentation_kind(trial.spec): trial for trial in reversed(near)}.values())
            for has_place in self._places:
                first.update([trial for trial in done if has_place(trial.spec)][:1])
            rest = [trial for trial in done if trial not in first][: max(0, rung.keep - len(first))]
            kept = [trial for trial in done if trial in first or trial in rest]
        for trial in done:
            if trial not in kept:
                trial.dropped = f"{loss_of(trial) - loss_of(done[0]):.3f} nats behind the best"
        self._dropped += [trial.number for trial in trials if trial.dropped]
        return kept

    def in_order(self, held_out: np.ndarray) -> np.ndarray:
        """Values of the images of all folds, one fold after another, in the order of the images."""
        values = np.empty_like(held_out)
        values[np.concatenate([np.flatnonzero(fold) for fold in self._folds])] = held_out
        return values

    def _measures(self, rung: Rung) -> bool:
        """Whether more than accuracy is measured on a rung."""
        return rung.keep is None and len(self._bounds.objective) > 1

    def _predicted(self, spec: Spec, rung: Rung, fold: int, check: Check) -> "Predicted":
        """Train without a fold and predict it."""
        train, held_out = self._parts[fold]
        run = training(shortened(spec, rung), self._problem, train)
        params = run.finish(check)
        extra = None
        if self._measures(rung):
            extra = measure(self._bounds.objective, params, held_out, self._bounds.epsilon, self._seed)
        logits = Network(params).logits(held_out.images)
        return Predicted(logits, run.seconds, extra, self._clock.elapsed_s)

    def _scored(self, spec: Spec, rung: Rung, found: Mapping[int, "Predicted"]) -> Score:
        """The score of the out-of-fold predictions on the folds of a rung."""
        parts = [found[fold] for fold in range(rung.folds)]
        logits = np.concatenate([part.logits for part in parts])
        truth = np.concatenate([self._problem.data.labels[self._folds[fold]] for fold in range(rung.folds)])
        extras = [part.extra for part in parts if part.extra]
        reached = combined(self._bounds.objective, logits, truth, extras) if self._measures(rung) else {}
        hits, ended_s = evaluate.right(logits, truth), max(part.ended_s for part in parts)
        return Score(rung, shortened(spec, rung).epochs, losses(logits, truth), hits, ended_s, reached)


class Predicted(NamedTuple):
    """Out-of-fold predictions for one fold."""

    logits: np.ndarray
    seconds: float  # of training
    extra: Extra | None  # in the last round, of several objectives
    ended_s: float  # after the search began


@dataclass
class _Memory:
    """What a search has found out, kept in case that it is interrupted.

    What a trial predicts depends on nothing but its key, the data and the base, so a search that is run again from the
    start, and meets trials that it has run before, decides as it would have without the interruption.
    """

    checkpoint: Checkpoint
    spent_s: float  # of `search.seconds`, before the search
    earlier: Sequence[Recipe]  # which other jobs may add to meanwhile
    used_s: float = 0.0  # by the search
    ended: bool = False
    results: dict[str, "Predicted | str"] = field(default_factory=dict)  # or why a trial failed, by `_key`

    @classmethod
    def of(cls, checkpoint: Checkpoint, spent_s: float, earlier: Sequence[Recipe]) -> "_Memory":
        """What is known at the start of a search."""
        found = checkpoint.load()
        if found is None:
            return cls(checkpoint, spent_s, earlier)
        arrays, record = found
        spent_s = record["spent_s"] + (0.0 if record["ended"] else spent_s)
        memory = cls(checkpoint, spent_s, record["earlier"], record["used_s"], record["ended"])
        for key, (seconds, sparsity, ended_s) in record["trials"].items():
            extra = None if sparsity is None else Extra(arrays[f"{key}/robust"], sparsity)
            memory.results[key] = Predicted(arrays[key], seconds, extra, ended_s)
        memory.results |= record["failed"]
        return memory

    def note(self, key: str, result: "Predicted | str", elapsed_s: float) -> None:
        """Remember a result."""
        self.results[key], self.used_s = result, elapsed_s
        self.checkpoint.save(self._state)

    def stop(self, elapsed_s: float, *, ended: bool) -> None:
        """Remember where the search pauses, or that it has ended: then no decision depends on the time any more."""
        if not self.ended:
            self.used_s, self.ended = elapsed_s, ended
            self.checkpoint.save(self._state, now=True)

    def _state(self) -> State:
        found = {key: result for key, result in self.results.items() if isinstance(result, Predicted)}
        arrays = {key: result.logits for key, result in found.items()}
        arrays |= {f"{key}/robust": result.extra.robust for key, result in found.items() if result.extra}
        record = {
            "spent_s": self.spent_s, "used_s": self.used_s, "ended": self.ended,
            "earlier": [dict(recipe) for recipe in self.earlier],
            "trials": {
                key: [result.seconds, result.extra and result.extra.sparsity, result.ended_s]
                for key, result in found.items()
            },
            "failed": {key: result for key, result in self.results.items() if isinstance(result, str)},
        }  # fmt: skip
        return arrays, record


def _key(spec: Spec, fold: int, measured: bool) -> str:
    """What a result depends on, besides data and base: the spec as it was run, the fold that was held out."""
    return sha256(json.dumps([spec.model_dump_json(), fold, measured]).encode()).hexdigest()


def shortened(spec: Spec, rung: Rung) -> Spec:
    """A spec with the epochs that it gets on a rung."""
    return spec.model_copy(update={"epochs": max(1, round(rung.share * spec.epochs))})


OVERFITTED = 2.0  # standard errors by which more epochs must have lost accuracy
NO_TIME = "no time was left"
_TOO_FEW = f"nothing was searched, because a class has fewer than {FEWEST_OF_A_CLASS} images; a fixed recipe was used"


def rungs(trials: int, folds: int, images: int) -> tuple[Rung, ...]:
    """How many candidates get how much work."""
    left = min(FINALISTS, math.ceil(trials / 4))
    first = min(folds, math.ceil(FIRST_IMAGES * folds / images))
    return Rung(FIRST_SHARE, first, left), Rung(LAST_SHARE, folds)


LARGEST = 5_000_000  # images times classes of which predictions are kept beyond the search
FINALISTS = 3  # unless there are more places
HOPELESS = 2.0  # a kind of augmentation whose loss is more than so many times the lowest gets no place
FIRST_IMAGES = 200  # held-out images that decide the first round, if there are as many
FIRST_SHARE, LAST_SHARE = 1 / 16, 1 / 4  # of the epochs, in the first round and in the last


def training(spec: Spec, problem: Problem, split: Split) -> Training:
    """A new run of a spec."""
    start = begin(spec, problem.base, classes=problem.classes, same_classes=problem.same_classes)
    return Training(spec, start, split, problem.classes)


ENDING_S = 0.5  # for evaluation and publication
MARGIN, ATTACKED_MARGIN = 1.1, 1.8  # of the training after the search, whose progress is measured and recorded
ATTACKED_RATE = 7.0  # of an epoch with an attack of five steps to one without, until it is known


def makespan(lengths: Sequence[float], workers: int) -> float:
    """When the last of some tasks ends, if whichever worker is free takes the next."""
    free = [0.0] * workers
    for length in lengths:
        free[free.index(min(free))] += length
    return max(free)


class Clock:
    """Keeps a search within its time. Without a bound nothing depends on the time, so the choice can be repeated."""

    def __init__(
        self, seconds: float | None, *, runs: float, spent_s: float = 0.0, used_s: float = 0.0, stopped: bool = False
    ) -> None:
        """Start.

        Args:
            seconds: from the start of the job until the version is live.
            spent_s: seconds of these already used.
            runs: how long the training that follows the search takes, in runs on all images.
            used_s: seconds that the search took before it was interrupted.
            stopped: it had ended then, so the time stands still.
        """
        self._bound = math.inf if seconds is None else max(seconds / 2, seconds - ENDING_S - spent_s)
        self._began = time.perf_counter() - used_s
        self._stopped_s = used_s if stopped else None
        self._runs = runs
        self._taken: dict[tuple[str, str], tuple[float, float]] = {}  # kind -> epochs on all images, and their seconds

    @property
    def elapsed_s(self) -> float:
        """Seconds that the search has taken."""
        return time.perf_counter() - self._began if self._stopped_s is None else self._stopped_s

    def note(self, spec: Spec, epochs: float, seconds: float) -> None:
        """Learn from a trial, of so many epochs on all images, how long an epoch takes."""
        before = self._taken.get(_kind(spec), (0.0, 0.0))
        self._taken[_kind(spec)] = before[0] + epochs, before[1] + seconds

    def _epoch_s(self, spec: Spec) -> float:
        """Seconds for an epoch in all of the runs that follow."""
        return self._runs * self._rate(spec) * (MARGIN if spec.adversarial is None else ATTACKED_MARGIN)

    def _rate(self, spec: Spec) -> float:
        """Seconds for an epoch on all images."""
        rates = {kind: seconds / epochs for kind, (epochs, seconds) in list(self._taken.items())}
        slowest = max(rates.values(), default=0.0)
        if spec.adversarial:
            slowest = max((rate for (_, attack), rate in rates.items() if attack), default=ATTACKED_RATE * slowest)
        return rates.get(_kind(spec), slowest)

    def is_up(self, best: Spec, meanwhile: Spec | None = None) -> bool:
        """Tell whether the rest of the time is needed to train the best spec so far.

        Args:
            meanwhile: what would be trained on a fold before.
        """
        if self._bound == math.inf:
            return False
        before = meanwhile.epochs * self._rate(meanwhile) if meanwhile else 0.0
        return self.elapsed_s + before + best.epochs * self._epoch_s(best) > self._bound

    def affordable(self, spec: Spec) -> int:
        """Epochs that can be trained in the rest of the time; at most those of the spec."""
        epoch_s, left = self._epoch_s(spec), self._bound - self.elapsed_s
        return spec.epochs if epoch_s * spec.epochs <= left else max(1, int(left / epoch_s))


def _kind(spec: Spec) -> tuple[str, str]:
    """What the time of an epoch depends on most."""
    return spec.method, spec.adversarial.attack if spec.adversarial else ""
