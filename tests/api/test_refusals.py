"""Bad input over HTTP: each gets its answer, and leaves nothing."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import tensorflow as tf
from fastapi import FastAPI

from api.http import errors
from tests.conftest import Service, png, zipped
from tests.trainer.test_datasets import BAD, DOT


def files(home: Path) -> set[Path]:
    """What is kept in a home, but for the store and what the model server and worker have in hand."""
    return {path for part in ("models", "staging", "datasets") for path in (home / part).rglob("*")}


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


def test_who_asks_for_a_label_that_no_version_has_learns_what_to_do(service: Service) -> None:
    answer = service.api.post("/predict", json={"model": "lenet5", "label": "canary", "instances": [IMAGE]})
    assert answer.json()["error"]["message"] == (
        "model 'lenet5' has no label 'canary': name a version, or set the label on one"
    )


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


def test_an_unforeseen_failure_is_answered_and_not_raised_again() -> None:
    app = FastAPI()
    errors.install(app)

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("unforeseen")

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as api:
            return await api.get("/broken")

    found = asyncio.run(ask())  # uvicorn closes the connection of an application that raises
    assert (found.status_code, found.json()["error"]["code"]) == (500, "internal_error")


def test_a_nul_in_an_id_is_refused_before_the_store_sees_it(service: Service) -> None:
    """PostgreSQL cannot look it up, which was reported as a store that is away."""
    asked = 0
    for path, operations in service.api.get("/openapi.json").json()["paths"].items():
        for method, operation in operations.items():
            queries = {parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "query"}
            if "{id}" in path:
                url = path.replace("{id}", "a%00b").replace("{delivery}", "x")
            elif "after" in queries:
                url = f"{path}?after=a%00b"
            else:
                continue
            asked += 1
            expected = {404} if path == "/openai/v1/models/{id}" else {400, 422}
            answer = service.api.request(method, url)
            assert answer.status_code in expected, (method, url, answer.text)
    assert asked > 20


@pytest.mark.parametrize("field", ["dataset", "validation_dataset"])
def test_a_nul_in_the_id_of_a_data_set_is_refused_with_its_field(service: Service, field: str) -> None:
    answer = service.api.post("/finetune", data={"model": "m", field: "a\0b"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, field), answer.text


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
def test_a_nul_in_the_id_of_a_file_is_refused_with_its_field(service: Service, field: str) -> None:
    job = {"model": "lenet5", "training_file": "f", field: "a\0b"}
    answer = service.api.post("/openai/v1/fine_tuning/jobs", json=job)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, field), answer.text


def test_a_method_that_a_path_lacks_is_answered_with_those_that_it_has(service: Service) -> None:
    found = {path: service.api.patch(path) for path in ("/datasets/x", "/openai/v1/files", "/predict", "/healthz")}
    assert {answer.status_code for answer in found.values()} == {405}
    assert {path: answer.headers["Allow"] for path, answer in found.items()} == {
        "/datasets/x": "GET, DELETE, HEAD",
        "/openai/v1/files": "GET, POST, HEAD",
        "/predict": "POST",
        "/healthz": "GET, HEAD",
    }
