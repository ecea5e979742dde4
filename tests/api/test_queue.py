"""The queue over HTTP: positions, priorities, filters, and fine-tunes that are only tried."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.conftest import Service, eventually, png, zipped
from trainer.asked import default_folds

LONG = '{"method": "full", "epochs": 1000}'


def submit(service: Service, data: bytes, model: str, **fields: str) -> httpx.Response:
    return service.api.post("/finetune", files={"data": ("data.zip", data)}, data={"model": model, **fields})


@pytest.fixture(scope="module")
def jobs(service: Service, digits_zip: bytes) -> Iterator[list[dict[str, Any]]]:
    """A long job that runs, and three that wait, as they were answered."""
    answers = [submit(service, digits_zip, "queue-a", spec=LONG)]
    first = answers[0].json()["id"]
    eventually(lambda: service.api.get(f"/finetune/{first}").json()["status"] == "running", "the first job runs")
    for model, priority in (("queue-a", "0"), ("queue-b", "5"), ("queue-a", "-5")):
        answers.append(submit(service, digits_zip, model, priority=priority, spec="{}"))
    yield [answer.json() for answer in answers]
    for answer in answers:
        service.api.post(f"/finetune/{answer.json()['id']}/cancel")
        service.finished(answer.json()["id"])


def test_a_queued_job_has_a_place_by_its_priority(service: Service, jobs: list[dict[str, Any]]) -> None:
    now = {job["id"]: job for job in service.api.get("/finetune", params={"limit": 4}).json()["data"]}
    running, usual, urgent, patient = (now[job["id"]] for job in jobs)
    assert [job["queue_position"] for job in (running, urgent, usual, patient)] == [None, 1, 2, 3]
    assert [job["priority"] for job in (running, urgent, usual, patient)] == [0, 5, 0, -5]
    assert running["estimated_start_at"] is None
    assert service.api.get(f"/finetune/{patient['id']}").json()["queue_position"] == 3
    for job in (urgent, usual, patient):
        begin, end = job["estimated_start_at"], job["estimated_end_at"]
        assert end is None or begin is not None
        assert end is None or end > begin


def test_pages_have_only_the_jobs_that_are_asked_for(service: Service, jobs: list[dict[str, Any]]) -> None:
    def listed(**params: Any) -> list[str]:
        page = service.api.get("/finetune", params={"limit": 1, **params}).json()
        found = [job["id"] for job in page["data"]]
        return found + listed(**{**params, "after": found[-1]}) if page["has_more"] else found

    ids = [job["id"] for job in jobs]
    assert listed(model="queue-a") == [ids[3], ids[1], ids[0]]
    assert listed(model="queue-a", status="queued") == [ids[3], ids[1]]
    assert listed(model="queue-b") == [ids[2]]
    assert listed(model="queue-b", status="failed") == []


@pytest.mark.parametrize(("name", "value"), [("status", "done"), ("model", "No Such"), ("limit", "0"), ("after", "x")])
def test_a_filter_that_cannot_be_is_refused_by_name(service: Service, name: str, value: str) -> None:
    answer = service.api.get("/finetune", params={name: value})
    assert answer.status_code == (404 if name == "after" else 422)
    assert answer.json()["error"]["param"] == name


@pytest.mark.parametrize(
    ("name", "value"), [("priority", "101"), ("priority", "-101"), ("priority", "high"), ("priority", "1.5"),
                        ("dry_run", "perhaps")],
)  # fmt: skip
def test_a_field_with_a_wrong_value_is_refused_by_name(
    service: Service, digits_zip: bytes, name: str, value: str
) -> None:
    answer = submit(service, digits_zip, "refused", **{name: value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, name)
    assert value.lstrip("-") in answer.json()["error"]["message"]
    assert service.api.get("/finetune", params={"model": "refused"}).json()["data"] == []


def test_a_dry_run_says_what_would_be_and_creates_nothing(service: Service, digits: Any) -> None:
    def kept() -> set[str]:
        return {path.name for path in service.home.glob("datasets/*")} | {
            path.name for path in service.home.glob("staging/uploads-*/*")
        }

    files, unseen = kept(), zipped({f"{digits[1][i]}/{i}.png": png(digits[0][i]) for i in range(300, 500)})
    for spec in (None, '{"method": "full"}'):
        fields = {"spec": spec} if spec else {}
        answer = submit(service, unseen, "dry", dry_run="true", **fields)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert (found["object"], found["model"], found["base"]) == ("fine_tuning.dry_run", "dry", "lenet5:1")
        assert (found["dataset"]["images"], sum(found["dataset"]["classes"].values())) == (200, 200)
        assert found["estimate"]["seconds"] > 0
        assert 2e8 < found["estimate"]["memory_bytes"] < 8e9
        if spec is None:
            assert (found["spec"]["method"], found["resolved_spec"]) == ("auto", None)
            assert found["spec"]["search"]["folds"] == default_folds(200)
        else:
            assert found["resolved_spec"]["method"] == "full"
            assert found["resolved_spec"]["base"] == "lenet5:1"
    assert kept() == files
    assert service.api.get("/finetune", params={"model": "dry"}).json()["data"] == []


@pytest.mark.parametrize(
    ("data", "fields", "param"),
    [
        (b"no zip", {}, "data"),
        (None, {"spec": '{"epochs": 0}'}, "spec.epochs"),
        (None, {"spec": '{"validation_split": 0}'}, "spec.validation_split"),
        (None, {"model": "lenet5"}, "model"),
    ],
)
def test_a_dry_run_finds_what_a_run_would_refuse(
    service: Service, digits_zip: bytes, data: bytes | None, fields: dict[str, str], param: str
) -> None:
    answer = submit(service, digits_zip if data is None else data, **{"model": "dry", "dry_run": "true", **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
