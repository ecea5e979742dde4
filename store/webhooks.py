"""Webhooks in the store: the endpoints that clients register, and the deliveries that are owed to them.

pending ──2xx──▶ succeeded
 ▲   ╰──the last retry fails, or the endpoint is disabled──▶ failed
 ╰──────────replay──────────╯

`enqueue` writes a delivery for every endpoint in the transaction of what it tells of (a transactional outbox), so that
a crash neither loses nor invents one. Gateways share the deliveries: `claim` leases those that are due, and a lease
that nobody settles in time expires, so that another gateway sends its delivery, once more perhaps, with the same id.
The lease is a token, which a gateway that was taken for dead does not have any more. All times are those of the
database's clock. Secrets are stored as they are, because deliveries are signed with them.
"""

import base64
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from store.engine import metadata, now
from store.errors import UnknownWebhook, WrongState
from store.records import DEFAULT_TENANT

WebhookType = Literal[
    "fine_tuning.job.created",
    "fine_tuning.job.running",
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "fine_tuning.job.report_completed",
    "model.label.moved",
]
DeliveryStatus = Literal["pending", "succeeded", "failed"]

MAX_WEBHOOKS = 100  # of a tenant
BATCH = 8  # deliveries to one endpoint that a gateway sends at a time
LEASE_S = 60.0  # longer than an attempt takes, with the time to store how it ended
ROTATION_S = 86400.0  # for which the old secret signs beside the new one
KEEP_S = 30 * 86400.0  # for which finished deliveries and disabled endpoints are kept
SECRET_BYTES = 32
MAX_REASON = 200  # characters

webhooks = sa.Table(
    "webhooks",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False, server_default=DEFAULT_TENANT, index=True),
    sa.Column("url", sa.String, nullable=False),
    sa.Column("types", sa.JSON(none_as_null=True)),  # null for all
    sa.Column("secret", sa.String, nullable=False),
    sa.Column("old_secret", sa.String),
    sa.Column("old_secret_until", sa.Float),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("disabled_at", sa.Float),
    sa.Column("disabled_because", sa.String),
)
deliveries = sa.Table(
    "deliveries",
    metadata,
    sa.Column("id", sa.String, primary_key=True),  # the webhook-id header
    sa.Column("tenant", sa.String, nullable=False, server_default=DEFAULT_TENANT),
    sa.Column("webhook", sa.String, sa.ForeignKey("webhooks.id", ondelete="CASCADE"), nullable=False, index=True),
    sa.Column("type", sa.String, nullable=False),
    sa.Column("data", sa.JSON, nullable=False),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("status", sa.String, nullable=False),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),  # that have ended
    sa.Column("due_at", sa.Float, index=True),  # of the next attempt, or of the end of the lease; null once finished
    sa.Column("lease", sa.String),
    sa.Column("attempted_at", sa.Float),
    sa.Column("http_status", sa.Integer),  # of the last attempt, if it was answered
    sa.Column("error", sa.String),  # of the last attempt
)
# The lock lets nobody delete or disable an endpoint before the transaction has committed.
_ENABLED = (
    sa.select(webhooks.c.id, webhooks.c.types, now().label("at"))
    .where(webhooks.c.disabled_at.is_(None))
    .with_for_update(read=True)
)


@dataclass(frozen=True)
class Webhook:
    """An endpoint. Times are Unix seconds; secrets are `whsec_` and base64."""

    id: str
    tenant: str
    url: str
    types: list[str] | None  # None for all
    secret: str
    old_secret: str | None  # signs as well until `old_secret_until`
    old_secret_until: float | None
    created_at: float
    disabled_at: float | None
    disabled_because: str | None


@dataclass(frozen=True)
class Delivery:
    """What an endpoint is told, and how far that is. Times are Unix seconds."""

    id: str
    tenant: str
    webhook: str
    type: str
    data: dict[str, Any]
    created_at: float  # when it happened
    status: DeliveryStatus
    attempts: int
    due_at: float | None
    lease: str | None
    attempted_at: float | None
    http_status: int | None
    error: str | None


@dataclass(frozen=True)
class Claimed:
    """A leased delivery with what it takes to send it."""

    delivery: Delivery
    url: str
    secrets: tuple[str, ...]  # that sign, the newest first


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended.

    Attributes:
        http_status: of the answer, None if there was none.
        error: why it failed, None if it did not.
        retry_in_s: pause before the next attempt; None for none.
        gone: the endpoint wants nothing any more.
    """

    http_status: int | None = None
    error: str | None = None
    retry_in_s: float | None = None
    gone: bool = False


def enqueue(
    connection: sa.Connection, type: WebhookType, data: Mapping[str, Any], tenant: str = DEFAULT_TENANT
) -> None:  # fmt: skip
    """Owe a delivery to every endpoint of a tenant that wants this type, once the connection's transaction commits."""
    wanting = _ENABLED.where(webhooks.c.tenant == tenant)
    rows = [
        {"id": _id("msg", row.at), "tenant": tenant, "webhook": row.id, "type": type, "data": dict(data),
         "created_at": row.at, "due_at": row.at, "status": "pending"}
        for row in connection.execute(wanting)
        if row.types is None or type in row.types
    ]  # fmt: skip
    if rows:
        connection.execute(deliveries.insert(), rows)


class Webhooks:
    """Reads and writes endpoints and deliveries."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def create(
        self, url: str, types: Collection[WebhookType] | None = None, tenant: str = DEFAULT_TENANT, *,
        also: Callable[[sa.Connection, Webhook], None] = lambda connection, webhook: None,
    ) -> Webhook:  # fmt: skip
        """Register an endpoint. Ids sort by creation time.

        Args:
            types: what it wants to be told; None for everything.
            also: called in the same transaction; raises to roll it back.

        Raises:
            WrongState: the tenant has `MAX_WEBHOOKS` already.
        """
        with self._engine.begin() as connection:
            of_tenant = sa.select(sa.func.count()).select_from(webhooks).where(webhooks.c.tenant == tenant)
            if connection.execute(of_tenant).scalar_one() >= MAX_WEBHOOKS:
                raise WrongState(f"there are {MAX_WEBHOOKS} webhooks already; delete one first")
            at = connection.execute(sa.select(now())).scalar_one()
            webhook = Webhook(
                id=_id("webhook", at), tenant=tenant, url=url, types=sorted(set(types)) if types else None,
                secret=_new_secret(), old_secret=None, old_secret_until=None, created_at=at, disabled_at=None,
                disabled_because=None,
            )  # fmt: skip
            connection.execute(webhooks.insert().values(**vars(webhook)))
            also(connection, webhook)
        return webhook

    def get(self, webhook_id: str, tenant: str = DEFAULT_TENANT, param: str = "id") -> Webhook:
        """Return an endpoint.

        Raises:
            UnknownWebhook: the tenant has none of this id.
        """
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(webhooks).where(_is(webhook_id, tenant))).mappings().first()
        if row is None:
            raise UnknownWebhook(f"there is no webhook {webhook_id!r}", param=param)
        return Webhook(**row)

    def page(self, *, after: str | None, limit: int, tenant: str = DEFAULT_TENANT) -> tuple[list[Webhook], bool]:
        """Return up to `limit` endpoints, newest first, that come after the one `after`; and whether there are more.

        Raises:
            UnknownWebhook: there is no endpoint `after`.
        """
        query = sa.select(webhooks).where(webhooks.c.tenant == tenant).order_by(webhooks.c.id.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(webhooks.c.id < self.get(after, tenant, "after").id)
        with self._engine.connect() as connection:
            found = [Webhook(**row) for row in connection.execute(query).mappings()]
        return found[:limit], len(found) > limit

    def delete(self, webhook_id: str, tenant: str = DEFAULT_TENANT) -> None:
        """Delete an endpoint with its deliveries.

        Raises:
            UnknownWebhook: the tenant has none of this id.
        """
        with self._engine.begin() as connection:
            if not connection.execute(webhooks.delete().where(_is(webhook_id, tenant))).rowcount:
                raise UnknownWebhook(f"there is no webhook {webhook_id!r}", param="id")

    def rotate(self, webhook_id: str, tenant: str = DEFAULT_TENANT, *, overlap_s: float = ROTATION_S) -> Webhook:
        """Give an endpoint a new secret.

        Args:
            overlap_s: how long the secret that it had signs beside the new one.

        Raises:
            UnknownWebhook: the tenant has none of this id.
        """
        fresh = {"secret": _new_secret(), "old_secret": webhooks.c.secret, "old_secret_until": now() + overlap_s}
        rotated = webhooks.update().where(_is(webhook_id, tenant)).values(**fresh)
        with self._engine.begin() as connection:
            connection.execute(rotated)
        return self.get(webhook_id, tenant)

    def deliveries(
        self, webhook_id: str, *, status: DeliveryStatus | None = None, after: str | None = None, limit: int,
        tenant: str = DEFAULT_TENANT,
    ) -> tuple[list[Delivery], bool]:  # fmt: skip
        """Return up to `limit` deliveries to an endpoint, newest first, that come after `after`; and if there are more.

        Raises:
            UnknownWebhook: there is no such endpoint, or no such delivery to it.
        """
        self.get(webhook_id, tenant)
        query = sa.select(deliveries).where(deliveries.c.webhook == webhook_id)
        if status is not None:
            query = query.where(deliveries.c.status == status)
        if after is not None:
            query = query.where(deliveries.c.id < self._delivery(webhook_id, after, "after").id)
        with self._engine.connect() as connection:
            rows = connection.execute(query.order_by(deliveries.c.id.desc()).limit(limit + 1)).mappings()
            found = [Delivery(**row) for row in rows]
        return found[:limit], len(found) > limit

    def replay(self, webhook_id: str, delivery_id: str, tenant: str = DEFAULT_TENANT) -> Delivery:
        """Send a delivery again, at once, under its id and with all its retries.

        Raises:
            UnknownWebhook: there is no such endpoint, or no such delivery to it.
            WrongState: the endpoint is disabled.
        """
        if self.get(webhook_id, tenant).disabled_at is not None:
            raise WrongState(f"webhook {webhook_id} is disabled; create another one", param="id")
        again = {"status": "pending", "attempts": 0, "due_at": now(), "lease": None}
        of_webhook = (deliveries.c.id == delivery_id) & (deliveries.c.webhook == webhook_id)
        with self._engine.begin() as connection:
            connection.execute(deliveries.update().where(of_webhook).values(**again))
        return self._delivery(webhook_id, delivery_id, "delivery")

    def _delivery(self, webhook_id: str, delivery_id: str, param: str) -> Delivery:
        of_webhook = (deliveries.c.id == delivery_id) & (deliveries.c.webhook == webhook_id)
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(deliveries).where(of_webhook)).mappings().first()
        if row is None:
            raise UnknownWebhook(f"there is no delivery {delivery_id!r} to webhook {webhook_id}", param=param)
        return Delivery(**row)

    def claim(self, busy: Collection[str] = (), *, lease_s: float = LEASE_S) -> list[Claimed]:
        """Lease what is due: up to `BATCH` deliveries to each endpoint.

        Args:
            busy: endpoints that the caller is sending to.
        """
        due = (deliveries.c.due_at <= now()) & deliveries.c.webhook.not_in(busy)
        with self._engine.connect() as connection:  # usually there is none, and reading takes no write lock
            if connection.execute(sa.select(deliveries.c.id).where(due).limit(1)).first() is None:
                return []
        place = sa.func.row_number().over(partition_by=deliveries.c.webhook, order_by=deliveries.c.due_at)
        ranked = sa.select(deliveries.c.id, place.label("place")).where(due).subquery()
        first = sa.select(deliveries.c.id).where(
            due, deliveries.c.id.in_(sa.select(ranked.c.id).where(ranked.c.place <= BATCH))
        )
        first = first.with_for_update(skip_locked=True)  # another gateway may choose the same at this moment
        lease = {"lease": secrets.token_hex(8), "due_at": now() + lease_s}
        leased = deliveries.update().where(deliveries.c.id.in_(first), due).values(**lease).returning(deliveries)
        with self._engine.begin() as connection:
            found = [Delivery(**row) for row in connection.execute(leased).mappings()]
            to = sa.select(webhooks, now().label("now")).where(webhooks.c.id.in_({each.webhook for each in found}))
            endpoints = {row.id: row for row in connection.execute(to)}
        claimed = []
        for delivery in sorted(found, key=lambda delivery: delivery.id):
            endpoint = endpoints[delivery.webhook]
            signing = [endpoint.secret]
            if endpoint.old_secret is not None and endpoint.old_secret_until > endpoint.now:
                signing.append(endpoint.old_secret)
            claimed.append(Claimed(delivery, endpoint.url, tuple(signing)))
        return claimed

    def settle(self, delivery: Delivery, attempt: Attempt) -> None:
        """Note how an attempt ended, unless its lease has been lost."""
        leased = (deliveries.c.id == delivery.id) & (deliveries.c.lease == delivery.lease)
        error = attempt.error and attempt.error[:MAX_REASON]
        values: dict[str, Any] = {"status": "failed" if error else "succeeded", "due_at": None}
        if error and attempt.retry_in_s is not None:
            values = {"due_at": now() + attempt.retry_in_s}
        ended = deliveries.update().where(leased).values(
            **values, lease=None, attempts=deliveries.c.attempts + 1, attempted_at=now(),
            http_status=attempt.http_status, error=error,
        )  # fmt: skip
        endpoint = (webhooks.c.id == delivery.webhook) & webhooks.c.disabled_at.is_(None)
        waiting = (deliveries.c.webhook == delivery.webhook) & deliveries.c.due_at.is_not(None)
        given_up = {"status": "failed", "due_at": None, "lease": None, "error": "the endpoint is disabled"}
        with self._engine.begin() as connection:
            if attempt.gone:  # the endpoint first, so that nothing is enqueued for it after the others are given up
                connection.execute(webhooks.update().where(endpoint).values(disabled_at=now(), disabled_because=error))
            connection.execute(ended)
            if attempt.gone:
                connection.execute(deliveries.update().where(waiting).values(**given_up))

    def clean_up(self, keep_s: float = KEEP_S) -> None:
        """Delete finished deliveries and disabled endpoints that are older than `keep_s`."""
        old = deliveries.c.due_at.is_(None) & (sa.func.coalesce(deliveries.c.attempted_at, deliveries.c.created_at)
                                               < now() - keep_s)  # fmt: skip
        with self._engine.begin() as connection:
            connection.execute(deliveries.delete().where(old))
            connection.execute(webhooks.delete().where(webhooks.c.disabled_at < now() - keep_s))


def _is(webhook_id: str, tenant: str) -> sa.ColumnElement[bool]:
    return (webhooks.c.id == webhook_id) & (webhooks.c.tenant == tenant)


def _id(kind: str, at: float) -> str:
    return f"{kind}-{int(at * 1000):011x}{secrets.token_hex(8)}"


def _new_secret() -> str:
    return "whsec_" + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
