"""Jobs as the API shows them."""

import dataclasses
from typing import Any

import pytest

from api.routes.jobs import JobList, JobView
from store.records import DatasetCard, Progress
from trainer.asked import parse_spec
from trainer.jobs.records import Job
from trainer.spec import described

JOB = Job(
    id="ftjob-1", tenant="default", model="m", version=None, preview_version=None, label="stable", base="lenet5:1",
    status="running", stage="training", progress=Progress(), created_at=0.0, started_at=0.0, finished_at=None,
    spec=described(parse_spec("{}")), resolved_spec=None, dataset=DatasetCard(), error=None, report_status="none",
    worker="w", attempts=1, cancel_requested=False, pause_requested=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "stored",
    [
        {},
        {"spec": {**JOB.spec, "from_the_future": 1}},
        {"spec": {**JOB.spec, "method": "magic", "l2": "auto"}},
        {"spec": {}},
        {"stage": "searching", "status": "waiting", "report_status": "partial"},
        {"error": {"message": "worker lost"}, "status": "failed"},
        {"spec": None},
    ],
)
def test_a_job_of_another_release_is_shown_as_it_was_stored(stored: dict[str, Any]) -> None:
    view = JobView.of(dataclasses.replace(JOB, **stored))
    shown = JobList(data=[view], has_more=False).model_dump(mode="json")["data"][0]
    for name, value in stored.items():
        if name == "error":
            assert shown[name]["message"] == value["message"]
        elif value is not None and value != {}:
            assert shown[name] == value
    assert JobView.of(JOB).spec == parse_spec("{}")


def test_the_documentation_lists_what_this_release_writes() -> None:
    properties = JobView.model_json_schema()["properties"]
    assert properties["status"]["enum"] == ["queued", "running", "paused", "succeeded", "failed", "cancelled"]
    assert "training" in properties["stage"]["anyOf"][0]["enum"]
