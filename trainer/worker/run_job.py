"""One job from data to a live version: search, fit, evaluate, export, publish."""

import contextlib
import functools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import sqlalchemy as sa
import structlog
import tensorflow as tf

from serving.client import ModelServer
from serving.publishing import Probe, files_of, publish, seal, withdraw
from serving.registry import STABLE, Fence, Registry, Version
from store import traces
from store.engine import reason, retrying
from store.errors import Diverged
from store.files import make_directory, remove_tree
from store.objects import objects_of
from store.records import Abstention, GateCard, Manifest, ReportCard, public_name
from store.settings import Settings
from trainer import delta, report
from trainer.abstention import Detector
from trainer.asked import Asked
from trainer.checkpoints import Checkpoint
from trainer.export import digest, export, load_params, prepare
from trainer.fit import PENALTIES, Fitted, Split, Start, begin, fit, sample
from trainer.jobs.kept import folder_of
from trainer.jobs.records import Job, Jobs
from trainer.lenet import Arrays
from trainer.network import bottleneck_of
from trainer.parallel import Check, Paused, side_by_side, watched
from trainer.recipes import PREVIEWED, preview_recipe
from trainer.report import HeldOut, seen_by
from trainer.search import Found, Problem, search
from trainer.spec import Gate, Spec, described, pinned, regularizes, unregularized
from trainer.worker.candidate import DAMAGED, Candidate, gate_of, learned_by
from trainer.worker.complete_report import forgetting
from trainer.worker.evaluation import Evaluation, Trained
from trainer.worker.held_out import Predictions
from trainer.worker.job_data import FOLD, PARITY_IMAGES, JobData, device_of, named
from trainer.worker.kept_networks import keep, read_all

STORE_PATIENCE_S = 600.0  # how long a job waits for a store that is away
FOLD_PAUSE_S = 0.25  # between two records of epochs of a fold
LATER = ("robust_accuracy", "forgetting")  # conditions of a gate that a preview is not measured for
NOISE = np.random.default_rng(0).integers(0, 256, (4, 28, 28, 1)).astype(np.float32) / 255
EARLIER = 3  # versions whose recipes are tried again for the next

T = TypeVar("T")

log: structlog.stdlib.BoundLogger = structlog.get_logger("temper.worker")


@dataclass
class Run:
    """A job under way: what it writes to its record."""

    job: Job
    jobs: Jobs
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    published: set[str] = field(default_factory=set)  # publishing steps that are done
    chosen: dict[str, Any] | None = field(init=False)  # the resolved spec in the record
    _under_way: tuple[str, float] = field(init=False)  # stage, and when it began

    def __post_init__(self) -> None:
        self.chosen = self.job.resolved_spec
        self._under_way = self.job.stage or "", time.perf_counter()

    def trial(self, record: dict[str, Any]) -> None:
        """Note a trial of the search."""
        self.patiently(lambda: self.jobs.append_event(self.job, "trial", record))

    def check(self) -> None:
        """End a job that a client has cancelled, or wants paused while there is much left to do."""
        if self.patiently(lambda: self.jobs.check_lease(self.job)):
            raise Paused

    def go_on(self) -> None:
        """End a cancelled job."""
        self.patiently(lambda: self.jobs.check_lease(self.job))

    def epoch(self, record: dict[str, Any]) -> None:
        """Note an epoch."""
        self.patiently(lambda: self.jobs.append_event(self.job, "epoch", record))

    def publishing(self, done: str) -> None:
        """Note a publishing step. Called again while the next step waits, to end a cancelled job."""
        if done in self.published:
            self.go_on()
            return
        stage = {"proven": "warming", "warmed": "publishing"}.get(done)
        self.patiently(lambda: self.jobs.append_event(self.job, "publishing", {"step": done}, stage=stage))
        traces.event(done)
        self.published.add(done)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Everything inside belongs to this stage."""
        if name != self._under_way[0]:  # the first one came with the claim
            self.patiently(lambda: self.jobs.set_stage(self.job, name))
        began = time.perf_counter()
        self._under_way = name, began
        with traces.child(name):
            yield
        self.seconds[name] = round(time.perf_counter() - began, 3)

    def seconds_so_far(self) -> dict[str, float]:
        """Seconds by stage, with those of the stage that is under way."""
        name, began = self._under_way
        return {**self.seconds, name: round(time.perf_counter() - began, 3)}

    def resolved(self, spec: Spec) -> None:
        """Note what the search has chosen, unless that is noted, by an earlier attempt perhaps."""
        chosen = pinned(spec, public_name(self.job.base))
        if chosen != self.chosen:
            self.patiently(lambda: self.jobs.resolve(self.job, chosen))
            self.chosen = chosen

    def patiently(self, write: Callable[[], T]) -> T:
        """Wait for a store that is away: what has been trained is worth more than the wait."""

        def tell(exc: Exception) -> None:
            log.warning("the store failed; the job waits for it", job=self.job.id, reason=reason(exc))

        return retrying(write, timeout_s=STORE_PATIENCE_S, failed=tell)


def run_job(job: Job, *, settings: Settings, jobs: Jobs, registry: Registry, servers: Sequence[ModelServer]) -> None:
    """Run a claimed job to its success, from the checkpoints of earlier attempts.

    Whatever this writes shows the lease of the job, so that an attempt that was frozen and replaced changes nothing
    when it goes on: it works in a directory of its own and finds its lease lost at its next step.

    Raises:
        TemperError: why it failed; nothing of it is served or left on disk, but for a preview and checkpoints.
        LeaseLost: it was cancelled or given to another worker.
        Paused: a client wants it paused. Checkpoints have what was done.
    """
    run = Run(job, jobs)
    run.check()
    clear_leftovers(
        job, settings=settings, registry=registry, servers=servers, fence=functools.partial(jobs.check_lease, job)
    )
    report.reset_peak_memory()
    staged = settings.staging / f"{job.id}.{job.lease}"
    try:
        with run.stage("validating"):
            asked = Asked.of(job.spec)
            device = device_of(asked.fixed.device)
            # What an earlier release has kept was trained before near copies were held out together.
            grouped = not job.checkpoint or "coverage" in (job.resolved_spec or {})
            data = JobData.load(job.dataset, settings, asked.fixed, grouped=grouped)
            watched(lambda _: data.check(), run.go_on)
            source = named(job.base, registry)
            base = load_params(files_of(settings, source.model, source.version))
            make_directory(settings.checkpoints / job.id)
            groups = watched(lambda _: data.groups, run.go_on)
        with tf.device(device):
            problem = Problem(data.all, base, len(data.classes), data.classes == source.manifest.classes, groups)
            folded = sha256(groups.astype("<i8").tobytes()).hexdigest()
            learned_from = [job.dataset.dump(), source.manifest.classes, digest(base), folded]
            checkpoints = _Checkpoints(settings.checkpoints / job.id, learned_from)
            maker = _Maker(
                run, settings, registry, servers, asked, data, source, problem, Evaluation(data, settings, device),
                staged, checkpoints,
            )  # fmt: skip
            if job.checkpoint:
                return maker.make_of(**job.checkpoint)
            bounds, found = asked.fixed.search, Found(asked.fixed)
            if asked.auto:
                first = job.label == STABLE and job.preview_version is None and not registry.has_live(job.model)
                if bounds and bounds.preview and first:
                    with run.stage("previewing"), contextlib.suppress(Diverged):  # the search may find what does not
                        maker.preview()
                with run.stage("searching"):
                    found = search(
                        asked, problem, uploaded=data.validation is not None, earlier=_earlier(job.model, registry),
                        spent_s=sum(run.seconds.values()),
                        on_trial=run.trial, check=run.check, checkpoint=checkpoints("search", job.spec),
                    )  # fmt: skip
                    run.resolved(found.spec)
            maker.make(found)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@dataclass(frozen=True)
class _Checkpoints:
    """The checkpoints of a job."""

    folder: Path
    learned_from: list[Any]  # data and base

    def __call__(self, name: str, spec: Mapping[str, Any]) -> Checkpoint:
        return Checkpoint.of(self.folder, name, *self.learned_from, dict(spec))


@dataclass(frozen=True)
class _Maker:
    """Makes versions of a job's data: trains, evaluates, exports and publishes."""

    run: Run
    settings: Settings
    registry: Registry
    servers: Sequence[ModelServer]
    asked: Asked
    data: "JobData"
    source: Version  # that training starts from
    problem: Problem
    evaluation: Evaluation
    staged: Path
    checkpoints: _Checkpoints

    def preview(self) -> None:
        """Publish the first version of a model from a quick recipe, unless its gate fails."""
        recipe = preview_recipe(self.problem.same_classes, len(self.problem.data.labels))
        spec = self.asked.resolve(recipe)
        spec = spec.model_copy(update={"epochs": min(spec.epochs, recipe["epochs"])})
        start = self._start(spec)
        train, validation = self.data.split(spec)
        train = sample(train, PREVIEWED)
        classes, check = len(self.data.classes), self.run.check
        fitted = watched(
            lambda go_on: fit(
                spec, start, train, validation, classes=classes, on_epoch=lambda _: go_on(), shares=False
            ), check,
        )  # fmt: skip
        held_out = watched(lambda _: HeldOut.apart(fitted, train, validation or train), check)
        card = watched(lambda _: self.evaluation.figures(spec, start, fitted, train, held_out), check)
        card["warnings"].append("this is a preview, trained for a moment while its job searches for a better recipe")
        quick = gate_of(spec, self.run.job.model, self.registry).model_copy(update=dict.fromkeys(LATER))
        candidate = self._candidate(quick, card, fitted, held_out)
        if not candidate.judge(None, self.settings, self.registry).passed:
            return
        manifest = self._exported(candidate, spec, train, card, preview=True)
        self._publish(
            manifest, candidate, lambda: ReportCard.model_validate(card), step=lambda _: check(),
            finish=lambda job, version, connection, _: self.run.jobs.previewed(job, version, connection),
        )  # fmt: skip

    def make(self, found: Found) -> None:
        """Train a resolved spec and publish the result, which ends the job."""
        run, data, spec = self.run, self.data, found.spec
        start = self._start(spec)
        with run.stage("training"):
            train, validation = data.split(spec)
            trained = self._trained(spec, start, train, validation)
            across = trained.across
            if across and (confirmed := found.confirmed(across.logits, across.split.labels)) is not found:
                remove_tree(self._keeping(spec))
                found, spec = confirmed, confirmed.spec
                run.resolved(spec)
                trained = self._trained(spec, start, train, validation)
            twin = self._twin(spec, start, train, validation)
        if spec.checkpoints:
            objects_of(self.settings).share(self._keeping(spec))
        self._finish(spec, start, trained, train, validation, found if self.asked.auto else None, twin)

    def make_of(self, job: str, epoch: int) -> None:
        """Publish what another job has kept of an epoch, which ends this one."""
        spec = Spec.model_validate_json(json.dumps(self.run.chosen))
        start = self._start(spec)
        kept = objects_of(self.settings).fetch(folder_of(self.settings, job, self.run.chosen))
        train, validation = self.data.split(spec)
        trained = watched(lambda _: Trained(*read_all(kept, epoch, start, spec, self.data)), self.run.go_on)
        self._finish(spec, start, trained, train, validation)

    def _trained(
        self, spec: Spec, start: Start, train: Split, validation: Split | None, *, twin: bool = False
    ) -> Trained:  # fmt: skip
        """The network to serve, or its twin, and with folds out-of-fold predictions, all trained at the same time.

        Out of fold, every image is classified by a network that was trained without it. Where the served network is
        trained on all images, those of the folds are trained in the same way, without a look at the images held out.
        """
        data, run, keeping = self.data, self.run, self._keeping(spec)
        kind, recipe = ("twin", unregularized(spec)) if twin else ("network", spec)
        folds = list(data.folds(spec)) if spec.folds else []
        going_on = set(range(1 + len(folds)))  # the network on all images is number 0
        records: SimpleQueue[tuple[int, dict[str, Any]]] = SimpleQueue()
        written = -math.inf

        def work(number: int, check: Check) -> tuple[Fitted, tuple[np.ndarray, np.ndarray] | None]:
            def on_epoch(record: dict[str, Any]) -> None:
                if not twin:
                    records.put((number, record))
                check()

            seen, unseen = train, validation
            if number:
                held_out = folds[number - 1]
                seen, unseen = data.part(~held_out), data.part(held_out) if spec.validation_split else None
            fitted = fit(
                recipe, start, seen, unseen, classes=len(data.classes), on_epoch=on_epoch,
                shares=not number and not twin,
                checkpoint=self.checkpoints(f"{kind}-{number}", described(recipe)),
                keep=functools.partial(keep, keeping, number),
            )  # fmt: skip
            return fitted, seen_by(fitted.params, seen, data.part(held_out)) if number else None

        def write_down() -> None:
            """Every epoch of the served network, and the progress of one fold at a time."""
            nonlocal written
            while not records.empty():
                number, record = records.get()
                fold = {"fold": number, "folds": len(folds)} if number else {}
                if not fold or (number == min(going_on) and time.monotonic() > written + FOLD_PAUSE_S):
                    written = time.monotonic()
                    run.epoch({**dict.fromkeys(PENALTIES, 0.0), **record, "epochs": spec.epochs, **fold})

        def check() -> None:
            write_down()
            run.check()

        n = len(data.all.labels)
        logits, distances = np.zeros((n, len(data.classes)), np.float32), np.zeros((n, 2), np.float32)
        found: dict[int, Fitted] = {}
        try:
            for number, (fitted, predicted) in side_by_side(work, sorted(going_on), check):
                write_down()
                going_on.discard(number)
                found[number] = fitted
                if predicted is not None:
                    logits[folds[number - 1]], distances[folds[number - 1]] = predicted
        except Paused:
            write_down()
            raise
        if not folds:
            return Trained(found[0], None)
        first, params = data.part(folds[0]), found[1].params
        return Trained(found[0], HeldOut(data.all, logits, first, params, distances, out_of_fold=True))

    def _twin(self, spec: Spec, start: Start, train: Split, validation: Split | None) -> Trained | None:
        """The twin, if the spec asks for one that is another network, and it can be trained."""
        if spec.twin and regularizes(spec):
            with contextlib.suppress(Diverged):
                return self._trained(spec, start, train, validation, twin=True)
        return None

    def _keeping(self, spec: Spec) -> Path:
        """Where epochs of the training of what has been chosen are kept."""
        folder = folder_of(self.settings, self.run.job.id, self.run.chosen)
        if spec.checkpoints:
            make_directory(folder)
        return folder

    def _finish(
        self, spec: Spec, start: Start, trained: Trained, train: Split, validation: Split | None,
        searched: Found | None = None, twin: Trained | None = None,
    ) -> None:  # fmt: skip
        """Evaluate, export and publish a network."""
        run = self.run
        with run.stage("evaluating"):
            gate = gate_of(spec, run.job.model, self.registry)
            well = gate.robust_accuracy is not None
            fitted, held_out, card = watched(
                lambda _: self.evaluation.report(
                    spec, start, trained, train, validation, searched, twin, attack_well=well
                ), run.go_on,
            )  # fmt: skip
            if gate.forgetting is not None:
                task = run.job.base, self.data.classes, self.settings, self.registry
                card["forgetting"] = watched(lambda _: forgetting(fitted.params, *task), run.go_on)
            if searched:
                card["search"] = searched.dump()
                card["warnings"] += searched.warnings
        with run.stage("exporting"):
            candidate = watched(lambda _: self._candidate(gate, card, fitted, held_out), run.go_on)
            card["warnings"] += watched(lambda _: candidate.warnings(), run.go_on)
            fold = held_out.params if held_out.out_of_fold else None
            manifest = self._exported(candidate, spec, train, card, fold=fold)
        with run.stage("publishing"):
            self._publish(
                manifest, candidate,
                lambda: ReportCard.model_validate({**card, "cost": report.cost(run.seconds_so_far(), fitted)}),
                step=run.publishing, finish=run.jobs.succeeded,
            )  # fmt: skip

    def _start(self, spec: Spec) -> Start:
        problem = self.problem
        return begin(spec, problem.base, classes=problem.classes, same_classes=problem.same_classes)

    def _candidate(self, gate: Gate, card: dict[str, Any], fitted: Fitted, held_out: HeldOut) -> Candidate:
        report_card, predicted = ReportCard.model_validate(card), Predictions.of(held_out, self.data)
        try:
            inherited = learned_by(self.source, self.settings, self.registry)
        except DAMAGED as exc:
            log.warning(
                "what the base has learned is not known", base=public_name(self.run.job.base), reason=reason(exc)
            )
            inherited = {}
        return Candidate(self.run.job.id, gate, report_card, fitted, predicted, self.data, self.source, inherited)

    def _exported(
        self, candidate: Candidate, spec: Spec, train: Split, card: dict[str, Any], *, fold: Arrays | None = None,
        preview: bool = False,
    ) -> Manifest:  # fmt: skip
        """Write everything that is published to the staging directory."""
        fitted, job, data, staged = candidate.fitted, self.run.job, self.data, self.staged
        base = public_name(job.base)
        watched(lambda _: prepare(fitted.params, invert=data.invert, detects=True), self.run.go_on)
        manifest = Manifest(
            classes=data.classes, polarity=data.polarity, base=base, base_sha256=digest(self.problem.base),
            sha256=digest(fitted.params), spec=self.asked.described(), resolved_spec=pinned(spec, base),
            dataset=job.dataset, job=job.id, adapter_bottleneck=bottleneck_of(fitted.params), preview=preview,
            checkpoint=job.checkpoint, abstention=Abstention.rule(card["abstention"]),
        )  # fmt: skip
        detector, limits = Detector.of(fitted.params, train.images), card["abstention"]["limits"]
        arrays = detector.arrays(limits)
        export(staged, fitted.params, invert=data.invert, manifest=manifest.dump(), detector=arrays)
        if fold:
            np.savez(staged / FOLD, allow_pickle=False, **fold)
        delta.write(staged / delta.DELTA, fitted.trained, lora_scale=fitted.lora_scale, manifest=manifest.dump())
        card["parameters"]["delta_bytes"] = (staged / delta.DELTA).stat().st_size
        probed = tf.concat([train.images[:PARITY_IMAGES], NOISE], axis=0)  # whose distances are small, and large
        distances = (detector.distances(fitted.params, probed) / np.asarray(limits)).max(axis=1).astype(np.float32)
        Probe(data.as_sent(probed), fitted.network.logits(probed), distances).save(staged)
        candidate.held_out.save(staged)
        seal(staged)
        return manifest

    def _publish(
        self, manifest: Manifest, candidate: Candidate, card: Callable[[], ReportCard], *, step: Callable[[str], None],
        finish: Callable[[Job, int, sa.Connection, GateCard | None], None],
    ) -> None:  # fmt: skip
        job = self.run.job
        publish(
            self.settings, self.registry, self.servers,
            staged=self.staged, model=job.model, job_id=job.id, manifest=manifest, report=card, label=job.label,
            judge=lambda stable: watched(
                lambda _: candidate.judge(stable, self.settings, self.registry), self.run.go_on
            ),
            step=step, fence=functools.partial(self.run.jobs.check_lease, job),
            finish=lambda connection, version, gate: finish(job, version, connection, gate),
        )  # fmt: skip


def clear_leftovers(
    job: Job, *, settings: Settings, registry: Registry, servers: Sequence[ModelServer], fence: Fence = lambda _: None
) -> None:
    """Remove what earlier attempts at a job may have left half-done.

    Raises:
        LeaseLost: with a fence, which is asked before a version is withdrawn: it may be a later attempt's.
    """
    for path in settings.staging.glob(f"{job.id}.*"):
        if int(path.suffix[1:]) < job.lease:
            shutil.rmtree(path, ignore_errors=True)
    for version in registry.of_job(job.id):
        if not version.live:
            withdraw(settings, registry, servers, version.model, version.version, fence)


def _earlier(model: str, registry: Registry) -> list[dict[str, Any]]:
    """What was chosen for the newest versions of a model."""
    versions = registry.of_model(model) if registry.has_live(model) else []
    specs = [version.manifest.resolved_spec for version in versions if not version.manifest.preview]
    return [spec for spec in specs if spec][:EARLIER]
