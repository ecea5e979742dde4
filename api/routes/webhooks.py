"""Webhooks: register endpoints, rotate their secrets, list deliveries and replay them."""

import asyncio
import logging
from hashlib import sha256
from typing import Annotated, Any, Literal, Self, get_args

from fastapi import APIRouter, Path, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from api.courier import MAX_URL
from api.gateway import gateway_of, tenant_of
from api.http.openapi import After, Limit, errors
from api.http.repeats import IdempotencyKey, Note, once
from store.validation import TEXT
from store.webhooks import Delivery, DeliveryStatus, Webhook, WebhookType
from trainer.jobs.answers import Answer

log = logging.getLogger("temper.gateway")
router = APIRouter(tags=["webhooks"])

WebhookId = Annotated[str, Path(max_length=100, pattern=TEXT, description="The webhook's id.")]
DeliveryId = Annotated[str, Path(max_length=100, pattern=TEXT, description="The delivery's id.")]
_Type = Annotated[str, WithJsonSchema({"type": "string", "enum": list(get_args(WebhookType))})]


class NewWebhook(BaseModel):
    """An endpoint to register."""

    model_config = ConfigDict(extra="forbid", strict=True)

    url: Annotated[str, Field(min_length=1, max_length=MAX_URL)] = Field(
        description="Where to send deliveries: an `https://` URL at a public address, unless others are allowed.",
        examples=["https://example.com/hooks/temper"],
    )
    types: Annotated[list[WebhookType], Field(min_length=1)] | None = Field(
        None, description="What to be told; without it everything."
    )


class WebhookView(BaseModel):
    """An endpoint that is told what happens."""

    id: str = Field(description="Name of the webhook.", examples=["webhook-0198c0ffee01a2b3c4d5e6f7a8b"])
    object: Literal["webhook"] = Field("webhook", description="Kind of this object.")
    url: str = Field(description="Where deliveries go.")
    types: list[_Type] | None = Field(description="What it is told; null for everything.")
    status: Literal["enabled", "disabled"] = Field(description="`disabled` once the endpoint has answered 410 (Gone).")
    disabled_because: str | None = Field(description="Why it is disabled.")
    created_at: float = Field(description="Unix seconds.")
    old_secret_until: float | None = Field(description="Until when the secret before the last rotation signs as well.")

    @classmethod
    def of(cls, webhook: Webhook, **more: Any) -> Self:
        """The public face of an endpoint's record."""
        fields = {name: value for name, value in vars(webhook).items() if name in WebhookView.model_fields}
        return cls(**fields, status="enabled" if webhook.disabled_at is None else "disabled", **more)


class WebhookWithSecret(WebhookView):
    """An endpoint with its new secret, which is shown this once."""

    secret: str = Field(description="Signs the deliveries: `whsec_` and 32 bytes in base64.")


class WebhookList(BaseModel):
    """Webhooks, newest first."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[WebhookView] = Field(description="The webhooks of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last id.")


class WebhookDeleted(BaseModel):
    """What was deleted."""

    id: str = Field(description="The webhook.")
    deleted: Literal[True] = Field(True, description="Always true.")


class DeliveryView(BaseModel):
    """What an endpoint is told, and how far that is."""

    id: str = Field(description="The `webhook-id` of every attempt.", examples=["msg-0198c0ffee01a2b3c4d5e6f7a8b"])
    object: Literal["webhook.delivery"] = Field("webhook.delivery", description="Kind of this object.")
    webhook: str = Field(description="The webhook.")
    type: _Type = Field(description="What has happened.")
    data: dict[str, Any] = Field(description="The particulars, as in the body that is sent.")
    created_at: float = Field(description="When it happened, in Unix seconds.")
    status: DeliveryStatus = Field(description="`pending` until an attempt succeeds or the last one fails.")
    attempts: int = Field(description="Attempts that have ended.")
    attempted_at: float | None = Field(description="When the last of them ended, in Unix seconds.")
    next_attempt_at: float | None = Field(description="Unix seconds; null if there is none to come.")
    http_status: int | None = Field(description="That answered the last attempt.")
    error: str | None = Field(description="Why the last attempt failed.")

    @classmethod
    def of(cls, delivery: Delivery) -> "DeliveryView":
        """The public face of a delivery's record."""
        fields = {name: value for name, value in vars(delivery).items() if name in cls.model_fields}
        return cls(**fields, next_attempt_at=delivery.due_at)


class DeliveryList(BaseModel):
    """Deliveries, newest first."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[DeliveryView] = Field(description="The deliveries of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last id.")


@router.post(
    "/webhooks", status_code=201, response_model=WebhookWithSecret, responses=errors(400, 409, 413, 422, 503, 507)
)  # fmt: skip
async def create_webhook(request: Request, new: NewWebhook, idempotency_key: IdempotencyKey = None) -> Response:
    """Register an endpoint. What happens from now on is sent to it; its secret is shown this once.

    Each delivery is a POST of `{"type", "timestamp", "data"}` after
    [Standard Webhooks](https://www.standardwebhooks.com): `webhook-signature` has `v1,` and the base64 of the
    HMAC-SHA256 of `{webhook-id}.{webhook-timestamp}.{body}` under the secret's bytes. Answer 2xx within 15 seconds;
    anything else is tried again, nine times in three days, with the same `webhook-id`. A redirect is a failure, 410
    disables the webhook, and `Retry-After` is honoured. A delivery may arrive twice, and after a later one.

    `data` of a job has `id`, `model`, `label`, `status`, `version`, `preview_version`, `error` and `report_status`, as
    in the job; that of a label has `model`, `label`, and the versions `from` and `to`, null where there was or is none.
    """
    gateway, tenant = gateway_of(request), tenant_of(request)

    async def create(note: Note) -> Answer:
        await gateway.courier.check(new.url)
        made = await asyncio.to_thread(
            gateway.webhooks.create, new.url, new.types, tenant,
            also=lambda connection, made: note(connection, _created(made)),
        )  # fmt: skip
        log.info("webhook %s registered", made.id)
        return _created(made)

    return await once(request, sha256(new.model_dump_json().encode()).hexdigest(), create)


def _created(webhook: Webhook) -> Answer:
    body = WebhookWithSecret.of(webhook, secret=webhook.secret).model_dump_json()
    return Answer(201, body, f"/webhooks/{webhook.id}")


@router.get("/webhooks", responses=errors(404, 422, 503))
def list_webhooks(request: Request, after: After = None, limit: Limit = 20) -> WebhookList:
    """Webhooks, newest first."""
    page, more = gateway_of(request).webhooks.page(after=after, limit=limit, tenant=tenant_of(request))
    return WebhookList(data=[WebhookView.of(webhook) for webhook in page], has_more=more)


@router.get("/webhooks/{id}", responses=errors(404, 422, 503))
def get_webhook(request: Request, id: WebhookId) -> WebhookView:
    """A webhook, without its secret."""
    return WebhookView.of(gateway_of(request).webhooks.get(id, tenant_of(request)))


@router.delete("/webhooks/{id}", responses=errors(404, 422, 503, 507))
def delete_webhook(request: Request, id: WebhookId) -> WebhookDeleted:
    """Delete a webhook with its deliveries."""
    gateway, tenant = gateway_of(request), tenant_of(request)
    gateway.webhooks.delete(id, tenant)
    gateway.answers.forget(tenant, f"/webhooks/{id}")  # and with it the secret
    log.info("webhook %s deleted", id)
    return WebhookDeleted(id=id)


@router.post("/webhooks/{id}/rotate", responses=errors(404, 422, 503, 507))
def rotate_secret(request: Request, id: WebhookId) -> WebhookWithSecret:
    """Give a webhook a new secret. For 24 hours, or until the next rotation, the old one signs as well."""
    rotated = gateway_of(request).webhooks.rotate(id, tenant_of(request))
    log.info("webhook %s has a new secret", id)
    return WebhookWithSecret.of(rotated, secret=rotated.secret)


@router.get("/webhooks/{id}/deliveries", responses=errors(404, 422, 503))
def list_deliveries(
    request: Request,
    id: WebhookId,
    status: Annotated[DeliveryStatus | None, Query(description="Only those; `failed` for what was given up.")] = None,
    after: After = None,
    limit: Limit = 20,
) -> DeliveryList:
    """What a webhook was or will be told, newest first. Finished deliveries are kept for 30 days."""
    page, more = gateway_of(request).webhooks.deliveries(
        id, status=status, after=after, limit=limit, tenant=tenant_of(request)
    )
    return DeliveryList(data=[DeliveryView.of(delivery) for delivery in page], has_more=more)


@router.post(
    "/webhooks/{id}/deliveries/{delivery}/replay", status_code=202, responses=errors(404, 409, 422, 503, 507)
)  # fmt: skip
def replay_delivery(request: Request, id: WebhookId, delivery: DeliveryId) -> DeliveryView:
    """Send a delivery again, at once and with all its retries, under the same `webhook-id`."""
    return DeliveryView.of(gateway_of(request).webhooks.replay(id, delivery, tenant_of(request)))
