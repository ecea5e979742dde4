"""What only the embedded model server does. tests/contract holds what it shares with TensorFlow Serving."""

import asyncio
import math
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.embedded.model_manager import Models
from serving.embedded.rapid_json import ParseError, parse
from serving.embedded.rest import create_app


def tcp_listeners(pid: int) -> list[str]:
    """Local addresses on which a process listens, in hexadecimal, from /proc."""
    found = []
    ours = {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in ours:
                found.append(local)
    return found


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
        ("192.0.2.1:8500", "cannot listen on 192.0.2.1:8500 (--address)"),
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
