"""What operators watch: how many jobs stand where, how long the queue is, and how long the stages of jobs take."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import sqlalchemy as sa

from store.engine import now
from trainer.jobs.events import events
from trainer.jobs.records import LIVING, Status, WorkerState, jobs, workers

Stage = Literal["validating", "previewing", "searching", "training", "evaluating", "exporting", "publishing", "warming"]
STAGES: tuple[str, ...] = get_args(Stage)
# Transactions commit in another order than they note the time, so jobs are looked for that far back again.
OVERLAP_S = 60.0
MOST_JOBS = 500  # whose stages are added up at a time


@dataclass(frozen=True)
class Snapshot:
    """The store at one moment."""

    jobs: dict[str, int]  # by status, all of them
    workers: dict[str, int]  # living ones by state, all of them
    oldest_queued_s: float  # age of the job that was queued first; 0 if none waits
    stages: list[dict[str, float]]  # seconds by stage of every job that has finished since the last snapshot


@dataclass
class Statistics:
    """Reads snapshots. One costs a scan of the index of statuses, and a look at the jobs that have finished since."""

    engine: sa.Engine
    _since: float | None = None  # finished jobs are looked for from here on, in Unix seconds of the database
    _seen: dict[str, float] = field(default_factory=dict)  # when those ended that are counted and may be found again

    def snapshot(self) -> Snapshot:
        """Read the store; the first snapshot has no stages.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: the store is away or damaged.
        """
        queued = sa.select(sa.func.min(jobs.c.created_at)).where(jobs.c.status == "queued").scalar_subquery()
        with self.engine.connect() as connection:
            at, oldest = connection.execute(sa.select(now(), queued)).one()
            statuses = _counts(connection, sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status))
            living = sa.select(workers.c.state, sa.func.count()).where(LIVING).group_by(workers.c.state)
            states = _counts(connection, living)
            stages = self._finished(connection, at)
        return Snapshot(
            jobs={status: statuses[status] for status in get_args(Status)},
            workers={state: states[state] for state in get_args(WorkerState)},
            oldest_queued_s=0.0 if oldest is None else max(0.0, at - oldest),
            stages=stages,
        )

    def _finished(self, connection: sa.Connection, at: float) -> list[dict[str, float]]:
        """Seconds by stage of the jobs that have finished since the last call, up to `MOST_JOBS` of them."""
        first, past = self._since is None, at - OVERLAP_S
        most = None if first else len(self._seen) + MOST_JOBS  # those seen are found again
        ended = sa.select(jobs.c.id, jobs.c.finished_at).where(jobs.c.finished_at >= (past if first else self._since))
        found = connection.execute(ended.order_by(jobs.c.finished_at, jobs.c.id).limit(most)).all()
        new = [row.id for row in found if row.id not in self._seen]
        stages = [] if first else _seconds_by_stage(connection, new)
        # Only now, so that a failure on the way loses none.
        self._since = since = min(past, found[-1].finished_at) if len(found) == most else past
        self._seen = {row.id: row.finished_at for row in found if row.finished_at >= since}
        return stages


def _counts(connection: sa.Connection, query: sa.Select[Any]) -> Counter[str]:
    return Counter({row[0]: row[1] for row in connection.execute(query)})


def _seconds_by_stage(connection: sa.Connection, ids: Iterable[str]) -> list[dict[str, float]]:
    """Of each job the seconds between a change of stage and the next change, summed up over its attempts."""
    changes = sa.select(events.c.job, events.c.at, events.c.data).where(
        events.c.job.in_(list(ids)), events.c.type == "status"
    )
    seconds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    job, stage, began = None, None, 0.0
    for row in connection.execute(changes.order_by(events.c.job, events.c.seq)):
        if row.job == job and stage in STAGES:
            seconds[row.job][stage] += row.at - began
        job, stage, began = row.job, row.data.get("stage"), row.at
    return [dict(stages) for stages in seconds.values()]
