"""Real parts for the tests: stores, a model server process, a whole service."""

import contextlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import numpy as np
import psutil
import pytest
import sqlalchemy as sa
import tensorflow as tf
from PIL import Image

from quality.digits import all_digits
from serving.client import ModelServer
from serving.quiet import import_tensorflow
from serving.registry import Registry
from store.engine import connect
from store.processes import free_port
from store.settings import Settings
from trainer.asked import parse_asked
from trainer.jobs.datasets import Dataset
from trainer.jobs.records import Job, Jobs

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; processes would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

T = TypeVar("T")
# A service that starts soon and reports soon, and tells webhooks to servers in the test's process.
SMALL = {
    "TEMPER_ATTACK_IMAGES": "16", "TEMPER_MODEL_SERVERS": "1", "TEMPER_WEBHOOK_PRIVATE": "true",
    "TEMPER_WEBHOOK_HTTP": "true",
}  # fmt: skip

import_tensorflow()
if gpus := tf.config.list_physical_devices("GPU"):  # as in the worker
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    tf.config.experimental.enable_op_determinism()


def eventually(look: Callable[[], T | None], what: str, timeout_s: float = 60.0) -> T:
    """What `look` finds, as soon as it is true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if found := look():
                return found
        time.sleep(0.02)
    raise AssertionError(f"not within {timeout_s:g} s: {what}")


@contextlib.contextmanager
def opened(url: str) -> Iterator[sa.Engine]:
    """The store at `url`, all of whose connections are closed again."""
    engine = connect(url)
    try:
        yield engine
    finally:
        engine.dispose()


def png(image: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(image).save(encoded, "PNG")
    return encoded.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


def npz(**arrays: Any) -> bytes:
    packed = io.BytesIO()
    np.savez(packed, **arrays)
    return packed.getvalue()


def succeed(jobs: Jobs, job: Job, version: int) -> None:
    """End a running job as its worker would."""
    with jobs._engine.begin() as connection:
        jobs.succeeded(job, version, connection)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders of the longest files, so that short ones fill up the end of two processes."""
    items.sort(key=lambda item: item.path.parent.name not in ("cli", "end_to_end", "trainer"))


@pytest.fixture(scope="session")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits: (1797, 28, 28) uint8 light on dark, and (1797,) labels, shuffled."""
    images, labels = all_digits()
    order = np.random.default_rng(1).permutation(len(labels))
    return images[order], labels[order]


@pytest.fixture(scope="session")
def digits_zip(digits: tuple[np.ndarray, np.ndarray]) -> bytes:
    """200 of them as class folders."""
    images, labels = digits
    return zipped({f"{labels[i]}/{i}.png": png(images[i]) for i in range(200)})


class PostgreSQL:
    """A PostgreSQL server of its own, with its data in `folder`."""

    def __init__(self, folder: Path) -> None:
        found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or [Path(shutil.which("initdb") or "")]
        if not found[-1].is_file():
            pytest.skip("no PostgreSQL server on this machine (Debian: apt-get install postgresql)")
        binaries = found[-1].parent
        as_user: list[str | Path] = []
        if os.getuid() == 0:  # PostgreSQL refuses to run as root
            as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
            for parent in (folder, *folder.parents[:-2]):
                parent.chmod(0o755)
            shutil.chown(folder, "postgres", "postgres")
        cluster, port = folder / "cluster", free_port()
        subprocess.run(
            [*as_user, binaries / "initdb", "--auth=trust", "--username=temper", "--no-sync", "-D", cluster],
            check=True, capture_output=True, cwd="/",
        )  # fmt: skip
        self.url = f"postgresql+psycopg://temper@127.0.0.1:{port}/postgres"
        self._command: list[str | Path] = [
            *as_user, binaries / "postgres", "-D", cluster, "-p", str(port), "-k", "", "-h", "127.0.0.1", "-F"
        ]  # fmt: skip
        self.start()

    def start(self) -> None:
        self._launch()
        eventually(self._answers, "PostgreSQL answers")

    def _launch(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL, cwd="/")

    def stop(self) -> None:
        """Stop at once; all connections break."""
        self._process.send_signal(signal.SIGINT)
        self._process.wait()

    def _answers(self) -> bool:
        if self._process.poll() is not None:  # while it was stopped, another connection got its port for a moment
            self._launch()
        engine = sa.create_engine(self.url)
        try:
            engine.connect().close()
        except sa.exc.OperationalError:
            return False
        finally:
            engine.dispose()
        return True


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a PostgreSQL server of its own."""
    server = PostgreSQL(tmp_path_factory.mktemp("postgresql"))
    yield server.url
    server.stop()


@pytest.fixture
def empty_postgresql(postgresql: str) -> str:
    """Its URL, with nothing in it."""
    bare = sa.create_engine(postgresql)
    with bare.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA public CASCADE"))
        connection.execute(sa.text("CREATE SCHEMA public"))
    bare.dispose()
    return postgresql


@pytest.fixture(params=["sqlite", "postgresql"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[sa.Engine]:
    """An empty store, once of each kind."""
    if request.param == "sqlite":
        engine = connect(f"sqlite:///{tmp_path / 'temper.db'}")
    else:
        engine = connect(request.getfixturevalue("empty_postgresql"))
    yield engine
    engine.dispose()


@contextlib.contextmanager
def running_model_server(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """An embedded model server process that answers."""
    process = subprocess.Popen(
        [sys.executable, "-m", "serving", "--address", f"127.0.0.1:{port}", "--rest-address", ""]
    )
    try:
        eventually(lambda: listens(port), "the model server listens")
        yield process
    finally:
        process.kill()
        process.wait()


def freeze(pid: int) -> None:
    """SIGSTOP, and wait until every thread of the process has stopped."""
    os.kill(pid, signal.SIGSTOP)

    def stopped() -> bool:
        try:
            threads = [psutil.Process(thread.id) for thread in psutil.Process(pid).threads()]
            return all(thread.status() == psutil.STATUS_STOPPED for thread in threads)
        except psutil.NoSuchProcess:  # a thread that has just ended
            return False

    eventually(stopped, "it has stopped")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def model_server() -> Iterator[str]:
    """Address of an embedded model server process."""
    port = free_port()
    with running_model_server(port):
        yield f"127.0.0.1:{port}"


@dataclass
class Service:
    """A running `temper serve`."""

    home: Path
    url: str
    api: httpx.Client
    supervisor: subprocess.Popen[bytes]

    def children(self, module: str) -> list[int]:
        """Process ids of the siblings that run `python -m <module>`."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                with contextlib.suppress(OSError):
                    parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    if parent == self.supervisor.pid and module.encode() in (entry / "cmdline").read_bytes().split(
                        b"\0"
                    ):
                        found.append(int(entry.name))
        return found

    def kill(self, module: str) -> None:
        """SIGKILL the sibling, once it runs, and wait until it is gone."""
        (pid,) = eventually(lambda: self.children(module), f"{module} runs")
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: pid not in self.children(module), f"{module} is gone")

    def ready(self) -> bool:
        """Does everything answer, with a worker that waits for jobs?"""
        answer = self.api.get("/readyz")
        return answer.status_code == 200 and bool({"idle", "reporting"} & set(answer.json()["workers"].values()))

    def finetune(self, data: bytes, model: str, spec: str | None = "{}") -> httpx.Response:
        fields = {"model": model} | ({"spec": spec} if spec else {})
        return self.api.post("/finetune", files={"data": ("data", data)}, data=fields)

    def finished(self, job_id: str, timeout_s: float = 120.0) -> dict[str, Any]:
        """The job's record, once it has finished."""

        def look() -> dict[str, Any] | None:
            job: dict[str, Any] = self.api.get(f"/finetune/{job_id}").json()
            return job if job["finished_at"] else None

        return eventually(look, f"{job_id} finishes", timeout_s)

    def completed(self, job_id: str) -> None:
        """Wait until the job's report is complete."""

        def look() -> bool:
            return bool(self.api.get(f"/finetune/{job_id}").json()["report_status"] == "complete")

        eventually(look, f"the report of {job_id} is complete", 300.0)  # minutes of computing on a busy machine


@contextlib.contextmanager
def running_service(home: Path, key: str | None = None, **environment: str) -> Iterator[Service]:
    """A `temper serve` of its own, ready; its client sends the key."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "cli", "serve", "--port", str(port)],
        env={**os.environ, "TEMPER_HOME": str(home), **SMALL, **environment},
    )
    url = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as api:
        service = Service(home, url, api, process)
        try:
            eventually(service.ready, "the service is ready")
            yield service
        finally:
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One service for all tests that leave it as it was."""
    with running_service(tmp_path_factory.mktemp("home")) as service:
        yield service


class Place:
    """A home with a published base and a data set."""

    def __init__(self, home: Path, target: str, digits: tuple[np.ndarray, np.ndarray]) -> None:
        self.settings = Settings(home=home, model_server=target)
        self.settings.make_home()
        self.engine = connect(self.settings.store_url)
        self.jobs, self.registry, self.servers = Jobs(self.engine), Registry(self.engine), [ModelServer(target)]
        from trainer.worker.pretrained import publish_base

        publish_base(self.settings, self.registry, self.servers)
        dataset = Dataset(digits[0][:100], digits[1][:100].astype(np.int32), tuple("0123456789"))
        self.dataset = dataset.described()
        dataset.save(self.settings.datasets / f"{self.dataset.id}.npz")

    def claimed(self, spec: dict[str, Any], base: str = "lenet5:1", model: str = "m") -> Job:
        """A job that this process runs."""
        asked = parse_asked(json.dumps(spec))
        self.jobs.create(model=model, base=base, spec=asked.described(), dataset=self.dataset)
        job = self.jobs.claim("w")
        assert job is not None
        return job

    def run(self, job: Job) -> Job:
        from trainer.worker.run_job import run_job

        run_job(job, settings=self.settings, jobs=self.jobs, registry=self.registry, servers=self.servers)
        return self.jobs.get(job.id)


@pytest.fixture
def place(tmp_path: Path, model_server: str, digits: tuple[np.ndarray, np.ndarray]) -> Iterator[Place]:
    place = Place(tmp_path, model_server, digits)
    yield place
    place.servers[0].reload(tmp_path, {})
    place.engine.dispose()
