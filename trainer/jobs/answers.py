"""Answers to requests that created something, so that a repeated request gets the first one's instead of creating more.

An answer is written in the transaction that creates what it tells of, under the key of the request. Of two requests
with one key that run at the same time, on whatever gateway, the second one's transaction fails (`Repeated`) and leaves
nothing; it then reads the first one's answer. There is no third state, so a crash leaves either both or neither.
"""

from dataclasses import dataclass

import sqlalchemy as sa

from store.engine import metadata, now
from store.errors import IdempotencyMismatch
from store.records import DEFAULT_TENANT

KEPT_S = 24 * 3600.0
HEADER = "Idempotency-Key"

answers = sa.Table(
    "answers",
    metadata,
    sa.Column("tenant", sa.String, primary_key=True, server_default=DEFAULT_TENANT),
    sa.Column("key", sa.String, primary_key=True),
    sa.Column("request", sa.String, nullable=False),  # SHA-256 of its path and content
    sa.Column("created_at", sa.Float, nullable=False, index=True),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("body", sa.Text, nullable=False),
    sa.Column("location", sa.String),
)


class Repeated(Exception):
    """The request has been answered meanwhile; the transaction that would have done its work again is rolled back."""


@dataclass(frozen=True)
class Attempt:
    """A request that may be a repeated one."""

    tenant: str
    key: str
    request: str  # SHA-256 of its path and content
    since: float  # time of the oldest answer that may be its own, Unix seconds of the database's clock


@dataclass(frozen=True)
class Answer:
    """A response: JSON, and where to find what was created."""

    status: int
    body: str
    location: str | None = None


class Answers:
    """Keeps answers for `KEPT_S`."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def attempt(self, tenant: str, key: str, request: str, *, window_s: float = KEPT_S) -> Attempt:
        """Begin with a request that repeats one answered up to `window_s` before now, if there was one."""
        with self._engine.connect() as connection:
            at = connection.execute(sa.select(now())).scalar_one()
        return Attempt(tenant, key, request, at - window_s)

    def find(self, attempt: Attempt) -> Answer | None:
        """Return the answer to an earlier attempt; None if there is none.

        Raises:
            IdempotencyMismatch: the key was that of another request.
        """
        query = sa.select(answers).where(_of(attempt), answers.c.created_at >= attempt.since)
        with self._engine.connect() as connection:
            row = connection.execute(query).first()
        if row is None:
            return None
        if row.request != attempt.request:
            raise IdempotencyMismatch(
                f"{HEADER}: {attempt.key!r} was used for another request in the last 24 hours; use a new key",
                param=HEADER,
            )
        return Answer(row.status, row.body, row.location)

    def record(self, connection: sa.Connection, attempt: Attempt, answer: Answer) -> None:
        """Write the answer, in the transaction that does what it says.

        Raises:
            Repeated: there is one to an earlier attempt.
        """
        old = answers.c.created_at < now() - KEPT_S
        connection.execute(answers.delete().where(old | (_of(attempt) & (answers.c.created_at < attempt.since))))
        try:
            row = {"tenant": attempt.tenant, "key": attempt.key, "request": attempt.request, **vars(answer)}
            connection.execute(answers.insert().values(created_at=now(), **row))
        except sa.exc.IntegrityError as exc:
            raise Repeated from exc

    def forget(self, tenant: str, location: str) -> None:
        """Forget the answer that tells of something that has been deleted: a repeated request makes it anew."""
        of_it = (answers.c.tenant == tenant) & (answers.c.location == location)
        with self._engine.begin() as connection:
            connection.execute(answers.delete().where(of_it))


def _of(attempt: Attempt) -> sa.ColumnElement[bool]:
    return (answers.c.tenant == attempt.tenant) & (answers.c.key == attempt.key)
