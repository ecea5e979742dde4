"""Estimates of how long jobs take, and of when those in the queue begin and end."""

import json
from typing import Any

import pytest
import sqlalchemy as sa

from store.records import DatasetCard
from tests.conftest import succeed
from trainer import fit, search
from trainer.asked import default_folds, parse_asked
from trainer.jobs import estimates as module
from trainer.jobs import records
from trainer.jobs.estimates import Estimates, nominal
from trainer.jobs.records import Job, Jobs

SPECS: tuple[dict[str, Any] | None, ...] = (
    None, {}, {"method": "full"}, {"method": "full", "adversarial": {"attack": "pgd", "epsilon": 0.1}}
)  # fmt: skip

COLD_S = module.COMPILED_S + module.WARM_UP_S  # more for the first job of all


def card(images: int) -> DatasetCard:
    return DatasetCard(id="d", images=images, classes={str(name): images // 10 for name in range(10)})


def work(spec: dict[str, Any] | None, images: int = 300) -> float:
    return nominal(parse_asked(None if spec is None else json.dumps(spec)), card(images))


@pytest.fixture
def jobs(engine: sa.Engine) -> Jobs:
    return Jobs(engine)


def queued(jobs: Jobs, spec: dict[str, Any] | None = None, images: int = 300) -> Job:
    asked = parse_asked(json.dumps(spec or {}))
    return jobs.create(model="m", base="lenet5:1", spec=asked.described(), dataset=card(images))


def has_run(jobs: Jobs, engine: sa.Engine, spec: dict[str, Any] | None, images: int, seconds: float) -> Job:
    """A job that has finished after so many seconds."""
    queued(jobs, spec, images)
    job = jobs.claim("w")
    assert job is not None
    succeed(jobs, job, 1)
    with engine.begin() as connection:
        ended = records.jobs.update().where(records.jobs.c.id == job.id)
        connection.execute(ended.values(finished_at=records.jobs.c.started_at + seconds))
    return job


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_more_images_and_epochs_are_more_work(spec: dict[str, Any] | None) -> None:
    assert work(spec, 300) < work(spec, 1000) < work(spec, 5000)
    if spec is not None:
        assert work({**spec, "epochs": 10}) < work({**spec, "epochs": 40})


def test_a_search_an_attack_folds_and_all_layers_are_more_work_than_none() -> None:
    assert work({}) < work({"method": "full"}) < work(SPECS[3])
    assert work({"method": "full"}) < work({"method": "full", "folds": 5})
    assert work({"search": {"trials": 4}}) < work({"search": {"trials": 32}})
    assert work({}) < work(None)


def test_estimates_know_the_rounds_of_the_search() -> None:
    for images in (50, 300, 1000):
        folds = default_folds(images)
        first, last = search.rungs(16, folds, images)
        assert (first.share, last.share, last.folds) == (module.FIRST_SHARE, module.LAST_SHARE, folds)
        assert first.keep is not None
        assert first.keep <= module.FINALISTS <= first.keep + 2  # with those that have a place of their own
    assert (search.FIRST_IMAGES, fit.HALVED) == (module.FIRST_IMAGES, module.HALVED)


def test_an_estimate_follows_from_jobs_of_the_same_kind(jobs: Jobs, engine: sa.Engine) -> None:
    full, lora = parse_asked('{"method": "full"}'), parse_asked("{}")
    unknown = Estimates(jobs).of(full, card(300), lambda job: None)
    assert (unknown.jobs, unknown.within) == (0, 0.5)
    assert unknown.seconds == nominal(full, card(300)) + module.COMPILED_S
    for factor in (3.0, 2.0, 40.0):  # the last one is an outlier
        compiled_s = COLD_S if factor == 3.0 else 0.0
        has_run(jobs, engine, {"method": "full"}, 300, factor * nominal(full, card(300)) + compiled_s)
    found = Estimates(jobs).of(full, card(300), lambda job: 2_000_000_000)
    assert (found.jobs, found.within) == (3, 0.2)
    assert found.seconds == pytest.approx(3.0 * nominal(full, card(300)), rel=1e-3)
    assert found.memory_bytes == 2_000_000_000
    larger = Estimates(jobs).of(full, card(1000), lambda job: 2_000_000_000)  # in halves, which is another structure
    assert larger.seconds == pytest.approx(3.0 * nominal(full, card(1000)) + module.COMPILED_S, rel=1e-3)
    assert larger.memory_bytes == 2_000_000_000 + 700 * module.IMAGE_BYTES
    assert Estimates(jobs).of(lora, card(300), lambda job: None).jobs == 0


def test_a_search_with_a_bound_takes_no_longer_and_teaches_nothing(jobs: Jobs, engine: sa.Engine) -> None:
    bounded: dict[str, Any] = {"search": {"seconds": 5.0}}
    free: dict[str, Any] = {"search": {}}
    has_run(jobs, engine, bounded, 300, 5.0)
    asked = parse_asked(json.dumps(free))
    assert Estimates(jobs).of(asked, card(300), lambda job: None).jobs == 0
    has_run(jobs, engine, free, 300, 100.0)
    seconds = Estimates(jobs).of(asked, card(300), lambda job: None).seconds
    assert seconds == pytest.approx(100.0 - COLD_S, rel=1e-3)
    found = Estimates(jobs).of(parse_asked(json.dumps(bounded)), card(300), lambda job: None)
    assert found.seconds == 5.0


def test_a_job_that_publishes_a_checkpoint_teaches_nothing_of_training(jobs: Jobs, engine: sa.Engine) -> None:
    asked = parse_asked("{}")

    def published() -> Job:
        return jobs.create(
            model="m", base="lenet5:1", spec=asked.described(), dataset=card(300), checkpoint={"job": "j", "epoch": 1}
        )

    published()
    claimed = jobs.claim("w")
    assert claimed is not None
    assert claimed.checkpoint == {"job": "j", "epoch": 1}
    succeed(jobs, claimed, 1)
    assert Estimates(jobs).of(asked, card(300), lambda job: None).jobs == 0
    jobs.heartbeat("w", "idle")
    (standing,) = Estimates(jobs).standings([published()])
    assert standing.start_at is not None
    assert standing.end_at is not None
    assert standing.end_at - standing.start_at < 1.0


def test_the_queue_is_shared_among_the_living_workers(jobs: Jobs, engine: sa.Engine) -> None:
    has_run(jobs, engine, {}, 300, 10.0 + COLD_S)
    running = queued(jobs)
    jobs.heartbeat("w", "busy")
    assert jobs.claim("w") is not None
    waiting = [queued(jobs) for _ in range(3)]
    unknown = queued(jobs, {"method": "head"})
    last = queued(jobs)

    def standings() -> list[tuple[int | None, float | None, float | None]]:
        """Positions, and times in seconds from now."""
        open_ = [jobs.get(job.id) for job in (running, *waiting, unknown, last)]
        found, at = Estimates(jobs).standings(open_), jobs.outlook().now
        rounded = []
        for standing in found:
            times = [each and round((each - at) / 10, 1) * 10 for each in (standing.start_at, standing.end_at)]
            rounded.append((standing.position, times[0], times[1]))
        return rounded

    one = [(None, None, 10), (1, 10, 20), (2, 20, 30), (3, 30, 40), (4, 40, None), (5, None, None)]
    assert standings() == one
    jobs.heartbeat("v", "idle")
    two = [(None, None, 10), (1, 0, 10), (2, 10, 20), (3, 10, 20), (4, 20, None), (5, 20, 30)]
    assert standings() == two
    for worker in ("w", "v"):
        jobs.forget_worker(worker)
    assert [standing[:2] for standing in standings()[1:]] == [(place, None) for place in range(1, 6)]


def test_a_job_that_has_finished_stands_nowhere_and_one_that_is_new_has_its_place_at_once(jobs: Jobs) -> None:
    estimates, first, second = Estimates(jobs), queued(jobs), queued(jobs)
    assert [standing.position for standing in estimates.standings([first, second])] == [1, 2]
    cancelled = jobs.cancel(first.id)
    third = queued(jobs)
    assert [standing.position for standing in estimates.standings([cancelled, second, third])] == [None, 1, 2]
    claimed = jobs.claim("w")
    assert claimed is not None
    assert estimates.standings([claimed]) == [module.Standing()]  # although it was second a moment ago
