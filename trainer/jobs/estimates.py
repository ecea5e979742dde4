"""How long jobs take, how much memory, and when those in the queue begin and end.

`nominal` says how much work a job is, in seconds of the machine that its constants were measured on; it knows how work
grows with images, epochs, folds and attacks. How fast the workers of this service are follows from jobs that have
finished: the median ratio of what they took to their nominal work, of those of the same kind. The first job of a
structure takes longer, because its training step is compiled.
"""

import heapq
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Self

from pydantic import ValidationError

from store.errors import InvalidSpec
from store.records import DatasetCard
from trainer.asked import Asked, default_folds
from trainer.jobs.records import FINISHED, RECENT, Job, Jobs
from trainer.recipes import Recipe, known
from trainer.spec import FEWEST_OF_A_CLASS, Fgsm, Free, Spec, batch_size

# Seconds on two cores of an AMD EPYC; see `load/bench_estimates.py`.
JOB_S, JOB_S_PER_IMAGE = 0.5, 1e-4  # data, evaluation, quick attacks, export, publication
PREVIEW_S = 1.3
EPOCH_S, ATTACKED_EPOCH_S = 0.009, 0.1  # validation and the record; and the attack on validation images
COMPILED_S, ATTACKED_COMPILED_S = 0.7, 2.0  # once in a worker's life for each structure
WARM_UP_S = 1.5  # of the first job of all
STEP_S = {  # and more for each image of the batch
    "full": (1.1e-3, 7.8e-5), "bias": (1.0e-3, 7.8e-5), "ia3": (6e-4, 7e-5), "lora": (4e-4, 5.8e-5),
    "adapter": (4e-4, 3.4e-5), "head": (4e-4, 1e-5),
}  # fmt: skip
AUGMENTED_S = 8e-5  # more for each image
ATTACKED = {"fgsm": 2.15, "pgd": 0.92, "trades": 1.1, "free": 0.91, "vat": 1.4}  # more clean steps, for each of theirs
CHOSEN = 0.8  # recipes that a search keeps are cheaper than the mean
BASE_BYTES, IMAGE_BYTES = 800 << 20, 40 << 10  # of a worker, and of each image
# As in `trainer.search`: the images that decide the first round, shares of the epochs, and who is in the last one.
FIRST_IMAGES, FIRST_SHARE, LAST_SHARE, FINALISTS = 200, 1 / 16, 1 / 4, 4
WITHIN = (0.5, 0.35, 0.2)  # stated uncertainty, as a share: from constants, from one job, from more
LIKE = 10  # finished jobs of a kind, the latest ones, whose median counts
REFRESH_S = 5.0  # after which the finished jobs are read anew
FRESH_S = 0.5  # age of the queue that is good enough: clients ask often, and it may be long
MOST = 10_000  # jobs whose work is remembered

# As in `trainer.fit`: the images of a batch that is computed in halves, and what may be on or off.
HALVED = 32
SWITCHES = ("l1", "l2", "l2_sp", "dropout", "mixup", "augmentation", "ema")

Kind = tuple[str, str]  # method or "search", and attack
Structure = tuple[object, ...]


@dataclass(frozen=True)
class Estimate:
    """What a job will take."""

    seconds: float
    within: float  # uncertainty of the seconds, as a share of them
    memory_bytes: int  # peak of the worker
    jobs: int  # finished ones of the same kind that it rests on; 0 for constants


@dataclass(frozen=True)
class Standing:
    """Where an open job stands. Times are Unix seconds; None where nothing is known."""

    position: int | None = None  # 1 is next; None once it runs
    start_at: float | None = None
    end_at: float | None = None


def kind(asked: Asked) -> Kind:
    """What jobs have in common whose times can be compared."""
    attack = asked.fixed.adversarial
    objectives = ",".join(asked.fixed.search.objective) if asked.fixed.search else ""
    return "search" if asked.auto else asked.fixed.method, attack.attack if attack else objectives


def nominal(asked: Asked, dataset: DatasetCard) -> float:
    """How much work a job is, in seconds of the machine that the constants belong to."""
    images, spec = dataset.images, asked.fixed
    held_out = 0.0 if dataset.validation else spec.validation_split
    overhead_s = JOB_S + JOB_S_PER_IMAGE * images
    if not asked.auto or min(dataset.classes.values(), default=0) < FEWEST_OF_A_CLASS:
        return overhead_s + (1 + spec.twin) * _trained_s(spec, images * (1 - held_out), images, spec.folds or 0)
    assert spec.search is not None
    folds = spec.search.folds or default_folds(images)
    recipes = known(False, images)
    first, share = min(folds, math.ceil(FIRST_IMAGES * folds / images)), 1 - 1 / folds

    def mean_s(epochs_share: float, images: float) -> float:
        return sum(_run_s(_resolved(asked, recipe, epochs_share), images) for recipe in recipes) / len(recipes)

    cores, trials = len(os.sched_getaffinity(0)), spec.search.trials
    searched_s = first * trials * mean_s(FIRST_SHARE, share * images)
    searched_s += folds * min(FINALISTS, trials) * mean_s(LAST_SHARE, share * images)
    runs = 0 if dataset.validation else folds
    final_s = sum(_trained_s(_resolved(asked, recipe), images, images, runs) for recipe in recipes) / len(recipes)
    preview_s = PREVIEW_S if spec.search.preview else 0.0
    return overhead_s + preview_s + CHOSEN * (searched_s / cores + (1 + spec.twin) * final_s)


def _resolved(asked: Asked, recipe: Recipe, epochs_share: float = 1.0) -> Spec:
    spec = asked.resolve(recipe)
    return spec.model_copy(update={"epochs": max(1, round(epochs_share * spec.epochs))})


def _trained_s(spec: Spec, served: float, images: float, folds: int) -> float:
    """A run on `served` images beside those of the folds, one to a core."""
    lengths = [_run_s(spec, served)] + folds * [_run_s(spec, images * (1 - 1 / max(folds, 1)))]
    free = [0.0] * len(os.sched_getaffinity(0))
    for length in lengths:
        heapq.heapreplace(free, free[0] + length)
    return max(free)


def _run_s(spec: Spec, images: float) -> float:
    """One run on this many images."""
    size, attack = batch_size(spec, int(images)), spec.adversarial
    on_pixels = spec.augmentation or spec.mixup or attack  # then no layer's outputs can be kept from epoch to epoch
    step_s, image_s = STEP_S["bias" if on_pixels and spec.method != "full" else spec.method]
    update_s, epoch_s = step_s + size * (image_s + AUGMENTED_S * (spec.augmentation is not None)), EPOCH_S
    if attack:
        steps = attack.replays if isinstance(attack, Free) else 1 if isinstance(attack, Fgsm) else attack.steps
        update_s *= 1 + ATTACKED[attack.attack] * steps
        epoch_s += ATTACKED_EPOCH_S
    return spec.epochs * (epoch_s + math.ceil(images / size) * update_s)


def structure(asked: Asked, dataset: DatasetCard) -> Structure:
    """What is compiled anew if it differs, as `trainer.fit.structure` has it; all of a search counts as one."""
    spec, classes = asked.fixed, len(dataset.classes)
    if asked.auto:
        return kind(asked), classes
    halves = batch_size(spec, int(dataset.images * (1 - spec.validation_split))) >= HALVED
    return kind(asked), classes, halves, spec.optimizer, *(bool(getattr(spec, name)) for name in SWITCHES)


@dataclass(frozen=True)
class _Work:
    """What a job asks for, as far as its duration depends on it."""

    kind: Kind
    structure: Structure
    nominal_s: float
    compiled_s: float  # more, if the structure is new
    bound_s: float  # that the client has set

    @classmethod
    def of(cls, asked: Asked, dataset: DatasetCard) -> Self:
        search = asked.fixed.search
        return cls(
            kind(asked), structure(asked, dataset), nominal(asked, dataset),
            ATTACKED_COMPILED_S if asked.fixed.adversarial else COMPILED_S,
            search.seconds if search and search.seconds else math.inf,
        )  # fmt: skip

    @classmethod
    def of_checkpoint(cls, dataset: DatasetCard) -> Self:
        """What a job has to do that publishes a checkpoint and trains nothing."""
        kind = "checkpoint", ""
        return cls(kind, kind, JOB_S + JOB_S_PER_IMAGE * dataset.images, 0.0, math.inf)


class Estimates:
    """Estimates that rest on the jobs of this service, which are read anew every `REFRESH_S`."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._read_at = -math.inf
        self._finished: dict[Kind, list[tuple[Job, float]]] = {}  # newest first, with what each took, times its work
        self._compiled: set[Structure] = set()
        self._queue: tuple[dict[str, Standing], float] = {}, -math.inf  # and when it was looked at
        self._works: dict[str, _Work | None] = {}  # by job; working one out takes milliseconds

    def of(self, asked: Asked, dataset: DatasetCard, peak_of: Callable[[Job], int | None]) -> Estimate:
        """What a job would take.

        Args:
            peak_of: the peak of the worker's memory in bytes while it ran a job, if that is known.
        """
        self._read_at = -math.inf
        work = _Work.of(asked, dataset)
        like = self._like(work.kind)
        peaks = [(job, peak) for job, _ in like if (peak := peak_of(job))]
        base = median(peak - IMAGE_BYTES * job.dataset.images for job, peak in peaks) if peaks else BASE_BYTES
        seconds = self._seconds(work) or min(work.nominal_s + work.compiled_s, work.bound_s)
        within = WITHIN[min(len(like), 2)]
        return Estimate(seconds, within, int(base + IMAGE_BYTES * dataset.images), len(like))

    def standings(self, jobs: Sequence[Job]) -> list[Standing]:
        """Where each of some jobs stands, as it was up to `FRESH_S` ago; those that have finished stand nowhere."""
        waiting = [job.id for job in jobs if job.status not in FINISHED]
        known, looked_at = self._queue
        if waiting and (time.monotonic() > looked_at + FRESH_S or not known.keys() >= set(waiting)):
            known, _ = self._queue = self._look(), time.monotonic()
        found = []
        for job in jobs:
            standing = known.get(job.id, Standing()) if job.id in waiting else Standing()
            found.append(standing if job.status == "queued" else Standing(end_at=standing.end_at))
        return found

    def _look(self) -> dict[str, Standing]:
        """Where every queued and running job stands, by its id."""
        outlook = self._jobs.outlook()
        found, free = dict[str, Standing](), list[float]()  # when each worker is free; infinite where that is unknown
        for job in outlook.running:
            took = self._seconds(self._work(job))
            end = math.inf if took is None or job.started_at is None else max(outlook.now, job.started_at + took)
            found[job.id] = Standing(end_at=_known(end))
            free.append(end)
        free += [outlook.now] * (outlook.workers - len(free))
        heapq.heapify(free)
        for position, job in enumerate(outlook.queued, start=1):
            took = self._seconds(self._work(job))
            start = free[0] if free and outlook.workers else math.inf
            end = math.inf if took is None else start + took
            if free:
                heapq.heapreplace(free, end)
            found[job.id] = Standing(position, _known(start), _known(end))
        return found

    def _seconds(self, work: _Work | None) -> float | None:
        """How long it will take; None if nothing is known of its kind."""
        like = self._like(work.kind) if work else []
        if work is None or not like:
            return None
        seconds = median(ratio for _, ratio in like) * work.nominal_s
        return min(seconds + (work.compiled_s if work.structure not in self._compiled else 0.0), work.bound_s)

    def _like(self, kind: Kind) -> list[tuple[Job, float]]:
        """The latest finished jobs of a kind."""
        if time.monotonic() > self._read_at + REFRESH_S:
            self._read_at = time.monotonic()
            self._learn(self._jobs.recent())
        return self._finished.get(kind, [])[:LIKE]

    def _learn(self, newest_first: Sequence[Job]) -> None:
        finished: dict[Kind, list[tuple[Job, float]]] = {}
        compiled = set[Structure]()
        for job in reversed(newest_first):
            work = self._work(job)
            if not work or math.isfinite(work.bound_s) or job.attempts != 1:  # which say less of how fast a worker is
                continue
            if job.started_at is not None and job.finished_at is not None:
                took_s = job.finished_at - job.started_at
                if work.structure not in compiled:
                    more_s = work.compiled_s + (WARM_UP_S if not compiled and len(newest_first) < RECENT else 0.0)
                    took_s = max(took_s - more_s, took_s / 3)
                compiled.add(work.structure)
                finished.setdefault(work.kind, []).insert(0, (job, took_s / work.nominal_s))
        self._finished, self._compiled = finished, compiled

    def _work(self, job: Job) -> _Work | None:
        """How much a job is; None if another release has stored it in words that this one does not know."""
        if job.id not in self._works:
            if len(self._works) > MOST:
                self._works.clear()
            try:
                self._works[job.id] = (
                    _Work.of_checkpoint(job.dataset) if job.checkpoint
                    else _Work.of(Asked.of(job.spec or {}), job.dataset)
                )  # fmt: skip
            except (ValidationError, InvalidSpec):
                self._works[job.id] = None
        return self._works[job.id]


def _known(at: float) -> float | None:
    return None if math.isinf(at) else round(at, 3)
