"""Gates over HTTP: those of models, versions that failed theirs, and overrides."""

import io
import json
import zipfile
from typing import Any

import pytest

from tests.conftest import Service, zipped

QUICK = {"epochs": 1, "method": "head"}
IMPOSSIBLE = {"calibration_error": 0.0}


def finetuned(service: Service, data: bytes, model: str, **spec: Any) -> dict[str, Any]:
    """A finished job."""
    return service.finished(service.finetune(data, model, json.dumps(QUICK | spec)).json()["id"])


@pytest.fixture(scope="module")
def failed(service: Service, digits_zip: bytes) -> dict[str, Any]:
    """The job of version 2 of `gated`, which has failed its gate; version 1 is `stable`."""
    assert finetuned(service, digits_zip, "gated")["gate"]["passed"] is True
    return finetuned(service, digits_zip, "gated", gate=IMPOSSIBLE)


def predicted(service: Service, **query: Any) -> int:
    headers = {"Content-Type": "application/octet-stream"}
    return service.api.post("/predict", params=query, content=bytes(784), headers=headers).status_code


def test_the_job_says_that_its_version_is_live_without_its_label_and_why(
    service: Service, failed: dict[str, Any]
) -> None:
    assert (failed["status"], failed["version"], failed["gate"]["passed"]) == ("succeeded", 2, False)
    assert (failed["gate"]["compared_with"], failed["gate"]["overrides"]) == (1, [])
    by_name = {one["condition"]: one for one in failed["gate"]["conditions"]}
    assert set(by_name) == {"calibration_error", "same_classes", "not_worse"}
    assert by_name["not_worse"]["passed"] is True
    missed = by_name["calibration_error"]
    assert (missed["limit"], missed["passed"]) == (0.0, False)
    assert 0 < missed["value"] < 1
    assert "more than 0%" in missed["message"]
    assert service.api.get("/models/gated").json()["labels"] == {"stable": 1}
    assert service.api.get("/models/gated/versions/2").json()["report"]["gate"] == failed["gate"]
    assert predicted(service, model="gated", version=2) == 200
    events = service.api.get(f"/finetune/{failed['id']}/events", params={"limit": 100}).json()["data"]
    (ended,) = (event for event in events if event["data"].get("status") == "succeeded")
    assert ended["data"]["gate"] == failed["gate"]


def test_an_override_moves_the_label_and_nothing_else_does(service: Service, failed: dict[str, Any]) -> None:
    label = "/models/gated/labels/second"
    refused = service.api.put(label, json={"version": 2})
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], error["param"]) == (409, "gate_failed", "override")
    assert "the calibration error is" in error["message"]
    assert [one["condition"] for one in error["details"]] == ["calibration_error"]
    assert service.api.put(label, json={"version": 2, "override": "yes"}).status_code == 422
    assert service.api.put(label, json={"version": 2, "override": True}).json()["version"] == 2
    (override,) = service.api.get("/models/gated/versions/2").json()["report"]["gate"]["overrides"]
    assert override["label"] == "second"
    assert abs(override["at"] - failed["finished_at"]) < 600
    page = service.api.get("/models/gated/versions/2/report").text
    assert "It failed its gate and got the label second by an override" in page
    assert "Gate</h2>" in page
    assert "the calibration error is" in page


@pytest.mark.slow
def test_a_model_whose_only_version_failed_answers_by_version(service: Service, digits_zip: bytes) -> None:
    job = finetuned(service, digits_zip, "barred", gate=IMPOSSIBLE)
    assert (job["status"], job["gate"]["passed"]) == ("succeeded", False)
    assert service.api.get("/models/barred").json()["labels"] == {}
    assert predicted(service, model="barred", version=1) == 200
    assert predicted(service, model="barred") == 404


@pytest.mark.exhaustive
def test_a_models_gate_is_set_shown_and_taken_away(service: Service, digits_zip: bytes) -> None:
    url = "/models/ruled/gate"
    assert service.api.put(url, json={}).status_code == 404
    finetuned(service, digits_zip, "ruled")
    assert service.api.get(url).json() == {"model": "ruled", "object": "gate", "gate": None}
    refused = service.api.put(url, json={"accuracy": 7})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "accuracy")
    refused = service.api.put(url, json={"class_recall": {"0": "much"}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (422, "class_recall")
    given = service.api.put(url, json=IMPOSSIBLE | {"class_recall": {"0": 0.5}}).json()["gate"]
    assert (given["calibration_error"], given["class_recall"], given["not_worse"]) == (0.0, {"0": 0.5}, True)
    assert service.api.get(url).json()["gate"] == service.api.get("/models/ruled").json()["gate"] == given
    assert finetuned(service, digits_zip, "ruled")["gate"]["passed"] is False
    assert service.api.delete(url).json()["gate"] is None
    assert finetuned(service, digits_zip, "ruled")["gate"]["passed"] is True
    assert service.api.get("/models/ruled").json()["labels"] == {"stable": 3}


@pytest.mark.exhaustive
def test_a_gate_for_a_class_that_the_data_lacks_is_refused(service: Service, digits_zip: bytes) -> None:
    answer = service.finetune(digits_zip, "classy", json.dumps({"gate": {"class_recall": {"ten": 0.5}}}))
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "spec.gate.class_recall")
    finetuned(service, digits_zip, "classy")
    service.api.put("/models/classy/gate", json={"class_recall": {"ten": 0.5}}).raise_for_status()
    for fields in ({}, {"dry_run": "true"}):
        form = {"model": "classy", "spec": json.dumps(QUICK), **fields}
        answer = service.api.post("/finetune", files={"data": ("data", digits_zip)}, data=form)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, "spec.gate")
        assert "the model's gate has a limit for 'ten'" in answer.json()["error"]["message"]
    assert finetuned(service, digits_zip, "classy", gate={})["status"] == "succeeded"


@pytest.mark.exhaustive
def test_a_list_of_models_has_the_classes_of_stable(service: Service, digits_zip: bytes) -> None:
    finetuned(service, digits_zip, "listed")
    with zipfile.ZipFile(io.BytesIO(digits_zip)) as archive:
        few = zipped({name: archive.read(name) for name in archive.namelist() if name[0] in "012"})
    job = finetuned(service, few, "listed")
    assert (job["version"], job["gate"]["passed"]) == (2, False)
    (model,) = (one for one in service.api.get("/models").json()["data"] if one["name"] == "listed")
    assert (model["versions"], model["labels"], model["classes"]) == ([2, 1], {"stable": 1}, list("0123456789"))
