"""Random histories: workers are frozen, killed and stopped anywhere, clients interfere, and nothing is lost.

Real workers (`trainer.worker.loop.Worker`) run their real loop on a real store, and publish through the real registry
into real directories. Only learning is left out: an epoch takes no time, and a version has three small files. Each
worker is a coroutine that halts before every transaction and every change of a directory, and goes on when Hypothesis
says so. Its clock is what it sleeps. So a history follows from the numbers that Hypothesis draws and from nothing else.

    .venv/bin/python -m tests.end_to_end.test_histories --histories 10000 --seed 7    # 7 gives the same ones each time

A history that breaks an invariant is made as short as possible and printed as Python, with the seed that replays it.
"""

import contextlib
import functools
import io
import itertools
import json
import os
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
import sqlalchemy as sa
import structlog
from greenlet import getcurrent, greenlet
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from serving.client import ModelServer
from serving.publishing import FILES, PROBE, check_files, publish, reconcile, seal
from serving.registry import Registry
from store.engine import connect
from store.errors import Diverged, TemperError
from store.records import DatasetCard, Manifest, ReportCard
from store.settings import Settings
from trainer.jobs import records
from trainer.jobs.records import FINISHED, MAX_ATTEMPTS, Job, Jobs
from trainer.worker import complete_report, loop, retention, run_job
from trainer.worker.loop import Stopped, Worker

FEW, EACH = 50, 2_000  # histories
STEPS = 25  # of a history, at most
PARTS = [(8, 2), (8, 3), (8, 4), (16, 5), (STEPS, 6)]  # steps and seed; short ones are cheap and find most bugs
KEEP = 2  # versions of a model
TABLES = ("events", "jobs", "labels", "reports", "versions", "models", "workers", "revisions", "turns")
MODELS, SLOTS = st.sampled_from(["m", "n"]), st.integers(0, 1)
PAUSES = st.sampled_from([1, 2, 3, 5, 8, 13, 21, 40])  # from one to the next; a job has about 30
OF_REPORT = ("report_status", "worker", "lease", "last_seq")  # columns of a job that change when it has finished
ANY = st.integers(0, 9)  # the remainder chooses among what there is


class Dead(BaseException):
    """Ends a worker that was killed, once the history is over."""


def pause() -> None:
    """Halt until told to go on, if a worker calls this."""
    actor: Actor | None = getattr(getcurrent(), "actor", None)
    if actor:
        actor.halt()


def pausing(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def paused(*args: Any, **more: Any) -> Any:
        pause()
        return call(*args, **more)

    return paused


class Paced:
    """An engine whose transactions wait for their turn."""

    def __init__(self, engine: sa.Engine) -> None:
        self.begin, self.connect = pausing(engine.begin), pausing(engine.connect)


class Clock:
    """Passes by being slept."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, _: float) -> None:
        pause()
        self.now += 1.0


class World:
    """Home and store of one history after another."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, keep_versions=KEEP)
        self.engine = connect(self.settings.store_url)
        self.raw = sqlite3.connect(home / "temper.db", isolation_level=None)
        self.raw.row_factory = sqlite3.Row
        packed = io.BytesIO()
        np.savez(packed, pixels=np.zeros((1, 784), np.uint8), logits=np.zeros((1, 1), np.float32))
        self.probe = packed.getvalue()
        self.clock, self.numbers = Clock(), itertools.count()

    def begin(self) -> None:
        """Forget everything."""
        self.raw.executescript(f"BEGIN; {' '.join(f'DELETE FROM {table};' for table in TABLES)} COMMIT")
        for directory in (self.settings.models, self.settings.staging):
            shutil.rmtree(directory, ignore_errors=True)
        self.settings.make_home()
        self.numbers = itertools.count()

    def rows(self, query: str, *values: Any) -> list[sqlite3.Row]:
        return self.raw.execute(query, values).fetchall()

    def close(self) -> None:
        self.raw.close()
        self.engine.dispose()


def tag(job: Job) -> str:
    """Marks a version as made under a lease."""
    return f"{job.id}.{job.lease}"


class Actor:
    """A worker at work."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.worker = Worker(world.settings)
        self.holds: Job | None = None  # what it works on, whether or not the lease holds
        Jobs(world.engine).heartbeat(self.worker.id, "idle")
        self._buried = False
        self._coroutine = greenlet(self._work)
        self._coroutine.actor = self
        self._coroutine.switch()

    def _work(self) -> None:
        with contextlib.suppress(Stopped, Dead):
            self.halt()
            self.worker._loop(())

    def halt(self) -> None:
        if self._buried:
            raise Dead
        self._coroutine.parent.switch()

    def bury(self) -> None:
        """End without another effect: whatever handles the end does not get past a pause."""
        self._buried = True
        if not self.ended:
            self._coroutine.throw(Dead)

    @property
    def ended(self) -> bool:
        return bool(self._coroutine.dead)

    def lost(self) -> bool:
        """Does it work on what has been taken from it?"""
        if self.holds is None:
            return False
        (row,) = self.world.rows("SELECT lease, status FROM jobs WHERE id = ?", self.holds.id)
        return bool(row["lease"] != self.holds.lease or row["status"] != self.holds.status)

    def seen(self) -> set[tuple[Any, ...]]:
        """All that a worker without a lease could change, but for what has been removed already."""
        queries = (
            "SELECT * FROM jobs", "SELECT * FROM events", "SELECT * FROM labels", "SELECT * FROM models",
            "SELECT v.*, r.report FROM versions v JOIN reports r USING (model, version) WHERE NOT removed",
        )  # fmt: skip
        found = {tuple(row) for query in queries for row in self.world.rows(query)}
        return found | {(path.name,) for path in self.world.settings.staging.iterdir()}

    def step(self, throw: BaseException | None = None) -> None:
        """Go on to the next pause; with an exception, as if a signal had raised it there."""
        held = self.holds if self.lost() else None
        before = self.seen() if held else set()
        self._coroutine.throw(throw) if throw else self._coroutine.switch()
        if self.ended:
            Jobs(self.world.engine).forget_worker(self.worker.id)
        if held:
            changed = self.seen() ^ before
            # It may work in a directory of its own, and withdraw the version that it did not finish.
            mine = {row for row in changed if any(tag(held) in str(value) for value in row)}
            assert changed == mine, f"a worker without the lease of {held.id} changed {changed - mine}"


class Histories(RuleBasedStateMachine):
    """What may happen, and what must hold all the same. A new rule is a method; see the ones for clients."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.world.begin()
        self.jobs, self.registry = Jobs(self.world.engine), Registry(self.world.engine)
        self.slots: list[Actor | None] = [None, None]
        self.killed: list[Actor] = []
        self.crashes = 0
        self.acknowledged: dict[str, dict[str, Any]] = {}  # specs
        self.cancelled: set[str] = set()  # by clients
        self.finished: dict[str, tuple[Any, ...]] = {}

    def slot(self, number: int) -> Actor:
        slot = self.slots[number]
        if slot is None or slot.ended:
            slot = self.slots[number] = Actor(self.world)
        return slot

    def age(self, slot: Actor) -> None:
        """Nothing has been heard of it for long."""
        self.world.rows("UPDATE workers SET seen_at = seen_at - 60 WHERE id = ?", slot.worker.id)
        self.crashes += 1

    # --- workers ------------------------------------------------------------------------------------------------------

    @rule(number=SLOTS, steps=PAUSES, beats=st.booleans())
    def work(self, number: int, steps: int, beats: bool) -> None:
        slot = self.slot(number)
        if beats:
            self.jobs.heartbeat(slot.worker.id, slot.worker.state)
        for _ in range(steps):
            if not slot.ended:
                slot.step()

    @rule(number=SLOTS, steps=PAUSES)
    def freeze(self, number: int, steps: int) -> None:
        """The other one looks for lost jobs and goes on; this one comes back with the next `work`."""
        self.age(self.slot(number))
        self.work(1 - number, steps, True)

    @rule(number=SLOTS)
    def kill(self, number: int) -> None:
        slot, self.slots[number] = self.slots[number], None
        if slot:
            self.age(slot)
            self.killed.append(slot)

    @rule(number=SLOTS)
    def stop(self, number: int) -> None:
        """With SIGTERM."""
        slot = self.slot(number)
        slot.step(Stopped())

    @rule()
    def restart(self) -> None:
        """Of the machine."""
        for number in range(len(self.slots)):
            self.kill(number)
        self.world.engine.dispose()

    # --- clients ------------------------------------------------------------------------------------------------------

    @rule(model=MODELS, label=st.sampled_from(["stable", "canary"]), fate=st.sampled_from(["", "preview", "diverges"]))
    def submit(self, model: str, label: str, fate: str) -> None:
        spec = {"fate": fate}
        job = self.jobs.create(model=model, base="lenet5:1", spec=spec, dataset=DatasetCard(id="d"), label=label)
        self.acknowledged[job.id] = spec

    @rule(which=ANY)
    def cancel(self, which: int) -> None:
        if self.acknowledged:
            job_id = list(self.acknowledged)[which % len(self.acknowledged)]
            with contextlib.suppress(TemperError):
                self.jobs.cancel(job_id)
                self.cancelled.add(job_id)

    @rule(model=MODELS, which=st.none() | ANY, dies=st.booleans())
    def delete(self, model: str, which: int | None, dies: bool) -> None:
        """The model or a version; the gateway may die before the files are deleted."""
        with contextlib.suppress(TemperError):
            versions = self.registry.of_model(model)
            self.registry.retire(model, None if which is None else versions[which % len(versions)].version)
        if not dies:
            reconcile(self.world.settings, self.registry, ())

    @rule(model=MODELS, label=st.sampled_from(["stable", "canary"]), which=st.none() | ANY)
    def move_label(self, model: str, label: str, which: int | None) -> None:
        with contextlib.suppress(TemperError):
            if which is None:
                self.registry.drop_label(model, label)
            else:
                versions = self.registry.of_model(model)
                self.registry.put_label(model, label, versions[which % len(versions)].version)

    # --- what must hold -----------------------------------------------------------------------------------------------

    @invariant()
    def nothing_is_lost_or_done_twice(self) -> None:
        happened: dict[str, list[sqlite3.Row]] = {}
        for event in self.world.rows("SELECT job, seq, type, data FROM events ORDER BY job, seq"):
            happened.setdefault(event["job"], []).append(event)
        jobs = {row["id"]: row for row in self.world.rows("SELECT * FROM jobs")}
        assert jobs.keys() == self.acknowledged.keys()
        for job_id, row in jobs.items():
            assert [event["seq"] for event in happened[job_id]] == list(range(1, row["last_seq"] + 1))
            told = [json.loads(event["data"]) for event in happened[job_id] if event["type"] == "status"]
            assert (told[-1]["status"], told[-1]["stage"]) == (row["status"], row["stage"])
            assert told[-1].get("version") == row["version"]
            assert all(data["status"] not in FINISHED for data in told[:-1]), "it has ended twice"
            if row["status"] in FINISHED:
                stays = tuple(row[name] for name in row.keys() if name not in OF_REPORT)  # noqa: SIM118
                assert self.finished.setdefault(job_id, stays) == stays, "a finished job has changed"
            fate = self.acknowledged[job_id]["fate"]
            if row["status"] == "cancelled":
                assert job_id in self.cancelled
            elif row["status"] == "failed":
                code = json.loads(row["error"])["code"]
                assert code == "worker_lost" or (code, fate) == ("diverged", "diverges"), row["error"]
                assert code == "diverged" or self.crashes >= MAX_ATTEMPTS
        live: dict[str, set[int]] = {}
        for version in self.world.rows("SELECT model, version, live, job_id, manifest FROM versions WHERE live"):
            live.setdefault(version["model"], set()).add(version["version"])
            job = jobs[version["job_id"]]
            if json.loads(version["manifest"])["preview"]:
                assert job["preview_version"] == version["version"]
            else:
                assert (job["status"], job["version"]) == ("succeeded", version["version"])
            files = self.world.settings.version(version["model"], version["version"])
            assert (files / FILES).is_file(), "a live version has no files"
        labels = self.world.rows("SELECT model, label, version FROM labels")
        assert all(label["version"] in live.get(label["model"], ()) for label in labels), "a label points nowhere"
        assert {label["model"] for label in labels if label["label"] == "stable"} == live.keys()

    def teardown(self) -> None:
        """All that runs dies, and one new worker puts everything in order."""
        try:
            self.restart()
            worker, clock, patience = Worker(self.world.settings), self.world.clock, itertools.count()
            self.jobs.heartbeat(worker.id, "idle")

            def idle(_: float) -> None:
                clock.now += 1.0
                if next(patience):  # the second time that there is nothing to do
                    raise Stopped

            with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Stopped):
                patch.setattr(clock, "sleep", idle)
                worker._loop(())
            self.nothing_is_lost_or_done_twice()
            assert all(row["status"] in FINISHED for row in self.world.rows("SELECT status FROM jobs"))
            assert not self.world.rows("SELECT 1 FROM jobs WHERE report_status = 'quick'")
            versions = self.world.rows("SELECT model, version, live FROM versions")
            assert all(version["live"] for version in versions), "half a version is left"
            named = {self.world.settings.version(version["model"], version["version"]) for version in versions}
            assert set(self.world.settings.models.glob("*/*")) == named
            for path in named:
                check_files(path)
            assert list(self.world.settings.staging.iterdir()) == []
        finally:
            for slot in self.killed:
                slot.bury()


# --- a job without learning -------------------------------------------------------------------------------------------


def run_without_learning(
    job: Job, *, settings: Settings, jobs: Jobs, registry: Registry, servers: Sequence[ModelServer]
) -> None:
    """The steps of `run_job`."""
    run, fence = run_job.Run(job, jobs), functools.partial(jobs.check_lease, job)
    staged = settings.staging / tag(job)

    def published(
        finish: Callable[[Job, int, sa.Connection], None], step: Callable[[str], None], preview: bool
    ) -> None:
        (staged / "assets.extra").mkdir(parents=True)
        (staged / "saved_model.pb").touch()
        (staged / PROBE).write_bytes(Histories.world.probe)
        seal(staged)
        publish(
            settings, registry, servers, staged=staged, model=job.model, job_id=job.id,
            manifest=Manifest(classes=("a",), sha256=tag(job), preview=preview), report=ReportCard, label=job.label,
            step=step, fence=fence, finish=lambda connection, version, _: finish(job, version, connection),
        )  # fmt: skip

    run.check()
    run_job.clear_leftovers(job, settings=settings, registry=registry, servers=servers, fence=fence)
    try:
        if job.spec["fate"] == "preview" and not registry.has_live(job.model):
            with run.stage("previewing"):
                published(jobs.previewed, lambda _: run.check(), True)
        with run.stage("training"):
            run.epoch({"epoch": 1})
            if job.spec["fate"] == "diverges":
                raise Diverged("as it was told to")
        with run.stage("publishing"):
            published(jobs.succeeded, run.publishing, False)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def report_without_learning(job: Job, *, settings: Settings, jobs: Jobs, registry: Registry) -> Iterator[None]:
    """The steps of `complete_report`."""
    assert job.version is not None
    with holding(job):
        try:
            registry.find(job.model, job.version)
        except TemperError:
            jobs.reported(job, "none")
            return
    yield
    card, done = ReportCard(device=tag(job)), functools.partial(jobs.reported, job, "complete")
    with holding(job):
        registry.set_report(job.model, job.version, card, done)


@contextlib.contextmanager
def holding(job: Job) -> Iterator[None]:
    """Note what this worker works on."""
    actor: Actor | None = getattr(getcurrent(), "actor", None)
    if actor:
        actor.holds = job
    try:
        yield
    finally:
        if actor:
            actor.holds = None


ATTEMPT = Worker._attempt


def attempt(worker: Worker, job: Job, servers: Sequence[ModelServer]) -> None:
    with holding(job):
        ATTEMPT(worker, job, servers)


@contextlib.contextmanager
def worlds() -> Iterator[None]:
    """Workers of this process take turns and do not learn."""
    quiet: Any = structlog.wrap_logger(structlog.PrintLogger(), wrapper_class=structlog.make_filtering_bound_logger(50))
    with (
        TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as home,
        contextlib.closing(World(Path(home))) as world,
        pytest.MonkeyPatch.context() as patch,
    ):
        Histories.world = world
        patch.setattr(loop, "connect", lambda url: Paced(world.engine))
        patch.setattr(loop, "time", world.clock)
        patch.setattr(loop, "RECOVER_S", 1.0)
        patch.setattr(loop, "SWEEP_S", 2.0)
        patch.setattr(loop._StoreContact, "is_steady", lambda self: True)
        patch.setattr(Worker, "_attempt", attempt)
        patch.setattr(run_job, "run_job", run_without_learning)
        patch.setattr(complete_report, "complete_report", report_without_learning)
        patch.setattr(shutil, "rmtree", pausing(shutil.rmtree))
        patch.setattr(os, "rename", pausing(os.rename))
        names = SimpleNamespace(token_hex=lambda size: f"{next(world.numbers):010x}")
        for module in (records, loop):
            patch.setattr(module, "secrets", names)
        for module in (loop, run_job, retention):
            patch.setattr(module, "log", quiet)
        yield


def run(histories: int, first: int, steps: int = STEPS) -> None:
    """Run as many histories as asked for; raises with the shortest one found that breaks an invariant."""
    told = settings(
        max_examples=histories, stateful_step_count=steps, deadline=None, database=None, print_blob=True,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    with worlds():
        try:
            run_state_machine_as_test(seed(first)(Histories), settings=told)
        except BaseException as exc:
            options = f"--histories {histories} --seed {first} --steps {steps}"
            exc.add_note(f"replay: python -m tests.end_to_end.test_histories {options}")
            raise


def test_no_history_loses_a_job_or_does_one_twice() -> None:
    run(FEW, 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("steps", "first"), PARTS)
def test_no_history_of_ten_thousand_loses_a_job_or_does_one_twice(steps: int, first: int) -> None:
    run(EACH, first, steps)


@click.command()
@click.option("--histories", default=10_000, show_default=True)
@click.option("--seed", "first", default=0, show_default=True, help="The same seed gives the same histories.")
@click.option("--steps", default=STEPS, show_default=True, help="Most steps of a history.")
def main(histories: int, first: int, steps: int) -> None:
    """Run histories, and print how long that took."""
    click.echo(f"{histories} histories of up to {steps} steps, seed {first}")
    began = time.monotonic()
    run(histories, first, steps)
    click.echo(f"all is well after {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
