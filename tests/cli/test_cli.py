"""The `temper` command as a client of a real service, and what it says when something is wrong."""

import contextlib
import importlib.util
import json
import os
import pty
import re
import signal
import sqlite3
import subprocess
import sys
import termios
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from cli.main import main
from cli.show import print_gate, progress
from store.processes import free_port
from temper import Job
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


def error_line(done: subprocess.CompletedProcess[str], code: int = 1) -> str:
    """The one line on standard error of a command that failed."""
    assert done.returncode == code, done
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
    with progress() as tell:
        tell(
            Job(json={}, id="j", model="m", status="running", created_at=0, progress={"publishing": {"labelled": 1.0}})
        )
        tell(Job(json={}, id="j", model="m", status="succeeded", created_at=0, finished_at=1))


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
    assert f"temper --url {service.url} cancel {job}\n" in said
    assert f"temper --url {service.url} wait {job}\n" in said
    assert "Traceback" not in said


def test_a_service_that_does_not_answer_is_reported_with_its_url() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    line = error_line(run("--url", url, "models"), 3)
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
    line = error_line(run("models", TEMPER_HOST="::1", TEMPER_PORT=str(port := free_port())), 3)
    assert f"http://[::1]:{port}" in line


def test_a_directory_without_class_folders_is_refused_before_the_upload(tmp_path: Path) -> None:
    (tmp_path / "loose.png").write_bytes(b"")
    line = error_line(run("finetune", str(tmp_path), "--model", "m"))
    assert str(tmp_path) in line
    assert "one folder per class" in line


@pytest.mark.slow
def test_a_folder_with_a_csv_or_with_parts_is_uploaded_and_what_is_wrong_is_told(
    service: Service, digits: Digits, tmp_path: Path
) -> None:
    flat, parts = tmp_path / "flat", tmp_path / "parts"
    flat.mkdir()
    for i in range(40):
        (flat / f"{i}.png").write_bytes(png(digits[0][i]))
    rows = [f"{i}.png,{digits[1][i]}" for i in range(40)]
    (flat / "same.png").write_bytes(png(digits[0][7]))
    (flat / "labels.csv").write_text("\n".join(["file,label", *rows, f"same.png,{(digits[1][7] + 1) % 10}"]))
    for name, some in (("train", range(60)), ("test", range(60, 80))):
        class_folders(parts / name, (digits[0][some], digits[1][some]), len(some))
    ask = ("--model", "laid-out", "--dry-run")
    shown = called(service, "finetune", str(flat), *ask).stdout
    assert "41 images, 10 classes" in shown
    assert "2 images equal to one of another class: " in shown
    shown = called(service, "finetune", str(flat), *ask, "--exclude", "same.png").stdout
    assert "40 images, 10 classes" in shown
    assert "equal to one" not in shown
    (tmp_path / "list.txt").write_text("same.png\n\n3.png\n")
    listed = called(service, "finetune", str(flat), *ask, "--exclude", "4.png", "--exclude", f"@{tmp_path}/list.txt")
    assert "38 images" in listed.stdout
    assert "60 images, 20 to test on, 10 classes" in called(service, "finetune", str(parts), *ask).stdout
    refusal = called(service, "finetune", str(flat), *ask, "--exclude", "none.png", code=1).stderr
    assert "none.png: is not in the data set" in refusal
    assert "no-such" in called(service, "finetune", str(flat), *ask, "--exclude", "@no-such", code=1).stderr
    queued = called(
        service, "finetune", str(flat), "--model", "laid-out", "--epochs", "1000", "--method", "full"
    ).stdout
    assert "2 images equal to one of another class: " in queued
    called(service, "cancel", re.search(r"ftjob-\w+", queued)[0])  # type: ignore[index]


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
    for name in ("method", "l1", "l2", "dropout", "epochs", "learning-rate", "optimizer", "device", "seed", "momentum",
                 "weight-decay", "class-weights", "folds", "calibrate / --no-calibrate"):  # fmt: skip
        assert f"--{name} " in listed


LONG = "a-model-whose-name-has-all-of-the-64-characters-that-are-allowed"


def called(service: Service, *arguments: str, code: int = 0, stdin: str = "") -> Result:
    """A command, run in this process to save time."""
    done = CliRunner().invoke(main, ["--url", service.url, *arguments], input=stdin)
    assert done.exit_code == code, (done.stdout, done.stderr, done.exception)
    return done


def json_of(service: Service, *arguments: str, code: int = 0, stdin: str = "") -> Any:
    return json.loads(called(service, *arguments, "--json", code=code, stdin=stdin).stdout)


@pytest.fixture(scope="module")
def upload(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("upload") / "digits.npz"
    path.write_bytes(npz(images=digits[0][:60], labels=digits[1][:60]))
    return path


@pytest.fixture(scope="module")
def job(service: Service, upload: Path) -> str:
    """Name of a job that has made version 1 of the model `LONG`; version 2 is labelled `canary`."""
    quick = ("--model", LONG, "--method", "head", "--epochs", "1", "--checkpoints", "1", "--wait")
    done = json_of(service, "finetune", str(upload), *quick)
    assert (done["status"], done["version"]) == ("succeeded", 1)
    json_of(service, "finetune", str(upload), *quick, "--label", "canary")
    return str(done["id"])


@pytest.mark.slow
def test_every_command_prints_json_and_nothing_else(
    service: Service, job: str, upload: Path, digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image.png").write_bytes(png(digits[0][0]))
    nowhere = f"http://127.0.0.1:{free_port()}/"
    hook = json_of(service, "webhooks", "create", nowhere, "--types", "model.label.moved, fine_tuning.job.failed")
    seen = {
        "jobs": json_of(service, "jobs", "--limit", "1000")[-1],
        "status": json_of(service, "status", job),
        "wait": json_of(service, "wait", job),
        "predict": json_of(service, "predict", str(tmp_path / "image.png"), "--model", LONG),
        "models": next(model for model in json_of(service, "models") if model["name"] == LONG),
        "report": json_of(service, "report", LONG),
        "verify": json_of(service, "verify", f"{LONG}:2"),
        "promote": json_of(service, "promote", f"{LONG}:2"),
        "rollback": json_of(service, "rollback", LONG),
        "gate": json_of(service, "gate", LONG),
        "delta": json_of(service, "delta", LONG, "--output", str(tmp_path)),
        "download": json_of(service, "download", f"{LONG}:1", "--output", str(tmp_path / "x.zip")),
        "checkpoints": json_of(service, "checkpoints", job),
        "health": json_of(service, "health"),
        "events": [json.loads(line) for line in called(service, "events", job, "--json").stdout.splitlines()],
    }
    queued = json_of(service, "finetune", str(upload), "--model", LONG, "--epochs", "1000", "--method", "full")
    seen["finetune"] = queued
    seen["pause"] = json_of(service, "pause", queued["id"])
    seen["resume"] = json_of(service, "resume", queued["id"])
    seen["cancel"] = json_of(service, "cancel", queued["id"])
    seen["delete"] = json_of(service, "delete", LONG, "--label", "canary", "--yes")
    seen["datasets"] = json_of(service, "datasets", "add", str(upload))
    assert json_of(service, "datasets", "show", seen["datasets"]["id"]) == seen["datasets"]
    assert seen["datasets"] in json_of(service, "datasets", "list", "--limit", "1000")
    assert json_of(service, "datasets", "delete", seen["datasets"]["id"])["id"] == seen["datasets"]["id"]
    seen["webhooks"] = next(one for one in json_of(service, "webhooks", "list") if one["id"] == hook["id"])
    assert hook == {**seen["webhooks"], "secret": hook["secret"]}
    assert hook["types"] == ["fine_tuning.job.failed", "model.label.moved"]
    moved = json_of(service, "webhooks", "deliveries", hook["id"], "--limit", "2")
    assert [one["data"]["label"] for one in moved] == ["canary", "stable"]
    assert json_of(service, "webhooks", "replay", hook["id"], moved[0]["id"])["id"] == moved[0]["id"]
    assert json_of(service, "webhooks", "rotate", hook["id"])["secret"] != hook["secret"]
    assert json_of(service, "webhooks", "delete", hook["id"]) == {"id": hook["id"], "deleted": True}
    dry = json_of(service, "finetune", str(upload), "--model", LONG, "--dry-run")
    assert (dry["object"], dry["dataset"]["images"]) == ("fine_tuning.dry_run", 60)
    monkeypatch.setenv("TEMPER_HOME", str(tmp_path / "another"))
    seen["keys"] = json_of(service, "keys", "create", "--name", "x")
    assert json_of(service, "keys", "revoke", seen["keys"]["id"])["revoked_at"] is not None
    assert [key["id"] for key in json_of(service, "keys", "list")] == [seen["keys"]["id"]]
    seen["db"] = json_of(service, "db", "status")
    assert seen["db"]["revision"] == seen["db"]["head"]
    alone = {"serve", "gateway", "worker", "model-server", "mirror", "load"}  # processes, which print no JSON
    assert set(seen) | alone | {"doctor"} == set(main.commands)  # tests/cli/test_doctor.py reads the latter's
    assert (seen["status"]["id"], seen["wait"]["id"]) == (job, job)
    assert seen["status"].keys() == service.api.get(f"/finetune/{job}").json().keys()
    assert (seen["promote"]["version"], seen["rollback"]["version"]) == (2, 1)
    assert seen["gate"]["gate"] is None
    assert seen["verify"]["proven"]
    assert seen["report"]["report"]["validation"]["images"] > 0
    assert Path(seen["download"]["path"]).stat().st_size == seen["download"]["bytes"]
    assert [event["seq"] for event in seen["events"]] == list(range(1, len(seen["events"]) + 1))
    assert seen["delete"]["label"] == "canary"
    assert [one["epoch"] for one in seen["checkpoints"]] == [1]
    published = json_of(service, "checkpoints", job, "--publish", "1", "--label", "again")
    assert published["checkpoint"] == {"job": job, "epoch": 1}
    json_of(service, "cancel", published["id"])
    ended = json_of(service, "wait", queued["id"], code=1)  # the job that did not succeed is printed as well
    assert ended["status"] == "cancelled"


def test_a_file_replaces_a_file_and_nothing_else(service: Service, job: str, tmp_path: Path) -> None:
    pipe, link, behind = tmp_path / "pipe", tmp_path / "link", tmp_path / "behind"
    os.mkfifo(pipe)
    for command in (["delta", f"{LONG}:1"], ["download", f"{LONG}:1"], ["report", f"{LONG}:1"]):
        done = called(service, *command, "--output", str(pipe), code=1)
        assert done.stderr == f"Error: {pipe}: exists and is not a file\n"
        done = called(service, *command, "--output", str(tmp_path / "no" / "such"), code=1)
        assert done.stderr == f"Error: {tmp_path / 'no' / 'such'}: No such file or directory\n"
    assert pipe.is_fifo()
    behind.write_bytes(b"old")
    link.symlink_to(behind)
    called(service, "delta", f"{LONG}:1", "--output", str(link))
    assert link.is_symlink()
    assert len(behind.read_bytes()) > 1000
    assert "name a file" in called(service, "download", LONG, "--output", "-", code=2).stderr


@pytest.mark.exhaustive
def test_a_version_is_downloaded_as_tflite_with_its_classes(
    service: Service, job: str, upload: Path, tmp_path: Path
) -> None:
    done = called(service, "download", f"{LONG}:1", "--format", "tflite", "--output", str(tmp_path))
    (file,) = tmp_path.iterdir()
    assert file.name == f"{LONG}-1.tflite"
    proof, written = done.stdout.splitlines()
    assert re.fullmatch(
        r"largest difference from the trained model: \S+e-\d+ in logits, \S+e-\d+ in probabilities, \S+ in distance",
        proof,
    )
    assert written == f"{file}: {file.stat().st_size:,} bytes"
    classes = service.api.get(f"/models/{LONG}/versions/1").json()["classes"]
    assert zipfile.ZipFile(file).read("labels.txt").decode().splitlines() == classes


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("tf2onnx") is not None, reason="tf2onnx is installed, so nothing is missing"
)
def test_a_conversion_that_fails_is_one_line_and_leaves_no_file(service: Service, job: str, tmp_path: Path) -> None:
    for output in (tmp_path, tmp_path / "x.onnx"):
        done = called(service, "download", LONG, "--format", "onnx", "--output", str(output), "--json", code=1)
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert re.match(r"Error: onnx needs .*tf2onnx, which this installs: .* -m pip install 'temper\[onnx\]'", line)
    assert list(tmp_path.iterdir()) == []
    assert "savedmodel" in called(service, "download", LONG, "--format", "keras", code=2).stderr


@pytest.mark.slow
def test_tables_fit_a_terminal_of_80_columns(service: Service, job: str, upload: Path) -> None:
    wild = ("--method", "full", "--optimizer", "sgd", "--learning-rate", "1.0", "--l2", "10.0")
    failed = json_of(service, "finetune", str(upload), "--model", LONG, *wild, "--wait", code=1)
    url = f"http://127.0.0.1:{free_port()}/{'x' * 100}"
    hook = json_of(service, "webhooks", "create", url)["id"]
    json_of(service, "promote", f"{LONG}:2", "--label", "beta")
    dry = ["finetune", str(upload), "--model", LONG, "--dry-run"]
    commands = [["jobs"], ["models"], ["status", job], ["status", failed["id"]], ["events", job], ["report", LONG],
                ["report", "lenet5"], ["verify", LONG], ["health"], dry, [*dry, "--method", "full", "--epsilon", "0.1"],
                ["webhooks", "list"], ["webhooks", "deliveries", hook], ["checkpoints", job]]  # fmt: skip
    call = f"main(['--url', {service.url!r}, *one], standalone_mode=False)"
    program = f"from cli.main import main\nfor one in {commands}: {call}"
    leader, follower = pty.openpty()
    termios.tcsetwinsize(follower, (24, 80))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "xterm"}
    with subprocess.Popen([sys.executable, "-c", program], stdin=follower, stdout=follower, env=environment) as done:
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):  # at the end of a terminal
            while data := os.read(leader, 1 << 16):
                shown += data
        os.close(leader)
    assert done.returncode == 0
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).splitlines()
    assert max(map(len, lines)) <= 80, [line for line in lines if len(line) > 80]
    text = "".join(lines)
    assert job in text
    assert failed["id"] in text
    assert failed["error"]["message"][:40] in text
    assert hook in text
    assert "model.label.moved" in text
    json_of(service, "delete", LONG, "--label", "beta", "--yes")
    json_of(service, "webhooks", "delete", hook)


def test_a_dry_run_shows_what_would_be_trained_and_what_it_would_take(
    service: Service, upload: Path, digits: Digits, tmp_path: Path
) -> None:
    validation, few = tmp_path / "validation.npz", tmp_path / "few.npz"
    validation.write_bytes(npz(images=digits[0][60:100], labels=digits[1][60:100]))
    few.write_bytes(npz(images=digits[0][:20], labels=np.arange(20) % 10))
    ask = ("finetune", str(upload), "--model", "dry", "--dry-run")
    shown = called(service, *ask).stdout
    assert "dry would get a version; nothing was created" in shown
    for fact in ("60 images, 10 classes", "lenet5:1", "method, head", "16 recipes", " s, give or take ", " GB"):
        assert fact in shown, shown
    shown = called(service, *ask, "--method", "full", "--epsilon", "0.1", "--validation", str(validation)).stdout
    for fact in ("method full", '"epsilon": 0.1', "60 images, 40 to validate on"):
        assert fact in shown, shown
    assert "automatic" not in shown
    assert "recipes" not in shown
    assert "nothing is searched" in called(service, "finetune", str(few), *ask[2:]).stdout
    assert "either PATH or --dataset" in called(service, *ask, "--dataset", "x", code=2).stderr
    assert "--dry-run or --wait" in called(service, *ask, "--wait", code=2).stderr
    assert "[invalid_spec]" in called(service, *ask, "--epochs", "0", code=1).stderr
    assert service.api.get("/finetune", params={"model": "dry"}).json()["data"] == []


def test_a_webhooks_secret_stands_alone_on_standard_output_when_it_is_made_and_never_again(service: Service) -> None:
    made = called(service, "webhooks", "create", f"http://127.0.0.1:{free_port()}/")
    secret, hook = made.stdout.strip(), made.stderr.partition(",")[0]
    assert secret.startswith("whsec_")
    assert "not shown again" in made.stderr
    listed = called(service, "webhooks", "list").stdout
    assert hook in listed
    assert "whsec_" not in listed
    rotated = called(service, "webhooks", "rotate", hook).stdout.strip()
    assert rotated.startswith("whsec_")
    assert rotated != secret
    assert "fine_tuning.job.created" in called(service, "webhooks", "create", "x", "--types", "lost", code=1).stderr
    assert "[unknown_webhook]" in called(service, "webhooks", "replay", hook, "msg-0", code=1).stderr
    called(service, "webhooks", "deliveries", hook, "--status", "lost", code=2)
    assert f"deleted {hook}" in called(service, "webhooks", "delete", hook).stdout
    assert "[unknown_webhook]" in called(service, "webhooks", "delete", hook, code=1).stderr


def test_labels_are_promoted_and_rolled_back(service: Service, job: str) -> None:
    done = called(service, "promote", f"{LONG}:2", "--label", "canary", "--weight", "0.1")
    assert f"canary of {LONG} is now {LONG}:2 and 10% of the requests" in done.stdout
    assert "canary 2 (10%), stable 1" in called(service, "models").stdout
    assert f"{LONG}:1" in called(service, "rollback", LONG, "--label", "canary").stdout
    assert "no live version before 1" in called(service, "rollback", LONG, "--label", "canary", code=1).stderr
    assert "name the version" in called(service, "promote", LONG, code=2).stderr
    for wrong in (f"{LONG}:0", f"{LONG}:x", ":1", ""):
        called(service, "promote", wrong, code=2)


@pytest.mark.slow
def test_a_version_that_failed_its_gate_is_said_to_be_live_without_its_label(service: Service, upload: Path) -> None:
    spec = json.dumps({"method": "head", "epochs": 1})
    ask = ("finetune", str(upload), "--model", "gate-cli", "--wait")
    assert "gate-cli:1 is live" in called(service, *ask, "--spec", spec).stdout
    assert "default gate" in called(service, "gate", "gate-cli").stdout
    shown = called(service, "gate", "gate-cli", "--set", '{"calibration_error": 0}').stdout
    assert re.search(r"calibration error +0", shown)
    promote = "promote gate-cli:2 --override"
    done = called(service, *ask, "--spec", spec).stdout
    assert "gate-cli:2 is live without its label" in done
    assert "the calibration error is" in done
    assert promote in done
    job = json_of(service, "jobs", "--limit", "1")[0]
    assert promote in called(service, "status", job["id"]).stdout
    assert promote in called(service, "report", "gate-cli:2").stdout
    assert "without its label: the calibration error is" in called(service, "events", job["id"]).stdout
    assert "[gate_failed]" in called(service, "promote", "gate-cli:2", code=1).stderr
    assert "gate-cli:2" in called(service, "promote", "gate-cli:2", "--override").stdout
    assert "by an override" in called(service, "report", "gate-cli:2").stdout
    assert "default gate" in called(service, "gate", "gate-cli", "--delete").stdout
    called(service, *ask, "--spec", spec)
    assert "gate-cli:1" in called(service, "rollback", "gate-cli").stdout  # not to the one that failed
    called(service, "promote", "gate-cli:3")
    assert "gate-cli:2" in called(service, "rollback", "gate-cli", "--override").stdout


def test_a_doubt_about_a_version_that_passed_its_gate_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    condition = {"condition": "not_worse", "passed": True, "message": "only 3 [images]"}
    print_gate("m:2", {"passed": True, "conditions": [condition], "overrides": []}, "")
    assert capsys.readouterr().out == ""
    print_gate("m:2", {"passed": True, "conditions": [{**condition, "doubt": True}], "overrides": []}, "")
    told = " ".join(capsys.readouterr().out.split())
    assert told == "m:2 has passed its gate, with a doubt: only 3 [images]"


def test_deleting_asks_first(service: Service, job: str, upload: Path) -> None:
    spec = json.dumps({"method": "head", "epochs": 1})
    first = service.finished(service.finetune(upload.read_bytes(), "goner", spec).json()["id"])
    assert first["status"] == "succeeded"
    refused = called(service, "delete", "goner", code=1, stdin="n\n")
    assert "the model goner with all its labels and versions (1)" in refused.stderr
    assert "[wrong_state]" in called(service, "delete", "goner:1", "--yes", code=1).stderr
    called(service, "delete", "goner:1", "--label", "stable", code=2)
    assert "deleted goner:1" in called(service, "delete", "goner", stdin="y\n").stdout
    assert "[unknown_model]" in called(service, "delete", "goner", "--yes", code=1).stderr


def test_a_version_that_is_not_served_as_trained_is_an_error(service: Service, job: str) -> None:
    (service.home / "models" / LONG / "2" / "assets.extra" / "probe.npz").write_bytes(b"")
    failed = called(service, "verify", f"{LONG}:2", code=1)
    assert "probe.npz" in failed.stdout
    assert failed.stderr.startswith(f"Error: {LONG}:2 is not served as it was trained: files:")
    assert not json_of(service, "verify", f"{LONG}:2", code=1)["proven"]


def test_the_report_is_opened_in_the_browser(service: Service, job: str, tmp_path: Path) -> None:
    browser, opened = tmp_path / "browser", tmp_path / "opened"
    browser.write_text(f'#!/bin/sh\necho "$1" > {opened}\n')
    browser.chmod(0o755)
    page = tmp_path / "page.html"
    done = run("--url", service.url, "report", LONG, "--open", "--output", str(page), BROWSER=f"{browser} %s")
    assert done.returncode == 0, done
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert opened.read_text().strip() == page.as_uri()
    assert "generalization gap" in done.stdout


def test_a_spec_may_be_in_a_file(service: Service, upload: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps({"method": "full", "epochs": 1000, "momentum": 0.5, "optimizer": "sgd"}))
    options = ("--model", LONG, "--spec", f"@{spec}", "--momentum", "0.8", "--no-calibrate")
    job = json_of(service, "finetune", str(upload), *options)
    json_of(service, "cancel", job["id"])
    assert (job["spec"]["epochs"], job["spec"]["momentum"], job["spec"]["calibrate"]) == (1000, 0.8, False)
    assert "no-such" in called(service, "finetune", str(upload), "--model", LONG, "--spec", "@no-such", code=1).stderr


@pytest.mark.slow
def test_the_schema_of_the_store_is_shown_and_upgraded(tmp_path: Path) -> None:
    home = {"TEMPER_HOME": str(tmp_path)}
    assert json.loads(run("db", "status", "--json", **home).stdout)["revision"] is None
    assert list(tmp_path.iterdir()) == []
    head = json.loads(run("db", "upgrade", "--json", **home).stdout)["after"]
    assert run("db", "upgrade", **home).stdout == f"revision {head}, as before\n"
    assert run("db", "status", **home).stdout == f"revision {head}, which is up to date\n"
    with sqlite3.connect(tmp_path / "temper.db") as store:
        store.execute("UPDATE alembic_version SET version_num = '0001'")
    behind = run("db", "status", **home)
    assert (behind.returncode, behind.stdout) == (1, f"revision 0001; this release has {head}: temper db upgrade\n")
    with sqlite3.connect(tmp_path / "temper.db") as store:
        store.execute("UPDATE alembic_version SET version_num = '9999'")
    assert run("db", "status", **home).stdout == f"revision 9999 of a newer release; this one has {head}\n"
    assert "schema 9999 of a newer release" in error_line(run("db", "upgrade", **home))
    nowhere = {"TEMPER_STORE": "postgresql+psycopg://temper:secret@127.0.0.1:1/t"}
    refused = error_line(run("db", "status", **nowhere))
    assert "cannot open the store at postgresql" in refused
    assert "secret" not in refused
