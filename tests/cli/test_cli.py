"""The `temper` command as a client of a real service, and what it says when something is wrong."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli.main import follow
from store.processes import free_port
from tests.conftest import Service, eventually, npz, png

Digits = tuple[np.ndarray, np.ndarray]
COMMAND = [sys.executable, "-m", "cli"]
WIDE = {**os.environ, "COLUMNS": "120"}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, check=False, env={**WIDE, **environment}, timeout=60
    )


def temper(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run("--url", service.url, *arguments)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on standard error of a command that failed."""
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: "), line
    return line


def class_folders(root: Path, digits: Digits, count: int) -> Path:
    for index in range(count):
        place = root / str(digits[1][index])
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.png").write_bytes(png(digits[0][index]))
    return root


@contextmanager
def other_server(body: bytes, status: int = 200) -> Iterator[str]:
    """URL of an HTTP server that is not Temper and answers every GET with `body`."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_the_command_uploads_a_folder_waits_and_predicts(service: Service, digits: Digits, tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "digits", digits, 60)
    done = temper(service, "finetune", str(folder), "--model", "cli", "--epochs", "2", "--attack", "free",
                  "--epsilon", "0.05", "--method", "head", "--l2", "1e-3", "--wait")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "generalization gap" in done.stdout
    assert "cli:1 is live" in done.stdout
    assert " PGD " in done.stdout  # in the progress lines
    (attacked,) = (line for line in done.stdout.splitlines() if line.startswith("accuracy under PGD"))
    assert "epsilon 0.05" in attacked
    assert "under FGSM" in attacked
    (version,) = service.api.get("/models/cli").json()["versions"]
    spec = version["manifest"]["spec"]
    assert (spec["epochs"], spec["method"], spec["l2"]) == (2, "head", 1e-3)
    assert (spec["adversarial"]["attack"], spec["adversarial"]["epsilon"]) == ("free", 0.05)
    image = next((folder / "4").iterdir())
    assert "predicted by cli:1" in temper(service, "predict", str(image), "--model", "cli").stdout
    photo = tmp_path / "four.png"  # named for what it is not
    Image.open(image).save(photo, "JPEG")
    assert "predicted by cli:1" in temper(service, "predict", str(photo), "--model", "cli").stdout
    assert "cli" in temper(service, "models").stdout
    assert "succeeded" in temper(service, "jobs").stdout


def test_a_job_that_was_only_published_again_is_followed_to_its_end() -> None:
    job = {"progress": {"publishing": {"labelled": 1.0}}, "stage": None, "status": "succeeded", "finished_at": 1}
    assert follow(lambda: job) is job


def test_the_list_of_jobs_says_in_whole_lines_why_one_failed(service: Service, digits: Digits) -> None:
    images, labels = digits
    upload = npz(images=images[:60], labels=labels[:60])
    spec = json.dumps({"method": "full", "optimizer": "sgd", "learning_rate": 1.0, "l2": 10.0})
    job = service.finished(service.finetune(upload, "wild", spec).json()["id"])
    assert job["status"] == "failed", job
    (line,) = (line for line in temper(service, "jobs").stdout.splitlines() if job["id"] in line)
    assert job["error"]["message"] in line


def test_an_upload_that_is_refused_is_explained(service: Service, tmp_path: Path) -> None:
    (tmp_path / "d.zip").write_bytes(b"")
    line = error_line(temper(service, "finetune", str(tmp_path / "d.zip"), "--model", "m"))
    assert "empty" in line
    assert "[invalid_dataset]" in line


def test_each_detail_of_an_error_is_printed_once(service: Service, digits: Digits, tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "digits", digits, 60)
    failed = temper(service, "finetune", str(folder), "--model", "m", "--spec", '{"no_such_field": 1, "epochs": 0}')
    assert failed.stderr.count("no_such_field") == 1, failed.stderr
    for number in range(5):
        (folder / "0" / f"broken-{number}.png").write_bytes(b"no image")
    failed = temper(service, "finetune", str(folder), "--model", "m")
    assert [failed.stderr.count(f"broken-{number}.png") for number in range(5)] == [1] * 5, failed.stderr


def test_interrupted_waiting_says_how_to_go_on(service: Service, digits: Digits, tmp_path: Path) -> None:
    folder = class_folders(tmp_path / "digits", digits, 60)
    waiting = subprocess.Popen(
        [*COMMAND, "--url", service.url, "finetune", str(folder), "--model", "interrupted", "--epochs", "1000",
         "--method", "full", "--wait"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=WIDE,
    )  # fmt: skip
    assert waiting.stdout
    job = waiting.stdout.readline().split()[0]
    eventually(lambda: service.api.get(f"/finetune/{job}").json()["status"] == "running", "the job runs")
    waiting.send_signal(signal.SIGINT)
    _, said = waiting.communicate(timeout=30)
    assert service.api.post(f"/finetune/{job}/cancel").is_success  # it was still running
    service.finished(job)
    assert waiting.returncode == 130
    assert f"{service.url}/finetune/{job}/cancel" in said
    assert "temper jobs" in said
    assert "Traceback" not in said


def test_a_service_that_does_not_answer_is_reported_with_its_url() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    line = error_line(run("--url", url, "models"))
    assert url in line
    assert "temper serve" in line


@pytest.mark.parametrize("url", ["localhost:8080", "http://[::1", "http://localhost:port", "ftp://localhost"])
def test_an_invalid_url_is_reported(url: str) -> None:
    assert url in error_line(run("--url", url, "models"))


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'"text"', b'{"error": "no"}'])
@pytest.mark.parametrize("status", [200, 404])
def test_a_server_that_is_not_temper_is_recognized(body: bytes, status: int) -> None:
    with other_server(body, status) as url:
        assert "not a Temper service" in error_line(run("--url", url, "models"))


def test_a_listening_address_of_ipv6_becomes_a_valid_url() -> None:
    line = error_line(run("models", TEMPER_HOST="::1", TEMPER_PORT=str(port := free_port())))
    assert f"http://[::1]:{port}" in line


def test_a_directory_without_class_folders_is_refused_before_the_upload(tmp_path: Path) -> None:
    (tmp_path / "loose.png").write_bytes(b"")
    line = error_line(run("finetune", str(tmp_path), "--model", "m"))
    assert str(tmp_path) in line
    assert "one folder per class" in line


@pytest.mark.parametrize("command", ["finetune", "predict"])
def test_a_file_that_cannot_be_read_is_reported(service: Service, command: str) -> None:
    line = error_line(temper(service, command, "/proc/self/mem", "--model", "m"))  # even root cannot read it
    assert "Input/output error" in line


def test_a_file_that_is_no_image_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    assert "notes.txt" in error_line(run("predict", str(tmp_path / "notes.txt"), "--model", "m"))


def test_a_home_that_cannot_be_used_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in error_line(run("serve", TEMPER_HOME=str(tmp_path / "file")))
    (tmp_path / "home" / "serve.lock").mkdir(parents=True)  # opening it fails as it does in a read-only home
    assert str(tmp_path / "home" / "serve.lock") in error_line(run("serve", TEMPER_HOME=str(tmp_path / "home")))


@pytest.mark.parametrize("spec", ["{", "[]", '{"adversarial": 1}', '{"lora": [1]}'])
def test_a_spec_that_is_no_object_is_refused_before_the_upload(spec: str, tmp_path: Path) -> None:
    (tmp_path / "d.zip").write_bytes(b"")
    arguments = ("--epsilon", "0.1", "--rank", "2", "--spec", spec)
    assert "--spec" in error_line(run("finetune", str(tmp_path / "d.zip"), "--model", "m", *arguments))


def test_every_plain_field_of_the_spec_has_an_option() -> None:
    listed = run("finetune", "--help").stdout
    for name in ("method", "l1", "l2", "dropout", "epochs", "learning-rate", "optimizer", "device", "seed"):
        assert f"--{name} " in listed
