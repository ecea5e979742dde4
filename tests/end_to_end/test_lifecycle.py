"""Processes are killed, jobs are cancelled, clients hang up: nothing is lost."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from load.rivals.servers import private_mb
from tests.cli.test_cli import temper
from tests.conftest import Service, eventually, npz, opened, png, running_service, zipped
from tests.end_to_end.test_service import predicted
from tests.trainer.test_datasets import DOT
from trainer.jobs.records import Jobs

Digits = tuple[np.ndarray, np.ndarray]
QUICK = json.dumps({"epochs": 2})
LONG = json.dumps({"epochs": 1000, "method": "full"})
RESUMED = json.dumps(
    {
        "method": "full", "epochs": 60, "learning_rate": "auto",
        "search": {"trials": 4, "folds": 2, "preview": False},
    }
)  # fmt: skip
IMAGE = [[0.0] * 28] * 28
BYTES = {"Content-Type": "application/octet-stream"}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for the tests that kill its parts."""
    with running_service(tmp_path_factory.mktemp("own"), TEMPER_ATTACK_IMAGES="120") as service:
        yield service


def test_the_gateway_is_small_and_gives_back_the_memory_of_a_burst(own: Service) -> None:
    (pid,) = own.children("api")
    assert private_mb(pid) < 84
    many = {"model": "lenet5", "instances": [IMAGE] * 500}
    noise = np.random.default_rng(0).integers(0, 256, (1024, 784), np.uint8)
    photo = png(np.zeros((4000, 6000), np.uint8))

    def burst(number: int) -> None:
        match number % 4:
            case 0:
                answer = own.api.post("/predict", json=many)
            case 1:
                answer = own.api.post("/predict?model=lenet5", content=noise.tobytes(), headers=BYTES)
            case 2:
                answer = own.api.post("/predict?model=lenet5", content=photo, headers={"Content-Type": "image/png"})
            case _:
                answer = own.api.get("/openapi.json")
        assert answer.status_code in (200, 429, 504), answer.text  # the memory is what counts here

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(burst, range(40)))
    eventually(lambda: private_mb(pid) < 94, "the gateway has given back the memory of the burst", timeout_s=10)


def begun(service: Service, digits_zip: bytes, model: str, spec: str = LONG) -> str:
    """Id of a long job that trains, or has tried a recipe."""
    job_id: str = service.finetune(digits_zip, model, spec).json()["id"]
    eventually(lambda: service.api.get(f"/finetune/{job_id}").json()["progress"], "the job trains")
    return job_id


def test_a_cancelled_job_ends_within_an_epoch_and_leaves_nothing(own: Service, digits_zip: bytes) -> None:
    job_id = begun(own, digits_zip, "never")
    waiting = own.finetune(digits_zip, "never", QUICK).json()["id"]
    assert own.api.post(f"/finetune/{waiting}/cancel").json()["status"] == "cancelled"
    assert own.api.post(f"/finetune/{job_id}/cancel").status_code == 200
    assert own.finished(job_id, timeout_s=20)["status"] == "cancelled"
    assert own.api.post(f"/finetune/{job_id}/cancel").json()["error"]["code"] == "wrong_state"
    assert own.api.get("/models/never").status_code == 404
    # The gateway's own directory for uploads stays as long as it lives.
    assert [path for path in (own.home / "staging").iterdir() if not path.name.startswith("uploads-")] == []


@pytest.mark.exhaustive
def test_a_paused_job_leaves_its_worker_to_others_and_goes_on_when_it_is_resumed(
    own: Service, digits_zip: bytes
) -> None:
    job_id = begun(own, digits_zip, "paused")

    def post(act: str) -> dict[str, Any]:
        answer: dict[str, Any] = own.api.post(f"/finetune/{job_id}/{act}").json()
        return answer

    assert post("pause")["status"] == "running"
    paused = eventually(lambda: (job := status(own, job_id))["status"] == "paused" and job, "it is paused")
    assert post("pause")["error"]["code"] == "wrong_state"
    assert own.finished(own.finetune(digits_zip, "meanwhile", QUICK).json()["id"])["status"] == "succeeded"
    assert post("resume")["status"] == "queued"
    assert post("resume")["error"]["code"] == "wrong_state"
    resumed = eventually(lambda: status(own, job_id)["progress"], "it trains again")
    assert resumed["epoch"] > paused["progress"]["epoch"]
    assert status(own, job_id)["attempts"] == 1
    assert len(list((own.home / "checkpoints" / job_id).iterdir())) == 1
    post("cancel")
    assert own.finished(job_id, timeout_s=20)["status"] == "cancelled"
    eventually(lambda: not (own.home / "checkpoints" / job_id).exists(), "its checkpoints are gone")
    assert post("pause")["error"]["message"] == f"job {job_id} has already been cancelled"


def status(service: Service, job_id: str) -> dict[str, Any]:
    job: dict[str, Any] = service.api.get(f"/finetune/{job_id}").json()
    return job


@pytest.mark.exhaustive
def test_a_worker_killed_in_any_stage_costs_no_bit_of_the_weights(own: Service, digits_zip: bytes) -> None:
    def begin(model: str) -> str:
        job_id: str = own.finetune(digits_zip, model, RESUMED).json()["id"]
        return job_id

    def sha256(model: str) -> str:
        manifest = json.loads((own.home / f"models/{model}/1/assets.extra/manifest.json").read_text())
        return str(manifest["sha256"])

    assert own.finished(begin("whole"))["attempts"] == 1
    for model, moments in (
        ("resumed", [("searching", "trial"), ("training", "epoch")]),
        ("republished", [("evaluating,exporting,publishing,warming", "epoch")]),
    ):
        job_id = begin(model)
        for attempt, (stages, event) in enumerate(moments, start=1):

            def there(job_id: str = job_id, attempt: int = attempt, stages: str = stages, event: str = event) -> bool:
                job = status(own, job_id)
                assert job["finished_at"] is None, "it was too fast to be killed"
                at = job["attempts"] == attempt and job["stage"] in stages.split(",")
                return at and (event in job["progress"] or attempt > 1)

            eventually(there, f"attempt {attempt} is in {stages}")
            own.kill("trainer")
        done = own.finished(job_id)
        assert (done["status"], done["attempts"]) == ("succeeded", len(moments) + 1)
        assert sha256(model) == sha256("whole")
        assert [path.name for path in (own.home / "models" / model).iterdir()] == [str(done["version"])]


@pytest.mark.exhaustive
def test_a_cancelled_job_ends_within_a_second_in_every_stage(own: Service, digits: Digits) -> None:
    """Epochs of seconds, and a report of many attacks. Prints how long it took in each stage."""
    many = npz(images=np.tile(digits[0], (4, 1, 1)), labels=np.tile(digits[1], 4))
    few = npz(images=digits[0][:400], labels=digits[1][:400])
    attack = {"attack": "pgd", "epsilon": 0.1, "steps": 5}
    spec = {"method": "full", "epochs": 1, "adversarial": attack}
    took = {}
    for stage, upload, more in (
        ("previewing", many, {"learning_rate": "auto", "search": {"trials": 2}}),
        ("searching", many, {"learning_rate": "auto", "search": {"trials": 2, "preview": False}}),
        ("training", many, {}),
        ("evaluating", few, {}),
    ):
        job_id = own.finetune(upload, "cancelled", json.dumps(spec | more)).json()["id"]
        eventually(lambda job_id=job_id, stage=stage: status(own, job_id)["stage"] == stage, stage)  # type: ignore[misc]
        asked = own.api.post(f"/finetune/{job_id}/cancel").json()
        assert asked["stage"] == stage
        began = time.monotonic()
        eventually(lambda job_id=job_id: status(own, job_id)["status"] == "cancelled", "it is cancelled")  # type: ignore[misc]
        took[stage] = round(time.monotonic() - began, 2)
    print(took)
    assert max(took.values()) < 1.0


@pytest.mark.exhaustive
def test_a_report_yields_to_queued_jobs_and_survives_its_worker(own: Service, digits: Digits) -> None:
    images, labels = digits
    upload = npz(images=images[:600], labels=labels[:600])
    first = own.finished(own.finetune(upload, "long-report", QUICK).json()["id"])
    second = own.finished(own.finetune(upload, "long-report", QUICK).json()["id"])
    assert own.api.get(f"/finetune/{first['id']}").json()["report_status"] == "quick"
    assert second["status"] == "succeeded"
    eventually(lambda: "reporting" in own.api.get("/readyz").json()["workers"].values(), "the worker says what it does")
    own.kill("trainer")
    own.completed(first["id"])
    own.completed(second["id"])


@pytest.mark.exhaustive
def test_a_killed_model_server_comes_back_with_all_it_served(own: Service, digits_zip: bytes, digits: Digits) -> None:
    done = own.finished(own.finetune(digits_zip, "back", QUICK).json()["id"])
    assert done["status"] == "succeeded"
    own.kill("serving")
    body = {"model": "back", "range": "byte", "instances": digits[0][:1].tolist()}
    answer = own.api.post("/predict", json=body)
    assert answer.status_code == 503
    assert answer.headers["retry-after"]
    assert answer.json()["error"]["code"] == "model_server_unavailable"
    assert own.api.get("/healthz").status_code == 200
    job_id = own.finetune(digits_zip, "back", QUICK).json()["id"]  # is published when the server is back
    eventually(lambda: own.api.post("/predict", json=body).status_code == 200, "predictions are back")
    assert own.finished(job_id)["version"] == done["version"] + 1
    eventually(own.ready, "the service is ready")


@pytest.mark.slow
def test_a_killed_gateway_comes_back_and_jobs_go_on(own: Service, digits_zip: bytes) -> None:
    job_id = own.finetune(digits_zip, "on", QUICK).json()["id"]
    own.kill("api")
    assert own.finished(job_id)["status"] == "succeeded"
    answer = own.api.post("/predict", json={"model": "on", "instances": [IMAGE]})
    eventually(lambda: own.api.get("/readyz").status_code == 200, "the gateway is ready")
    assert answer.status_code in (200, 503)


@pytest.mark.exhaustive
def test_a_worker_that_is_told_to_stop_puts_its_job_back(own: Service, digits_zip: bytes) -> None:
    job_id = begun(own, digits_zip, "later")
    (pid,) = own.children("trainer")
    os.kill(pid, signal.SIGTERM)
    eventually(lambda: own.children("trainer") not in ([], [pid]), "another worker starts")
    eventually(lambda: own.api.get(f"/finetune/{job_id}").json()["progress"], "it trains the job")
    with opened(f"sqlite:///{own.home / 'temper.db'}") as engine:
        assert Jobs(engine).get(job_id).attempts == 1
    own.api.post(f"/finetune/{job_id}/cancel")
    own.finished(job_id)


def test_a_second_service_in_the_same_home_is_refused(own: Service) -> None:
    command = [sys.executable, "-m", "cli", "serve", "--port", "1"]
    refused = subprocess.run(
        command, env={**os.environ, "TEMPER_HOME": str(own.home)}, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "another `temper serve` runs" in refused.stderr


@pytest.mark.exhaustive
def test_a_killed_supervisor_leaves_no_orphans_and_a_new_one_finds_everything(
    tmp_path: Path, digits_zip: bytes, digits: Digits
) -> None:
    with running_service(tmp_path) as service:
        assert service.finished(service.finetune(digits_zip, "kept", QUICK).json()["id"])["status"] == "succeeded"
        orphans = service.children("api") + service.children("serving") + service.children("trainer")
        service.supervisor.kill()
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), "its children end")
    with running_service(tmp_path) as service:
        eventually(lambda: service.api.get("/models/kept").status_code == 200, "the model is there")
        assert predicted(service, "kept", digits[0][:1])["version"] == 1
        assert service.api.get("/finetune").json()["data"][0]["status"] == "succeeded"


@pytest.mark.slow
def test_the_whole_line_works_on_postgresql(postgresql: str, tmp_path: Path, digits_zip: bytes, digits: Digits) -> None:
    with running_service(tmp_path, TEMPER_STORE=postgresql, TEMPER_WORKERS="2") as service:
        ids = [service.finetune(digits_zip, f"pg{number}", QUICK).json()["id"] for number in range(3)]
        assert [service.finished(job_id)["status"] for job_id in ids] == ["succeeded"] * 3
        assert predicted(service, "pg2", digits[0][:1])["version"] == 1
    assert not (tmp_path / "temper.db").exists()


@pytest.mark.exhaustive
def test_a_service_sweeps_what_uploads_have_left_behind(tmp_path: Path, digits_zip: bytes) -> None:
    (tmp_path / "staging").mkdir()
    left = [tmp_path / "staging" / name for name in ("0123.upload", "uploads-0123", "ftjob-of-nobody")]
    left[0].write_bytes(b"half")
    for directory in left[1:]:
        directory.mkdir()
        (directory / "lock").write_bytes(b"")
    with running_service(tmp_path) as service:
        assert not any(path.exists() for path in left)
        # Names that mean something to the terminal, to scikit-learn's report and to nobody.
        images = np.stack([DOT] * 8)
        labels = np.repeat(["[/x]", "accuracy", "macro avg", "b"], 2)
        done = service.finished(service.finetune(npz(x=images, y=labels), "odd", QUICK).json()["id"])
        assert done["status"] == "succeeded"
        (version,) = service.api.get("/models/odd").json()["versions"]
        rows = version["report"]["validation"]["classification_report"]
        assert set(rows["classes"]) == set(labels)
        assert "[/x]" in temper(service, "models").stdout
        refused = service.finetune(npz(x=images, y=np.array(["\ud800"] * 4 + ["b"] * 4)), "odd")
        assert refused.status_code == 422
        # A client that hangs up in the middle is no failure of ours.
        with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as client:
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n{")
        large = (b"--X\r\nContent-Disposition: form-data; name=data; filename=a\r\n\r\n" if i == 0 else bytes(1 << 20)
                 for i in range(260))  # fmt: skip
        answer = service.api.post(
            "/finetune", content=large, headers={"Content-Type": "multipart/form-data; boundary=X"}
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")


def test_an_upload_ends_with_its_gateway(own: Service, tmp_path: Path) -> None:
    noise = png(np.random.default_rng(0).integers(0, 255, (2000, 2000), np.uint8))
    upload = zipped({f"{name}/{i}.png": noise for name in "ab" for i in range(12)})
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(own.finetune, upload, "cut")
        eventually(lambda: list((own.home / "staging").rglob("*.upload")), "the upload is being decoded")
        decoders = children(own.children("api")[0])
        own.kill("api")
        with pytest.raises(httpx.TransportError):
            answer.result()
    assert decoders
    eventually(lambda: not any(decoder.exists() for decoder in decoders), "the decoders end")
    eventually(own.ready, "the service is ready")


def children(pid: int) -> list[Path]:
    """What the process has started, as directories of /proc."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == pid:
                    found.append(entry)
    return found
