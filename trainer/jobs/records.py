"""Jobs as records in the store: the gateway creates and reads them, workers lease and run them.

queued ──claim──▶ running ──▶ succeeded
  ▲  │              │  │ ╰──▶ failed
  │  ╰▶ cancelled ◀─╯  │
  ╰──────requeue───────╯

A claim gives a worker the lease of a job: the pair (worker, attempts) in its row. Whoever writes to a running job
shows the pair, and the write fails once the job has been requeued, cancelled or claimed by another worker. A worker
that has sent no heartbeat for `LOST_AFTER_S` is taken for dead, and its jobs are requeued. All times are those of the
database's clock.
"""

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import sqlalchemy as sa

from store.engine import metadata, now
from store.errors import UnknownJob, WrongState
from store.records import DatasetCard, Progress
from trainer.jobs.events import Event, EventType, events, insert, progress_of

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
WorkerState = Literal["warming", "idle", "busy", "reporting"]
Happened = tuple[EventType, dict[str, Any]]
FINISHED = ("succeeded", "failed", "cancelled")
LOST_AFTER_S = 10.0  # a worker without a heartbeat for this long is taken for dead
MAX_ATTEMPTS = 3

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("version", sa.Integer),
    sa.Column("preview_version", sa.Integer),
    sa.Column("label", sa.String, nullable=False, server_default="stable"),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False, index=True),
    sa.Column("stage", sa.String),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("resolved_spec", sa.JSON(none_as_null=True)),
    sa.Column("dataset", sa.JSON, nullable=False),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("report_status", sa.String, nullable=False),
    sa.Column("worker", sa.String),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("last_seq", sa.Integer, nullable=False),  # of its events
    sa.Column("progress_seq", sa.Integer, nullable=False),  # the event that its progress begins with
    sa.Column("metadata", sa.JSON(none_as_null=True)),
)
workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),  # last heartbeat
)


@dataclass(frozen=True)
class Job:
    """A fine-tune as it stands. Times are Unix seconds."""

    id: str
    model: str
    version: int | None  # of the model, once it is live
    preview_version: int | None  # live while the job searches
    label: str  # moves to that version
    base: str  # name:version
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
    attempts: int  # how often a worker has started it
    cancel_requested: bool
    metadata: dict[str, str] | None = None  # of the client's own


_COLUMNS = [column for column in jobs.c if column.name in Job.__dataclass_fields__]


class LeaseLost(Exception):
    """The job no longer belongs to this worker: it was cancelled, or reassigned because the worker looked dead."""


class Jobs:
    """Reads and writes jobs, their events and the heartbeats of workers."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def create(
        self, *, model: str, base: str, spec: Mapping[str, Any], dataset: DatasetCard, label: str = "stable",
        resolved_spec: Mapping[str, Any] | None = None, metadata: Mapping[str, str] | None = None,
        also: Callable[[sa.Connection, Job], None] = lambda connection, job: None,
    ) -> Job:  # fmt: skip
        """Queue a job. Ids sort by creation time.

        Args:
            resolved_spec: the spec if there is nothing to search.
            metadata: what the client wants to find the job by.
            also: called in the same transaction; raises to roll it back.
        """
        with self._engine.begin() as connection:
            created_at = connection.execute(sa.select(now())).scalar_one()
            job = Job(
                id=f"ftjob-{int(created_at * 1000):011x}{secrets.token_hex(5)}", model=model, version=None, label=label,
                base=base, status="queued", stage=None, progress=Progress(), created_at=created_at, started_at=None,
                finished_at=None, spec=dict(spec), resolved_spec=dict(resolved_spec) if resolved_spec else None,
                dataset=dataset, error=None, report_status="none", worker=None, attempts=0, cancel_requested=False,
                preview_version=None, metadata=dict(metadata) if metadata else None,
            )  # fmt: skip
            row = {column.name: getattr(job, column.name) for column in _COLUMNS} | {"dataset": dataset.dump()}
            connection.execute(jobs.insert().values(**row, last_seq=1, progress_seq=2))
            insert(connection, job.id, 1, [_status("queued")])
            also(connection, job)
        return job

    def get(self, job_id: str, param: str = "id") -> Job:
        """Return a job.

        Raises:
            UnknownJob: no job has this id.
        """
        with self._engine.connect() as connection:
            found = _read(connection, sa.select(*_COLUMNS).where(jobs.c.id == job_id))
        if not found:
            raise UnknownJob(f"there is no job {job_id!r}", param=param)
        return found[0]

    def page(
        self, *, after: str | None, limit: int, metadata: Mapping[str, str] | None = MappingProxyType({})
    ) -> tuple[list[Job], bool]:
        """Return up to `limit` jobs, newest first, that come after the job `after`; and whether there are more.

        Args:
            metadata: what all of them have in theirs; None for those that have none.

        Raises:
            UnknownJob: no job has the id `after`.
        """
        query = sa.select(*_COLUMNS).order_by(jobs.c.id.desc()).limit(limit + 1)
        if metadata is None:
            query = query.where(jobs.c.metadata.is_(sa.null()))
        for key, value in (metadata or {}).items():
            query = query.where(jobs.c.metadata[key].as_string() == value)
        if after is not None:
            query = query.where(jobs.c.id < self.get(after, "after").id)
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

    def cancel(self, job_id: str) -> Job:
        """Cancel a queued job now, or a running one at its next epoch.

        Raises:
            UnknownJob: no job has this id.
            WrongState: it has finished.
        """
        of_job = jobs.c.id == job_id
        with self._engine.begin() as connection:
            changed = _write(
                connection, of_job & (jobs.c.status == "queued"), [_status("cancelled")],
                status="cancelled", finished_at=now(),
            ) or _write(connection, of_job & (jobs.c.status == "running"), (), cancel_requested=True)  # fmt: skip
        job = self.get(job_id)
        if not changed:
            raise WrongState(f"job {job_id} has already {_ENDED[job.status]}", param="id")
        return job

    def claim(self, worker: str) -> Job | None:
        """Lease the oldest queued job to `worker`; None if there is none."""
        oldest = (
            sa.select(jobs.c.id)
            .where(jobs.c.status == "queued")
            .order_by(jobs.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        with self._engine.connect() as connection:  # usually there is none, and reading takes no write lock
            if connection.execute(oldest).first() is None:
                return None
        with self._engine.begin() as connection:
            claimed = _write(
                connection, (jobs.c.id == oldest.scalar_subquery()) & (jobs.c.status == "queued"),
                [_status("running", "validating")],
                status="running", stage="validating", worker=worker, started_at=now(),
                attempts=jobs.c.attempts + 1, progress_seq=jobs.c.last_seq + 2,
            )  # fmt: skip
        return claimed[0] if claimed else None

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

    def previewed(self, job: Job, version: int) -> None:
        """Note the version that is live while a job searches.

        Raises:
            LeaseLost: as above.
        """
        self._write_leased(job, [("preview", {"version": version})], preview_version=version)

    def check_lease(self, job: Job, connection: sa.Connection | None = None) -> None:
        """Check that a job still belongs to the worker that claimed it.

        Args:
            connection: lock the job's row until its transaction ends, so that the answer holds until then.

        Raises:
            LeaseLost: another worker has the job, or a client has cancelled it.
        """
        held = sa.select(jobs.c.id).where(_leased(job), ~jobs.c.cancel_requested)
        if connection is not None:
            row = connection.execute(held.with_for_update()).first()
        else:
            with self._engine.connect() as own:
                row = own.execute(held).first()
        if row is None:
            raise LeaseLost(job.id)

    def _write_leased(self, job: Job, happened: Sequence[Happened], **values: Any) -> None:
        with self._engine.begin() as connection:
            if not _write(connection, _leased(job) & ~jobs.c.cancel_requested, happened, **values):
                raise LeaseLost(job.id)

    def finish(self, job: Job, status: Status, *, happened: Sequence[Happened] = (), **values: Any) -> None:
        """End a running job, unless its lease is lost; `happened` are its last events before that."""
        ending = {name: values[name] for name in ("version", "error") if name in values}
        last = _status(status, **ending)
        with self._engine.begin() as connection:
            _write(
                connection, _leased(job), [*happened, last],
                status=status, stage=None, finished_at=now(), worker=None, **values,
            )  # fmt: skip

    def requeue(self, job: Job) -> None:
        """Give back the lease of a running job whose worker stops; the attempt does not count."""
        with self._engine.begin() as connection:
            _write(connection, _leased(job), [_status("queued")], **_QUEUED, attempts=jobs.c.attempts - 1)

    def unreported(self, worker: str, but: Collection[str] = ()) -> Job | None:
        """Lease to `worker` the oldest job whose report is not complete and that no living worker works on."""
        free = jobs.c.worker.is_(None) | (jobs.c.worker == worker) | jobs.c.worker.not_in(sa.select(workers.c.id))
        open_ = (jobs.c.status == "succeeded") & (jobs.c.report_status == "quick") & free & jobs.c.id.not_in(but)
        oldest = sa.select(jobs.c.id).where(open_).order_by(jobs.c.id).limit(1).with_for_update(skip_locked=True)
        with self._engine.connect() as connection:  # usually there is none, and reading takes no write lock
            if connection.execute(oldest).first() is None:
                return None
        with self._engine.begin() as connection:
            claimed = _write(connection, (jobs.c.id == oldest.scalar_subquery()) & open_, (), worker=worker)
        return claimed[0] if claimed else None

    def reported(self, job: Job, report_status: str) -> None:
        """Note how much of a finished job's report there is."""
        with self._engine.begin() as connection:
            happened: list[Happened] = [("report", {"report_status": report_status})]
            _write(connection, jobs.c.id == job.id, happened, report_status=report_status)

    def open_bases(self) -> set[str]:
        """Return the versions, `name:version`, that unfinished jobs start from."""
        with self._engine.connect() as connection:
            query = sa.select(jobs.c.base).where(jobs.c.status.not_in(FINISHED)).distinct()
            return set(connection.execute(query).scalars())

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
            query = sa.select(workers.c.id, workers.c.state).where(workers.c.seen_at > now() - LOST_AFTER_S)
            return {row.id: row.state for row in connection.execute(query)}

    def recover(self, worker: str | None = None, *, others: bool = True) -> list[Job]:
        """Requeue running jobs that no worker runs, but end those to be cancelled and those out of attempts.

        Args:
            worker: the caller. It runs no job now, so one that is leased to it has been dropped.
            others: also take the jobs of dead workers.

        Returns:
            The jobs that have ended, whose leftovers the caller has to clear.
        """
        message = f"its worker died or lost the store {MAX_ATTEMPTS} times"
        died = {"code": "worker_lost", "message": message, "param": None}
        lost = jobs.c.worker == worker
        if others:
            lost |= jobs.c.worker.not_in(sa.select(workers.c.id))
        lost &= jobs.c.status == "running"
        again = lost & (jobs.c.attempts < MAX_ATTEMPTS) & ~jobs.c.cancel_requested
        ending = {"stage": None, "worker": None, "finished_at": now()}
        with self._engine.begin() as connection:
            if others:
                connection.execute(workers.delete().where(workers.c.seen_at < now() - LOST_AFTER_S))
            _write(connection, again, [_status("queued")], **_QUEUED)
            cancelled = _write(
                connection, lost & jobs.c.cancel_requested, [_status("cancelled")], status="cancelled", **ending
            )
            failed = _write(connection, lost, [_status("failed", error=died)], status="failed", error=died, **ending)
        return [*cancelled, *failed]


def needed_cards(connection: sa.Connection) -> list[DatasetCard]:
    """Return the data sets of jobs that have not finished or whose report is not complete."""
    open_report = (jobs.c.status == "succeeded") & (jobs.c.report_status == "quick")
    query = sa.select(jobs.c.dataset).where(jobs.c.status.not_in(FINISHED) | open_report)
    return [DatasetCard.read(card) for card in connection.execute(query).scalars()]


_ENDED = {"succeeded": "succeeded", "failed": "failed", "cancelled": "been cancelled"}
_QUEUED = {
    "status": "queued", "stage": None, "worker": None, "started_at": None, "progress_seq": jobs.c.last_seq + 2,
}  # fmt: skip


def _leased(job: Job) -> sa.ColumnElement[bool]:
    """The row of a running job, as long as the claim that `job` came from holds."""
    lease = (jobs.c.worker == job.worker) & (jobs.c.attempts == job.attempts)
    return (jobs.c.id == job.id) & lease & (jobs.c.status == "running")


def _status(status: Status, stage: str | None = None, **more: Any) -> Happened:
    return "status", {"status": status, "stage": stage, **more}


def _write(
    connection: sa.Connection, where: sa.ColumnElement[bool], happened: Sequence[Happened], **values: Any
) -> list[Job]:
    """Change the jobs that match, append what has happened to each, and return them, without progress."""
    values["last_seq"] = jobs.c.last_seq + len(happened)  # locks the row, so the numbers of events have no gaps
    update = jobs.update().where(where).values(**values).returning(*_COLUMNS, jobs.c.last_seq)
    changed = []
    for row in connection.execute(update).mappings().all():
        fields = dict(row)
        insert(connection, row["id"], fields.pop("last_seq"), happened)
        changed.append(_job(fields, ()))
    return changed


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
