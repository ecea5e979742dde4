"""Jobs and versions in a real store, SQLite and PostgreSQL."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from api.routes.jobs import JobView
from store.errors import UnknownJob, WrongState
from store.records import DatasetCard
from tests.conftest import succeed
from trainer.jobs import records as module
from trainer.jobs.records import Job, Jobs, LeaseLost


@pytest.fixture
def jobs(engine: sa.Engine) -> Jobs:
    return Jobs(engine)


def queued(jobs: Jobs, model: str = "m", priority: int = 0, tenant: str = "default") -> Job:
    dataset = DatasetCard(id="d", images=4)
    spec = {"epochs": 1}
    return jobs.create(model=model, base="lenet5:1", spec=spec, dataset=dataset, priority=priority, tenant=tenant)


def test_jobs_are_claimed_oldest_first_and_once(jobs: Jobs) -> None:
    made = []
    for number in range(20):
        made.append(queued(jobs, f"m{number}").id)
        time.sleep(0.002)  # ids sort by the millisecond
    claimed: list[str] = []

    def claim(worker: str) -> None:
        while job := jobs.claim(worker):
            claimed.append(job.id)

    threads = [threading.Thread(target=claim, args=(f"w{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == made
    assert {jobs.get(job_id).status for job_id in made} == {"running"}


def test_the_highest_priority_is_claimed_first_and_waiting_makes_up_for_it(jobs: Jobs, engine: sa.Engine) -> None:
    expected = []
    for name, priority, waited_s in (
        ("low", -100, 0.0), ("old", 0, 5.0), ("new", 0, 0.0), ("high", 1, 0.0), ("patient", -1, module.AGING_S + 1),
        ("starved", -100, 300 * module.AGING_S),
    ):  # fmt: skip
        job = queued(jobs, name, priority)
        with engine.begin() as connection:
            earlier = module.jobs.update().where(module.jobs.c.id == job.id)
            connection.execute(earlier.values(created_at=module.jobs.c.created_at - waited_s))
    outlook = jobs.outlook()
    while job := jobs.claim("w"):  # type: ignore[assignment]
        expected.append(job.model)
    assert expected == ["starved", "high", "old", "patient", "new", "low"]
    assert [job.model for job in outlook.queued] == expected
    assert (outlook.workers, outlook.running) == (0, [])
    assert [job.model for job in jobs.outlook().running] == expected


def test_tenants_take_turns_however_much_one_of_them_asks_for(jobs: Jobs) -> None:
    for number in range(6):
        queued(jobs, f"big-{number}", priority=100, tenant="big")
        time.sleep(0.002)
    for tenant in ("small", "tiny"):
        queued(jobs, f"{tenant}-0", tenant=tenant)
        time.sleep(0.002)
    queued(jobs, "small-1", tenant="small")
    jobs.heartbeat("w", "idle")
    expected = ["big-0", "small-0", "tiny-0", "big-1", "small-1", "big-2", "big-3", "big-4", "big-5"]
    assert [job.model for job in jobs.outlook().queued] == expected
    done = []
    while job := jobs.claim("w"):
        done.append(job.model)
        succeed(jobs, job, 1)
    assert done == expected


def test_a_worker_that_is_free_goes_to_the_tenant_with_the_fewest_running_jobs(jobs: Jobs) -> None:
    for number in range(4):
        queued(jobs, f"big-{number}", tenant="big")
        time.sleep(0.002)
    held = [jobs.claim(f"w{number}") for number in range(2)]
    queued(jobs, "small-0", tenant="small")
    queued(jobs, "small-1", tenant="small")
    for number in range(3):
        jobs.heartbeat(f"w{number}", "busy")
    assert [job.model for job in jobs.outlook().queued][:2] == ["small-0", "big-2"]  # which waits for one of its own
    later = [jobs.claim("w2"), jobs.claim("w2"), jobs.claim("w2")]
    assert [job.model for job in later if job] == ["small-0", "small-1", "big-2"]
    assert [job.model for job in held if job] == ["big-0", "big-1"]


def test_a_page_has_only_the_jobs_that_are_asked_for(jobs: Jobs) -> None:
    for name in ("a", "b", "a", "a"):
        last = queued(jobs, name)
        time.sleep(0.002)  # ids sort by the millisecond
    jobs.cancel(last.id)
    first, more = jobs.page(after=None, limit=2, model="a")
    rest, end = jobs.page(after=first[-1].id, limit=2, model="a")
    assert [job.model for job in first + rest] == ["a", "a", "a"]
    assert (more, end) == (True, False)
    assert jobs.page(after=None, limit=9, model="a", status="cancelled")[0] == [jobs.get(last.id)]
    assert jobs.page(after=None, limit=9, model="b", status="cancelled") == ([], False)


def test_a_claimed_job_is_only_its_workers(jobs: Jobs) -> None:
    queued(jobs)
    job = jobs.claim("w")
    assert job is not None
    jobs.append_event(job, "epoch", {"epoch": 1}, stage="training")
    stranger = Job(**{**vars(job), "lease": job.lease - 1})
    with pytest.raises(LeaseLost):
        jobs.set_stage(stranger, "publishing")
    jobs.finish(stranger, "failed")
    assert jobs.get(job.id).stage == "training"
    succeed(jobs, job, 3)
    found = jobs.get(job.id)
    assert (found.status, found.version, found.stage, found.progress.epoch) == ("succeeded", 3, None, 1)


def test_a_queued_job_is_cancelled_at_once_and_a_running_one_at_its_next_update(jobs: Jobs) -> None:
    first = queued(jobs)
    assert jobs.cancel(first.id).status == "cancelled"
    assert jobs.claim("w") is None
    queued(jobs)
    job = jobs.claim("w")
    assert job is not None
    assert jobs.cancel(job.id).status == "running"
    with pytest.raises(LeaseLost):
        jobs.check_lease(job)
    with pytest.raises(LeaseLost):
        jobs.set_stage(job, "training")
    jobs.finish(job, "cancelled")
    with pytest.raises(WrongState):
        jobs.cancel(job.id)


def test_a_job_that_changes_hands_while_it_is_cancelled_is_cancelled_all_the_same(jobs: Jobs) -> None:
    """On PostgreSQL every statement sees what has been committed before it, unless the row is locked."""
    engine = jobs._engine
    if engine.dialect.name != "postgresql":
        pytest.skip("transactions that write to SQLite run one after another")
    queued(jobs)
    job = jobs.claim("w")
    assert job is not None
    returned, updates = threading.Thread(target=lambda: Jobs(engine).requeue(job)), []

    def give_back(connection: sa.Connection, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE jobs") and threading.current_thread() is not returned:
            updates.append(statement)
            if len(updates) == 2:
                returned.start()
                returned.join(0.5)  # it waits for the row, or has given it back

    sa.event.listen(engine, "before_cursor_execute", give_back)
    assert jobs.cancel(job.id).id == job.id
    returned.join()
    found = jobs.get(job.id)
    assert found.cancel_requested or found.status == "cancelled"


def test_the_job_of_a_dead_worker_is_queued_anew_and_given_up_after_three(jobs: Jobs) -> None:
    job_id = queued(jobs).id
    for attempt in range(1, module.MAX_ATTEMPTS + 1):
        jobs.heartbeat("w", "busy")
        job = jobs.claim("w")
        assert job is not None
        assert job.attempts == attempt
        assert jobs.recover("another") == []
        assert jobs.get(job_id).status == "running"
        jobs.forget_worker("w")
        ended = jobs.recover("another")
    assert [job.id for job in ended] == [job_id]
    lost = jobs.get(job_id)
    assert lost.status == "failed"
    assert lost.error is not None
    assert lost.error["code"] == "worker_lost"


def test_a_worker_without_a_heartbeat_is_dead(jobs: Jobs) -> None:
    jobs.heartbeat("w", "warming")
    assert jobs.worker_states() == {"w": "warming"}
    jobs.heartbeat("w", "idle")
    assert jobs.worker_states() == {"w": "idle"}
    with jobs._engine.begin() as connection:
        connection.execute(sa.text("UPDATE workers SET seen_at = seen_at - 60"))
    assert jobs.worker_states() == {}


def test_workers_whose_clocks_disagree_leave_each_other_alone(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    queued(jobs)
    jobs.heartbeat("w", "busy")
    job = jobs.claim("w")
    assert job is not None
    clock = time.time
    for ahead_s in (20.0, -20.0):
        monkeypatch.setattr("time.time", lambda ahead_s=ahead_s: clock() + ahead_s)  # of another machine
        jobs.heartbeat("v", "idle")
        assert jobs.worker_states() == {"v": "idle", "w": "busy"}
        assert jobs.recover("another") == []
        monkeypatch.undo()
        assert jobs.worker_states() == {"v": "idle", "w": "busy"}
        assert jobs.recover("another") == []
        jobs.append_event(job, "epoch", {"epoch": 1})  # its lease holds


def test_a_job_that_its_worker_puts_back_costs_no_attempt(jobs: Jobs) -> None:
    queued(jobs)
    job = jobs.claim("w")
    assert job is not None
    jobs.requeue(job)
    again = jobs.claim("v")
    assert again is not None
    assert (again.id, again.attempts) == (job.id, 1)


def test_a_queued_job_is_paused_at_once_and_queued_again_by_resume(jobs: Jobs) -> None:
    job_id = queued(jobs).id
    assert jobs.pause(job_id).status == "paused"
    assert jobs.claim("w") is None
    with pytest.raises(WrongState, match="is paused already"):
        jobs.pause(job_id)
    assert jobs.resume(job_id).status == "queued"
    with pytest.raises(WrongState, match="is not paused; its status is 'queued'"):
        jobs.resume(job_id)
    job = jobs.claim("w")
    assert job is not None
    assert job.attempts == 1
    succeed(jobs, job, 1)
    with pytest.raises(WrongState, match="has already succeeded"):
        jobs.pause(job_id)
    with pytest.raises(UnknownJob):
        jobs.pause("none")
    with pytest.raises(UnknownJob):
        jobs.resume("none")


def test_a_running_job_is_paused_by_its_worker_and_that_costs_no_attempt(jobs: Jobs) -> None:
    job_id = queued(jobs).id
    for _ in range(module.MAX_ATTEMPTS + 1):
        job = jobs.claim("w")
        assert job is not None
        assert (job.attempts, job.pause_requested) == (1, False)
        assert not jobs.check_lease(job)
        assert jobs.pause(job_id).status == "running"
        assert jobs.check_lease(job)
        jobs.append_event(job, "epoch", {"epoch": 1})  # it still has the lease
        jobs.requeue(job)
        found = jobs.get(job_id)
        assert (found.status, found.stage, found.worker, found.attempts) == ("paused", None, None, 0)
        assert found.progress.epoch == 1
        with pytest.raises(LeaseLost):
            jobs.check_lease(job)
        assert jobs.needed_datasets() == [found.dataset]
        assert jobs.open() == {job_id}
        jobs.resume(job_id)
    told = [event.data["status"] for event in jobs.events(job_id) if event.type == "status"]
    assert told[:5] == ["queued", "running", "paused", "queued", "running"]


def test_a_pause_is_taken_back_by_resume_and_overruled_by_cancel(jobs: Jobs) -> None:
    job_id = queued(jobs).id
    job = jobs.claim("w")
    assert job is not None
    jobs.pause(job_id)
    assert jobs.resume(job_id).status == "running"
    assert not jobs.check_lease(job)
    jobs.pause(job_id)
    jobs.cancel(job_id)
    with pytest.raises(WrongState, match="is being cancelled"):
        jobs.pause(job_id)
    with pytest.raises(LeaseLost):
        jobs.check_lease(job)
    jobs.finish(job, "cancelled")
    assert jobs.get(job_id).status == "cancelled"
    other = queued(jobs).id
    jobs.pause(other)
    assert jobs.cancel(other).status == "cancelled"
    with pytest.raises(WrongState, match="its status is 'cancelled'"):
        jobs.resume(other)


def test_a_job_that_was_to_pause_when_its_worker_died_is_paused_but_not_for_ever(jobs: Jobs) -> None:
    job_id = queued(jobs).id
    for attempt in range(1, module.MAX_ATTEMPTS + 1):
        assert jobs.claim("w") is not None
        jobs.pause(job_id)
        jobs.recover("another")
        if attempt < module.MAX_ATTEMPTS:
            assert jobs.get(job_id).status == "paused"
            jobs.resume(job_id)
    assert jobs.get(job_id).status == "failed"


def test_a_lease_is_never_given_twice(jobs: Jobs) -> None:
    """Not even where a worker puts a job back, which takes back the attempt, and claims it again."""
    queued(jobs)
    first = jobs.claim("w")
    assert first is not None
    jobs.requeue(first)
    second = jobs.claim("w")
    assert second is not None
    assert (first.worker, first.attempts) == (second.worker, second.attempts)
    with pytest.raises(LeaseLost):
        jobs.append_event(first, "epoch", {"epoch": 1})
    jobs.append_event(second, "epoch", {"epoch": 1})


def test_a_report_is_written_by_the_worker_that_took_it_last(jobs: Jobs) -> None:
    queued(jobs)
    job = jobs.claim("w")
    assert job is not None
    succeed(jobs, job, 1)
    frozen, other = jobs.unreported("w"), jobs.unreported("v")  # of which nobody hears anything
    assert frozen is not None
    assert other is not None
    jobs.reported(other, "complete")
    happened = jobs.events(job.id)
    with pytest.raises(LeaseLost):
        jobs.reported(frozen, "none")
    assert (jobs.get(job.id).report_status, jobs.events(job.id)) == ("complete", happened)


def test_a_job_that_is_lost_while_others_are_recovered_is_not_taken_for_out_of_attempts(jobs: Jobs) -> None:
    """On PostgreSQL every statement sees what has been committed before it."""
    engine = jobs._engine
    if engine.dialect.name != "postgresql":
        pytest.skip("transactions that write to SQLite run one after another")
    queued(jobs)
    assert jobs.claim("dead") is not None  # without it nothing is lost, and nothing is written
    queued(jobs)
    jobs.heartbeat("w", "busy")
    job = jobs.claim("w")
    assert job is not None
    updates = []

    def stop_the_worker(connection: sa.Connection, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE jobs"):
            updates.append(statement)
            if len(updates) == 3:  # the first two put back what has been lost
                Jobs(engine).forget_worker("w")

    sa.event.listen(engine, "before_cursor_execute", stop_the_worker)
    assert jobs.recover("v") == []
    assert len(updates) == 4
    assert jobs.get(job.id).status == "running"
    assert jobs.recover("v") == []
    assert jobs.get(job.id).status == "queued"


def test_a_job_says_what_it_was_asked_for_and_its_events_why_it_waits_again(jobs: Jobs) -> None:
    job_id = queued(jobs).id
    assert jobs.claim("dead") is not None
    jobs.recover("another")
    claimed = jobs.claim("w")
    assert claimed is not None
    jobs.pause(job_id)
    shown = JobView.of(jobs.get(job_id))
    assert (shown.status, shown.pause_requested, shown.cancel_requested) == ("running", True, False)
    jobs.requeue(claimed)
    assert not JobView.of(jobs.get(job_id)).pause_requested
    jobs.resume(job_id)
    reasons = [event.data.get("reason") for event in jobs.events(job_id) if event.data.get("status") == "queued"]
    assert reasons == [None, "its worker died or lost the store", "resumed"]
    last = jobs.claim("w")
    assert last is not None
    jobs.cancel(job_id)
    assert JobView.of(jobs.get(job_id)).cancel_requested
    jobs.finish(last, "cancelled")
    assert not JobView.of(jobs.get(job_id)).cancel_requested


def test_looking_for_work_only_reads(jobs: Jobs) -> None:
    """So it keeps nobody who writes waiting."""
    engine = jobs._engine
    queued(jobs)
    jobs.heartbeat("w", "busy")
    assert jobs.claim("w") is not None
    jobs.heartbeat("v", "idle")
    statements: list[str] = []
    sa.event.listen(engine, "before_cursor_execute", lambda _, __, statement, *___: statements.append(statement))
    assert (jobs.claim("v"), jobs.unreported("v", ["a", "b"]), jobs.recover("v")) == (None, None, [])
    assert len(statements) >= 3
    assert all(statement.startswith("SELECT") and "FOR UPDATE" not in statement for statement in statements)


def test_pages_are_newest_first_and_complete(jobs: Jobs) -> None:
    made = []
    for _ in range(5):
        made.append(queued(jobs).id)
        time.sleep(0.002)
    first, more = jobs.page(after=None, limit=3)
    rest, end = jobs.page(after=first[-1].id, limit=3)
    assert [job.id for job in first + rest] == made[::-1]
    assert (more, end) == (True, False)
    with pytest.raises(UnknownJob):
        jobs.page(after="ftjob-0", limit=3)


def test_every_change_is_an_event_and_progress_follows_from_them(jobs: Jobs) -> None:
    queued(jobs)
    job = jobs.claim("w")
    assert job is not None
    jobs.append_event(job, "epoch", {"epoch": 1})
    jobs.requeue(job)
    assert jobs.get(job.id).progress.dump() == {}
    job = jobs.claim("w")
    assert job is not None
    assert jobs.get(job.id).progress.dump() == {}
    jobs.set_stage(job, "training")
    for number in (1, 2):
        jobs.append_event(job, "epoch", {"epoch": number, "epochs": 2})
    jobs.append_event(job, "publishing", {"step": "staged"}, stage="publishing")
    succeed(jobs, job, 1)
    jobs.reported(jobs.get(job.id), "complete")
    happened = jobs.events(job.id)
    assert [(event.type, event.data) for event in happened] == [
        ("status", {"status": "queued", "stage": None}),
        ("status", {"status": "running", "stage": "validating"}),
        ("epoch", {"epoch": 1}),
        ("status", {"status": "queued", "stage": None, "reason": "its worker stopped"}),
        ("status", {"status": "running", "stage": "validating"}),
        ("status", {"status": "running", "stage": "training"}),
        ("epoch", {"epoch": 1, "epochs": 2}),
        ("epoch", {"epoch": 2, "epochs": 2}),
        ("publishing", {"step": "staged"}),
        ("status", {"status": "running", "stage": "publishing"}),
        ("publishing", {"step": "labelled"}),
        ("status", {"status": "succeeded", "stage": None, "version": 1}),
        ("report", {"report_status": "complete"}),
    ]
    assert [event.seq for event in happened] == list(range(1, 14))
    assert [event.at for event in happened] == sorted(event.at for event in happened)
    assert [event.seq for event in jobs.events(job.id, after=11)] == [12, 13]
    steps = {event.data["step"]: round(event.at, 3) for event in happened if event.type == "publishing"}
    found = jobs.get(job.id)
    assert found.progress.dump() == {"epoch": 2, "epochs": 2, "publishing": steps}
    assert jobs.page(after=None, limit=1) == ([found], False)


def test_events_written_at_once_have_each_its_number(jobs: Jobs) -> None:
    queued(jobs)
    job = jobs.claim("w")
    assert job is not None
    leased = job

    def write(_: int) -> None:
        for number in range(10):
            jobs.append_event(leased, "epoch", {"epoch": number})

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))
    assert [event.seq for event in jobs.events(job.id)] == list(range(1, 33))


def test_a_worker_takes_back_what_it_has_dropped_itself_and_spares_others_when_told_to(jobs: Jobs) -> None:
    for worker in ("w", "v"):
        queued(jobs, worker)
        jobs.heartbeat(worker, "busy")
        assert jobs.claim(worker) is not None
        time.sleep(0.002)
    jobs.forget_worker("v")
    assert jobs.recover("w", others=False) == []
    states = {job.model: job.status for job in jobs.page(after=None, limit=9)[0]}
    assert states == {"w": "queued", "v": "running"}
    assert jobs.recover("w") == []
    assert {job.status for job in jobs.page(after=None, limit=9)[0]} == {"queued"}
