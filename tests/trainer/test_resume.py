"""Jobs that are interrupted go on from what was on disk, and end with the weights of an uninterrupted run."""

import itertools
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from serving.registry import Registry
from store.errors import JobFailed
from store.records import DatasetCard, Manifest, ReportCard
from store.settings import Settings
from tests.conftest import Place, succeed
from trainer import checkpoints, fit
from trainer.asked import parse_spec
from trainer.checkpoints import Checkpoint
from trainer.jobs import records
from trainer.jobs.kept import sweep_kept
from trainer.jobs.records import Job, Jobs
from trainer.parallel import Paused, side_by_side
from trainer.search import Clock
from trainer.spec import pinned
from trainer.worker.retention import sweep_checkpoints
from trainer.worker.run_job import Run

SEARCH = {"epochs": 6, "checkpoints": 2, "search": {"trials": 3, "folds": 2, "preview": False}}
STOPPING = {
    "epochs": 8, "method": "full", "learning_rate": 0.01, "early_stopping": {"patience": 2}, "l1": 1e-5, "folds": 2,
    "adversarial": {"attack": "fgsm", "epsilon": 0.1}, "ema": 0.9, "dropout": 0.3, "checkpoints": 3,
}  # fmt: skip
UNDER_WAY = 6  # epochs that are lost at most: of the trials or networks that are trained when the job is interrupted


class Killed(BaseException):
    """Stands for a signal that ends the process."""


@pytest.fixture
def saved_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FIRST_S", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", float("inf"))


class Trained:
    """Counts the epochs that are trained, and may do something before one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.epochs = 0
        self.before: Callable[[], None] = lambda: None
        epoch = fit.Training.epoch

        def counted(training: fit.Training) -> dict[str, float]:
            self.before()
            self.epochs += 1
            return epoch(training)

        monkeypatch.setattr(fit.Training, "epoch", counted)

    def whole(self, place: Place, spec: dict[str, Any]) -> str:
        """The weights of an uninterrupted job."""
        self.epochs = 0
        place.run(place.claimed(spec, model="whole"))
        sha256 = place.registry.find("whole").manifest.sha256
        assert sha256
        return sha256


def kept_of(place: Place, model: str) -> dict[str, bytes]:
    """The files of the checkpoints that the job of a model's version has kept for clients."""
    folder = place.settings.kept / str(place.registry.find(model).job_id)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.npz")}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    return Trained(monkeypatch)


@pytest.mark.slow
@pytest.mark.usefixtures("saved_always")
@pytest.mark.parametrize(
    ("spec", "moments"),
    [
        pytest.param(SEARCH, (0.1, 0.5, 0.95), id="searched", marks=pytest.mark.exhaustive),
        pytest.param(STOPPING, (0.6,), id="stopped early"),
    ],
)
def test_a_job_that_is_killed_anywhere_ends_with_the_weights_of_one_that_is_not(
    place: Place, trained: Trained, spec: dict[str, Any], moments: tuple[float, ...]
) -> None:
    sha256, whole = trained.whole(place, spec), trained.epochs
    expected, kept = place.registry.find("whole").report.dump(), kept_of(place, "whole")
    assert kept
    for moment in moments:

        def kill(moment: float = moment) -> None:
            if trained.epochs >= int(moment * whole):
                raise Killed

        trained.epochs, trained.before = 0, kill
        job = place.claimed(spec, model="resumed")
        with pytest.raises(Killed):
            place.run(job)
        trained.before = lambda: None
        assert place.jobs.recover("w") == []
        again = place.jobs.claim("w")
        assert again is not None
        done = place.run(again)
        assert trained.epochs <= whole + UNDER_WAY
        assert (done.status, done.attempts) == ("succeeded", 2)
        found = place.registry.find("resumed")
        assert found.manifest.sha256 == sha256
        assert kept_of(place, "resumed") == kept
        report = found.report.dump()
        report["gate"]["seconds"] = expected["gate"]["seconds"]
        assert {**report, "cost": 0, "search": 0} == {**expected, "cost": 0, "search": 0}
        if "search" in expected:
            assert report["search"]["sentence"] == expected["search"]["sentence"]
        place.registry.retire("resumed")  # so that the next one is not searched with it in mind


@pytest.mark.slow
@pytest.mark.parametrize("last", [0.2, 0.8], ids=["searching", "training"])
def test_a_job_that_is_paused_frees_its_worker_and_goes_on_where_it_was(
    place: Place, trained: Trained, monkeypatch: pytest.MonkeyPatch, last: float
) -> None:
    # Saved after the first epoch, and no more but at an end or when it is paused.
    monkeypatch.setattr(checkpoints, "FIRST_S", 0.0)
    monkeypatch.setattr(checkpoints, "SHARE", 1e-9)
    sha256, whole = trained.whole(place, SEARCH), trained.epochs
    job, noticed, look = place.claimed(SEARCH, model="resumed"), threading.Event(), Run.check

    def check(run: Run) -> None:
        try:
            look(run)
        except Paused:
            noticed.set()
            raise

    def pause() -> None:
        if trained.epochs >= int(last * whole):
            place.jobs.pause(job.id)
            noticed.wait(60)

    monkeypatch.setattr(Run, "check", check)

    trained.epochs, trained.before = 0, pause
    with pytest.raises(Paused):
        place.run(job)
    place.jobs.requeue(job)
    assert place.jobs.get(job.id).status == "paused"
    assert place.jobs.claim("w") is None
    before = trained.epochs
    place.jobs.resume(job.id)
    trained.before = lambda: None
    again = place.jobs.claim("w")
    assert again is not None
    done = place.run(again)
    assert trained.epochs > before
    assert trained.epochs <= whole + UNDER_WAY
    assert (done.status, done.attempts) == ("succeeded", 1)
    assert place.registry.find("resumed").manifest.sha256 == sha256
    epochs = [event.data for event in place.jobs.events(job.id) if event.type == "epoch" and "fold" not in event.data]
    assert [epoch["epoch"] for epoch in epochs] == list(range(1, 7))  # each is told once


@pytest.mark.slow
def test_a_preview_is_published_once(place: Place, trained: Trained) -> None:
    spec = {"epochs": 4, "search": {"trials": 2, "folds": 2}}
    job = place.claimed(spec)

    def kill() -> None:
        if place.jobs.get(job.id).stage == "searching":
            raise Killed

    trained.before = kill
    with pytest.raises(Killed):
        place.run(job)
    trained.before = lambda: None
    place.jobs.recover("w")
    again = place.jobs.claim("w")
    assert again is not None
    place.run(again)
    assert [version.version for version in place.registry.of_model("m")] == [2, 1]
    assert [event.type for event in place.jobs.events(job.id)].count("preview") == 1


def test_what_an_attempt_chooses_is_noted_once_and_last(place: Place) -> None:
    job = place.claimed(SEARCH)
    specs = [parse_spec(f'{{"epochs": {epochs}}}') for epochs in (6, 2)]
    for _ in range(2):  # an attempt, and the next: the second choice has fewer epochs, as they overfitted
        run = Run(place.jobs.get(job.id), place.jobs)
        for spec in specs:
            run.resolved(spec)
            run.resolved(spec)
        assert place.jobs.get(job.id).resolved_spec == pinned(specs[-1], job.base)
    assert [event.type for event in place.jobs.events(job.id)].count("resolved") == 4


def test_a_damaged_or_half_written_checkpoint_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    values = np.random.default_rng(0).random(1000, np.float32)
    Checkpoint(path).save(lambda: ({"values": values}, {"at": -np.inf, "history": [{"loss": 0.1}]}), now=True)
    found = Checkpoint(path).load()
    assert found is not None
    assert np.array_equal(found[0]["values"], values)
    assert found[1] == {"at": -np.inf, "history": [{"loss": 0.1}]}
    assert os.listdir(tmp_path) == ["c.npz"]
    whole = path.read_bytes()
    for damaged in (whole[:-100], whole[:10], b"", whole[:2000] + b"?" + whole[2001:]):
        path.write_bytes(damaged)
        assert Checkpoint(path).load() is None
    path.unlink()
    assert Checkpoint(path).load() is None


def test_a_checkpoint_of_other_data_or_another_spec_is_not_found(tmp_path: Path) -> None:
    Checkpoint.of(tmp_path, "network", "data", {"l2": 0.1}).save(lambda: ({}, {}), now=True)
    assert Checkpoint.of(tmp_path, "network", "data", {"l2": 0.1}).load() is not None
    assert Checkpoint.of(tmp_path, "network", "data", {"l2": 0.2}).load() is None
    assert Checkpoint.of(tmp_path, "network", "other", {"l2": 0.1}).load() is None


def test_a_checkpoint_that_cannot_be_saved_costs_only_the_work(tmp_path: Path) -> None:
    Checkpoint(tmp_path / "none" / "c.npz").save(lambda: ({}, {}), now=True)
    assert list(tmp_path.iterdir()) == []


def test_saving_takes_a_bounded_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at, saved = 0.0, 0
    monkeypatch.setattr(time, "monotonic", lambda: at)
    checkpoint = Checkpoint(tmp_path / "c.npz")

    def state() -> checkpoints.State:
        nonlocal at, saved
        at, saved = at + 0.05, saved + 1
        return {}, {}

    for _ in range(1000):
        at += 0.03  # an epoch
        checkpoint.save(state)
    assert saved > 5
    assert 0.05 * saved / at <= 1.1 * checkpoints.SHARE


def test_a_search_that_goes_on_has_the_time_that_was_left() -> None:
    spec = parse_spec("{}")
    clock = Clock(60.0, runs=1.0, spent_s=1.0, used_s=58.9)
    clock.note(spec, 1.0, 1.0)
    assert clock.is_up(spec)
    assert clock.affordable(spec) == 1
    stopped = Clock(60.0, runs=1.0, spent_s=1.0, used_s=30.0, stopped=True)
    assert (stopped.elapsed_s, stopped.elapsed_s) == (30.0, 30.0)


def test_checkpoints_of_finished_jobs_are_swept(engine: sa.Engine, tmp_path: Path) -> None:
    settings, jobs = Settings(home=tmp_path), Jobs(engine)
    settings.make_home()

    def made() -> Job:
        job = jobs.create(model="m", base="lenet5:1", spec={}, dataset=DatasetCard(id="d"))
        (settings.checkpoints / job.id).mkdir()
        return job

    paused, cancelled = made(), made()
    jobs.pause(paused.id)
    jobs.pause(cancelled.id)
    jobs.cancel(cancelled.id)
    (settings.checkpoints / "ftjob-unknown").mkdir()
    sweep_checkpoints(settings, jobs)
    assert os.listdir(settings.checkpoints) == [paused.id]


def test_kept_epochs_are_swept_with_their_model_after_a_month_and_not_while_they_are_published(
    engine: sa.Engine, tmp_path: Path
) -> None:
    settings, jobs, registry = Settings(home=tmp_path), Jobs(engine), Registry(engine)
    settings.make_home()

    def made(model: str) -> Job:
        jobs.create(model=model, base="lenet5:1", spec={}, dataset=DatasetCard(id="d"))
        job = jobs.claim("w")
        assert job is not None
        (settings.kept / job.id).mkdir()
        return job

    def ended(model: str, days: float = 0.0) -> Job:
        job = made(model)
        succeed(jobs, job, 1)
        with engine.begin() as connection:
            row = records.jobs.update().where(records.jobs.c.id == job.id)
            connection.execute(row.values(finished_at=records.jobs.c.finished_at - days * 86400.0))
        return job

    registry.go_live("alive", registry.reserve("alive", None, Manifest(), ReportCard()))
    recent, old, published, deleted = ended("alive", 29), ended("alive", 31), ended("alive", 31), ended("deleted")
    failed, running = made("alive"), made("new")
    jobs.finish(failed, "failed")
    publishing = jobs.create(
        model="alive", base="lenet5:1", spec={}, dataset=DatasetCard(id="d"),
        checkpoint={"job": published.id, "epoch": 1},
    )  # fmt: skip
    (settings.kept / "ftjob-unknown").mkdir()
    sweep_kept(settings, jobs, registry)
    gone = {old.id, deleted.id, failed.id}
    assert gone.isdisjoint(os.listdir(settings.kept))
    assert set(os.listdir(settings.kept)) == {recent.id, published.id, running.id}
    jobs.cancel(publishing.id)
    sweep_kept(settings, jobs, registry)
    assert set(os.listdir(settings.kept)) == {recent.id, running.id}


def test_a_kept_epoch_that_is_damaged_fails_the_job_that_publishes_it_and_leaves_nothing(place: Place) -> None:
    spec = pinned(parse_spec('{"method": "head", "epochs": 1, "checkpoints": 1}'), "lenet5:1")

    def claimed(checkpoint: dict[str, Any] | None = None) -> Job:
        place.jobs.create(
            model="m", base="lenet5:1", spec=spec, resolved_spec=spec, dataset=place.dataset, checkpoint=checkpoint
        )
        job = place.jobs.claim("w")
        assert job is not None
        return job

    first = place.run(claimed())
    (path,) = (place.settings.kept / first.id).rglob("*.npz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(JobFailed, match="the checkpoint of epoch 1 is gone or damaged"):
        place.run(claimed({"job": first.id, "epoch": 1}))
    assert [version.version for version in place.registry.of_model("m")] == [1]
    assert list(place.settings.staging.glob("ftjob-*")) == []


def test_a_cancelled_job_does_not_wait_for_the_epoch_and_a_paused_one_does() -> None:
    class Cancelled(Exception):
        pass

    for ending, waits in ((Cancelled, False), (Paused, True)):
        ends, ended = threading.Event(), threading.Event()
        looks = 0

        def epoch(_: int, __: Any, ends: threading.Event = ends, ended: threading.Event = ended) -> None:
            ends.wait(10)
            ended.set()

        def check(ending: type[Exception] = ending, ends: threading.Event = ends) -> None:
            nonlocal looks
            looks += 1
            if looks == 3:  # where it has been paused already
                ends.set()
            if looks > 1:
                raise ending

        try:
            with pytest.raises(ending):
                list(side_by_side(epoch, [1], check))
            assert ended.is_set() is waits
        finally:
            ends.set()


@pytest.mark.slow
def test_no_stage_goes_on_for_a_second_without_looking_whether_it_is_cancelled(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prints the longest gap between two looks in every stage of an automatic job.

    A gap counts by the clock or by the processor's time, whichever is less: other work stretches only the first. What
    waits without looking takes no processor's time, so the clock has a bound, too.
    """
    looks: list[tuple[float, float, str]] = []
    stage = "validating"  # which comes with the claim

    def looking(name: str) -> None:
        method = getattr(Jobs, name)

        def look(jobs: Jobs, *args: Any, **options: Any) -> Any:
            nonlocal stage
            looks.append((time.monotonic(), time.process_time(), stage))
            found = method(jobs, *args, **options)
            stage = args[1] if name == "set_stage" else options.get("stage") or stage
            looks.append((time.monotonic(), time.process_time(), stage))
            return found

        monkeypatch.setattr(Jobs, name, look)

    for name in ("set_stage", "append_event", "check_lease", "finish"):
        looking(name)
    spec = {"method": "full", "epochs": 20, "learning_rate": "auto", "search": {"trials": 2, "folds": 2}}
    assert place.run(place.claimed(spec)).status == "succeeded"
    gaps: dict[str, float] = defaultdict(float)
    for (clock, processor, _), (clock_after, processor_after, name) in itertools.pairwise(looks):
        gaps[name] = max(gaps[name], min(clock_after - clock, processor_after - processor))
    print({name: round(gap, 2) for name, gap in gaps.items()})
    assert set(gaps) >= {"validating", "previewing", "searching", "training", "evaluating", "exporting", "publishing"}
    assert max(gaps.values()) < 1.0, gaps
    assert max(after - before for (before, *_), (after, *_) in itertools.pairwise(looks)) < 3.0
