"""Several gateways and workers on one PostgreSQL, as on several machines: everything is killed, nothing is lost."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa

from serving.publishing import check_files
from serving.registry import Registry
from store.engine import connect
from store.processes import free_port
from tests.conftest import SMALL, PostgreSQL, eventually, npz, opened
from trainer.jobs.records import MAX_ATTEMPTS, Jobs

SPEC = json.dumps({"epochs": 1, "method": "head"})
GATEWAYS, WORKERS = 2, 3
MODELS = ("a", "b", "c", "d")


class Machines:
    """A model server, two gateways and three workers, started again whenever they end."""

    def __init__(self, home: Path, store: str) -> None:
        address = f"127.0.0.1:{free_port()}"
        environment = {**os.environ, **SMALL, "TEMPER_HOME": str(home), "TEMPER_STORE": store}
        environment |= {"TEMPER_MODEL_SERVER": address, "TEMPER_KEEP_VERSIONS": "0"}
        ports = [free_port() for _ in range(GATEWAYS)]
        self.urls = [f"http://127.0.0.1:{port}" for port in ports]
        self._log = (home / "log").open("ab")
        self._commands: dict[str, tuple[list[str], dict[str, str]]] = {
            "model server": (["serving", "--address", address, "--rest-address", ""], environment),
            **{f"gateway {i}": (["api"], environment | {"TEMPER_PORT": str(port)}) for i, port in enumerate(ports)},
            **{f"worker {i}": (["trainer"], environment) for i in range(WORKERS)},
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._keeper = threading.Thread(target=self._keep_running)

    def __enter__(self) -> "Machines":
        self._keeper.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._keeper.join()
        for process in self._running.values():
            process.terminate()
        for process in self._running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._log.close()

    def _keep_running(self) -> None:
        while not self._stopped.wait(0.2):
            with self._lock:
                for name, (command, environment) in self._commands.items():
                    process = self._running.get(name)
                    if process is None or process.poll() is not None:
                        self._running[name] = subprocess.Popen(
                            [sys.executable, "-m", *command], env=environment, stdout=self._log, stderr=self._log
                        )

    def kill(self, name: str) -> None:
        with self._lock:
            self._running[name].send_signal(signal.SIGKILL)
            self._running[name].wait()

    def ask(self, method: str, path: str, *, first: int = 0, **more: Any) -> httpx.Response:
        """The answer of a gateway that is there; `more` has to bring an Idempotency-Key if it creates something."""

        def look() -> httpx.Response | None:
            for url in (*self.urls[first:], *self.urls[:first]):
                with contextlib.suppress(httpx.TransportError):
                    answer = httpx.request(method, url + path, timeout=60, **more)
                    if answer.status_code != 503:
                        return answer
                    assert answer.headers["Retry-After"], answer.text
            return None

        return eventually(look, f"{method} {path} is answered", 120)

    def ready(self) -> bool:
        found = [httpx.get(f"{url}/readyz") for url in self.urls]
        return all(answer.status_code == 200 and len(answer.json()["workers"]) >= WORKERS for answer in found)


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[PostgreSQL]:
    (tmp_path / "postgresql").mkdir()
    server = PostgreSQL(tmp_path / "postgresql")
    yield server
    server.stop()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("count", "kills"), [(24, 4), (200, 25)])
def test_every_job_is_done_exactly_once_whatever_is_killed(
    tmp_path: Path, postgres: PostgreSQL, digits: tuple[np.ndarray, np.ndarray], count: int, kills: int
) -> None:
    rng = random.Random(count)
    home = tmp_path / "home"
    home.mkdir()
    upload = npz(images=digits[0][:60], labels=digits[1][:60])
    connect(postgres.url).dispose()
    with Machines(home, postgres.url) as machines, opened(postgres.url) as engine:
        eventually(machines.ready, "everything is ready", 180)
        jobs = Jobs(engine)

        def submit(number: int) -> str:
            form = {"model": MODELS[number % len(MODELS)], "spec": SPEC}
            headers = {"Idempotency-Key": f"job-{number}"}
            answer = machines.ask(
                "POST", "/finetune", first=number % GATEWAYS, data=form, files={"data": upload}, headers=headers
            )
            assert answer.status_code == 202, answer.text
            return str(answer.json()["id"])

        def succeeded() -> int:
            with engine.connect() as connection:
                return int(connection.execute(sa.text("SELECT count(*) FROM jobs WHERE finished_at > 0")).scalar_one())

        with ThreadPoolExecutor(4) as clients:
            submitted = [clients.submit(submit, number) for number in range(count)]
            for blow in range(kills):
                eventually(lambda: succeeded() >= count * (blow + 1) // (kills + 2), f"blow {blow}", 900)  # noqa: B023
                machines.kill(rng.choice([f"worker {rng.randrange(WORKERS)}", f"gateway {rng.randrange(GATEWAYS)}"]))
            ids = [each.result() for each in submitted]
        outage(machines, postgres, upload)
        eventually(lambda: succeeded() == count, "all jobs end", 900)
        found = [jobs.get(job_id) for job_id in ids]
        assert [job.status for job in found if job.status != "succeeded"] == []
        assert len(set(ids)) == count
        assert max(job.attempts for job in found) <= MAX_ATTEMPTS
        ends = [[event for event in jobs.events(job.id) if event.data.get("status") == "succeeded"] for job in found]
        assert {len(each) for each in ends} == {1}
        live = {(version.model, version.version): version.job_id for version in Registry(engine).live()}
        done = {(job.model, job.version): job.id for job in found}
        assert done == {key: job_id for key, job_id in live.items() if key[0] in MODELS}
        for model, version in done:
            check_files(home / "models" / model / str(version))
        newest = {model: max(version for name, version in live if name == model) for model in MODELS}
        body = {"range": "byte", "instances": digits[0][:1].tolist()}
        for model, url in ((model, url) for model in MODELS for url in machines.urls):
            answer = httpx.post(f"{url}/predict", json={"model": model, "version": newest[model], **body}, timeout=60)
            assert (answer.status_code, answer.json().get("version")) == (200, newest[model]), answer.text
        first, second = machines.urls
        assert httpx.put(f"{first}/models/a/labels/canary", json={"version": newest["a"]}).status_code == 200
        eventually(lambda: httpx.get(f"{second}/v1/models/a/labels/canary").status_code == 200, "both know the label")
    said = (home / "log").read_text()
    # SIGTERM may reach a worker inside a destructor of TensorFlow, where Python ignores it and says so.
    assert said.count("Traceback") == said.count("Exception ignored in")


def outage(machines: Machines, postgres: PostgreSQL, upload: bytes) -> None:
    """While the store is away, what needs it is refused with 503 and Retry-After; predictions are answered."""
    eventually(machines.ready, "everything is ready", 180)
    postgres.stop()
    for url in machines.urls:
        answers = [
            httpx.get(f"{url}/finetune", timeout=60),
            httpx.post(f"{url}/finetune", data={"model": "a", "spec": SPEC}, files={"data": upload}, timeout=60),
            httpx.put(f"{url}/models/a/labels/canary", json={"version": 1}, timeout=60),
        ]
        assert [(answer.status_code, answer.headers.get("Retry-After")) for answer in answers] == [(503, "1")] * 3
        predicted = httpx.post(f"{url}/predict", json={"model": "lenet5", "instances": [[0] * 784]}, timeout=60)
        assert predicted.status_code == 200, predicted.text
    postgres.start()
    eventually(machines.ready, "everything works again", 60)
