"""The worker's loop: the store goes away and comes back, clients interfere, nothing can be opened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from serving.registry import Registry
from store.records import Manifest, ReportCard
from store.settings import Settings
from tests.conftest import Place, PostgreSQL, eventually, opened
from trainer.asked import parse_spec
from trainer.jobs.records import Jobs
from trainer.spec import described
from trainer.worker import loop
from trainer.worker.loop import Worker
from trainer.worker.retention import retire_surplus


class Outage:
    """Makes a store fail as if it were locked: statements that contain `statement`, `times` times."""

    def __init__(self, engine: sa.Engine, statement: str, times: int) -> None:
        self.left = times

        def fail(connection: Any, cursor: Any, sql: str, *_: Any) -> None:
            if statement in sql and self.left:
                self.left -= 1
                raise sa.exc.OperationalError(sql, {}, Exception("database is locked"))

        sa.event.listen(engine, "before_cursor_execute", fail)


def worker_of(place: Place, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """A worker on the store of the place, in this process."""
    monkeypatch.setattr(loop, "connect", lambda url: place.engine)
    monkeypatch.setattr(loop, "STORE_PAUSE_S", 0.01)
    return Worker(place.settings)


def test_a_worker_shows_its_pulse_before_it_says_that_it_is_ready(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = worker_of(place, monkeypatch)
    monkeypatch.setattr(loop, "HEARTBEAT_S", 60.0)
    shown: list[bool] = []

    def look(_: Any) -> None:
        shown.append(place.settings.pulse_file(os.getpid()).exists())
        raise loop.Stopped

    monkeypatch.setattr(worker, "_loop", look)
    with pytest.raises(loop.Stopped):
        worker.run()
    assert shown == [True]
    assert not place.settings.pulse_file(os.getpid()).exists()


def test_a_job_goes_on_when_the_store_fails_for_a_while(place: Place) -> None:
    job = place.claimed({"epochs": 2})
    outage = Outage(place.engine, "INSERT INTO events", 3)
    done = place.run(job)
    assert outage.left == 0
    assert (done.status, done.progress.epoch) == ("succeeded", 2)


@pytest.mark.parametrize("statement", ["INSERT INTO versions", "UPDATE versions SET live"])
def test_a_job_whose_publication_the_store_interrupts_is_run_again(
    place: Place, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    spec = described(parse_spec('{"epochs": 1}'))
    job_id = place.jobs.create(model="m", base="lenet5:1", spec=spec, dataset=place.dataset).id
    worker = worker_of(place, monkeypatch)
    outage = Outage(place.engine, statement, 1)

    claim = Jobs.claim

    def claim_until_done(self: Jobs, name: str) -> Any:
        if self.get(job_id).finished_at:
            raise loop.Stopped
        return claim(self, name)

    monkeypatch.setattr(Jobs, "claim", claim_until_done)
    with pytest.raises(loop.Stopped):
        worker._loop(place.servers)
    assert outage.left == 0
    done = place.jobs.get(job_id)
    assert (done.status, done.attempts) == ("succeeded", 2)
    assert [version.version for version in place.registry.of_model("m")] == [done.version]


@pytest.mark.slow
def test_a_report_is_completed_although_the_store_fails(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    job = place.run(place.claimed({"epochs": 1}))
    worker = worker_of(place, monkeypatch)
    outage = Outage(place.engine, "UPDATE reports", 2)
    assert worker._continue_report()
    assert worker.state == "reporting"
    eventually(
        lambda: not worker._continue_report() and place.jobs.get(job.id).report_status == "complete",
        "the report is complete", 120,
    )  # fmt: skip
    assert outage.left == 0
    assert place.registry.find("m").report.dump()["robustness"]["curve"]


@pytest.mark.slow
def test_a_restart_of_postgresql_costs_no_job(tmp_path: Path, place: Place) -> None:
    (tmp_path / "postgresql").mkdir()
    server = PostgreSQL(tmp_path / "postgresql")
    said = tmp_path / "worker.log"
    environment = {
        **os.environ, "TEMPER_HOME": str(tmp_path / "other"), "TEMPER_STORE": server.url,
        "TEMPER_MODEL_SERVER": place.settings.model_server,
    }  # fmt: skip
    settings = Settings(home=tmp_path / "other")
    settings.make_home()
    dataset = f"{place.dataset.id}.npz"
    (settings.datasets / dataset).write_bytes((place.settings.datasets / dataset).read_bytes())
    with said.open("wb") as log:
        worker = subprocess.Popen([sys.executable, "-m", "trainer"], env=environment, stderr=log, stdout=log)
    try:
        with opened(server.url) as engine:
            jobs = Jobs(engine)
            spec = described(parse_spec('{"epochs": 1000, "method": "full"}'))
            job_id = jobs.create(model="m", base="lenet5:1", spec=spec, dataset=place.dataset).id
            eventually(lambda: jobs.get(job_id).progress.epoch, "the job trains", 200)
            server.stop()
            eventually(lambda: "the job waits for it" in said.read_text(), "the worker notices", 200)
            server.start()
            before = jobs.get(job_id)
            eventually(lambda: jobs.get(job_id).progress.epoch > before.progress.epoch, "the job goes on", 200)
            assert jobs.get(job_id).attempts == 1
            jobs.cancel(job_id)
            eventually(lambda: jobs.get(job_id).status == "cancelled", "the job is cancelled")
            assert list(jobs.worker_states()) == [before.worker]
        assert "Traceback" not in said.read_text()
    finally:
        worker.send_signal(signal.SIGTERM)
        worker.wait()
        server.stop()


def test_after_an_outage_a_worker_waits_before_it_takes_others_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    at = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: at)
    contact = loop._StoreContact()
    contact.beat()
    assert contact.is_steady()
    at += 12
    assert not contact.is_steady()  # no heartbeat has come through
    contact.beat()
    assert not contact.is_steady()  # those of the others may be on their way
    for _ in range(11):
        at += 1
        contact.beat()
    assert contact.is_steady()


class Raced(Registry):
    """A client deletes or labels a version just before it is retired."""

    act: Any = None

    def surplus(self, model: str, keep: int) -> list[int]:
        found = super().surplus(model, keep)
        self.act()
        return found


@pytest.mark.parametrize("act", ["delete the model", "delete the version", "label the version"])
def test_a_client_that_is_faster_than_retention_ends_no_worker(engine: sa.Engine, tmp_path: Path, act: str) -> None:
    registry = Raced(engine)
    for number in (1, 2, 3):
        registry.reserve("m", None, Manifest(classes=("a",)), ReportCard())
        registry.go_live("m", number)
    registry.act = {
        "delete the model": lambda: registry.retire("m"),
        "delete the version": lambda: registry.retire("m", 1),
        "label the version": lambda: registry.put_label("m", "canary", 1),
    }[act]
    settings = Settings(home=tmp_path, keep_versions=1)
    settings.make_home()
    retire_surplus("m", settings=settings, jobs=Jobs(engine), registry=registry, servers=[])
    live = {"delete the model": [], "delete the version": [3], "label the version": [3, 1]}[act]
    assert [version.version for version in registry.live()] == live


@pytest.mark.parametrize("module", ["trainer", "api"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TEMPER_STORE": "postgresql+psycopg://temper:secret@127.0.0.1:1/t"}, "cannot open the store at postgresql"),
        ({"TEMPER_HOME": "/proc/none"}, "cannot use TEMPER_HOME: "),
    ],
    ids=["store", "home"],
)
def test_what_cannot_be_opened_is_said_in_one_line(
    tmp_path: Path, module: str, settings: dict[str, str], message: str
) -> None:
    environment = {**os.environ, "TEMPER_HOME": str(tmp_path), **settings}
    ended = subprocess.run(
        [sys.executable, "-m", module], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 1
    assert ended.stderr.startswith(f"python -m {module}: {message}")
    assert ended.stderr.count("\n") == 1
    assert "secret" not in ended.stderr


def test_peak_memory_is_that_of_the_job(place: Place) -> None:
    large = b"x" * (400 << 20)
    del large
    place.run(place.claimed({"epochs": 1}))
    card = place.registry.find("m").report.dump()
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    assert card["cost"]["peak_memory_bytes"] <= peak + (1 << 20)  # the kernel counts pages by the batch
    again = b"x" * (400 << 20)
    peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    assert peak - card["cost"]["peak_memory_bytes"] > len(again) // 2
