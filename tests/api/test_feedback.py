"""POST /feedback: corrections are kept, bounded, deletable, and learned from."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa
from PIL import Image

from store.engine import now
from store.errors import InvalidRequest, UnknownCorrection, UnknownPrediction
from tests.conftest import Service, npz, running_service
from trainer.jobs.feedback import KEPT_S, Feedback, predictions

Digits = tuple[np.ndarray, np.ndarray]
CLASSES = [str(digit) for digit in range(10)]


@pytest.fixture(scope="module")
def model(service: Service, digits: Digits) -> str:
    upload = {"data": npz(images=digits[0][:120], labels=digits[1][:120])}
    form = {"model": "corrected", "spec": json.dumps({"method": "head", "epochs": 2})}
    answer = service.api.post("/finetune", files=upload, data=form)
    assert service.finished(answer.json()["id"])["status"] == "succeeded"
    return "corrected"


def predicted(service: Service, model: str, images: np.ndarray, path: str = "/predict") -> dict[str, Any]:
    body = {"model": model, "range": "byte", "feedback": True, "instances": images.tolist()}
    answer = service.api.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def corrected(service: Service, **body: Any) -> httpx.Response:
    return service.api.post("/feedback", json=body)


def test_a_correction_is_listed_with_its_image_replaced_and_deleted(
    service: Service, model: str, digits: Digits
) -> None:
    found = predicted(service, model, digits[0][200:202])
    answer = corrected(service, id=found["id"], index=1, label="3")
    assert (answer.status_code, answer.headers["Location"]) == (201, f"/feedback/{answer.json()['id']}")
    assert corrected(service, id=found["id"], index=1, label="5").json()["id"] == answer.json()["id"]
    (listed,) = service.api.get("/feedback", params={"model": model}).json()["data"]
    assert (listed["label"], listed["predicted"]) == ("5", found["predictions"][1]["label"])
    picture = Image.open(io.BytesIO(base64.b64decode(listed["image"].partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(picture), digits[0][201])
    assert service.api.delete(f"/feedback/{listed['id']}").json() == {"id": listed["id"], "deleted": True}
    assert service.api.get("/feedback", params={"model": model}).json()["data"] == []
    again = service.api.delete(f"/feedback/{listed['id']}")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "unknown_correction")


def test_what_cannot_be_corrected_is_said(service: Service, model: str, digits: Digits) -> None:
    found = predicted(service, model, digits[0][:1], "/explain")
    for body, status, param in (
        ({"id": "pred-none", "label": "3"}, 404, "id"),
        ({"id": found["id"], "index": 1, "label": "3"}, 422, "index"),
        ({"id": found["id"], "label": "zebra"}, 422, "label"),
        ({"id": found["id"]}, 422, "label"),
    ):
        answer = corrected(service, **body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    body = {"model": model, "range": "byte", "feedback": True, "instances": digits[0][:17].tolist()}
    assert service.api.post("/predict", json=body).status_code == 413
    plain = service.api.post("/predict", json={**body, "feedback": False}).json()
    assert "id" not in plain


@pytest.mark.slow
def test_a_fine_tune_learns_from_corrections_and_its_report_says_what_they_changed(
    service: Service, model: str, digits: Digits
) -> None:
    images, labels = digits[0][300:310], digits[1][300:310]
    found = predicted(service, model, images)
    for index, label in enumerate(labels.tolist()):
        assert corrected(service, id=found["id"], index=index, label=str(label)).status_code == 201
    spec = {"method": "full", "epochs": 8, "learning_rate": 0.003, "validation_split": 0, "folds": 3}
    form = {"model": model, "corrections": "true", "spec": json.dumps(spec)}
    planned = service.api.post("/finetune", data={**form, "dry_run": "true"}).json()
    assert planned["dataset"]["images"] == 130
    answer = service.api.post("/finetune", data=form)
    assert answer.status_code == 202, answer.text
    job = service.finished(answer.json()["id"])
    assert (job["status"], job["dataset"]["images"]) == ("succeeded", 130)
    assert job["dataset"]["filename"].endswith("with 10 corrections")
    version = service.api.get(f"/models/{model}/versions/{job['version']}").json()
    before = sum(one["label"] == str(label) for one, label in zip(found["predictions"], labels, strict=True))
    figures = version["report"]["corrections"]
    assert (figures["images"], figures["right_before"], figures["out_of_fold"]) == (10, before, True)
    listed = version["report"]["inspection"]["corrections"]
    assert [one["class"] for one in listed] == [str(label) for label in labels]
    assert figures["right"] == sum(one["predicted"] == one["class"] for one in listed)
    page = service.api.get(f"/models/{model}/versions/{job['version']}/report").text
    assert "Corrected by users" in page
    assert f"{figures['right']} of 10 are classified right now, by networks that were not trained on them" in page
    kept = service.api.get("/feedback", params={"model": model}).json()["data"]
    service.api.delete(f"/feedback/{kept[0]['id']}")
    again = service.api.post("/finetune", data={**form, "dry_run": "true"}).json()
    assert again["dataset"]["images"] == 129  # the others are there once
    for one in kept[1:]:
        service.api.delete(f"/feedback/{one['id']}")


def test_corrections_that_cannot_be_learned_from_are_refused(service: Service, model: str, digits: Digits) -> None:
    none = service.api.post("/finetune", data={"model": model, "corrections": "true"})
    assert (none.status_code, none.json()["error"]["param"]) == (422, "corrections")
    assert "there are none of 'corrected'" in none.json()["error"]["message"]
    upload = {"data": npz(images=digits[0][:40], labels=digits[1][:40])}
    both = service.api.post("/finetune", files=upload, data={"model": model, "corrections": "true"})
    assert (both.status_code, both.json()["error"]["param"]) == (422, "corrections")


@pytest.mark.exhaustive
def test_feedback_that_is_off_keeps_nothing(tmp_path: Path, digits: Digits) -> None:
    with running_service(tmp_path / "home", TEMPER_FEEDBACK="0") as service:
        body = {"model": "lenet5", "range": "byte", "feedback": True, "instances": digits[0][:1].tolist()}
        for answer in (service.api.post("/predict", json=body), corrected(service, id="pred-1", label="3")):
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "feedback_off")


def test_corrections_are_bounded_and_belong_to_a_tenant(engine: sa.Engine) -> None:
    feedback, image = Feedback(engine, 3), np.arange(784, dtype=np.uint8)[None]
    kept = [feedback.keep("a", "m", 1, CLASSES, ["7"], image + np.uint8(shade)) for shade in range(5)]
    with pytest.raises(UnknownPrediction):
        feedback.correct("b", kept[0], 0, "1")
    with pytest.raises(InvalidRequest, match="label"):
        feedback.correct("a", kept[0], 0, "eleven")
    made = [feedback.correct("a", name, 0, "1") for name in kept]
    assert [one.id for one in feedback.of_model("a", "m")] == [one.id for one in made[2:]]
    np.testing.assert_array_equal(feedback.of_model("a", "m")[0].image, (image + np.uint8(2)).reshape(28, 28))
    again = feedback.correct("a", feedback.keep("a", "m", 1, CLASSES, ["7"], image + np.uint8(2)), 0, "4")
    assert [one.id for one in feedback.of_model("a", "m")] == [made[3].id, made[4].id, again.id]  # the same image
    with pytest.raises(UnknownCorrection):
        feedback.delete("b", made[-1].id)
    feedback.delete("a", made[-1].id)
    theirs = feedback.correct("b", feedback.keep("b", "m", 1, CLASSES, ["7"], image), 0, "1")
    assert [one.id for one in feedback.of_model("b", "m")] == [theirs.id]
    assert len(feedback.of_model("a", "m")) == 2  # several tenants correct the base, and see their own corrections
    feedback.sweep({"m": True}.__contains__)
    assert len(feedback.of_model("a", "m")) == 2
    feedback.sweep(lambda model: False)
    assert feedback.of_model("a", "m") == []


def test_a_prediction_can_be_corrected_for_an_hour(engine: sa.Engine) -> None:
    feedback, image = Feedback(engine, 3), np.zeros((1, 784), np.uint8)
    old = feedback.keep("a", "m", 1, CLASSES, ["7"], image)
    with engine.begin() as connection:
        connection.execute(predictions.update().values(created_at=now() - KEPT_S - 1))
    with pytest.raises(UnknownPrediction, match="within an hour"):
        feedback.correct("a", old, 0, "1")
    feedback.sweep(lambda model: True)
    with engine.connect() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(predictions)).scalar_one() == 0
