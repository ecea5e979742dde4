"""Jobs and data sets as records in the store: the gateway writes and reads them, workers claim and run them.

queued ──claim──▶ running ──▶ succeeded
  │                  │  ╰────▶ failed
  ╰──▶ cancelled ◀───╯
"""

import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from store.engine import metadata
from store.errors import UnknownJob, WrongState

Status = Literal["queued", "running", "succeeded", "failed", "cancelled"]
FINISHED = ("succeeded", "failed", "cancelled")
LOST_AFTER_S = 10.0  # a worker without a sign of life for so long is dead
MAX_ATTEMPTS = 3

jobs = sa.Table(
    "jobs",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("version", sa.Integer),
    sa.Column("label", sa.String, nullable=False, server_default="stable"),
    sa.Column("base", sa.String, nullable=False),
    sa.Column("status", sa.String, nullable=False, index=True),
    sa.Column("stage", sa.String),
    sa.Column("progress", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float),
    sa.Column("spec", sa.JSON, nullable=False),
    sa.Column("dataset", sa.JSON, nullable=False),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("report_status", sa.String, nullable=False),
    sa.Column("worker", sa.String),
    sa.Column("attempts", sa.Integer, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
)
workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("state", sa.String, nullable=False),  # warming, idle or busy
    sa.Column("seen_at", sa.Float, nullable=False),
)


@dataclass(frozen=True)
class Job:
    """A fine-tune, as it stands. Times are unix seconds."""

    id: str
    model: str
    version: int | None  # of the model, once it is live
    label: str  # what will stand for that version
    base: str  # name:version
    status: Status
    stage: str | None  # validating, training, evaluating, exporting or publishing, while it runs
    progress: dict[str, Any]
    created_at: float
    started_at: float | None
    finished_at: float | None
    spec: dict[str, Any]
    dataset: dict[str, Any]
    error: dict[str, Any] | None  # code, message, param
    report_status: str  # none, quick or complete
    worker: str | None
    attempts: int  # times that a worker has begun it
    cancel_requested: bool


class LeaseLost(Exception):
    """The job was taken from this worker: cancelled, or given to another that it seemed to have died."""


class Jobs:
    """Reads and writes jobs and the signs of life of workers."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def create(
        self, *, model: str, base: str, spec: Mapping[str, Any], dataset: Mapping[str, Any], label: str = "stable"
    ) -> Job:
        """A queued job. Ids sort by time."""
        now = time.time()
        job = Job(
            id=f"ftjob-{int(now * 1000):011x}{secrets.token_hex(5)}", model=model, version=None, label=label, base=base,
            status="queued", stage=None, progress={}, created_at=now, started_at=None, finished_at=None,
            spec=dict(spec), dataset=dict(dataset), error=None, report_status="none", worker=None, attempts=0,
            cancel_requested=False,
        )  # fmt: skip
        with self._engine.begin() as connection:
            connection.execute(jobs.insert().values(**vars(job)))
        return job

    def get(self, job_id: str) -> Job:
        """One job.

        Raises:
            UnknownJob: there is none of that id.
        """
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(jobs).where(jobs.c.id == job_id)).mappings().one_or_none()
        if row is None:
            raise UnknownJob(f"there is no job {job_id!r}", param="id")
        return Job(**row)

    def page(self, *, after: str | None, limit: int) -> tuple[list[Job], bool]:
        """Jobs, newest first, that come after the job `after`; and whether there are more."""
        query = sa.select(jobs).order_by(jobs.c.id.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(jobs.c.id < self.get(after).id)
        with self._engine.connect() as connection:
            rows = [Job(**row) for row in connection.execute(query).mappings()]
        return rows[:limit], len(rows) > limit

    def cancel(self, job_id: str) -> Job:
        """Cancel a queued job now, or a running one at its next epoch.

        Raises:
            WrongState: it has finished.
        """
        now = time.time()
        with self._engine.begin() as connection:
            of_job = jobs.update().where(jobs.c.id == job_id)
            queued = of_job.where(jobs.c.status == "queued")
            if not connection.execute(queued.values(status="cancelled", finished_at=now)).rowcount:
                connection.execute(of_job.where(jobs.c.status == "running").values(cancel_requested=True))
        job = self.get(job_id)
        if job.status in FINISHED and not (job.status == "cancelled" and job.finished_at == now):
            raise WrongState(f"job {job_id} is over: {job.status}", param="id")
        return job

    def claim(self, worker: str) -> Job | None:
        """The oldest queued job, running from now on in the name of `worker`."""
        oldest = (
            sa.select(jobs.c.id)
            .where(jobs.c.status == "queued")
            .order_by(jobs.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        update = (
            jobs.update()
            .where(jobs.c.id == oldest.scalar_subquery(), jobs.c.status == "queued")
            .values(
                status="running", stage="validating", worker=worker, started_at=time.time(),
                attempts=jobs.c.attempts + 1, progress={},
            )
            .returning(*jobs.c)
        )  # fmt: skip
        with self._engine.connect() as connection:  # most often there is none, and a look takes no write lock
            if connection.execute(oldest).first() is None:
                return None
        with self._engine.begin() as connection:
            row = connection.execute(update).mappings().one_or_none()
        return Job(**row) if row else None

    def update(self, job: Job, **values: Any) -> None:
        """Write values of a running job.

        Raises:
            LeaseLost: the job no longer runs in the name of the worker that claimed it, or shall be cancelled.
        """
        mine = (jobs.c.id == job.id) & (jobs.c.worker == job.worker) & (jobs.c.attempts == job.attempts)
        with self._engine.begin() as connection:
            update = jobs.update().where(mine, jobs.c.status == "running", ~jobs.c.cancel_requested)
            if not connection.execute(update.values(**values)).rowcount:
                raise LeaseLost(job.id)

    def check_lease(self, job: Job, connection: sa.Connection) -> None:
        """Lock the row of a running job until the transaction of `connection` ends.

        Raises:
            LeaseLost: as in `update`.
        """
        mine = (jobs.c.id == job.id) & (jobs.c.worker == job.worker) & (jobs.c.attempts == job.attempts)
        held = sa.select(jobs.c.id).where(mine, jobs.c.status == "running", ~jobs.c.cancel_requested)
        if connection.execute(held.with_for_update()).first() is None:
            raise LeaseLost(job.id)

    def finish(self, job: Job, status: Status, **values: Any) -> None:
        """The end of a running job, unless it has been taken away."""
        mine = (jobs.c.id == job.id) & (jobs.c.worker == job.worker) & (jobs.c.attempts == job.attempts)
        with self._engine.begin() as connection:
            update = jobs.update().where(mine, jobs.c.status == "running")
            connection.execute(update.values(status=status, stage=None, finished_at=time.time(), **values))

    def unreported(self, worker: str, but: Collection[str] = ()) -> Job | None:
        """The oldest job whose report `worker` shall complete: it has succeeded, and no living worker is at it."""
        free = jobs.c.worker.is_(None) | (jobs.c.worker == worker) | jobs.c.worker.not_in(sa.select(workers.c.id))
        open_ = (jobs.c.status == "succeeded") & (jobs.c.report_status == "quick") & free & jobs.c.id.not_in(but)
        oldest = sa.select(jobs.c.id).where(open_).order_by(jobs.c.id).limit(1).with_for_update(skip_locked=True)
        with self._engine.connect() as connection:  # most often there is none, and a look takes no write lock
            if connection.execute(oldest).first() is None:
                return None
        update = jobs.update().where(jobs.c.id == oldest.scalar_subquery(), open_).values(worker=worker)
        with self._engine.begin() as connection:
            row = connection.execute(update.returning(*jobs.c)).mappings().one_or_none()
        return Job(**row) if row else None

    def open_bases(self) -> set[str]:
        """Versions, `name:version`, that jobs which have not finished start from."""
        with self._engine.connect() as connection:
            query = sa.select(jobs.c.base).where(jobs.c.status.not_in(FINISHED)).distinct()
            return set(connection.execute(query).scalars())

    def needed_datasets(self) -> list[dict[str, Any]]:
        """Data sets of jobs that have not finished or whose report is not complete."""
        open_report = (jobs.c.status == "succeeded") & (jobs.c.report_status == "quick")
        with self._engine.connect() as connection:
            query = sa.select(jobs.c.dataset).where(jobs.c.status.not_in(FINISHED) | open_report)
            return list(connection.execute(query).scalars())

    def reported(self, job: Job, report_status: str) -> None:
        """How much of a finished job's report is there by now."""
        with self._engine.begin() as connection:
            connection.execute(jobs.update().where(jobs.c.id == job.id).values(report_status=report_status))

    def requeue(self, job: Job) -> None:
        """Queue a running job anew: its worker stops."""
        with self._engine.begin() as connection:
            mine = (jobs.c.id == job.id) & (jobs.c.worker == job.worker) & (jobs.c.status == "running")
            connection.execute(
                jobs.update().where(mine).values(
                    status="queued", stage=None, worker=None, started_at=None, attempts=jobs.c.attempts - 1, progress={}
                )
            )  # fmt: skip

    def heartbeat(self, worker: str, state: str) -> None:
        """`worker` lives and is `state`."""
        with self._engine.begin() as connection:
            values = {"state": state, "seen_at": time.time()}
            if not connection.execute(workers.update().where(workers.c.id == worker).values(**values)).rowcount:
                connection.execute(workers.insert().values(id=worker, **values))

    def forget_worker(self, worker: str) -> None:
        """`worker` has stopped."""
        with self._engine.begin() as connection:
            connection.execute(workers.delete().where(workers.c.id == worker))

    def worker_states(self) -> dict[str, str]:
        """State of every worker that lives."""
        with self._engine.connect() as connection:
            query = sa.select(workers.c.id, workers.c.state).where(workers.c.seen_at > time.time() - LOST_AFTER_S)
            return {row.id: row.state for row in connection.execute(query)}

    def recover(self) -> list[Job]:
        """Queue the jobs of dead workers anew, cancel those that were to be, and fail those that keep killing.

        Returns:
            The jobs that are finished by this, for their leftovers to be cleared.
        """
        with self._engine.begin() as connection:
            connection.execute(workers.delete().where(workers.c.seen_at < time.time() - LOST_AFTER_S))
            lost = (jobs.c.status == "running") & jobs.c.worker.not_in(sa.select(workers.c.id))
            fields: dict[str, Any] = {"stage": None, "worker": None}
            now = time.time()
            died = {"code": "worker_lost", "message": f"its worker died {MAX_ATTEMPTS} times", "param": None}
            again = lost & (jobs.c.attempts < MAX_ATTEMPTS) & ~jobs.c.cancel_requested
            connection.execute(
                jobs.update().where(again).values(status="queued", started_at=None, progress={}, **fields)
            )
            ended = []
            for condition, values in (
                (lost & jobs.c.cancel_requested, {"status": "cancelled"}),
                (lost, {"status": "failed", "error": died}),
            ):
                update = jobs.update().where(condition).values(**values, finished_at=now, **fields).returning(*jobs.c)
                ended += [Job(**row) for row in connection.execute(update).mappings()]
        return ended
