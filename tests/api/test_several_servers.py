"""A service in front of two model servers."""

import contextlib
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx

from serving.client import ModelServer
from store.processes import free_port
from tests.conftest import Service, eventually, running_model_server, running_service

RAW = {"Content-Type": "application/octet-stream"}


class Crowd:
    """Clients that ask until they are told to stop."""

    def __init__(self, service: Service, model: str) -> None:
        self.statuses: Counter[int] = Counter()
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
                self.statuses[api.post(self._path, content=bytes(784), headers=RAW).status_code] += 1

    def asked(self, more: int) -> None:
        """Wait for so many more answers."""
        goal = self.statuses.total() + more
        eventually(lambda: self.statuses.total() >= goal, f"{more} answers")


@contextlib.contextmanager
def two_servers(home: Path) -> Iterator[tuple[Service, list[str], subprocess.Popen[bytes]]]:
    """A service in front of two model servers: the service, their addresses, and the second of them."""
    ports = [free_port(), free_port()]
    addresses = [f"127.0.0.1:{port}" for port in ports]
    with (
        running_model_server(ports[0]),
        running_model_server(ports[1]) as second,
        running_service(home, TEMPER_MODEL_SERVER=",".join(addresses)) as service,
    ):
        yield service, addresses, second


def test_one_of_two_servers_dies_under_load_and_nobody_notices(tmp_path: Path, digits_zip: bytes) -> None:
    with contextlib.ExitStack() as stack:
        service, addresses, dying = stack.enter_context(two_servers(tmp_path))
        for version in (1, 2):
            job = service.finetune(digits_zip, "shared", '{"epochs": 1, "method": "head"}').json()["id"]
            assert service.finished(job)["version"] == version
        crowd = stack.enter_context(Crowd(service, "shared"))

        def states() -> dict[str, str]:
            found: dict[str, str] = service.api.get("/readyz").json()["model_servers"]
            return found

        crowd.asked(200)
        dying.kill()
        dying.wait()
        crowd.asked(200)
        eventually(lambda: states() == dict(zip(addresses, ("ok", "unavailable"), strict=True)), "the loss is noticed")
        assert service.api.get("/readyz").status_code == 200
        stack.enter_context(running_model_server(int(addresses[1].rpartition(":")[2])))
        eventually(lambda: set(states().values()) == {"ok"}, "both are up")
        with ModelServer(addresses[1]) as second:
            assert second.available("shared") == {1, 2}
        crowd.asked(200)
        assert set(crowd.statuses) == {200}


def test_a_server_that_freezes_is_given_up_and_its_requests_go_to_the_other(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        service, _, frozen = stack.enter_context(two_servers(tmp_path))
        crowd = stack.enter_context(Crowd(service, "lenet5"))
        crowd.asked(100)
        began = time.monotonic()
        frozen.send_signal(signal.SIGSTOP)
        eventually(lambda: "unavailable" in service.api.get("/readyz").text, "it is given up")
        crowd.asked(100)
        assert time.monotonic() - began < 9  # before the requests' own time is up
        assert set(crowd.statuses) == {200}


def test_predictions_come_back_with_their_server(tmp_path: Path) -> None:
    port, path = free_port(), "/predict?model=lenet5"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_model_server(port))
        service = stack.enter_context(running_service(tmp_path, TEMPER_MODEL_SERVER=f"127.0.0.1:{port}"))
        server.kill()
        server.wait()
        answer = service.api.post(path, content=bytes(784), headers=RAW)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
        stack.enter_context(running_model_server(port))
        began = time.monotonic()
        eventually(lambda: service.api.post(path, content=bytes(784), headers=RAW).status_code == 200, "it answers")
        print(f"answered {time.monotonic() - began:.2f} s after the server listened again")


def test_a_version_published_without_a_server_is_there_when_it_returns(tmp_path: Path, digits_zip: bytes) -> None:
    with contextlib.ExitStack() as stack:
        service, addresses, absent = stack.enter_context(two_servers(tmp_path))
        absent.kill()
        absent.wait()
        job = service.finetune(digits_zip, "shared", '{"epochs": 1, "method": "head"}').json()["id"]
        assert service.finished(job, timeout_s=50)["status"] == "succeeded"
        crowd = stack.enter_context(Crowd(service, "shared"))
        crowd.asked(50)
        stack.enter_context(running_model_server(int(addresses[1].rpartition(":")[2])))
        eventually(lambda: "unavailable" not in service.api.get("/readyz").text, "both are up")
        with ModelServer(addresses[1]) as second:
            assert second.available("shared") == {1}
        crowd.asked(50)
        assert set(crowd.statuses) == {200}


def test_nobody_waits_for_a_server_that_is_known_to_be_frozen(tmp_path: Path, digits_zip: bytes) -> None:
    port, path = free_port(), "/predict?model=lenet5"
    with contextlib.ExitStack() as stack:
        frozen = stack.enter_context(running_model_server(port))
        service = stack.enter_context(running_service(tmp_path, TEMPER_MODEL_SERVER=f"127.0.0.1:{port}"))
        job = service.finetune(digits_zip, "unwanted", '{"epochs": 1, "method": "head"}').json()["id"]
        assert service.finished(job)["status"] == "succeeded"
        frozen.send_signal(signal.SIGSTOP)
        eventually(lambda: service.api.get("/readyz").status_code == 503, "it is given up")
        for _ in range(10):
            began = time.monotonic()
            answer = service.api.post(path, content=bytes(784), headers=RAW)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_server_unavailable")
            assert time.monotonic() - began < 0.5
        began = time.monotonic()
        assert service.api.delete("/models/unwanted").status_code == 200
        assert time.monotonic() - began < 3
        frozen.send_signal(signal.SIGCONT)
        eventually(lambda: service.api.post(path, content=bytes(784), headers=RAW).status_code == 200, "it answers")
        with ModelServer(f"127.0.0.1:{port}") as server:
            eventually(lambda: not server.available("unwanted"), "the deleted model is unloaded")


def test_a_version_whose_files_are_gone_is_reported_as_such(tmp_path: Path) -> None:
    port, path = free_port(), "/predict?model=lenet5"
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(running_model_server(port))
        service = stack.enter_context(running_service(tmp_path, TEMPER_MODEL_SERVER=f"127.0.0.1:{port}"))
        shutil.move(tmp_path / "models/lenet5/1", tmp_path / "elsewhere")
        server.kill()
        server.wait()
        stack.enter_context(running_model_server(port))

        def error() -> dict[str, str]:
            found: dict[str, str] = service.api.post(path, content=bytes(784), headers=RAW).json()["error"]
            return found

        eventually(lambda: error()["code"] == "model_server_error", "the loss is reported")
        assert "the files of lenet5:1 are missing" in error()["message"]
        shutil.move(tmp_path / "elsewhere", tmp_path / "models/lenet5/1")
        eventually(lambda: service.api.post(path, content=bytes(784), headers=RAW).status_code == 200, "it is back")
