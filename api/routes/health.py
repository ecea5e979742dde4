"""Health and metrics, for operators."""

import asyncio
from typing import Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from api.gateway import gateway_of
from api.inference.server_pool import PooledServer
from api.metrics import COLLECTORS

router = APIRouter(tags=["health"])

OPEN: dict[str, Any] = {"security": [{}]}  # documents that no key is needed; `Guard` knows


class Readiness(BaseModel):
    """Whether the service works: all that a client without an API key is told, where keys are required."""

    status: Literal["ready", "not_ready"] = Field(description="Whether the store and a model server work.")


class Ready(Readiness):
    """Which parts of the service work at the moment."""

    store: Literal["ok", "unavailable"] = Field(description="The store of jobs and models.")
    model_server: Literal["ok", "unavailable"] = Field(description="Whether at least one model server answers.")
    disk: Literal["ok", "full"] = Field(description="Whether there is space for uploads and new versions.")
    model_servers: dict[str, Literal["ok", "loading", "unavailable"]] = Field(
        description="Each of them, by address; `loading` while it does not serve all live versions yet."
    )
    workers: dict[str, str] = Field(description="State of every live worker: warming, idle, busy or reporting.")


@router.get("/healthz", openapi_extra=OPEN)
async def alive() -> dict[Literal["status"], Literal["ok"]]:
    """Answer as long as the gateway runs."""
    return {"status": "ok"}


@router.get(
    "/readyz", response_model=Ready | Readiness, responses={503: {"model": Ready | Readiness}}, openapi_extra=OPEN
)  # fmt: skip
async def ready(request: Request) -> Response:
    """Whether the store and a model server work, whether the disk has space, and what the workers do."""
    gateway = gateway_of(request)
    await asyncio.to_thread(gateway.health.check)
    store, workers = gateway.health.store_works, {}
    if store:
        try:
            workers = await asyncio.to_thread(gateway.jobs.worker_states)
        except sa.exc.SQLAlchemyError as exc:
            gateway.health.store_failed(exc)
            store = False
    up = bool(gateway.pool.up)
    words: dict[bool, Literal["ok", "unavailable"]] = {True: "ok", False: "unavailable"}
    body = Ready(
        status="ready" if store and up else "not_ready",
        store=words[store],
        disk="ok" if gateway.health.disk_has_space else "full",
        model_server=words[up],
        model_servers={server.address: _state(server) for server in gateway.pool.all},
        workers=workers,
    )
    hidden = set(Ready.model_fields) - {"status"} if request.scope["state"].get("stranger") else None
    return JSONResponse(body.model_dump(exclude=hidden), 200 if store and up else 503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
def metrics(request: Request) -> Response:  # in a thread: rendering takes a while
    """Metrics in the Prometheus text format."""
    shared = generate_latest(gateway_of(request).store_metrics.registry)
    return Response(generate_latest(COLLECTORS) + shared, media_type=CONTENT_TYPE_LATEST)


def _state(server: PooledServer) -> Literal["ok", "loading", "unavailable"]:
    if not server.up:
        return "unavailable"
    return "loading" if server.behind else "ok"
