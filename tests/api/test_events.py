"""The events of a job: in pages, as a stream, and across what interrupts a stream."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from api.routes.events import EventView
from store.processes import free_port
from tests.conftest import Service, eventually, running_service

STREAM = {"Accept": "text/event-stream"}
QUICK = '{"epochs": 2}'


def streamed(api: httpx.Client, job_id: str, after: int = 0) -> Iterator[dict[str, Any]]:
    """The events of a stream, each checked against its own envelope."""
    headers = {**STREAM, "Last-Event-ID": str(after)} if after else STREAM
    with api.stream("GET", f"/finetune/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line and not line.startswith(":"):
                name, _, value = line.partition(": ")
                fields[name] = value
            elif fields:
                event = json.loads(fields["data"])
                assert (fields["id"], fields["event"]) == (str(event["seq"]), event["type"])
                yield event
                fields = {}


def pages(api: httpx.Client, job_id: str, limit: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    while True:
        after = found[-1]["seq"] if found else 0
        page = api.get(f"/finetune/{job_id}/events", params={"after": after, "limit": limit}).json()
        found += page["data"]
        if not page["has_more"]:
            return found
        assert len(page["data"]) == limit


@pytest.fixture(scope="module")
def job(service: Service, digits_zip: bytes) -> str:
    """A job that has just been queued."""
    job_id: str = service.finetune(digits_zip, "events", QUICK).json()["id"]
    return job_id


def test_a_stream_tells_everything_in_order_and_ends_with_the_report(service: Service, job: str) -> None:
    found = list(streamed(service.api, job))
    assert [event["seq"] for event in found] == list(range(1, len(found) + 1))
    assert found == pages(service.api, job, limit=1000)
    told = [(event["type"], event["data"].get("status") or event["data"].get("stage")) for event in found]
    assert told[0] == ("status", "queued")
    assert found[-1]["data"] == {"report_status": "complete"}
    assert sum(event["type"] == "epoch" for event in found) == 2
    assert ("status", "succeeded") in told
    assert all(earlier["created_at"] <= later["created_at"] for earlier, later in itertools.pairwise(found))
    assert set(found[0]) == set(EventView.model_fields)


def test_pages_have_no_gaps_whatever_their_size(service: Service, job: str) -> None:
    service.completed(job)
    assert pages(service.api, job, limit=1) == pages(service.api, job, limit=7) == pages(service.api, job, limit=1000)


def test_a_stream_goes_on_after_the_last_event_that_a_client_has_seen(service: Service, job: str) -> None:
    service.completed(job)
    everything = pages(service.api, job, limit=1000)
    assert list(streamed(service.api, job, after=5)) == everything[5:]
    assert list(streamed(service.api, job, after=len(everything))) == []


@pytest.mark.parametrize(
    ("path", "headers", "status", "param"),
    [
        ("/finetune/none/events", {}, 404, "id"),
        ("/finetune/none/events", STREAM, 404, "id"),
        ("/finetune/{job}/events?after=-1", {}, 422, "after"),
        ("/finetune/{job}/events?limit=0", {}, 422, "limit"),
        ("/finetune/{job}/events", {**STREAM, "Last-Event-ID": "x"}, 422, "Last-Event-ID"),
        ("/finetune/{job}/events", {**STREAM, "Last-Event-ID": "9" * 5000}, 422, "Last-Event-ID"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    service: Service, job: str, path: str, headers: dict[str, str], status: int, param: str
) -> None:
    answer = service.api.get(path.format(job=job), headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


@pytest.mark.exhaustive
def test_no_event_is_lost_or_doubled_across_a_killed_gateway_and_another_one(tmp_path: Path, digits_zip: bytes) -> None:
    with running_service(tmp_path) as service:
        job_id = service.finetune(digits_zip, "m", '{"epochs": 60}').json()["id"]
        seen: list[dict[str, Any]] = []
        for event in streamed(service.api, job_id):
            seen.append(event)
            if len(seen) == 8:
                service.kill("api")
                break
        port = free_port()
        server = (tmp_path / "run/model_server.sock").as_posix()
        second = subprocess.Popen(
            [sys.executable, "-m", "api"],
            env={
                **os.environ, "TEMPER_HOME": str(tmp_path), "TEMPER_PORT": str(port),
                "TEMPER_MODEL_SERVER": f"unix:{server}",
            },
        )  # fmt: skip
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as other:
                eventually(lambda: other.get("/healthz").is_success, "the second gateway answers")
                for event in streamed(other, job_id, after=seen[-1]["seq"]):
                    seen.append(event)
                    if len(seen) == 20:
                        break
        finally:
            second.kill()
            second.wait()
        eventually(lambda: service.api.get("/healthz").is_success, "the first gateway is back")
        seen += streamed(service.api, job_id, after=seen[-1]["seq"])
        assert [event["seq"] for event in seen] == list(range(1, len(seen) + 1))
        assert seen == pages(service.api, job_id, limit=1000)
        assert seen[-1]["type"] == "report"
