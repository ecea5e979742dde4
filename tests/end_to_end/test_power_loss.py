"""What is left of a fine-tune when the power fails, or the disk, at any moment from the upload to the version.

The gateway runs in a thread and the worker's part in the test itself, so that what they write can be watched.
"""

import contextlib
import errno
import functools
import itertools
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa
import uvicorn
from sqlalchemy.engine.default import DefaultDialect

from api.app import create_app
from api.http.protocol import Connection
from serving.client import ModelServer
from serving.publishing import check_files
from serving.registry import BASE, Registry
from store.disk import translated
from store.engine import connect
from store.errors import TemperError
from store.settings import Settings
from tests.conftest import Place, eventually, npz
from trainer import checkpoints
from trainer.jobs.datasets import Dataset
from trainer.jobs.records import Jobs
from trainer.worker.pretrained import publish_base
from trainer.worker.run_job import clear_leftovers, run_job

SPEC = '{"epochs": 1}'
STORE = "temper.db"
COMMIT: Callable[[Any, Any], None] = DefaultDialect.do_commit


@contextlib.contextmanager
def gateway(settings: Settings) -> Iterator[httpx.Client]:
    """A client of a gateway in this process."""
    config = uvicorn.Config(
        create_app(settings), port=0, log_config=None, log_level="error", loop="uvloop", http=Connection, ws="none"
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    eventually(lambda: server.started, "the gateway has started")
    port = server.servers[0].sockets[0].getsockname()[1]
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as api:
        eventually(lambda: api.get("/readyz").json()["store"] == "ok", "the gateway is ready")
        yield api
    server.should_exit = True
    thread.join(30)


@pytest.fixture(autouse=True)
def checkpoint_after_the_first_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FIRST_S", 0.0)


@pytest.fixture
def upload(digits: tuple[np.ndarray, np.ndarray]) -> bytes:
    return npz(images=digits[0][:60], labels=digits[1][:60])


def finetune(api: httpx.Client, upload: bytes, model: str = "m") -> httpx.Response:
    return api.post("/finetune", files={"data": ("data", upload)}, data={"model": model, "spec": SPEC})


@dataclass
class State:
    """What is on disk."""

    files: dict[Path, bytes | None]  # None: a directory
    store: bytes

    def write(self, home: Path) -> None:
        for path, content in sorted(self.files.items()):
            place = home / path
            place.mkdir() if content is None else place.write_bytes(content)
        if self.store:
            (home / STORE).write_bytes(self.store)


@dataclass
class Recorder:
    """Notes after every fsync and every commit what a failure of the power at this moment would leave.

    That is the content of files as it was at their last fsync, under the names that their directories had at their last
    fsync; whatever was not synced is lost. A commit is on disk, for SQLite syncs it.
    """

    home: Path
    states: list[State] = field(default_factory=list)
    _contents: dict[int, bytes] = field(default_factory=dict)  # by inode
    _names: dict[int, list[tuple[str, int, bool]]] = field(default_factory=dict)  # name, inode, is a directory
    _held: list[int] = field(default_factory=list)  # open, so that no other file gets the number of a removed one
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def synced(self, descriptor: int) -> None:
        with self._lock:
            status = os.fstat(descriptor)
            self._held.append(os.dup(descriptor))
            path = Path(f"/proc/self/fd/{descriptor}")
            if stat.S_ISDIR(status.st_mode):
                self._names[status.st_ino] = [(e.name, e.inode(), e.is_dir()) for e in os.scandir(path)]
            else:
                self._contents[status.st_ino] = path.read_bytes()
            self.note()

    def committed(self) -> None:
        with self._lock:
            self.note()

    def note(self) -> None:
        content = b""
        if (self.home / STORE).exists():
            with (
                contextlib.closing(sqlite3.connect(f"file:{self.home / STORE}?mode=ro", uri=True)) as store,
                contextlib.closing(sqlite3.connect(":memory:")) as copy,
            ):
                store.backup(copy)
                content = copy.serialize()
        self.states.append(State(dict(self._below(self.home.stat().st_ino, Path())), content))

    def _below(self, folder: int, path: Path) -> Iterator[tuple[Path, bytes | None]]:
        for name, inode, is_directory in self._names.get(folder, ()):
            if is_directory:
                yield path / name, None
                yield from self._below(inode, path / name)
            elif not name.startswith(STORE):
                yield path / name, self._contents.get(inode, b"")

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)


@contextlib.contextmanager
def recording(home: Path) -> Iterator[Recorder]:
    recorder = Recorder(home)
    fsync = os.fsync

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        recorder.synced(descriptor)

    def committed(dialect: Any, connection: Any) -> None:
        COMMIT(dialect, connection)
        recorder.committed()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", synced)
        patch.setattr(DefaultDialect, "do_commit", committed)
        try:
            yield recorder
        finally:
            recorder.close()


def check(settings: Settings, engine: sa.Engine, job_id: str | None) -> str:
    """Assert that store and disk agree and the job is there; returns its status."""
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
    registry, jobs = Registry(engine), Jobs(engine)
    for version in registry.live():
        check_files(settings.version(version.model, version.version))
    for model, route in registry.routes().items():
        assert {label.version for label in route.labels.values()} <= set(route.classes), model
    if job_id is None:
        return ""
    job = jobs.get(job_id)
    assert Dataset.load(settings.datasets / job.dataset.file).described().id == job.dataset.id
    assert job.status != "succeeded" or registry.find(job.model, job.version)
    return job.status


def finish(settings: Settings, engine: sa.Engine, server: ModelServer, job_id: str) -> None:
    """What a worker does after a restart, until the job is done."""
    jobs, registry = Jobs(engine), Registry(engine)
    for ended in jobs.recover("w2"):
        raise AssertionError(f"{ended.id} was given up: {ended.error}")
    publish_base(settings, registry, [server])
    while (job := jobs.claim("w2")) is not None:
        run_job(job, settings=settings, jobs=jobs, registry=registry, servers=[server])
    assert check(settings, engine, job_id) == "succeeded"
    assert jobs.get(job_id).version in registry.routes()["m"].classes


@pytest.mark.exhaustive
def test_after_a_power_failure_at_any_moment_nothing_acknowledged_is_lost(
    tmp_path: Path, model_server: str, upload: bytes
) -> None:
    home = tmp_path / "home"
    settings = Settings(home=home, model_server=model_server)
    home.mkdir()
    with ModelServer(model_server) as server, recording(home) as recorder:
        server.reload(home, {})
        settings.make_home()
        engine = connect(settings.store_url)
        jobs, registry = Jobs(engine), Registry(engine)
        publish_base(settings, registry, [server])
        with gateway(settings) as api:
            answer = finetune(api, upload)
            acknowledged = len(recorder.states)
        assert answer.status_code == 202, answer.text
        job = jobs.claim("w1")
        assert job is not None
        run_job(job, settings=settings, jobs=jobs, registry=registry, servers=[server])
        sha256 = registry.find("m").manifest.sha256
        engine.dispose()
        done = len(recorder.states)
        assert 10 < acknowledged < done - 10, (acknowledged, done)
        seen: set[tuple[Any, ...]] = set()
        for number, state in enumerate(recorder.states[:done]):
            place = tmp_path / f"after-{number}"
            place.mkdir()
            state.write(place)
            restarted = Settings(home=place, model_server=model_server)
            restarted.make_home()
            store = connect(restarted.store_url)
            status = check(restarted, store, job.id if number >= acknowledged else None)
            assert status == "succeeded" or number < done - 1
            files = tuple(sorted(state.files))
            if number >= acknowledged and (files, status) not in seen:  # a job may take a second, so not from each
                seen.add((files, status))
                server.reload(place, {})
                finish(restarted, store, server, job.id)
                assert Registry(store).find("m").manifest.sha256 == sha256
            store.dispose()
            shutil.rmtree(place)
        assert len(seen) > 3
        assert any(path.suffix == ".npz" and "checkpoints" in path.parts for files, _ in seen for path in files)
        server.reload(home, {})


class Failing:
    """Fails the n-th call that changes the disk or the store."""

    def __init__(self, at: int, failure: Callable[[], Exception], database: Callable[[], Exception]) -> None:
        self._at, self._failure, self._database = at, failure, database
        self.calls = 0
        self._lock = threading.Lock()

    def _counted(self, failure: Callable[[], Exception]) -> None:
        with self._lock:
            self.calls += 1
            if self.calls == self._at:
                raise failure()

    @contextlib.contextmanager
    def armed(self, home: Path) -> Iterator[None]:
        def failing(call: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(call)
            def fails(*args: Any, **more: Any) -> Any:
                self._counted(self._failure)
                return call(*args, **more)

            return fails

        opened = open

        def opening(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            if set(mode) & set("wxa+") and str(file).startswith(str(home)):
                self._counted(self._failure)
            return opened(file, mode, *args, **more)

        def committing(dialect: Any, connection: Any) -> None:
            self._counted(self._database)
            COMMIT(dialect, connection)

        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "rename", "mkdir"):
                patch.setattr(os, name, failing(getattr(os, name)))
            patch.setattr("io.open", opening)
            patch.setattr("builtins.open", opening)
            patch.setattr(DefaultDialect, "do_commit", committing)
            yield


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO], ids=["full", "broken"])
def test_when_any_one_write_fails_the_error_is_clear_and_nothing_is_half_done(
    place: Place, upload: bytes, number: int
) -> None:
    said = "database or disk is full" if number == errno.ENOSPC else "disk I/O error"
    codes = {"storage_full"} if number == errno.ENOSPC else {"storage_failed", "store_unavailable"}
    statuses = {507} if number == errno.ENOSPC else {503}
    probe = np.zeros((1, 784), np.uint8)
    outcomes = []

    def failure() -> Exception:
        return OSError(number, os.strerror(number))

    def database() -> Exception:
        return sa.exc.OperationalError("COMMIT", {}, sqlite3.OperationalError(said))

    with gateway(place.settings) as api:
        for at in itertools.count(1):
            failing = Failing(at, failure, database)
            with failing.armed(place.settings.home):
                answer = finetune(api, upload, f"m{at}")
                error: dict[str, Any] = answer.json().get("error") or {}
                if answer.status_code != 202:
                    assert answer.status_code in statuses, answer.text
                    assert error["code"] in codes, error
                else:
                    error = attempt(place)
                    assert not error or error["code"] in codes, error
                assert place.servers[0].predict(BASE, 1, probe).version == 1  # predictions go on
            outcomes.append(error.get("code", "succeeded"))
            live = {(version.model, version.version) for version in place.registry.live()}
            for model, version in live:
                check_files(place.settings.version(model, version))
            assert live == {(model, v) for model, versions in place.registry.wanted().items() for v in versions}
            assert jobs_left(place) == [], "a job is stuck"
            staged = [path for path in place.settings.staging.rglob("*") if path.is_file() and path.name != "lock"]
            assert staged == []
            assert {path.suffix for path in place.settings.checkpoints.glob("*/*")} <= {".npz"}
            if failing.calls < at:
                break
    assert outcomes[-1] == "succeeded"
    assert len(outcomes) > 20
    assert outcomes.count("succeeded") < len(outcomes) - 5


def attempt(place: Place) -> dict[str, Any]:
    """Run the queued job as the worker's loop does; returns its error."""
    for _ in range(3):
        with contextlib.suppress(sa.exc.OperationalError):
            for ended in place.jobs.recover("w"):
                clear_leftovers(ended, settings=place.settings, registry=place.registry, servers=place.servers)
            job = place.jobs.claim("w")
            if job is None:
                return {}
            try:
                with translated():
                    place.run(job)
            except TemperError as exc:
                error = {"code": exc.code, "message": exc.message, "param": None}
                place.jobs.finish(job, "failed", error=error)
                return error
            return {}
    raise AssertionError("the store failed three times")


def jobs_left(place: Place) -> list[str]:
    page, _ = place.jobs.page(after=None, limit=100)
    return [job.id for job in page if job.status in ("queued", "running")]
