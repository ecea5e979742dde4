"""Checkpoints of a training are kept when its spec asks for it, listed, and published as versions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from tests.conftest import Service, eventually, npz
from trainer.checkpoints import Checkpoint
from trainer.export import digest
from trainer.network import Network

Digits = tuple[np.ndarray, np.ndarray]
SPEC = {"epochs": 5, "checkpoints": 2, "ema": 0.5, "calibrate": False, "polarity": "light_on_dark"}


@pytest.fixture(scope="module")
def upload(digits: Digits) -> bytes:
    return npz(images=digits[0][300:380], labels=digits[1][300:380])


@pytest.fixture(scope="module")
def job(service: Service, upload: bytes) -> dict[str, Any]:
    """A job that has made `kept:1` and kept epochs 3 and 5."""
    done = service.finished(service.finetune(upload, "kept", json.dumps(SPEC)).json()["id"])
    assert done["status"] == "succeeded", done
    return done


def publish(service: Service, job: str, epoch: Any, body: Any = None, **headers: str) -> httpx.Response:
    more = {} if body is None else {"json": body}
    return service.api.post(f"/finetune/{job}/checkpoints/{epoch}/publish", headers=headers, **more)


def checkpoints(service: Service, job: str, **params: Any) -> dict[str, Any]:
    answer = service.api.get(f"/finetune/{job}/checkpoints", params=params)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def error_of(answer: httpx.Response) -> tuple[int, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["param"]


def params_of(service: Service, job: str, epoch: int) -> dict[str, np.ndarray]:
    """The parameters that a job has kept of its served network."""
    (path,) = (service.home / "kept" / job).glob(f"*/0-{epoch}.npz")
    state = Checkpoint(path).load()
    assert state is not None
    return {name[len("params/") :]: value for name, value in state[0].items() if name.startswith("params/")}


def test_the_epochs_that_the_spec_asks_for_are_listed_last_first(service: Service, job: dict[str, Any]) -> None:
    events = service.api.get(f"/finetune/{job['id']}/events", params={"limit": 1000}).json()["data"]
    told = {event["data"]["epoch"]: event["data"] for event in events if event["type"] == "epoch"}
    whole = checkpoints(service, job["id"])
    assert (whole["object"], whole["has_more"]) == ("list", False)
    assert [one["epoch"] for one in whole["data"]] == [5, 3]
    for one in whole["data"]:
        assert one["id"] == f"{job['id']}-epoch-{one['epoch']}"
        assert (one["object"], one["job"]) == ("fine_tuning.checkpoint", job["id"])
        assert job["started_at"] - 1 < one["created_at"] < job["finished_at"] + 1
        for figure in ("validation_accuracy", "validation_cross_entropy"):
            assert one[figure] == told[one["epoch"]][figure]
    first = checkpoints(service, job["id"], limit=1)
    assert (first["data"], first["has_more"]) == ([whole["data"][0]], True)
    rest = checkpoints(service, job["id"], limit=1, after=first["data"][0]["id"])
    assert (rest["data"], rest["has_more"]) == ([whole["data"][1]], False)


def test_a_published_checkpoint_answers_with_the_logits_of_the_weights_that_were_kept(
    service: Service, job: dict[str, Any], digits: Digits
) -> None:
    answer = publish(service, job["id"], 3, {"label": "early"})
    assert answer.status_code == 202, answer.text
    queued = answer.json()
    assert answer.headers["Location"] == f"/finetune/{queued['id']}"
    assert (queued["model"], queued["label"]) == ("kept", "early")
    origin = {"job": job["id"], "epoch": 3}
    assert queued["checkpoint"] == origin
    done = service.finished(queued["id"])
    assert done["status"] == "succeeded", done
    events = service.api.get(f"/finetune/{done['id']}/events").json()["data"]
    stages = [event["data"]["stage"] for event in events if event["type"] == "status" and event["data"]["stage"]]
    assert list(dict.fromkeys(stages)) == ["validating", "evaluating", "exporting", "publishing", "warming"]

    version = service.api.get(f"/models/kept/versions/{done['version']}").json()
    manifest, report, params = version["manifest"], version["report"], params_of(service, job["id"], 3)
    assert (version["job"], manifest["checkpoint"]) == (done["id"], origin)
    assert manifest["sha256"] == digest(params)
    for field in ("spec", "resolved_spec", "dataset"):
        assert manifest[field] == job[field], field
    assert report["training"] | {"overfitted_attack_in_epoch": None} == {
        "epochs": 3, "kept_epoch": 3, "ended_by": "checkpoint", "overfitted_attack_in_epoch": None,
    }  # fmt: skip
    listed = next(one for one in checkpoints(service, job["id"])["data"] if one["epoch"] == 3)
    assert report["validation"]["accuracy"] == pytest.approx(listed["validation_accuracy"])
    assert report["validation"]["cross_entropy"] == pytest.approx(listed["validation_cross_entropy"], abs=1e-5)
    assert listed["version"] == done["version"]

    images = digits[0][:8].reshape(8, 28, 28, 1) / np.float32(255)
    url = f"/v1/models/kept/versions/{done['version']}:predict"
    answered = service.api.post(url, json={"inputs": images.tolist()}).json()["outputs"]["logits"]
    assert np.allclose(answered, Network(params).logits(images), atol=1e-4)
    assert service.api.get("/models/kept").json()["labels"] == {"stable": 1, "early": done["version"]}
    page = service.api.get(f"/models/kept/versions/{done['version']}/report").text
    assert f"the checkpoint of epoch 3 of {job['id']}" in page


@pytest.mark.exhaustive
def test_the_last_checkpoint_of_a_search_gives_the_version_again(service: Service, upload: bytes) -> None:
    spec = {"epochs": 2, "checkpoints": 1, "search": {"trials": 2, "folds": 2, "preview": False}}
    job = service.finished(service.finetune(upload, "kept-searched", json.dumps(spec)).json()["id"])
    (last,) = checkpoints(service, job["id"])["data"]
    assert (last["epoch"], last["validation_accuracy"], last["version"]) == (job["resolved_spec"]["epochs"], None, None)
    done = service.finished(publish(service, job["id"], last["epoch"]).json()["id"])
    assert (done["status"], done["version"], done["label"]) == ("succeeded", 2, "stable"), done
    first, second = (service.api.get(f"/models/kept-searched/versions/{number}").json() for number in (1, 2))
    assert second["manifest"]["sha256"] == first["manifest"]["sha256"]
    assert second["report"]["validation"]["out_of_fold"]
    for part in ("validation", "calibration", "cross_validation", "train", "history"):
        assert second["report"][part] == first["report"][part], part
    assert "search" not in second["report"]
    complete = service.home / "models" / "kept-searched" / "2" / "assets.extra" / "fold.npz"
    assert complete.is_file()  # what the rest of the report attacks


def test_publishing_is_repeated_with_its_key_and_creates_nothing_twice(service: Service, job: dict[str, Any]) -> None:
    key = {"Idempotency-Key": "publish-once"}
    first = publish(service, job["id"], 5, {"label": "late"}, **key)
    assert first.status_code == 202
    again = publish(service, job["id"], 5, {"label": "late"}, **key)
    assert (again.json()["id"], again.headers["Location"]) == (first.json()["id"], first.headers["Location"])
    assert error_of(publish(service, job["id"], 5, {"label": "other"}, **key))[:2] == (422, "idempotency_mismatch")
    assert error_of(publish(service, job["id"], 3, {"label": "late"}, **key))[:2] == (422, "idempotency_mismatch")
    assert service.finished(first.json()["id"])["status"] == "succeeded"


def test_what_there_is_not_cannot_be_published(service: Service, job: dict[str, Any]) -> None:
    before = len(service.api.get("/finetune", params={"model": "kept", "limit": 100}).json()["data"])
    assert error_of(publish(service, "ftjob-none", 3)) == (404, "unknown_job", "id")
    assert error_of(service.api.get("/finetune/ftjob-none/checkpoints")) == (404, "unknown_job", "id")
    assert error_of(publish(service, job["id"], 4)) == (404, "unknown_checkpoint", "epoch")
    assert error_of(publish(service, job["id"], 0))[0] == 422
    assert error_of(publish(service, job["id"], 3, {"label": "No!"})) == (422, "invalid_request", "label")
    assert error_of(publish(service, job["id"], 3, {"version": 1})) == (422, "invalid_request", "version")
    assert error_of(service.api.get(f"/finetune/{job['id']}/checkpoints?after=x")) == (
        404, "unknown_checkpoint", "after",
    )  # fmt: skip
    assert len(service.api.get("/finetune", params={"model": "kept", "limit": 100}).json()["data"]) == before


@pytest.mark.slow
def test_nothing_is_published_before_the_job_has_succeeded_or_after_it_was_cancelled(
    service: Service, upload: bytes
) -> None:
    spec = {"method": "full", "epochs": 1000, "checkpoints": 10}
    job = service.finetune(upload, "kept-running", json.dumps(spec)).json()["id"]
    eventually(lambda: checkpoints(service, job)["data"], "the first checkpoint is there")
    assert error_of(publish(service, job, 100)) == (409, "wrong_state", "id")
    service.api.post(f"/finetune/{job}/cancel")
    service.finished(job)
    assert checkpoints(service, job)["data"] == []
    assert error_of(publish(service, job, 100)) == (404, "unknown_checkpoint", "epoch")


@pytest.fixture
def images(service: Service, job: dict[str, Any]) -> Iterator[Path]:
    """The file of the data set; back in its place afterwards."""
    path = service.home / "datasets" / f"{job['dataset']['prepared']}.npz"
    content = path.read_bytes()
    yield path
    path.write_bytes(content)


@pytest.mark.slow
def test_a_checkpoint_without_its_images_or_its_base_is_not_published(
    service: Service, upload: bytes, job: dict[str, Any], images: Path
) -> None:
    spec = {"base": "kept-base", "method": "head", "epochs": 1, "checkpoints": 1}
    service.finished(service.finetune(upload, "kept-base", '{"method": "head", "epochs": 1}').json()["id"])
    based = service.finished(service.finetune(upload, "kept-based", json.dumps(spec)).json()["id"])
    service.api.delete("/models/kept-base")
    refused = publish(service, based["id"], 1)
    assert error_of(refused) == (409, "wrong_state", "id")
    assert "kept-base:1" in refused.json()["error"]["message"]
    images.unlink()
    refused = publish(service, job["id"], 3)
    assert error_of(refused) == (409, "wrong_state", "id")
    assert "images" in refused.json()["error"]["message"]
    service.api.delete("/models/kept-based")
    assert checkpoints(service, based["id"])["data"] == []
    assert error_of(publish(service, based["id"], 1)) == (404, "unknown_checkpoint", "epoch")


@pytest.mark.exhaustive
def test_the_checkpoints_of_a_model_go_with_it_and_stay_away_from_the_next_of_its_name(
    service: Service, upload: bytes
) -> None:
    spec = json.dumps({"epochs": 1, "checkpoints": 1, "method": "head"})
    job = service.finished(service.finetune(upload, "kept-gone", spec).json()["id"])["id"]
    assert [kept["epoch"] for kept in checkpoints(service, job)["data"]] == [1]
    assert service.api.delete("/models/kept-gone").status_code == 200
    assert not (service.home / "kept" / job).exists()
    service.finished(service.finetune(upload, "kept-gone", spec).json()["id"])
    assert checkpoints(service, job)["data"] == []
    assert error_of(publish(service, job, 1)) == (404, "unknown_checkpoint", "epoch")
