"""What only the embedded model server does. tests/contract holds what it shares with TensorFlow Serving."""

import asyncio
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.embedded import model_manager
from serving.embedded.model_manager import AVAILABLE, LOADERS, LOADING, MAX_WAITING, START, Models
from serving.embedded.rapid_json import ParseError, parse
from serving.embedded.rest import create_app
from serving.embedded.servable import Refused
from tests.conftest import eventually
from tests.contract.conftest import config, predict_request, put


def tcp_listeners(pid: int) -> list[Any]:
    """Local addresses on which a process listens."""
    return [one.laddr for one in psutil.Process(pid).net_connections("tcp") if one.status == psutil.CONN_LISTEN]


def test_it_serves_on_a_unix_socket_alone(tmp_path: Path) -> None:
    address = f"unix:{tmp_path / 'model-server.sock'}"
    command = [sys.executable, "-m", "serving", "--address", address, "--rest-address", ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == f"model server ready on {address}\n"
            with grpc.insecure_channel(address) as channel:
                answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert tcp_listeners(process.pid) == []
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("unix:/nowhere/model-server.sock", "cannot listen on unix:/nowhere/model-server.sock (--address)"),
        pytest.param("192.0.2.1:8500", "cannot listen on 192.0.2.1:8500 (--address)", marks=pytest.mark.slow),
    ],
)
def test_an_address_that_cannot_be_had_is_named(address: str, message: str) -> None:
    command = [sys.executable, "-m", "serving", "--address", address, "--rest-address", ""]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode == 1
    assert message in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b' {"a": [1, 2.5, null, true, false, "x", {}, []]} ', {"a": [1, 2.5, None, True, False, "x", {}, []]}),
        (b'[Inf, -Inf, Infinity, -Infinity, 1] x"', [math.inf, -math.inf, math.inf, -math.inf, 1]),
        (rb'["\ud83d\ude00\u00e9\n\/", Inf]', ["\U0001f600é\n/", math.inf]),
        (b'["e100", 1e100, 1E-400]', ["e100", 1e100, 0.0]),
        (b"[18446744073709551615, -9223372036854775808, Inf]", [2**64 - 1, -(2**63), math.inf]),
        (b'["\xff", Inf]', ["\udcff", math.inf]),
        (b'{"a": -0.5e+1, "b": 0}\0{', {"a": -5.0, "b": 0}),
    ],
)
def test_json_is_read_as_rapidjson_reads_it(body: bytes, value: Any) -> None:
    assert parse(body) == value
    assert parse(b"\xef\xbb\xbf" + body) == value


@pytest.mark.parametrize(
    ("body", "message", "offset"),
    [
        (b"  \n", "The document is empty.", 3),
        (b"\0{}", "The document is empty.", 0),
        (b'["\xc3\xa9", tru]', "Invalid value.", 10),
        (b"[-]", "Invalid value.", 2),
        (b"[Infi]", "Invalid value.", 5),
        (b"[1.]", "Miss fraction part in number.", 3),
        (b"[1.5e+]", "Miss exponent in number.", 6),
        (b"[0, 1e309]", "Number too big to be stored in double.", 4),
        (b"[01]", "Missing a comma or ']' after an array element.", 2),
        (b'{"a":1,}', "Missing a name for object member.", 7),
        (b'{"a":1', "Missing a comma or '}' after an object member.", 6),
        (b'["abc', "Missing a closing quotation mark in string.", 5),
        (b'["a\nb"]', "Invalid encoding in string.", 3),
        (rb'["a\qb"]', "Invalid escape character in string.", 3),
        (rb'["\u12g4"]', "Incorrect hex digit after \\u escape in string.", 2),
        (rb'["\ud83d"]', "The surrogate pair in string is invalid.", 2),
        (rb'["\udc00"]', "The surrogate pair in string is invalid.", 2),
    ],
)
def test_json_errors_are_those_of_rapidjson(body: bytes, message: str, offset: int) -> None:
    with pytest.raises(ParseError) as caught:
        parse(body)
    assert (caught.value.message, caught.value.offset) == (message, offset)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b"[Inf,", b'[{"a":'])
def test_json_that_is_nested_too_deeply_is_refused(opening: bytes) -> None:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(create_app(Models()))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            return await client.post("/v1/models/m:predict", content=opening * 100_000)

    response = asyncio.run(asked())
    assert response.status_code == 400
    assert response.json() == {"error": "JSON Parse error: The document is nested too deeply."}


# --- loading ------------------------------------------------------------------------------------------------------


def copies(folder: Path, models: int, versions: int) -> dict[str, Any]:
    """Configurations of models with so many equal versions each, oldest first."""
    first = put(folder / "m0" / "1")
    for model in range(models):
        (folder / f"m{model}").mkdir(exist_ok=True)
        for version in range(1, versions + 1):
            if not (link := folder / f"m{model}" / f"{version}").exists():
                link.symlink_to(first)
    numbers = list(range(1, versions + 1))
    return {f"m{model}": config(f"m{model}", folder / f"m{model}", specific=numbers) for model in range(models)}


def states(models: Models) -> Counter[int]:
    """How many versions are in each state."""
    return Counter(state.state for model in list(models._models.values()) for state in model.states.values())


def asked(models: Models, name: str, version: int | None = None) -> int:
    """The version that answers."""
    return models.find(predict_request(name, {}, version=version).model_spec)[0]


@pytest.mark.slow
def test_a_version_that_is_asked_for_is_loaded_before_those_that_wait(tmp_path: Path) -> None:
    models = Models()
    with ThreadPoolExecutor() as pool:
        reload = pool.submit(models.reload, copies(tmp_path, models=1, versions=60))
        eventually(lambda: "m0" in models._models and models._models["m0"].states, "the versions are known")
        for version in (60, 31):
            assert asked(models, "m0", version) == version
            assert models.states("m0", version)[0][1].state == AVAILABLE
        assert states(models)[START] > 20
        reload.result()
    eventually(lambda: states(models) == {AVAILABLE: 60}, "all are loaded")
    models.reload({})


def test_the_first_version_of_every_model_is_loaded_before_the_second_of_any(tmp_path: Path) -> None:
    models = Models()
    models.reload(copies(tmp_path, models=5, versions=6))  # returns when each of them answers
    found = states(models)
    assert found[AVAILABLE] <= 5 + LOADERS
    for model in range(5):
        assert models.states(f"m{model}", 1)[0][1].state == AVAILABLE  # the first in the configuration
    models.reload({})
    eventually(lambda: AVAILABLE not in states(models), "all are unloaded, and what waited is dropped")


def test_calls_for_a_version_that_cannot_be_read_do_not_take_all_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_manager, "LOAD_WAIT_S", 120.0)
    configs = copies(tmp_path, models=1, versions=1) | {"stuck": config("stuck", tmp_path / "stuck")}
    file = tmp_path / "stuck" / "1" / "saved_model.pb"
    file.parent.mkdir(parents=True)
    os.mkfifo(file)  # whoever reads it waits for a writer, as on a disk that has gone away
    models = Models()
    with ThreadPoolExecutor() as pool:
        try:
            reload = pool.submit(models.reload, configs)
            eventually(lambda: states(models) == {AVAILABLE: 1, LOADING: 1}, "it is being loaded")
            waiting = [pool.submit(asked, models, "stuck", 1) for _ in range(MAX_WAITING)]
            eventually(lambda: models._waiting._value == 0, "calls wait for it")
            with pytest.raises(Refused, match="Servable not found"):
                asked(models, "stuck")  # at once
            assert asked(models, "m0") == 1
            assert not any(call.done() for call in waiting)
        finally:
            writer = os.open(file, os.O_RDWR)  # its reader goes on, and finds nothing,
            file.unlink()  # and who has not opened it yet finds no file
            os.close(writer)
        for call in waiting:
            with pytest.raises(Refused, match="Servable not found"):
                call.result()
        with pytest.raises(Refused, match=r"1 model\(s\) did not become available: .*name: stuck version: 1"):
            reload.result()
    models.reload({})
