"""The whole service: real processes, HTTP, jobs that train, predictions that name their version."""

import contextlib
import json
import os
import signal
import socket
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
import tensorflow as tf

from tests.conftest import Service, eventually, npz, opened, png, running_service, zipped
from tests.test_datasets import BAD, DOT
from trainer.export import load_params
from trainer.jobs import Jobs
from trainer.lenet import logits

Digits = tuple[np.ndarray, np.ndarray]
QUICK = json.dumps({"epochs": 2})
ROBUST = json.dumps({"adversarial": {"attack": "fgsm", "epsilon": 0.1}, "epochs": 8})
LONG = json.dumps({"epochs": 1000, "method": "full"})


def predicted(service: Service, model: str, images: np.ndarray, **more: Any) -> Any:
    body = {"model": model, "range": "byte", "instances": images.tolist(), **more}
    answer = service.api.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def files(home: Path) -> set[Path]:
    """What is kept in a home, but for the store and what the model server and worker have in hand."""
    return {path for part in ("models", "staging", "datasets") for path in (home / part).rglob("*")}


@pytest.fixture(scope="module")
def job(service: Service, digits_zip: bytes) -> Any:
    """A fine-tune that has succeeded: LoRA, L2, dropout and FGSM on 200 digits."""
    answer = service.finetune(digits_zip, "digits", ROBUST)
    assert answer.status_code == 202, answer.text
    assert answer.headers["location"] == f"/finetune/{answer.json()['id']}"
    return service.finished(answer.json()["id"])


def test_a_fine_tune_ends_in_a_live_version_that_knows_its_digits(service: Service, job: Any, digits: Digits) -> None:
    assert (job["status"], job["error"], job["stage"]) == ("succeeded", None, None)
    assert (job["object"], job["base"], job["version"], job["report_status"]) == (
        "fine_tuning.job",
        "lenet5:1",
        1,
        "quick",
    )
    assert job["spec"]["l2"] == 1e-4
    assert job["progress"]["epoch"] == job["progress"]["epochs"] == 8
    assert {"data_loss", "adversarial_loss", "l2", "validation_accuracy"} <= set(job["progress"])
    images, labels = digits[0][200:600], digits[1][200:600]
    answer = predicted(service, "digits", images)
    assert (answer["model"], answer["version"], answer["classes"]) == ("digits", 1, list("0123456789"))
    right = np.mean([p["label"] == str(label) for p, label in zip(answer["predictions"], labels, strict=True)])
    base = predicted(service, "lenet5", images)
    before = np.mean([p["label"] == str(label) for p, label in zip(base["predictions"], labels, strict=True)])
    assert right > 0.93
    assert right > before
    assert all(abs(sum(p["probabilities"]) - 1) < 1e-5 for p in answer["predictions"])


def test_the_report_can_be_recomputed_from_the_exported_model(service: Service, job: Any, digits: Digits) -> None:
    (version,) = service.api.get("/models/digits").json()["versions"]
    report = version["report"]
    assert report["parameters"] == {
        "trained": 5946,
        "total": 107_786,
        "delta_bytes": report["parameters"]["delta_bytes"],
    }
    assert set(report["cost"]["seconds"]) == {"validating", "training", "evaluating", "exporting", "publishing"}
    validation = report["validation"]
    assert np.sum(validation["confusion_matrix"]) == validation["images"]
    assert np.trace(validation["confusion_matrix"]) == round(validation["accuracy"] * validation["images"])
    assert report["train"]["images"] + validation["images"] == 200
    params = load_params(service.home / "models/digits/1")
    images, labels = digits[0][:200] / np.float32(255), digits[1][:200]
    scores = logits(params, tf.constant(images[..., None])).numpy()
    right = report["train"]["accuracy"] * report["train"]["images"] + validation["accuracy"] * validation["images"]
    assert (scores.argmax(1) == labels).sum() == round(right)
    gap = report["generalization_gap"]
    assert gap["accuracy"] == pytest.approx(report["train"]["accuracy"] - validation["accuracy"])
    assert gap["cross_entropy"] == pytest.approx(validation["cross_entropy"] - report["train"]["cross_entropy"])
    assert report["robustness"]["epsilon"] == 0.1
    assert 0 <= report["robustness"]["accuracy"] <= validation["accuracy"]


def test_predictions_go_on_while_a_new_version_goes_live(service: Service, job: Any, digits: Digits) -> None:
    stop = threading.Event()
    seen: list[Any] = []
    bad: list[Any] = []

    def ask() -> None:
        with httpx.Client(base_url=service.url, timeout=30) as api:
            while not stop.is_set():
                body = {"model": "digits", "range": "byte", "instances": [digits[0][0].tolist()]}
                answer = api.post("/predict", json=body)
                (seen if answer.status_code == 200 else bad).append(answer.json())

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(ask)
        images, labels = digits
        upload = npz(images=images[:120], labels=labels[:120])
        done = service.finished(service.finetune(upload, "digits", QUICK).json()["id"])
        eventually(lambda: seen[-1]["version"] == done["version"], "the new version answers")
        stop.set()
    assert done["status"] == "succeeded"
    assert bad == []
    versions = [answer["version"] for answer in seen]
    assert versions[0] < done["version"] == max(versions)
    assert predicted(service, "digits", digits[0][:1], version=1)["version"] == 1
    assert predicted(service, "digits", digits[0][:1], label="stable")["version"] == done["version"]


def test_a_version_answers_as_soon_as_its_job_says_so(service: Service, digits: Digits) -> None:
    images, labels = digits
    answer = service.finetune(npz(images=images[:60], labels=labels[:60] % 2), "fresh", QUICK).json()
    done = service.finished(answer["id"])
    assert predicted(service, "fresh", images[:3])["version"] == done["version"] == 1
    assert predicted(service, "fresh", images[:3])["classes"] == ["0", "1"]


def test_dark_on_light_uploads_and_predictions_agree(service: Service, digits: Digits) -> None:
    images, labels = digits
    answer = service.finetune(npz(images=255 - images[:200], labels=labels[:200]), "dark", ROBUST).json()
    assert answer["dataset"]["polarity"] == "dark_on_light"
    assert service.finished(answer["id"])["status"] == "succeeded"
    found = predicted(service, "dark", 255 - images[200:400])["predictions"]
    assert np.mean([p["label"] == str(label) for p, label in zip(found, labels[200:400], strict=True)]) > 0.9


def test_a_fine_tune_can_go_on_from_any_published_version(service: Service, job: Any, digits_zip: bytes) -> None:
    spec = json.dumps({"base": "digits:1", "epochs": 1, "method": "head"})
    done = service.finished(service.finetune(digits_zip, "digits-next", spec).json()["id"])
    assert (done["status"], done["base"]) == ("succeeded", "digits:1")
    before, after = (load_params(service.home / "models" / name) for name in ("digits/1", "digits-next/1"))
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {"head/kernel", "head/bias"}


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_an_image_body_is_prepared_like_an_upload(service: Service, job: Any, digits: Digits, kind: str) -> None:
    from tests.test_datasets import encoded

    image = digits[0][3]
    from PIL import Image

    body = encoded(Image.fromarray(image), kind.upper(), **({"quality": 100} if kind == "jpeg" else {}))
    answer = service.api.post(
        "/predict?model=digits&version=1", content=body, headers={"Content-Type": f"image/{kind}"}
    )
    assert answer.status_code == 200, answer.text
    exact = predicted(service, "digits", image[None], version=1)
    tolerance = 1e-5 if kind == "png" else 0.1
    np.testing.assert_allclose(
        answer.json()["predictions"][0]["probabilities"], exact["predictions"][0]["probabilities"], atol=tolerance
    )


def test_unit_byte_and_flat_instances_mean_the_same(service: Service, digits: Digits) -> None:
    image = digits[0][5]
    answers = [
        predicted(service, "lenet5", image[None]),
        predicted(service, "lenet5", image.reshape(1, 784)),
        predicted(service, "lenet5", image.reshape(1, 28, 28, 1)),
        predicted(service, "lenet5", image[None] / 255, range="unit"),
    ]
    found = [answer["predictions"][0]["probabilities"] for answer in answers]
    np.testing.assert_allclose(found, [found[0]] * 4, atol=1e-5)


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", BAD)
def test_a_bad_upload_gets_its_answer_and_leaves_nothing(service: Service, case: str) -> None:
    content, says, named = BAD[case]
    kept = files(service.home)
    jobs = [job["id"] for job in service.api.get("/finetune", params={"limit": 100}).json()["data"]]
    answer = service.finetune(content, "bad")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_dataset", "data")
    assert says in error["message"]
    assert len(error["details"]) == len(named)
    assert "Traceback" not in answer.text
    assert files(service.home) == kept
    assert [job["id"] for job in service.api.get("/finetune", params={"limit": 100}).json()["data"]] == jobs


GOOD_UPLOAD = zipped({f"{name}/{i}.png": png(DOT) for name in "ab" for i in range(2)})


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": "Bad Name"}, "invalid_request", "model"),
        ({"model": "-x"}, "invalid_request", "model"),
        ({"model": "a" * 65}, "invalid_request", "model"),
        ({"model": "lenet5"}, "invalid_request", "model"),
        ({}, "invalid_request", "model"),
        ({"model": "ok", "sepc": "{}"}, "invalid_request", "sepc"),
        ({"model": "ok", "spec": "{"}, "invalid_spec", "spec"),
        ({"model": "ok", "spec": '{"l3": 1}'}, "invalid_spec", "spec.l3"),
        ({"model": "ok", "spec": '{"dropout": 1.5}'}, "invalid_spec", "spec.dropout"),
        ({"model": "ok", "spec": '{"base": "nobody"}'}, "invalid_spec", "spec.base"),
        ({"model": "ok", "spec": '{"base": "lenet5:9"}'}, "invalid_spec", "spec.base"),
    ],
)
def test_a_bad_form_is_refused_with_its_field(service: Service, fields: dict[str, str], code: str, param: str) -> None:
    answer = service.api.post("/finetune", files={"data": ("d.zip", GOOD_UPLOAD)}, data=fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, code, param), answer.text


IMAGE = [[0.0] * 28] * 28
TEXT, PNG, FORM = ({"Content-Type": kind} for kind in ("text/plain", "image/png", "multipart/form-data"))


@pytest.mark.parametrize(
    ("body", "status", "code", "param", "details"),
    [
        ("{", 400, "malformed_request", None, []),
        ("", 400, "malformed_request", None, []),
        ("[]", 422, "invalid_request", "body", None),
        ({"model": "lenet5", "a\0b": 1, "instances": [IMAGE]}, 422, "invalid_request", "a\0b", None),
        ({"model": "lenet5"}, 422, "invalid_request", "instances", None),
        ('{"model": "lenet5", "model": "x", "instances": [[0]]}', 422, "invalid_request", "model", None),
        ('{"model": "lenet5", "instances": [[0]], "instances": [[0]]}', 422, "invalid_request", "instances", None),
        ({"model": "lenet5", "instances": [IMAGE], "label": ["stable"]}, 422, "invalid_request", "label", None),
        ({"model": "lenet5", "instances": []}, 422, "invalid_request", "instances", None),
        ({"model": "lenet5", "instances": [IMAGE], "x": 1}, 422, "invalid_request", "x", None),
        ({"model": "LeNet", "instances": [IMAGE]}, 422, "invalid_request", "model", None),
        ({"model": "nobody", "instances": [IMAGE]}, 404, "unknown_model", "model", []),
        ({"model": "lenet5", "version": 7, "instances": [IMAGE]}, 404, "unknown_model", "version", []),
        ({"model": "lenet5", "label": "canary", "instances": [IMAGE]}, 404, "unknown_model", "label", []),
        ({"model": "lenet5", "version": 1, "label": "s", "instances": [IMAGE]}, 422, "invalid_request", "label", []),
        ({"model": "lenet5", "instances": [IMAGE, [IMAGE], [1, 2], 5, None]}, 422, "invalid_instances", "instances",
         [1, 2, 3, 4]),
        ({"model": "lenet5", "instances": [[["a"] * 28] * 28, [[0] * 27] + [[0] * 28] * 27]}, 422,
         "invalid_instances", "instances", [0, 1]),
        ({"model": "lenet5", "instances": [[[2] * 28] * 28, IMAGE, [[-1] * 28] * 28]}, 422, "invalid_instances",
         "instances", [0, 2]),
        ('{"model": "lenet5", "instances": [[' + ", ".join(["NaN"] * 784) + "]]}", 400, "malformed_request",
         None, []),
        ({"model": "lenet5", "instances": [[10**400] * 784]}, 400, "malformed_request", None, []),
        ({"model": "lenet5", "instances": [[0] * 784] * 1025}, 413, "too_large", "instances", []),
    ],
)  # fmt: skip
def test_a_bad_prediction_is_refused_with_field_and_indices(
    service: Service, body: Any, status: int, code: str, param: str | None, details: list[int] | None
) -> None:
    content = body if isinstance(body, str) else json.dumps(body)
    answer = service.api.post("/predict", content=content, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), answer.text
    if details is not None:
        assert [detail["index"] for detail in error["details"]] == details


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (("GET", "/nowhere", {}), 404, "not_found"),
        (("DELETE", "/predict", {}), 405, "method_not_allowed"),
        (("GET", "/finetune/ftjob-0", {}), 404, "unknown_job"),
        (("GET", "/finetune/%20", {}), 404, "unknown_job"),
        (("POST", "/finetune/ftjob-0/cancel", {}), 404, "unknown_job"),
        (("GET", "/models/nobody", {}), 404, "unknown_model"),
        (("GET", "/finetune?limit=0", {}), 422, "invalid_request"),
        (("GET", "/finetune?after=ftjob-0", {}), 404, "unknown_job"),
        (("POST", "/predict", {"content": "a", "headers": TEXT}), 415, "unsupported_media_type"),
        (("POST", "/predict", {"content": b"a", "headers": PNG}), 422, "invalid_request"),
        (("POST", "/predict?model=lenet5", {"content": b"a", "headers": PNG}), 422, "invalid_image"),
        (("POST", "/predict", {"content": b" " * (9 << 20)}), 413, "too_large"),
        (("POST", "/predict", {"content": (b" " * (1 << 20) for _ in range(9))}), 413, "too_large"),
        (("POST", "/predict/", {"content": b" "}), 404, "not_found"),
        (("POST", "/finetune", {"json": {"model": "m"}}), 415, "unsupported_media_type"),
        (("POST", "/finetune", {"data": {"model": "m"}}), 422, "invalid_request"),
        (("POST", "/finetune", {"content": b"x", "headers": FORM}), 400, "malformed_request"),
    ],
)  # fmt: skip
def test_every_other_mistake_has_its_status_too(service: Service, request_: Any, status: int, code: str) -> None:
    method, path, arguments = request_
    answer = service.api.request(method, path, **arguments)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["code"] == code


def test_a_device_that_is_not_there_fails_the_job_clearly(service: Service, digits_zip: bytes) -> None:
    if tf.config.list_physical_devices("GPU"):
        pytest.skip("this machine has a GPU")
    kept = files(service.home)
    done = service.finished(service.finetune(digits_zip, "gpu", '{"device": "gpu"}').json()["id"])
    assert (done["status"], done["version"]) == ("failed", None)
    assert (done["error"]["code"], done["error"]["param"]) == ("device_unavailable", "spec.device")
    assert {path for path in files(service.home) - kept if "datasets" not in path.parts} == set()
    assert service.api.get("/models/gpu").status_code == 404


# --- documentation, command, resources ----------------------------------------------------------------------------


def test_every_field_and_parameter_of_the_api_is_described(service: Service) -> None:
    document = service.api.get("/openapi.json").json()
    for name, schema in document["components"]["schemas"].items():
        for field, about in schema.get("properties", {}).items():
            assert "description" in about or name in ("Body_finetune_finetune_post",), f"{name}.{field}"
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            assert about.get("description"), f"{method} {path}"
            assert all("description" in parameter for parameter in about.get("parameters", [])), f"{method} {path}"


def test_the_documented_examples_work(service: Service) -> None:
    document = service.api.get("/openapi.json").json()
    example = document["paths"]["/predict"]["post"]["requestBody"]["content"]["application/json"]["example"]
    answer = service.api.post("/predict", json=example)
    assert answer.status_code == 200
    assert answer.json()["predictions"][0]["label"] == "7"
    form = document["components"]["schemas"]["Body_finetune_finetune_post"]["properties"]["spec"]
    example = json.loads(form["examples"][0])
    assert service.finetune(b"", "m", json.dumps(example)).json()["error"]["code"] == "invalid_dataset"  # not the spec


def temper(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "api.cli", "--url", service.url, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "120"})


def test_the_command_uploads_a_folder_waits_and_predicts(service: Service, digits: Digits, tmp_path: Path) -> None:
    for index in range(60):
        place = tmp_path / "digits" / str(digits[1][index])
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{index}.png").write_bytes(png(digits[0][index]))
    done = temper(service, "finetune", str(tmp_path / "digits"), "--model", "cli", "--epochs", "2", "--epsilon", "0.05",
                  "--method", "head", "--l2", "1e-3", "--wait")  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "generalization gap" in done.stdout
    assert "cli:1 serves" in done.stdout
    (version,) = service.api.get("/models/cli").json()["versions"]
    spec = version["manifest"]["spec"]
    assert (spec["epochs"], spec["method"], spec["l2"], spec["adversarial"]["epsilon"]) == (2, "head", 1e-3, 0.05)
    image = next((tmp_path / "digits" / "4").iterdir())
    assert "says cli:1" in temper(service, "predict", str(image), "--model", "cli").stdout
    assert "cli" in temper(service, "models").stdout
    assert "succeeded" in temper(service, "jobs").stdout


def test_the_command_says_what_is_wrong(service: Service, tmp_path: Path) -> None:
    (tmp_path / "d.zip").write_bytes(b"")
    failed = temper(service, "finetune", str(tmp_path / "d.zip"), "--model", "m")
    assert failed.returncode == 1
    assert "empty" in failed.stderr
    assert "[invalid_dataset]" in failed.stderr
    assert "Traceback" not in failed.stderr


# --- cancelling, dying, coming back -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service for the tests that kill its parts."""
    with running_service(tmp_path_factory.mktemp("own")) as service:
        yield service


def test_the_gateway_takes_less_than_100_mb(own: Service) -> None:
    with ThreadPoolExecutor(8) as pool:
        body = {"model": "lenet5", "instances": [IMAGE] * 64}
        list(pool.map(lambda _: own.api.post("/predict", json=body).raise_for_status(), range(100)))
    (pid,) = own.children("api")
    status = Path(f"/proc/{pid}/status").read_text()
    kilobytes = int(status.partition("VmRSS:")[2].split()[0])
    # Python 3.13 takes a tenth more for the same modules; what is promised is measured on 3.11.
    assert kilobytes < (100_000 if sys.version_info < (3, 13) else 115_000)


def begun(service: Service, digits_zip: bytes, model: str) -> str:
    """Id of a long job that is in training."""
    job_id: str = service.finetune(digits_zip, model, LONG).json()["id"]
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
    assert list((own.home / "staging").iterdir()) == []


def test_a_report_yields_to_queued_jobs_and_survives_its_worker(own: Service, digits: Digits) -> None:
    images, labels = digits
    upload = npz(images=images, labels=labels)
    first = own.finished(own.finetune(upload, "long-report", QUICK).json()["id"])
    second = own.finished(own.finetune(upload, "long-report", QUICK).json()["id"])
    assert own.api.get(f"/finetune/{first['id']}").json()["report_status"] == "quick"
    assert second["status"] == "succeeded"
    own.kill("trainer")
    own.completed(first["id"])
    own.completed(second["id"])


def test_a_killed_worker_loses_no_job(own: Service, digits_zip: bytes) -> None:
    job_id = begun(own, digits_zip, "survivor")
    own.kill("trainer")
    with opened(f"sqlite:///{own.home / 'temper.db'}") as engine:
        eventually(lambda: Jobs(engine).get(job_id).attempts == 2, "another worker claims it")
    eventually(lambda: own.api.get(f"/finetune/{job_id}").json()["progress"], "and trains it")
    own.api.post(f"/finetune/{job_id}/cancel")
    assert own.finished(job_id)["status"] == "cancelled"


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


def test_a_killed_gateway_comes_back_and_jobs_go_on(own: Service, digits_zip: bytes) -> None:
    job_id = own.finetune(digits_zip, "on", QUICK).json()["id"]
    own.kill("api")
    assert own.finished(job_id)["status"] == "succeeded"
    answer = own.api.post("/predict", json={"model": "on", "instances": [IMAGE]})
    eventually(lambda: own.api.get("/readyz").status_code == 200, "the gateway is ready")
    assert answer.status_code in (200, 503)


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
    command = [sys.executable, "-m", "api.cli", "serve", "--port", "1"]
    refused = subprocess.run(
        command, env={**os.environ, "TEMPER_HOME": str(own.home)}, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 1
    assert "another `temper serve` runs" in refused.stderr


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


def test_the_whole_line_works_on_postgresql(postgresql: str, tmp_path: Path, digits_zip: bytes, digits: Digits) -> None:
    with running_service(tmp_path, TEMPER_STORE=postgresql, TEMPER_WORKERS="2") as service:
        ids = [service.finetune(digits_zip, f"pg{number}", QUICK).json()["id"] for number in range(3)]
        assert [service.finished(job_id)["status"] for job_id in ids] == ["succeeded"] * 3
        assert predicted(service, "pg2", digits[0][:1])["version"] == 1
    assert not (tmp_path / "temper.db").exists()


def test_a_service_sweeps_what_uploads_have_left_behind(tmp_path: Path, digits_zip: bytes) -> None:
    (tmp_path / "staging").mkdir()
    left = tmp_path / "staging" / "0123.upload"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    with running_service(tmp_path) as service:
        assert not left.exists()
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
            client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5000\r\n\r\n{")
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
        eventually(lambda: list((own.home / "staging").glob("*.upload")), "the upload is being decoded")
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
