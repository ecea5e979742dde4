"""What operators ask: is it alive, is it ready, what has it done."""

import asyncio
import logging
from typing import Literal

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from api.gateway import gateway_of
from api.metrics import COLLECTORS
from api.routes.schemas import Ready

log = logging.getLogger("temper.gateway")


def add(app: FastAPI) -> None:
    """The routes of operators."""

    @app.get("/", include_in_schema=False)
    async def front() -> RedirectResponse:
        """To what can be asked here."""
        return RedirectResponse("/docs")

    @app.get("/healthz", tags=["health"])
    async def alive() -> dict[Literal["status"], Literal["ok"]]:
        """The gateway lives."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], response_model=Ready, responses={503: {"model": Ready}})
    async def ready(request: Request) -> Response:
        """The store and a model server answer; what the workers do."""
        gateway = gateway_of(request)
        try:
            workers = await asyncio.to_thread(gateway.jobs.worker_states)
            store = True
        except Exception:
            log.exception("the store does not answer")
            workers, store = {}, False
        up = bool(gateway.pool.up)
        words: dict[bool, Literal["ok", "unavailable"]] = {True: "ok", False: "unavailable"}
        body = Ready(
            status="ready" if store and up else "not_ready", store=words[store], model_server=words[up],
            model_servers={target.address: words[target.up] for target in gateway.pool.all}, workers=workers,
        )  # fmt: skip
        return JSONResponse(body.model_dump(), 200 if store and up else 503)

    @app.get("/metrics", tags=["health"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def metrics() -> Response:  # in a thread: rendering takes a while
        """What Prometheus collects."""
        return Response(generate_latest(COLLECTORS), media_type=CONTENT_TYPE_LATEST)
