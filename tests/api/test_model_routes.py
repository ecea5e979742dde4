"""Labels, shares of the traffic, removal and verification, over HTTP."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import Service, eventually

Digits = tuple[np.ndarray, np.ndarray]
QUICK = '{"epochs": 1, "method": "head"}'


@pytest.fixture(scope="module")
def model(service: Service, digits_zip: bytes) -> str:
    """A model with versions 1 to 3."""
    jobs = [service.finetune(digits_zip, "labelled", QUICK).json()["id"] for _ in range(3)]
    assert [service.finished(job)["version"] for job in jobs] == [1, 2, 3]
    return "labelled"


def answered(service: Service, model: str, **headers: str) -> int:
    answer = service.api.post(
        f"/predict?model={model}", content=bytes(784), headers={"Content-Type": "application/octet-stream", **headers}
    )
    return int(answer.raise_for_status().headers["X-Temper-Version"])


def test_one_call_promotes_and_one_rolls_back(service: Service, model: str) -> None:
    assert answered(service, model) == 3
    moved = service.api.put(f"/models/{model}/labels/stable", json={"version": 1})
    assert moved.json() == {"model": model, "object": "label", "label": "stable", "version": 1, "weight": 0.0}
    assert answered(service, model) == 1
    service.api.put(f"/models/{model}/labels/stable", json={"version": 3}).raise_for_status()
    assert answered(service, model) == 3


def test_a_canary_gets_its_share_and_a_key_sticks_to_it(service: Service, model: str) -> None:
    service.api.put(f"/models/{model}/labels/canary", json={"version": 2, "weight": 0.5}).raise_for_status()
    found = Counter(answered(service, model) for _ in range(60))
    assert set(found) == {2, 3}
    for key in ("anna", "ben", "cem", "dora"):
        assert len({answered(service, model, **{"X-Sticky-Key": key}) for _ in range(5)}) == 1
    assert len({answered(service, model, **{"X-Sticky-Key": f"user-{number}"}) for number in range(40)}) == 2
    about = service.api.get(f"/models/{model}").json()
    assert (about["labels"], about["weights"]) == ({"stable": 3, "canary": 2}, {"canary": 0.5})
    assert service.api.delete(f"/models/{model}/labels/canary").json()["deleted"] is True
    assert {answered(service, model) for _ in range(10)} == {3}


@pytest.mark.slow
def test_a_fine_tune_can_go_to_the_canary_first(service: Service, model: str, digits_zip: bytes) -> None:
    form = {"model": "careful", "spec": QUICK}
    for fields in (form, {**form, "label": "canary"}):
        answer = service.api.post("/finetune", files={"data": ("d", digits_zip)}, data=fields)
        assert service.finished(answer.json()["id"])["status"] == "succeeded"
    assert service.api.get("/models/careful").json()["labels"] == {"stable": 1, "canary": 2}
    refused = service.api.post("/finetune", files={"data": ("d", digits_zip)}, data={**form, "label": "A B"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "label")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("PUT", "/labels/stable", {"version": 99}, 404, "version"),
        ("PUT", "/labels/stable", {"version": 3, "weight": 0.5}, 422, "weight"),
        ("PUT", "/labels/canary", {"version": 3, "weight": 1.5}, 422, "weight"),
        ("PUT", "/labels/canary", {"version": "3"}, 422, "version"),
        ("PUT", "/labels/canary", {}, 422, "version"),
        ("PUT", "/labels/canary", {"version": 3, "x": 1}, 422, "x"),
        ("PUT", "/labels/UP", {"version": 3}, 422, "label"),
        ("DELETE", "/labels/stable", None, 409, "label"),
        ("DELETE", "/labels/nope", None, 404, "label"),
        ("DELETE", "/versions/99", None, 404, "version"),
        ("DELETE", "/versions/3", None, 409, "version"),
        ("POST", "/versions/99/verify", None, 404, "version"),
    ],
)
def test_what_cannot_be_is_refused(
    service: Service, model: str, method: str, path: str, body: Any, status: int, param: str
) -> None:
    answer = service.api.request(method, f"/models/{model}{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_the_base_model_stays(service: Service) -> None:
    for path in ("/models/lenet5", "/models/lenet5/versions/1"):
        assert service.api.delete(path).status_code == 409


@pytest.mark.slow
def test_a_removed_version_is_gone_everywhere_and_the_rest_answers(service: Service, digits_zip: bytes) -> None:
    for _ in range(2):
        assert service.finished(service.finetune(digits_zip, "going", QUICK).json()["id"])["status"] == "succeeded"
    assert service.api.delete("/models/going/versions/1").json()["versions"] == [1]
    body = {"model": "going", "version": 1, "range": "byte", "instances": [[0] * 784]}
    assert service.api.post("/predict", json=body).status_code == 404
    assert not (service.home / "models/going/1").exists()
    assert answered(service, "going") == 2
    assert service.api.delete("/models/going").json()["versions"] == [2]
    assert service.api.get("/models/going").status_code == 404
    assert list((service.home / "models/going").iterdir()) == []
    done = service.finished(service.finetune(digits_zip, "going", QUICK).json()["id"])
    assert done["version"] == 3


def test_a_version_that_a_waiting_job_starts_from_stays(service: Service, model: str, digits_zip: bytes) -> None:
    long = '{"epochs": 1000, "method": "full", "base": "labelled:1"}'
    job = service.finetune(digits_zip, "heir", long).json()["id"]
    for path in (f"/models/{model}/versions/1", f"/models/{model}"):
        refused = service.api.delete(path)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "wrong_state")
    service.api.post(f"/finetune/{job}/cancel")
    assert service.finished(job)["status"] == "cancelled"


def test_verifying_finds_what_has_changed_on_disk(service: Service, digits_zip: bytes) -> None:
    assert service.finished(service.finetune(digits_zip, "checked", QUICK).json()["id"])["status"] == "succeeded"
    found = service.api.post("/models/checked/versions/1/verify").json()
    assert found["proven"] is True
    assert set(found["failures"].values()) == {None}
    weights: Path = service.home / "models/checked/1/variables/variables.data-00000-of-00001"
    content = bytearray(weights.read_bytes())
    content[1000] ^= 1
    weights.write_bytes(content)
    found = service.api.post("/models/checked/versions/1/verify").json()
    assert found["proven"] is False
    assert "variables.data-00000-of-00001" in found["failures"]["files"]


@pytest.mark.slow
def test_the_steps_and_the_warming_can_be_seen_on_the_job(service: Service, digits_zip: bytes) -> None:
    job = service.finetune(digits_zip, "steps", QUICK).json()["id"]
    steps = eventually(lambda: service.api.get(f"/finetune/{job}").json()["progress"].get("publishing"), "it publishes")
    assert "staged" in steps
    done = service.finished(job)
    assert list(done["progress"]["publishing"])[-2:] == ["warmed", "labelled"]
    assert (done["stage"], done["label"]) == (None, "stable")
