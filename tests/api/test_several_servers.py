"""A service in front of one or two model servers, some of which it runs itself."""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving.client import ModelServer
from serving.registry import Registry
from store.processes import free_port
from store.records import ReportCard
from tests.conftest import Service, eventually, freeze, opened, running_model_server, running_service

pytestmark = pytest.mark.slow
RAW = {"Content-Type": "application/octet-stream"}
HEAD = '{"epochs": 1, "method": "head"}'


class Crowd:
    """Clients that ask until they are told to stop."""

    def __init__(self, service: Service, model: str) -> None:
        self.statuses: Counter[int] = Counter()
        self.longest_s = 0.0
        self._stop = threading.Event()
        self._path = f"{service.url}/predict?model={model}"
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]

    def __enter__(self) -> "Crowd":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as api:
            while not self._stop.is_set():
                began = time.monotonic()
                self.statuses[api.post(self._path, content=bytes(784), headers=RAW).status_code] += 1
                self.longest_s = max(self.longest_s, time.monotonic() - began)

    def asked(self, more: int) -> None:
        """Wait for so many more answers."""
        goal = self.statuses.total() + more
        eventually(lambda: self.statuses.total() >= goal, f"{more} answers")


class Behind:
    """A service, and the model servers that it asks; every test leaves them running."""

    def __init__(self, stack: contextlib.ExitStack, home: Path, servers: int) -> None:
        self._stack = stack
        self.home = home
        self.ports = [free_port() for _ in range(servers)]
        self.addresses = [f"127.0.0.1:{port}" for port in self.ports]
        self.processes = [self._run(port) for port in self.ports]
        self.service = stack.enter_context(running_service(home, TEMPER_MODEL_SERVER=",".join(self.addresses)))

    def _run(self, port: int) -> subprocess.Popen[bytes]:
        return self._stack.enter_context(running_model_server(port))

    def kill(self) -> None:
        """Kill the last server."""
        self.processes[-1].kill()
        self.processes[-1].wait()

    def revive(self) -> None:
        """Start the last server again."""
        self.processes[-1] = self._run(self.ports[-1])

    def raw(self) -> httpx.Response:
        """The answer to one image for the base."""
        return self.service.api.post("/predict?model=lenet5", content=bytes(784), headers=RAW)

    def states(self) -> list[str]:
        """What the gateway says of each server."""
        found: dict[str, str] = self.service.api.get("/readyz").json()["model_servers"]
        return [found[address] for address in self.addresses]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    """A service in front of one model server."""
    with contextlib.ExitStack() as stack:
        yield Behind(stack, tmp_path_factory.mktemp("one"), servers=1)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    """A service in front of two model servers."""
    with contextlib.ExitStack() as stack:
        yield Behind(stack, tmp_path_factory.mktemp("two"), servers=2)


@pytest.mark.exhaustive
def test_one_of_two_servers_dies_under_load_and_nobody_notices(two: Behind, digits_zip: bytes) -> None:
    for version in (1, 2):
        job = two.service.finetune(digits_zip, "shared", HEAD).json()["id"]
        assert two.service.finished(job)["version"] == version
    with Crowd(two.service, "shared") as crowd:
        crowd.asked(200)
        two.kill()
        crowd.asked(200)
        eventually(lambda: two.states() == ["ok", "unavailable"], "the loss is noticed")
        assert two.service.api.get("/readyz").status_code == 200
        two.revive()
        eventually(lambda: two.states() == ["ok", "ok"], "both are up")
        with ModelServer(two.addresses[1]) as second:
            assert second.available("shared") == {1, 2}
        crowd.asked(200)
    assert set(crowd.statuses) == {200}


@pytest.mark.exhaustive
def test_a_version_published_without_a_server_is_there_when_it_returns(two: Behind, digits_zip: bytes) -> None:
    two.kill()
    job = two.service.finetune(digits_zip, "late", HEAD).json()["id"]
    assert two.service.finished(job, timeout_s=50)["status"] == "succeeded"
    with Crowd(two.service, "late") as crowd:
        crowd.asked(50)
        two.revive()
        eventually(lambda: two.states() == ["ok", "ok"], "both are up")
        with ModelServer(two.addresses[1]) as second:
            assert second.available("late") == {1}
        crowd.asked(50)
    assert set(crowd.statuses) == {200}


def test_a_server_that_freezes_is_given_up_and_its_requests_go_to_the_other(two: Behind) -> None:
    with Crowd(two.service, "lenet5") as crowd:
        crowd.asked(100)
        began = time.monotonic()
        freeze(two.processes[-1].pid)
        eventually(lambda: "unavailable" in two.states(), "it is given up")
        crowd.asked(100)
        assert time.monotonic() - began < 9  # before the requests' own time is up
    assert set(crowd.statuses) == {200}
    two.processes[-1].send_signal(signal.SIGCONT)


def test_predictions_come_back_with_their_server(one: Behind) -> None:
    one.kill()
    answer = one.raw()
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    one.revive()
    began = time.monotonic()
    eventually(lambda: one.raw().status_code == 200, "it answers")
    print(f"answered {time.monotonic() - began:.2f} s after the server listened again")


@pytest.mark.exhaustive
def test_nobody_waits_for_a_server_that_is_known_to_be_frozen(one: Behind, digits_zip: bytes) -> None:
    job = one.service.finetune(digits_zip, "unwanted", HEAD).json()["id"]
    assert one.service.finished(job)["status"] == "succeeded"
    freeze(one.processes[-1].pid)
    eventually(lambda: one.service.api.get("/readyz").status_code == 503, "it is given up")
    for _ in range(10):
        began = time.monotonic()
        answer = one.raw()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_server_unavailable")
        assert time.monotonic() - began < 0.5
    began = time.monotonic()
    assert one.service.api.delete("/models/unwanted").status_code == 200
    assert time.monotonic() - began < 3
    one.processes[-1].send_signal(signal.SIGCONT)
    eventually(lambda: one.raw().status_code == 200, "it answers")
    with ModelServer(one.addresses[0]) as server:
        eventually(lambda: not server.available("unwanted"), "the deleted model is unloaded")


def test_a_version_whose_files_are_gone_is_reported_as_such(one: Behind, tmp_path: Path) -> None:
    files = one.home / "models/lenet5/1"
    shutil.move(files, tmp_path / "elsewhere")
    one.kill()
    one.revive()
    eventually(lambda: one.raw().json()["error"]["code"] == "model_server_error", "the loss is reported")
    assert "the files of lenet5:1 are missing" in one.raw().json()["error"]["message"]
    shutil.move(tmp_path / "elsewhere", files)
    eventually(lambda: one.raw().status_code == 200, "it is back")


@pytest.mark.exhaustive
def test_a_service_with_a_standby_fails_no_request_while_its_servers_die_and_freeze(
    tmp_path: Path, digits_zip: bytes
) -> None:
    with running_service(tmp_path, TEMPER_MODEL_SERVERS="2") as service:

        def both_are_up() -> bool:
            states: dict[str, str] = service.api.get("/readyz").json()["model_servers"]
            return list(states.values()) == ["ok", "ok"]

        def process(number: int) -> int | None:
            """Id of a model server's process."""
            address = list(service.api.get("/readyz").json()["model_servers"])[number]
            named = (pid for pid in service.children("serving") if address in Path(f"/proc/{pid}/cmdline").read_text())
            return next(named, None)

        def is_replaced(number: int, gone: int) -> bool:
            return process(number) not in (None, gone)

        def send(number: int, what: signal.Signals) -> int:
            """Send a signal to the server, which answers at present; return the id of its process."""
            pid = process(number)
            assert pid is not None
            os.kill(pid, what)
            return pid

        assert service.finished(service.finetune(digits_zip, "m", HEAD).json()["id"])["status"] == "succeeded"
        eventually(both_are_up, "the standby is up")
        shutil.copytree(tmp_path / "models/m/1", tmp_path / "models/m/2")
        with opened(f"sqlite:///{tmp_path / 'temper.db'}") as engine:  # as of a worker that dies right afterwards
            registry = Registry(engine)
            registry.go_live("m", registry.reserve("m", None, registry.find("m").manifest, ReportCard()))
        with ModelServer(list(service.api.get("/readyz").json()["model_servers"])[1]) as standby:
            eventually(lambda: standby.available("m") == {1, 2}, "the standby is told of it")
        with Crowd(service, "m") as crowd:
            for number in (0, 1):
                crowd.asked(200)
                gone = send(number, signal.SIGKILL)
                crowd.asked(200)
                eventually(functools.partial(is_replaced, number, gone), "it is replaced")
                eventually(both_are_up, "both are up")
            print(f"longest wait for an answer while servers died: {crowd.longest_s:.3f} s")
            crowd.longest_s = 0.0
            crowd.asked(200)
            frozen = send(0, signal.SIGSTOP)
            crowd.asked(200)
            eventually(lambda: not both_are_up(), "it is given up")
            crowd.asked(200)
            print(f"longest wait for an answer while one froze: {crowd.longest_s:.3f} s")
        os.kill(frozen, signal.SIGCONT)
        assert set(crowd.statuses) == {200}
        assert crowd.longest_s < 1.0
