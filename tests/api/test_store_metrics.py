"""What `/metrics` says of the store that gateways share."""

import socket
import time

import httpx
import pytest
import sqlalchemy as sa
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from api.store_metrics import StoreMetrics
from store.records import DatasetCard
from store.settings import Settings
from tests.conftest import succeed
from trainer.jobs import statistics
from trainer.jobs.records import Job, Jobs, jobs
from trainer.jobs.statistics import STAGES, Statistics


def scraped(metrics: StoreMetrics) -> dict[tuple[str, ...], float]:
    """The samples of a fresh reading by their names and labels, those of buckets excepted."""
    metrics._read_at = float("-inf")
    text = generate_latest(metrics.registry).decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {
        (sample.name, *sample.labels.values()): sample.value for sample in samples if "le" not in sample.labels
    }  # fmt: skip


def queued(records: Jobs, model: str = "m") -> Job:
    return records.create(model=model, base="lenet5:1", spec={}, dataset=DatasetCard())


def run(records: Jobs, engine: sa.Engine, ended_s_ago: float = 0.0) -> str:
    """A job that has succeeded: 0 s of validating, then training."""
    queued(records)
    job = records.claim("w")
    assert job is not None
    records.set_stage(job, "training")
    succeed(records, job, 1)
    if ended_s_ago:
        with engine.begin() as connection:
            where = jobs.c.id == job.id
            connection.execute(jobs.update().where(where).values(finished_at=jobs.c.finished_at - ended_s_ago))
    return job.id


def test_jobs_workers_and_the_oldest_in_the_queue_are_counted(engine: sa.Engine) -> None:
    records, metrics = Jobs(engine), StoreMetrics(Statistics(engine))
    assert scraped(metrics)["temper_queue_oldest_seconds",] == 0
    run(records, engine)
    first = queued(records)
    queued(records)
    with engine.begin() as connection:
        aged = jobs.update().where(jobs.c.id == first.id).values(created_at=jobs.c.created_at - 100)
        connection.execute(aged)
    records.heartbeat("one", "busy")
    records.heartbeat("two", "busy")
    found = scraped(metrics)
    assert {key[1]: value for key, value in found.items() if key[0] == "temper_jobs"} == {
        "queued": 2, "running": 0, "paused": 0, "succeeded": 1, "failed": 0, "cancelled": 0,
    }  # fmt: skip
    assert {key[1]: value for key, value in found.items() if key[0] == "temper_workers"} == {
        "warming": 0, "idle": 0, "busy": 2, "reporting": 0,
    }  # fmt: skip
    assert 100 <= found["temper_queue_oldest_seconds",] < 110
    assert found["temper_store_up",] == 1


def test_stages_of_finished_jobs_are_observed_once_each_and_have_a_closed_set_of_labels(engine: sa.Engine) -> None:
    records, metrics = Jobs(engine), StoreMetrics(Statistics(engine))
    run(records, engine)  # before the first scrape

    def counts(found: dict[tuple[str, ...], float]) -> dict[str, float]:
        return {key[1]: value for key, value in found.items() if key[0] == "temper_stage_seconds_count"}

    assert counts(scraped(metrics)) == dict.fromkeys(STAGES, 0)
    began = time.monotonic()
    queued(records)
    job = records.claim("w")
    assert job is not None
    records.set_stage(job, "training")
    records.append_event(job, "epoch", {"epoch": 1})
    time.sleep(0.2)  # the duration that is measured
    records.set_stage(job, "publishing")
    records.append_event(job, "publishing", {"step": "proven"}, stage="warming")
    records.append_event(job, "publishing", {"step": "warmed"}, stage="publishing")
    assert counts(scraped(metrics)) == dict.fromkeys(STAGES, 0)  # it has not finished
    succeed(records, job, 1)
    expected = dict.fromkeys(STAGES, 0) | dict.fromkeys(("validating", "training", "publishing", "warming"), 1)
    for _ in range(2):
        found = scraped(metrics)
        assert counts(found) == expected
    assert 0.2 <= found["temper_stage_seconds_sum", "training"] <= time.monotonic() - began
    run(records, engine, ended_s_ago=30)  # its transaction was slow
    assert counts(scraped(metrics))["training"] == 2


def test_more_jobs_than_are_read_at_a_time_are_caught_up_with(
    engine: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(statistics, "MOST_JOBS", 3)
    monkeypatch.setattr(statistics, "OVERLAP_S", 0.05)
    records, read = Jobs(engine), Statistics(engine)
    read.snapshot()
    for _ in range(10):
        run(records, engine)
    time.sleep(0.1)  # until they are older than the overlap
    seen = [len(read.snapshot().stages) for _ in range(8)]
    assert max(seen) == 3
    assert sum(seen) == 10


def test_a_store_that_hangs_or_is_damaged_fails_no_scrape(engine: sa.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = StoreMetrics(Statistics(engine))
    assert ("temper_jobs", "queued") in scraped(metrics)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE workers RENAME TO lost")
    found = scraped(metrics)
    assert found["temper_store_up",] == 0
    assert {key[0] for key in found} - {"temper_store_up"} == {
        "temper_stage_seconds_count", "temper_stage_seconds_sum", "temper_stage_seconds_created",
    }  # fmt: skip
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE lost RENAME TO workers")
    assert scraped(metrics)["temper_store_up",] == 1
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hanging = sa.create_engine(f"postgresql+psycopg://temper@127.0.0.1:{silent.getsockname()[1]}/t")
        began = time.monotonic()
        assert scraped(StoreMetrics(Statistics(hanging)))["temper_store_up",] == 0
        assert time.monotonic() - began < 5


def test_a_gateway_shows_them_beside_its_own(lone: tuple[httpx.Client, httpx.Client, Settings]) -> None:
    for api in lone[:2]:
        text = api.get("/metrics").text
        assert "temper_store_up 1.0" in text
        assert 'temper_jobs{status="running"} 0.0' in text
        assert "temper_requests_total" in text
        names = [family.name for family in text_string_to_metric_families(text)]
        assert len(names) == len(set(names))
