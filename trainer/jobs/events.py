"""What has happened to a job, append-only: every change of status or stage, every trial, epoch and publishing step.

    type        data
    status      {"status": …, "stage": …}; at the end with "error", or with "version" and "gate" (a `GateCard`)
    preview     {"version": …}, live while the job searches
    trial       what a trial of the search has found, and the best so far
    resolved    {"spec": …}, which the search has chosen
    epoch       the record of the epoch, with "epochs" and, in cross-validation, "fold" and "folds"
    publishing  {"step": …}: staged, verified, renamed, available, proven, warmed or labelled
    report      {"report_status": …}, after the job has finished

Events of a job are numbered from 1 without gaps, in the order in which they happened.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from store.engine import metadata, now
from store.records import Progress

EventType = Literal["status", "preview", "trial", "resolved", "epoch", "publishing", "report"]

events = sa.Table(
    "events",
    metadata,
    sa.Column("job", sa.String, sa.ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at", sa.Float, nullable=False),
    sa.Column("type", sa.String, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
)
_INSERT = events.insert().values(at=now())


@dataclass(frozen=True)
class Event:
    """Something that has happened to a job."""

    job: str
    seq: int
    at: float  # Unix seconds, of the database's clock
    type: EventType
    data: dict[str, Any]


def insert(
    connection: sa.Connection, job_id: str, last_seq: int, happened: Sequence[tuple[EventType, dict[str, Any]]]
) -> None:
    """Append events, the last of which gets the number `last_seq`."""
    first = last_seq - len(happened) + 1
    rows = [{"job": job_id, "seq": first + i, "type": kind, "data": data} for i, (kind, data) in enumerate(happened)]
    if rows:
        connection.execute(_INSERT, rows)


def progress_of(happened: Iterable[Event]) -> Progress:
    """How far a job is: its last trial or epoch, and the time of each publishing step after it."""
    progress: dict[str, Any] = {}
    for event in happened:
        if event.type in ("trial", "epoch"):
            progress = dict(event.data)
        elif event.type == "publishing":
            progress.setdefault("publishing", {}).setdefault(event.data["step"], round(event.at, 3))
    return Progress.read(progress)
