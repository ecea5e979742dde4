"""The health checks of the images tell processes that work from those that do not."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2_grpc
from grpc_health.v1.health import HealthServicer

from store.processes import free_port
from store.settings import Settings
from tests.cli.test_doctor import self_signed
from tests.conftest import Service

ROOT = Path(__file__).parents[2]


def check(*arguments: str, **settings: str) -> tuple[int, str]:
    """The exit code of a health check, and what it says."""
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **settings}
    command = [sys.executable, "-m", "deploy.healthcheck", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr.strip()


def test_a_gateway_that_answers_is_healthy_on_any_address(service: Service) -> None:
    port = service.url.rpartition(":")[2]
    assert check("gateway", TEMPER_PORT=port, TEMPER_HOST="0.0.0.0") == (0, "")
    assert check("gateway", TEMPER_PORT=port, TEMPER_HOST="127.0.0.1", http_proxy="http://127.0.0.1:9") == (0, "")


def test_a_gateway_that_does_not_answer_is_not_healthy() -> None:
    port = free_port()
    code, said = check("gateway", TEMPER_PORT=str(port))
    assert code == 1
    assert said.startswith(f"unhealthy: http://127.0.0.1:{port}/healthz: ")
    assert "Traceback" not in said


def test_a_wrong_setting_is_named() -> None:
    code, said = check("gateway", TEMPER_PORT="http")
    assert (code, said.partition(": ")[2][:11]) == (1, "TEMPER_PORT")


def test_a_model_server_that_answers_is_healthy(model_server: str) -> None:
    assert check("model-server", "--address", model_server) == (0, "")


def test_a_model_server_that_does_not_answer_is_not_healthy() -> None:
    address = f"127.0.0.1:{free_port()}"
    code, said = check("model-server", "--address", address)
    assert code == 1
    assert said.startswith(f"unhealthy: {address}: UNAVAILABLE")


def test_a_model_server_that_demands_certificates_is_asked_with_one(tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path, "server")
    pair = [(key.read_bytes(), cert.read_bytes())]
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    demanding = grpc.ssl_server_credentials(pair, cert.read_bytes(), require_client_auth=True)
    address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', demanding)}"
    server.start()
    files = {"CA": cert, "CERT": cert, "KEY": key}
    told = {f"TEMPER_MODEL_SERVER_{name}": str(path) for name, path in files.items()}
    try:
        assert check("model-server", "--address", address, **told) == (0, "")
        assert check("model-server", "--address", address)[0] == 1
    finally:
        server.stop(None)


def test_a_worker_that_is_ready_is_healthy(service: Service) -> None:
    assert check("trainer", TEMPER_HOME=str(service.home)) == (0, "")


@pytest.mark.parametrize("age_s", [None, 60.0])
def test_a_worker_that_shows_no_fresh_pulse_is_not_healthy(tmp_path: Path, age_s: float | None) -> None:
    other = tmp_path / "worker-elsewhere-1.pulse"
    other.touch()  # of a container that shares the home
    if age_s is not None:
        file = Settings(home=tmp_path).pulse_file(1)
        file.touch()
        os.utime(file, times=(time.time() - age_s,) * 2)
    code, said = check("trainer", TEMPER_HOME=str(tmp_path))
    assert code == 1
    assert ("the worker last showed 6" if age_s else "no worker of this host") in said
