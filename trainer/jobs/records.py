"""Jobs as records in the store: the gateway creates and reads them, workers lease and run them.

  ╭───────────────── requeue ─────────────────╮
  ▼                                           │
queued ───────────── claim ───────────────▶ running ──▶ succeeded
  │  ▲                                       │ │ ╰────▶ failed
  │  ╰─ resume ─╮                            │ │
  ├─── pause ──▶ paused ◀── pause ───────────╯ │
  │                │                           │
  ╰── cancel ──────┴──▶ cancelled ◀── cancel ──╯

A claim gives a worker the lease of a job: a number in its row that grows whenever the job changes hands, a fencing
token that is never given twice. Whoever writes to a job, or to the registry on its behalf, shows the number in the same
transaction, and the write fails once the job has been requeued, paused, cancelled or claimed by another worker. A
worker that has sent no heartbeat for `LOST_AFTER_S` is taken for dead, and its jobs are requeued; one that was only
frozen finds its lease lost. A client that pauses or cancels a running job asks its worker to; a pause, and a worker
that is stopped, cost no attempt. All times are those of the database's clock.

Tenants take turns: the next job is one of the tenant with the fewest running jobs, and of equal ones of the tenant
whose last turn was longest ago. (Workers that claim at the same moment may take jobs of the same tenant.) Of a tenant's
queued jobs the one with the highest priority is next, and of equal ones the oldest. A point of priority is worth
`AGING_S` of waiting: a job is overtaken only by those created within `AGING_S` times their advantage after it, so a low
priority delays a job and cannot starve it.
"""

import secrets
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import sqlalchemy as sa

from store import traces
from store.engine import insert_of, metadata, now
from store.errors import UnknownJob, WrongState
from store.records import DEFAULT_TENANT, DatasetCard, GateCard, Progress, public_name
from store.webhooks import WebhookType, enqueue
from trainer.jobs.events import Event, EventType, events, insert, progress_of

Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]
WorkerState = Literal["warming", "idle", "busy", "reporting"]
Happened = tuple[EventType, dict[str, Any]]
FINISHED = ("succeeded", "failed", "cancelled")
LOST_AFTER_S = 10.0  # a worker without a heartbeat for this long is taken for dead
MAX_ATTEMPTS = 3
AGING_S = 600.0  # of waiting that make up for one point of priority
MAX_PRIORITY = 100
RECENT = 50  # finished jobs that estimates rest on
TOLD: Mapping[str, WebhookType] = {
    "running": "fine_tuning.job.running",
    "succeeded": "fine_tuning.job.succeeded",
    "failed": "fine_tuning.job.failed",
    "cancelled": "fine_tuning.job.cancelled",
}  # what a new status is to webhooks; that a job is requeued is none of their business
ANNOUNCED = (  # by webhooks
    "id", "model", "label", "status", "version", "preview_version", "error", "report_status", "gate",
)  # fmt: skip

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False, index=True, server_default=DEFAULT_TENANT),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("version", sa.Integer),
    sa.Column("preview_version", sa.Integer),
    sa.Column("label", sa.String, nullable=False, server_default="stable"),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False, index=True),
    sa.Column("stage", sa.String),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float, index=True),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("resolved_spec", sa.JSON(none_as_null=True)),
    sa.Column("dataset", sa.JSON, nullable=False),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("report_status", sa.String, nullable=False),
    sa.Column("worker", sa.String),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("lease", sa.Integer, nullable=False, server_default="0"),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("pause_requested", sa.Boolean, nullable=False, server_default=sa.false()),
    sa.Column("last_seq", sa.Integer, nullable=False),  # of its events
    sa.Column("progress_seq", sa.Integer, nullable=False),  # the event that its progress begins with
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    sa.Column("metadata", sa.JSON(none_as_null=True)),
    sa.Column("checkpoint", sa.JSON(none_as_null=True)),
    sa.Column("gate", sa.JSON(none_as_null=True)),
    sa.Column("trace", sa.String),
)
workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),  # last heartbeat
)
turns = sa.Table(
    "turns",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True),
    sa.Column("claimed_at", sa.Float, nullable=False),  # when a job of it was last claimed
)


@dataclass(frozen=True)
class Job:
    """A fine-tune as it stands. Times are Unix seconds."""

    id: str
    tenant: str
    model: str  # its stored name
    version: int | None  # of the model, once it is live
    preview_version: int | None  # live while the job searches
    label: str  # moves to that version
    base: str  # stored name:version
    status: Status
    stage: (
        str | None
    )  # validating, previewing, searching, training, evaluating, exporting, publishing or warming, while it runs
    progress: Progress  # from its events: the last trial or epoch, then the publishing steps
    created_at: float
    started_at: float | None
    finished_at: float | None
    spec: dict[str, Any]  # as asked for, with "auto" where it is searched
    resolved_spec: dict[str, Any] | None  # the same with what the search has chosen; None until then
    dataset: DatasetCard
    error: dict[str, Any] | None  # code, message, param
    report_status: str  # none, quick or complete
    worker: str | None
    attempts: int  # how often a worker has started it, without those that were paused or stopped
    cancel_requested: bool
    pause_requested: bool
    lease: int = 0  # grows whenever the job changes hands
    priority: int = 0  # from -MAX_PRIORITY to MAX_PRIORITY; the highest first
    metadata: dict[str, str] | None = None  # of the client's own
    checkpoint: dict[str, Any] | None = None  # that it publishes instead of training: `job` and `epoch`
    trace: str | None = None  # W3C traceparent of the request that created it, where requests are traced
    gate: dict[str, Any] | None = None  # whether its version got its label, and why: a `GateCard`


@dataclass(frozen=True)
class Outlook:
    """What is to be done."""

    now: float  # Unix seconds
    workers: int  # that live
    running: list[Job]
    queued: list[Job]  # in the order in which they will be claimed if all take equally long


# Wide statements are costly to build, so they and what idle workers keep asking are built once.
_COLUMNS = [column for column in jobs.c if column.name in Job.__dataclass_fields__]
_SELECT = sa.select(*_COLUMNS)
_UPDATE = jobs.update().returning(*(jobs.c[name] for name in ("tenant", "last_seq", *ANNOUNCED)))
_TURN = (jobs.c.created_at - AGING_S * jobs.c.priority, jobs.c.id)  # in which a tenant's queued jobs are claimed
_QUEUED_IDS = sa.select(jobs.c.id).where(jobs.c.status == "queued")
_ANY_QUEUED = _QUEUED_IDS.limit(1)
_busy = jobs.alias()
_BUSY = (
    sa.select(_busy.c.tenant, sa.func.count().label("count"))
    .where(_busy.c.status == "running")
    .group_by(_busy.c.tenant)
    .subquery()
)
_NEXT = (
    _QUEUED_IDS.outerjoin_from(jobs, _BUSY, _BUSY.c.tenant == jobs.c.tenant)
    .outerjoin(turns, turns.c.tenant == jobs.c.tenant)
    .order_by(sa.func.coalesce(_BUSY.c.count, 0), sa.func.coalesce(turns.c.claimed_at, 0.0), *_TURN)
    .limit(1)
)
_OPEN_REPORT = (jobs.c.status == "succeeded") & (jobs.c.report_status == "quick")
_OF_THE_DEAD = jobs.c.worker.not_in(sa.select(workers.c.id))
LIVING = workers.c.seen_at > now() - LOST_AFTER_S


def _lost(worker: Any, others: bool) -> sa.ColumnElement[bool]:
    """Running jobs that `worker`, which runs none now, has dropped; with `others`, also those of dead workers."""
    dropped = jobs.c.worker == worker
    return sa.and_(jobs.c.status == "running", dropped | _OF_THE_DEAD if others else dropped)


def _unreported(worker: Any, but: Any) -> sa.ColumnElement[bool]:
    """The jobs whose report is not complete and that no living worker but `worker` works on."""
    free = jobs.c.worker.is_(None) | (jobs.c.worker == worker) | _OF_THE_DEAD
    return sa.and_(_OPEN_REPORT, free, jobs.c.id.not_in(but))


def _oldest(condition: sa.ColumnElement[bool]) -> sa.Select[str]:
    return sa.select(jobs.c.id).where(condition).order_by(jobs.c.id).limit(1)


_WORKER: sa.BindParameter[str] = sa.bindparam("worker")
_ANY_DROPPED = sa.select(sa.exists().where(_lost(_WORKER, others=False)))
_ANY_LOST = sa.select(sa.exists().where(_lost(_WORKER, others=True)) | sa.exists().where(~LIVING))
_OLDEST_UNREPORTED = _oldest(_unreported(_WORKER, sa.bindparam("but", expanding=True)))


class LeaseLost(Exception):
    """The job no longer belongs to this worker: it was cancelled, or reassigned because the worker looked dead."""


class Jobs:
    """Reads and writes jobs, their events and the heartbeats of workers."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def create(
        self, *, model: str, base: str, spec: Mapping[str, Any], dataset: DatasetCard, label: str = "stable",
        resolved_spec: Mapping[str, Any] | None = None, priority: int = 0, tenant: str = DEFAULT_TENANT,
        metadata: Mapping[str, str] | None = None, checkpoint: Mapping[str, Any] | None = None,
        also: Callable[[sa.Connection, Job], None] = lambda connection, job: None,
    ) -> Job:  # fmt: skip
        """Queue a job. Ids sort by creation time.

        Args:
            model: the stored name of the model that gets a version.
            base: the stored name and the version of what it starts from.
            resolved_spec: the spec if there is nothing to search.
            priority: from -MAX_PRIORITY to MAX_PRIORITY; the highest first.
            metadata: what the client wants to find the job by.
            checkpoint: what to publish instead of training, `job` and `epoch`; the rest is as in that job.
            also: called in the same transaction; raises to roll it back.
        """
        with self._engine.begin() as connection:
            created_at = connection.execute(sa.select(now())).scalar_one()
            job = Job(
                id=f"ftjob-{int(created_at * 1000):011x}{secrets.token_hex(5)}", tenant=tenant, model=model,
                version=None, label=label, base=base, status="queued", stage=None, progress=Progress(),
                created_at=created_at, started_at=None, finished_at=None, spec=dict(spec),
                resolved_spec=dict(resolved_spec) if resolved_spec else None, dataset=dataset, error=None,
                report_status="none", worker=None, attempts=0, cancel_requested=False, pause_requested=False,
                preview_version=None, priority=priority, metadata=dict(metadata) if metadata else None,
                checkpoint=dict(checkpoint) if checkpoint else None, trace=traces.current(),
            )  # fmt: skip
            row = {column.name: getattr(job, column.name) for column in _COLUMNS} | {"dataset": dataset.dump()}
            connection.execute(jobs.insert().values(**row, last_seq=1, progress_seq=2))
            insert(connection, job.id, 1, [_status("queued")])
            _announce(connection, "fine_tuning.job.created", row)
            also(connection, job)
        return job

    def get(self, job_id: str, param: str = "id", tenant: str | None = None) -> Job:
        """Return a job.

        Args:
            tenant: whose job it has to be, for whoever asks on behalf of one.

        Raises:
            UnknownJob: no job has this id, or it is another tenant's.
        """
        with self._engine.connect() as connection:
            found = _read(connection, _SELECT.where((jobs.c.id == job_id) & _of(tenant)))
        if not found:
            raise UnknownJob(f"there is no job {job_id!r}", param=param)
        return found[0]

    def page(
        self, *, after: str | None, limit: int, tenant: str | None = None, model: str | None = None,
        status: Status | None = None, metadata: Mapping[str, str] | None = MappingProxyType({}),
    ) -> tuple[list[Job], bool]:  # fmt: skip
        """Return up to `limit` jobs, newest first, that come after the job `after`; and whether there are more.

        Args:
            tenant: whose jobs; everyone's without one.
            model: return only the jobs of this model.
            status: return only the jobs that have it.
            metadata: what all of them have in theirs; None for those that have none.

        Raises:
            UnknownJob: no such job has the id `after`.
        """
        query = _SELECT.where(_of(tenant)).order_by(jobs.c.id.desc()).limit(limit + 1)
        for column, wanted in ((jobs.c.model, model), (jobs.c.status, status)):
            if wanted is not None:
                query = query.where(column == wanted)
        if metadata is None:
            query = query.where(jobs.c.metadata.is_(sa.null()))
        for key, value in (metadata or {}).items():
            query = query.where(jobs.c.metadata[key].as_string() == value)
        if after is not None:
            query = query.where(jobs.c.id < self.get(after, "after", tenant).id)
        with self._engine.connect() as connection:
            found = _read(connection, query)
        return found[:limit], len(found) > limit

    def events(self, job_id: str, *, after: int = 0, limit: int | None = None) -> list[Event]:
        """Return the first `limit` events of a job whose number is greater than `after`."""
        later = (events.c.job == job_id) & (events.c.seq > after)
        return self._events(sa.select(events).where(later).order_by(events.c.seq).limit(limit))

    def latest_events(self, job_id: str, *, before: int | None, limit: int) -> list[Event]:
        """Return the last `limit` events of a job whose number is less than `before`, newest first."""
        query = sa.select(events).where(events.c.job == job_id).order_by(events.c.seq.desc()).limit(limit)
        return self._events(query if before is None else query.where(events.c.seq < before))

    def _events(self, query: sa.Select[Any]) -> list[Event]:
        with self._engine.connect() as connection:
            return [Event(**row) for row in connection.execute(query).mappings()]

    @contextmanager
    def _held(self, job_id: str, tenant: str | None) -> Iterator[tuple[sa.Connection, sa.ColumnElement[bool]]]:
        """A transaction in which the status of a job stays what it is but for the transaction's own writes; its row."""
        of_job = (jobs.c.id == job_id) & _of(tenant)
        with self._engine.begin() as connection:
            connection.execute(sa.select(jobs.c.id).where(of_job).with_for_update())
            yield connection, of_job

    def cancel(self, job_id: str, tenant: str | None = None) -> Job:
        """Cancel a job that waits now, or a running one within a second.

        Args:
            tenant: whose job it has to be.

        Raises:
            UnknownJob: no job has this id, or it is another tenant's.
            WrongState: it has finished.
        """
        with self._held(job_id, tenant) as (connection, of_job):
            changed = _write(
                connection, of_job & jobs.c.status.in_(("queued", "paused")), [_status("cancelled")],
                status="cancelled", finished_at=now(),
            ) or _write(connection, of_job & (jobs.c.status == "running"), (), cancel_requested=True)  # fmt: skip
        job = self.get(job_id, tenant=tenant)
        if not changed:
            raise WrongState(f"job {job_id} has already {_ENDED[job.status]}", param="id")
        return job

    def pause(self, job_id: str, tenant: str | None = None) -> Job:
        """Pause a queued job now, or a running one at its next epoch. One that is trained already is not held up.

        Args:
            tenant: whose job it has to be.

        Raises:
            UnknownJob: no job has this id, or it is another tenant's.
            WrongState: it is paused, is being cancelled or has finished.
        """
        with self._held(job_id, tenant) as (connection, of_job):
            of_job &= ~jobs.c.cancel_requested
            changed = _write(
                connection, of_job & (jobs.c.status == "queued"), [_status("paused")], status="paused"
            ) or _write(connection, of_job & (jobs.c.status == "running"), (), pause_requested=True)  # fmt: skip
        job = self.get(job_id, tenant=tenant)
        if not changed:
            stands = "is being cancelled" if job.cancel_requested else f"is {job.status} already"
            stands = f"has already {_ENDED[job.status]}" if job.status in FINISHED else stands
            raise WrongState(f"job {job_id} {stands}", param="id")
        return job

    def resume(self, job_id: str, tenant: str | None = None) -> Job:
        """Queue a paused job again, or take back the request to pause a running one.

        Args:
            tenant: whose job it has to be.

        Raises:
            UnknownJob: no job has this id, or it is another tenant's.
            WrongState: it is not paused.
        """
        with self._held(job_id, tenant) as (connection, of_job):
            changed = _write(
                connection, of_job & (jobs.c.status == "paused"), [_status("queued", reason="resumed")], **_QUEUED
            ) or _write(
                connection, of_job & (jobs.c.status == "running") & jobs.c.pause_requested, (), pause_requested=False
            )  # fmt: skip
        job = self.get(job_id, tenant=tenant)
        if not changed:
            raise WrongState(f"job {job_id} is not paused; its status is {job.status!r}", param="id")
        return job

    def outlook(self) -> "Outlook":
        """Return what is to be done, without progress, and by how many workers."""
        open_ = _SELECT.where(jobs.c.status.in_(("running", "queued"))).order_by(*_TURN)
        living = sa.select(sa.func.count()).where(LIVING).scalar_subquery()
        with self._engine.connect() as connection:
            found = _without_progress(connection, open_)
            at, count = connection.execute(sa.select(now(), living)).one()
            claimed_at = {row.tenant: row.claimed_at for row in connection.execute(sa.select(turns))}
        queued, running = ([job for job in found if job.status == status] for status in ("queued", "running"))
        return Outlook(at, count, running, _in_turn(queued, running, claimed_at, count))

    def recent(self, most: int = RECENT) -> list[Job]:
        """Return the newest jobs that have succeeded, without progress."""
        query = _SELECT.where(jobs.c.status == "succeeded").order_by(jobs.c.id.desc()).limit(most)
        with self._engine.connect() as connection:
            return _without_progress(connection, query)

    def claim(self, worker: str) -> Job | None:
        """Lease the queued job whose turn it is to `worker`; None if there is none."""
        with self._engine.connect() as connection:  # usually there is none, and reading takes no write lock
            if connection.execute(_ANY_QUEUED).first() is None:
                return None
        return self._lease(
            _NEXT, jobs.c.status == "queued", [_status("running", "validating")], _note_turn,
            status="running", stage="validating", worker=worker, started_at=now(),
            attempts=jobs.c.attempts + 1, progress_seq=jobs.c.last_seq + 2,
        )  # fmt: skip

    def _lease(
        self, first: sa.Select[str], where: sa.ColumnElement[bool], happened: Sequence[Happened],
        also: Callable[[sa.Connection, Job], None] = lambda connection, job: None, **values: Any,
    ) -> Job | None:  # fmt: skip
        """Give the first job that nobody else is taking at this moment a new lease; None if `where` no longer holds."""
        taken = first.with_for_update(skip_locked=True, of=jobs).scalar_subquery()
        with self._engine.begin() as connection:
            ids = _write(connection, (jobs.c.id == taken) & where, happened, **values, lease=jobs.c.lease + 1)
            found = _without_progress(connection, _SELECT.where(jobs.c.id.in_(ids)))
            for job in found:
                also(connection, job)
        return found[0] if found else None

    def append_event(self, job: Job, type: EventType, data: Mapping[str, Any], *, stage: str | None = None) -> None:
        """Append an event to a job that runs, in one transaction with a new stage, if one is given.

        Raises:
            LeaseLost: the job no longer belongs to the worker that claimed it, or a client has cancelled it.
        """
        values: dict[str, Any] = {"progress_seq": jobs.c.last_seq + 1} if type in ("trial", "epoch") else {}
        happened: list[Happened] = [(type, dict(data))]
        if stage is not None:
            happened.append(_status("running", stage))
            values["stage"] = stage
        self._write_leased(job, happened, **values)

    def set_stage(self, job: Job, stage: str) -> None:
        """Note the stage of a job that runs.

        Raises:
            LeaseLost: as above.
        """
        self._write_leased(job, [_status("running", stage)], stage=stage)

    def resolve(self, job: Job, spec: Mapping[str, Any]) -> None:
        """Note the spec that a search has chosen for a job that runs.

        Raises:
            LeaseLost: as above.
        """
        self._write_leased(job, [("resolved", {"spec": dict(spec)})], resolved_spec=dict(spec))

    def previewed(self, job: Job, version: int, connection: sa.Connection) -> None:
        """Note the version that is live while a job searches.

        Args:
            connection: of the transaction that makes it live.

        Raises:
            LeaseLost: as above.
        """
        self._write_leased(job, [("preview", {"version": version})], connection, preview_version=version)

    def succeeded(self, job: Job, version: int, connection: sa.Connection, gate: GateCard | None = None) -> None:
        """End a running job with its version, which is live without its label if the gate has failed.

        Args:
            connection: of the transaction that makes the version live, so that neither is there without the other.

        Raises:
            LeaseLost: as above.
        """
        judged: dict[str, Any] = {"gate": gate.dump()} if gate else {}
        happened: list[Happened] = [_status("succeeded", version=version, **judged)]
        if gate is None or gate.passed:
            happened.insert(0, ("publishing", {"step": "labelled"}))
        ended: dict[str, Any] = {"status": "succeeded", "version": version, "report_status": "quick", **judged}
        self._write_leased(job, happened, connection, **_ENDING, **ended)

    def check_lease(self, job: Job, connection: sa.Connection | None = None) -> bool:
        """Check that a job still belongs to the worker that claimed it; returns whether a client wants it paused.

        Args:
            connection: lock the job's row until its transaction ends, so that the answer holds until then.

        Raises:
            LeaseLost: another worker has the job, or a client has cancelled it.
        """
        held = sa.select(jobs.c.pause_requested).where(_leased(job), ~jobs.c.cancel_requested)
        if connection is not None:
            row = connection.execute(held.with_for_update()).first()
        else:
            with self._engine.connect() as own:
                row = own.execute(held).first()
        if row is None:
            raise LeaseLost(job.id)
        return bool(row.pause_requested)

    def _write_leased(
        self, job: Job, happened: Sequence[Happened], connection: sa.Connection | None = None, **values: Any
    ) -> None:
        with nullcontext(connection) if connection is not None else self._engine.begin() as within:
            if not _write(within, _leased(job) & ~jobs.c.cancel_requested, happened, **values):
                raise LeaseLost(job.id)

    def finish(self, job: Job, status: Literal["failed", "cancelled"], *, error: dict[str, Any] | None = None) -> None:
        """End a running job without a version, unless its lease is lost."""
        last = _status(status, error=error) if error else _status(status)
        with self._engine.begin() as connection:
            _write(connection, _leased(job), [last], **_ENDING, status=status, error=error)

    def requeue(self, job: Job) -> None:
        """Give back the lease of a running job that is to pause, or whose worker stops; the attempt does not count."""
        with self._engine.begin() as connection:
            _put_back(connection, _leased(job), "its worker stopped", attempts=jobs.c.attempts - 1)

    def unreported(self, worker: str, but: Collection[str] = ()) -> Job | None:
        """Lease to `worker` the oldest job whose report is not complete and that no living worker works on."""
        with self._engine.connect() as connection:  # usually there is none, and reading takes no write lock
            if connection.execute(_OLDEST_UNREPORTED, {"worker": worker, "but": list(but)}).first() is None:
                return None
        open_ = _unreported(worker, but)
        return self._lease(_oldest(open_), open_, (), worker=worker)

    def reported(self, job: Job, report_status: str, connection: sa.Connection | None = None) -> None:
        """Note how much of a finished job's report there is.

        Args:
            connection: of the transaction that stores the report.

        Raises:
            LeaseLost: another worker has taken over the report.
        """
        happened: list[Happened] = [("report", {"report_status": report_status})]
        self._write_leased(job, happened, connection, report_status=report_status)

    def open(self) -> set[str]:
        """Return the ids of unfinished jobs."""
        with self._engine.connect() as connection:
            return set(connection.execute(sa.select(jobs.c.id).where(jobs.c.status.not_in(FINISHED))).scalars())

    def unfinished(self, tenant: str) -> int:
        """Return how many jobs of a tenant are queued or running."""
        query = sa.select(sa.func.count()).where(_of(tenant), jobs.c.status.not_in(FINISHED))
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def open_bases(self) -> set[str]:
        """Return the versions, `name:version`, that unfinished jobs start from."""
        with self._engine.connect() as connection:
            query = sa.select(jobs.c.base).where(jobs.c.status.not_in(FINISHED)).distinct()
            return set(connection.execute(query).scalars())

    def open_sources(self) -> set[str]:
        """Return the ids of the jobs of which unfinished jobs publish a checkpoint."""
        publish = jobs.c.checkpoint.is_not(sa.null()) & jobs.c.status.not_in(FINISHED)
        with self._engine.connect() as connection:
            return set(connection.execute(sa.select(jobs.c.checkpoint["job"].as_string()).where(publish)).scalars())

    def needed_datasets(self) -> list[DatasetCard]:
        """Return the data sets of jobs that have not finished or whose report is not complete."""
        with self._engine.connect() as connection:
            return needed_cards(connection)

    def heartbeat(self, worker: str, state: WorkerState) -> None:
        """Note that `worker` lives, and what it does."""
        with self._engine.begin() as connection:
            values = {"state": state, "seen_at": now()}
            if not connection.execute(workers.update().where(workers.c.id == worker).values(**values)).rowcount:
                connection.execute(workers.insert().values(id=worker, **values))

    def forget_worker(self, worker: str) -> None:
        """Remove a worker that stops."""
        with self._engine.begin() as connection:
            connection.execute(workers.delete().where(workers.c.id == worker))

    def worker_states(self) -> dict[str, str]:
        """Return the state of every living worker by its id."""
        with self._engine.connect() as connection:
            query = sa.select(workers.c.id, workers.c.state).where(LIVING)
            return {row.id: row.state for row in connection.execute(query)}

    def recover(self, worker: str, *, others: bool = True) -> list[Job]:
        """Requeue or pause running jobs that no worker runs, but end those to be cancelled and those out of attempts.

        Args:
            worker: the caller. It runs no job now, so one that is leased to it has been dropped.
            others: also take the jobs of dead workers.

        Returns:
            The jobs that have ended, whose leftovers the caller has to clear.
        """
        message = f"its worker died or lost the store {MAX_ATTEMPTS} times"
        died = {"code": "worker_lost", "message": message, "param": None}
        lost = _lost(worker, others)
        # PostgreSQL may find jobs lost by the second or third statement that were not by the first: each tells its own.
        last = jobs.c.attempts >= MAX_ATTEMPTS
        with self._engine.connect() as connection:  # usually there are none, and reading takes no write lock
            if not connection.execute(_ANY_LOST if others else _ANY_DROPPED, {"worker": worker}).scalar_one():
                return []
        with self._engine.begin() as connection:
            if others:
                connection.execute(workers.delete().where(~LIVING))
            _put_back(connection, lost & ~last & ~jobs.c.cancel_requested, "its worker died or lost the store")
            cancelled = _write(
                connection, lost & jobs.c.cancel_requested, [_status("cancelled")], **_ENDING, status="cancelled"
            )
            failed = _write(
                connection, lost & last, [_status("failed", error=died)], **_ENDING, status="failed", error=died
            )
            return _without_progress(connection, _SELECT.where(jobs.c.id.in_([*cancelled, *failed])))


def needed_cards(connection: sa.Connection, tenant: str | None = None) -> list[DatasetCard]:
    """Return the data sets of jobs, a tenant's or all, that have not finished or whose report is not complete."""
    query = sa.select(jobs.c.dataset).where(_of(tenant), jobs.c.status.not_in(FINISHED) | _OPEN_REPORT)
    return [DatasetCard.read(card) for card in connection.execute(query).scalars()]


_ENDED = {"succeeded": "succeeded", "failed": "failed", "cancelled": "been cancelled"}
_FREE = {"stage": None, "worker": None, "lease": jobs.c.lease + 1}
_QUEUED = {**_FREE, "status": "queued", "started_at": None, "progress_seq": jobs.c.last_seq + 2}
_PAUSED = {**_FREE, "status": "paused", "pause_requested": False}
_ENDING = {**_FREE, "finished_at": now()}


def _note_turn(connection: sa.Connection, job: Job) -> None:
    """Note that it was the turn of the job's tenant."""
    turn = insert_of(connection.dialect.name)(turns).values(tenant=job.tenant, claimed_at=now())
    connection.execute(turn.on_conflict_do_update(index_elements=["tenant"], set_={"claimed_at": now()}))


def next_tenant(heads: Mapping[str, Any], running: Mapping[str, int], last_turn: Mapping[str, float]) -> str:
    """The tenant whose turn it is, as the query of `claim` has it.

    Args:
        heads: what the first queued job of each tenant sorts by.
        running: how many jobs of each tenant are running.
        last_turn: when a job of each tenant was last claimed; none for a tenant that has had no turn.
    """
    return min(heads, key=lambda tenant: (running.get(tenant, 0), last_turn.get(tenant, 0.0), heads[tenant]))


def _in_turn(queued: Sequence[Job], running: Sequence[Job], claimed_at: Mapping[str, float], workers: int) -> list[Job]:
    """Queued jobs in the order in which `workers` will claim them if all take equally long.

    Args:
        queued: in the order in which those of each tenant are claimed.
        claimed_at: when a job of each tenant was last claimed.
    """
    waiting: dict[str, deque[Job]] = {}
    for job in queued:
        waiting.setdefault(job.tenant, deque()).append(job)
    if len(waiting) < 2:
        return list(queued)
    busy = deque(job.tenant for job in sorted(running, key=lambda job: job.started_at or 0.0))
    running_of, last_turn = Counter(busy), dict(claimed_at)
    heads, latest = (
        {tenant: _turn_of(jobs[0]) for tenant, jobs in waiting.items()},
        max(claimed_at.values(), default=0.0),
    )
    order: list[Job] = []
    while heads:
        if busy and len(busy) >= workers:
            running_of[busy.popleft()] -= 1
        tenant = next_tenant(heads, running_of, last_turn)
        order.append(waiting[tenant].popleft())
        busy.append(tenant)
        running_of[tenant] += 1
        last_turn[tenant] = latest + len(order)
        if waiting[tenant]:
            heads[tenant] = _turn_of(waiting[tenant][0])
        else:
            del heads[tenant]
    return order


def _turn_of(job: Job) -> tuple[float, str]:
    return job.created_at - AGING_S * job.priority, job.id


def _put_back(connection: sa.Connection, where: sa.ColumnElement[bool], reason: str, **values: Any) -> None:
    """Queue the running jobs that match, or pause those that a client wants paused."""
    pauses = where & jobs.c.pause_requested & ~jobs.c.cancel_requested
    _write(connection, pauses, [_status("paused")], **_PAUSED, **values)
    _write(connection, where, [_status("queued", reason=reason)], **_QUEUED, **values)


def _of(tenant: str | None) -> sa.ColumnElement[bool]:
    """The rows of a tenant, or all."""
    return sa.true() if tenant is None else jobs.c.tenant == tenant


def _leased(job: Job) -> sa.ColumnElement[bool]:
    """The row of a job, as long as the claim that `job` came from holds."""
    return (jobs.c.id == job.id) & (jobs.c.lease == job.lease) & (jobs.c.status == job.status)


def _status(status: Status, stage: str | None = None, **more: Any) -> Happened:
    return "status", {"status": status, "stage": stage, **more}


def _write(
    connection: sa.Connection, where: sa.ColumnElement[bool], happened: Sequence[Happened], **values: Any
) -> list[str]:
    """Change the jobs that match, append what has happened to each, and return their ids."""
    values["last_seq"] = jobs.c.last_seq + len(happened)  # locks the row, so the numbers of events have no gaps
    changed = []
    for row in connection.execute(_UPDATE.where(where).values(**values)).mappings().all():
        insert(connection, row["id"], row["last_seq"], happened)
        if told := _told_of(values):
            _announce(connection, told, dict(row))
        changed.append(row["id"])
    return changed


def _told_of(values: Mapping[str, Any]) -> WebhookType | None:
    """What endpoints are told of a change, if anything; a new stage comes without a status."""
    if values.get("report_status") == "complete":
        return "fine_tuning.job.report_completed"
    return TOLD.get(values.get("status", ""))


def _announce(connection: sa.Connection, type: WebhookType, row: Mapping[str, Any]) -> None:
    data = {name: row[name] for name in ANNOUNCED} | {"model": public_name(row["model"])}
    enqueue(connection, type, data, row["tenant"])


def _without_progress(connection: sa.Connection, query: sa.Select[Any]) -> list[Job]:
    return [_job(dict(row), ()) for row in connection.execute(query).mappings()]


def _read(connection: sa.Connection, query: sa.Select[Any]) -> list[Job]:
    """Jobs with their progress, which begins at the last epoch: a few events of each."""
    rows = connection.execute(query).mappings().all()
    in_progress = (
        sa.select(events)
        .join(jobs, jobs.c.id == events.c.job)
        .where(jobs.c.id.in_([row["id"] for row in rows]), events.c.seq >= jobs.c.progress_seq)
        .order_by(events.c.job, events.c.seq)
    )
    happened: dict[str, list[Event]] = {}
    for event in connection.execute(in_progress).mappings() if rows else ():
        happened.setdefault(event["job"], []).append(Event(**event))
    return [_job(dict(row), happened.get(row["id"], ())) for row in rows]


def _job(row: Mapping[str, Any], happened: Sequence[Event]) -> Job:
    return Job(**{**row, "dataset": DatasetCard.read(row["dataset"] or {})}, progress=progress_of(happened))
