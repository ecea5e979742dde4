"""The command, and the `locust` command, as an operator starts them."""

import csv
import json
import os
import signal
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from click.testing import CliRunner

from load.command import main
from store.processes import free_port
from tests.api.test_keys import certificate
from tests.conftest import SMALL, Service, eventually, running_service

ROOT = Path(__file__).parents[2]
LOCUSTFILE = ROOT / "load" / "locustfile.py"
QUIET = {"TEMPER_LOAD_KINDS": "clean=1", "TEMPER_LOAD_REQUESTS": "50", "TEMPER_LOAD_P95_MS": "2000",
         "TEMPER_LOAD_P99_MS": "5000"}  # fmt: skip


def started(folder: Path, *command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    given = {**os.environ, "PYTHONPATH": str(ROOT), "TEMPER_LOAD_OUT": str(folder / "out"), **QUIET, **environment}
    return subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=given,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "summary.json").read_text())
    return found


def test_wrong_options_and_an_absent_service_have_exit_codes_of_their_own(tmp_path: Path) -> None:
    wrong = CliRunner().invoke(main, ["--forms", "xml", "--rate", "-1"])
    assert wrong.exit_code == 2
    assert "--forms xml: 'xml' is none of json, png, bytes" in wrong.stderr
    assert "--rate -1.0: Input should be greater than 0" in wrong.stderr
    url = f"http://127.0.0.1:{free_port()}"
    away = CliRunner().invoke(main, ["--url", url, "--kinds", "clean"])
    assert (away.exit_code, f"Error: {url}: ConnectionRefusedError" in away.stderr) == (3, True)
    np.savez(tmp_path / "wrong.npz", images=np.zeros((2, 8, 8), np.uint8), labels=np.zeros(2))
    images = CliRunner().invoke(main, ["--images", str(tmp_path / "wrong.npz")])
    assert images.exit_code == 2
    assert "expected images (n, 28, 28) uint8 and labels (n,), got (2, 8, 8) uint8" in images.stderr


def test_processes_that_do_not_start_are_not_a_missed_objective(service: Service, tmp_path: Path) -> None:
    lines = [
        "import gevent.monkey", "gevent.monkey.patch_all()", "from load import command, scenarios",
        "scenarios.WORKERS_READY_S = 0.0", "command.main()",
    ]  # fmt: skip
    (tmp_path / "impatient.py").write_text("\n".join(lines))
    done = started(tmp_path, "impatient", "--url", service.url, "--workers", "1")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (4, "Error: --workers: 1 workers did not start")


def test_a_directory_that_cannot_be_written_is_refused_before_the_load(service: Service, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out, why in ((tmp_path / "file", "File exists"), (Path("/proc/none"), "No such file or directory")):
        refused = CliRunner().invoke(main, ["--url", service.url, "--kinds", "clean", "--out", str(out)])
        assert (refused.exit_code, f"--out {out}: {why}" in refused.stderr) == (2, True), refused.stderr


@pytest.mark.slow
def test_an_interrupted_run_reports_what_it_has_measured(service: Service, tmp_path: Path) -> None:
    command = ["load", "mixed", "--url", service.url, "--rate", "40", "--duration-s", "600", "--finetuners", "0"]
    given = {**os.environ, "PYTHONPATH": str(ROOT), "TEMPER_LOAD_OUT": str(tmp_path / "out"), **QUIET}
    before = predicted(service)
    running = subprocess.Popen([sys.executable, "-m", *command], cwd=tmp_path, env=given)
    try:
        eventually(lambda: predicted(service) > before + 100, "it has sent requests", 60)
        running.send_signal(signal.SIGINT)
        assert running.wait(60) in (0, 1)
    finally:
        running.kill()
    found = summary(tmp_path)
    assert found["predictions"]["count"] >= 100
    assert any("interrupted" in note for note in found["notes"])


def predicted(service: Service) -> float:
    """Predictions that the gateway has answered."""
    lines = service.api.get("/metrics").text.splitlines()
    mine = (line for line in lines if line.startswith("temper_requests_total") and 'route="/predict"' in line)
    return sum(float(line.split()[-1]) for line in mine)


@pytest.mark.exhaustive
def test_two_workers_share_the_rate_and_their_samples_are_judged_together(service: Service, tmp_path: Path) -> None:
    command = ["load", "mixed", "--url", service.url, "--workers", "2", "--rate", "60", "--duration-s", "6"]
    done = started(tmp_path, *command, "--finetuners", "0", "--accuracy", "0.8")
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary(tmp_path)
    assert found["verdict"] == "kept"
    assert found["generator"]["processes"] == 2
    assert found["predictions"]["count"] == pytest.approx(60 * 6, rel=0.3)
    assert found["server_ms"]["model"] > 0
    assert found["versions"] == {"lenet5": {"1": found["predictions"]["count"]}}
    with (tmp_path / "out" / "seconds.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(int(row["due"]) for row in rows) == found["predictions"]["count"]
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!doctype html>")


@pytest.mark.slow
def test_a_missed_objective_decides_the_exit_code(service: Service, tmp_path: Path) -> None:
    command = ["load", "spike", "--url", service.url, "--duration-s", "3", "--rate", "40", "--p95-ms", "0.1"]
    done = started(tmp_path, *command, "--finetuners", "0", "--operators", "0")
    assert done.returncode == 1, done.stdout + done.stderr
    assert [one["name"] for one in summary(tmp_path)["objectives"] if not one["is_kept"]] == ["p95"]
    assert "recovery_s" in summary(tmp_path)["figures"]


@pytest.mark.exhaustive
def test_locust_itself_runs_the_users_with_a_master_and_two_workers(service: Service, tmp_path: Path) -> None:
    command = ["locust", "-f", str(LOCUSTFILE), "--headless", "--processes", "2", "--users", "4", "--spawn-rate", "4",
               "--run-time", "6", "--host", service.url, "Predictor"]  # fmt: skip
    done = started(tmp_path, *command)
    assert done.returncode == 0, done.stdout + done.stderr
    found = summary(tmp_path)
    assert found["predictions"]["count"] == pytest.approx(4 * 10 * 6, rel=0.35)
    assert found["predictions"]["failed"] == 0


@pytest.mark.exhaustive
def test_every_user_works_with_a_key_over_grpc_and_leaves_nothing_behind(tmp_path: Path) -> None:
    environment = {**os.environ, "TEMPER_HOME": str(tmp_path / "home"), **SMALL}
    made = subprocess.run(
        [sys.executable, "-m", "cli", "keys", "create", "--name", "load", "--scope", "admin", "--json"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    key = next(value for value in json.loads(made.stdout).values() if str(value).startswith("tmp_"))
    with running_service(tmp_path / "home", key) as service:
        refused = started(tmp_path, "load", "--url", service.url)
        assert (refused.returncode, "--api-key: " in refused.stderr) == (2, True)
        socket = f"unix:{tmp_path / 'home' / 'run' / 'model_server.sock'}"
        command = [
            "load",
            "mixed",
            "--url",
            service.url,
            "--model-server",
            socket,
            "--rate",
            "20",
            "--duration-s",
            "25",
        ]
        done = started(tmp_path, *command, "--skew-s", "1", "--operators", "2", TEMPER_API_KEY=key)
        found = summary(tmp_path)
        assert found["errors"] == {}, done.stdout
        assert done.returncode == 0, done.stdout + done.stderr
        names = set(found["requests"])
        assert {"JOB fine-tune", "POST /predict checked", "gRPC Predict", "GET /finetune/{id}/events",
                "GET /metrics", "GET /datasets"} <= names  # fmt: skip
        assert found["accuracy"]["clean"]["accuracy"] > 0.8
        assert key not in json.dumps(found) + done.stdout + done.stderr
        eventually(
            lambda: [model["name"] for model in service.api.get("/models").json()["data"]] == ["lenet5"],
            "the models of the test are gone",
        )


@pytest.mark.exhaustive
def test_our_p99_of_a_frozen_gateway_is_that_of_an_independent_open_loop_generator(tmp_path: Path) -> None:
    with running_service(tmp_path / "home") as service:
        (gateway,) = service.children("api")
        done = started(tmp_path, "load.bench_truth", "--url", service.url, "--pid", str(gateway), "--json")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)["figures_ms"]
    waiting, ours, independent = figures.values()
    assert ours[2] > 1500  # most of a freeze of 2 s
    assert ours[2] == pytest.approx(independent[2], rel=0.05)
    assert ours[1] == pytest.approx(independent[1], rel=0.05)
    assert waiting[1] < 0.5 * ours[1]  # a p95 without the stall


@pytest.mark.exhaustive
def test_an_https_service_is_loaded_if_its_certificate_is_trusted(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    port = free_port()
    settings = {"TEMPER_TLS_CERT": str(cert), "TEMPER_TLS_KEY": str(key), "TEMPER_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-m", "cli", "serve", "--port", str(port)]
    server = subprocess.Popen(command, env={**os.environ, **SMALL, **settings})
    try:
        url = f"https://127.0.0.1:{port}"
        context = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=url, verify=context) as api:
            eventually(lambda: api.get("/models/lenet5").is_success, "the base model is there")
        given = ["load", "single-stream", "--url", url, "--duration-s", "1"]
        trusted = started(tmp_path, *given, "--ca", str(cert), "--p90-ms", "5000")
        assert trusted.returncode == 0, trusted.stdout + trusted.stderr
        unknown = started(tmp_path, *given)
        assert (unknown.returncode, "CERTIFICATE_VERIFY_FAILED" in unknown.stderr) == (3, True)
    finally:
        server.terminate()
        server.wait(30)
