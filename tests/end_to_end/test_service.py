"""The whole service: real processes, HTTP, jobs that train, predictions that name their version."""

import functools
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tensorflow as tf

from tests.conftest import Service, eventually, freeze, npz, running_service
from trainer.export import load_params
from trainer.lenet import logits

Digits = tuple[np.ndarray, np.ndarray]
QUICK = json.dumps({"epochs": 2})
ROBUST = json.dumps({"adversarial": {"attack": "fgsm", "epsilon": 0.1}, "epochs": 8})


def predicted(service: Service, model: str, images: np.ndarray, **more: Any) -> Any:
    body = {"model": model, "range": "byte", "instances": images.tolist(), **more}
    answer = service.api.post("/predict", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.fixture(scope="module")
def job(service: Service, digits_zip: bytes) -> Any:
    """A fine-tune that has succeeded: LoRA, L2, dropout and FGSM on 200 digits."""
    answer = service.finetune(digits_zip, "numerals", ROBUST)
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
    answer = predicted(service, "numerals", images)
    assert (answer["model"], answer["version"], answer["classes"]) == ("numerals", 1, list("0123456789"))
    right = np.mean([p["label"] == str(label) for p, label in zip(answer["predictions"], labels, strict=True)])
    base = predicted(service, "lenet5", images)
    before = np.mean([p["label"] == str(label) for p, label in zip(base["predictions"], labels, strict=True)])
    assert right > 0.93
    assert right > before
    assert all(abs(sum(p["probabilities"]) - 1) < 1e-5 for p in answer["predictions"])


def test_the_report_can_be_recomputed_from_the_exported_model(service: Service, job: Any, digits: Digits) -> None:
    (version,) = service.api.get("/models/numerals").json()["versions"]
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
    params = load_params(service.home / "models/numerals/1")
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
                body = {"model": "numerals", "range": "byte", "instances": [digits[0][0].tolist()]}
                answer = api.post("/predict", json=body)
                (seen if answer.status_code == 200 else bad).append(answer.json())

    with ThreadPoolExecutor(4) as pool:
        for _ in range(4):
            pool.submit(ask)
        try:
            images, labels = digits
            upload = npz(images=images[:120], labels=labels[:120])
            spec = json.dumps({"epochs": 2, "gate": {"not_worse": False}})
            done = service.finished(service.finetune(upload, "numerals", spec).json()["id"])
            eventually(lambda: seen[-1]["version"] == done["version"], "the new version answers")
        finally:
            stop.set()
    assert done["status"] == "succeeded"
    assert bad == []
    versions = [answer["version"] for answer in seen]
    assert versions[0] < done["version"] == max(versions)
    assert predicted(service, "numerals", digits[0][:1], version=1)["version"] == 1
    assert predicted(service, "numerals", digits[0][:1], label="stable")["version"] == done["version"]


def test_a_version_answers_as_soon_as_its_job_says_so(service: Service, digits: Digits) -> None:
    images, labels = digits
    answer = service.finetune(npz(images=images[:60], labels=labels[:60] % 2), "fresh", QUICK).json()
    done = service.finished(answer["id"])
    assert predicted(service, "fresh", images[:3])["version"] == done["version"] == 1
    assert predicted(service, "fresh", images[:3])["classes"] == ["0", "1"]


@pytest.mark.slow
def test_dark_on_light_uploads_and_predictions_agree(service: Service, digits: Digits) -> None:
    images, labels = digits
    answer = service.finetune(npz(images=255 - images[:200], labels=labels[:200]), "dark", ROBUST).json()
    assert answer["dataset"]["polarity"] == "dark_on_light"
    assert service.finished(answer["id"])["status"] == "succeeded"
    found = predicted(service, "dark", 255 - images[200:400])["predictions"]
    assert np.mean([p["label"] == str(label) for p, label in zip(found, labels[200:400], strict=True)]) > 0.9


@pytest.mark.slow
def test_a_fine_tune_can_go_on_from_any_published_version(service: Service, job: Any, digits_zip: bytes) -> None:
    spec = json.dumps({"base": "numerals:1", "epochs": 1, "method": "head"})
    done = service.finished(service.finetune(digits_zip, "digits-next", spec).json()["id"])
    assert (done["status"], done["base"]) == ("succeeded", "numerals:1")
    before, after = (load_params(service.home / "models" / name) for name in ("numerals/1", "digits-next/1"))
    assert {name for name in before if not np.array_equal(before[name], after[name])} == {"head/kernel", "head/bias"}


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_an_image_body_is_prepared_like_an_upload(service: Service, job: Any, digits: Digits, kind: str) -> None:
    from tests.trainer.test_datasets import encoded

    image = digits[0][3]
    from PIL import Image

    body = encoded(Image.fromarray(image), kind.upper(), **({"quality": 100} if kind == "jpeg" else {}))
    answer = service.api.post(
        "/predict?model=numerals&version=1", content=body, headers={"Content-Type": f"image/{kind}"}
    )
    assert answer.status_code == 200, answer.text
    exact = predicted(service, "numerals", image[None], version=1)
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


def test_every_field_and_parameter_of_the_api_is_described(service: Service) -> None:
    document = service.api.get("/openapi.json").json()
    for reference in re.findall(r'"#/components/schemas/([^"]+)"', json.dumps(document)):
        assert reference in document["components"]["schemas"]
    for name, schema in document["components"]["schemas"].items():
        for field, about in schema.get("properties", {}).items():
            assert "description" in about, f"{name}.{field}"
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
    form = document["paths"]["/finetune"]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
    example = json.loads(form["properties"]["spec"]["examples"][0])
    assert service.finetune(b"", "m", json.dumps(example)).json()["error"]["code"] == "invalid_dataset"  # not the spec


@pytest.mark.exhaustive
def test_frozen_processes_are_replaced(tmp_path: Path) -> None:
    with running_service(tmp_path) as service:
        eventually(lambda: "idle" in service.api.get("/readyz").json()["workers"].values(), "the worker is ready")
        before = {module: service.children(module) for module in ("api", "serving", "trainer")}
        for (pid,) in before.values():
            freeze(pid)

        def replaced(module: str) -> bool:
            now = service.children(module)
            return len(now) == 1 and now != before[module]

        for module in before:
            eventually(functools.partial(replaced, module), f"{module} is replaced", timeout_s=90)
        eventually(service.ready, "the service is ready again")
        assert predicted(service, "lenet5", np.zeros((1, 28, 28), np.uint8))["version"] == 1
