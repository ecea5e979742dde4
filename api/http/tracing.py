"""The id of each request, and the response headers, log lines and metrics that go with it."""

import itertools
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.typing import EventDict, WrappedLogger

from api.metrics import REJECTIONS, REQUEST_SERIES
from store import traces
from store.records import public_name

log = logging.getLogger("temper.gateway")

NO_REQUEST = "-"
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default=NO_REQUEST)
SCOPE: ContextVar[Scope] = ContextVar("scope")  # of the request that has this id
ACCEPTED = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")  # ids that clients may choose
REASONS = {
    401: "unauthorized",
    403: "forbidden",
    413: "too_large",
    429: "overloaded",
    503: "unavailable",
    504: "timeout",
}
LINES_A_SECOND = 20  # about failed requests
QUIET = ("/healthz", "/readyz", "/metrics")


class Tracing:
    """The outermost layer. `answered_by` tells it which version has answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._start, self._numbers = secrets.token_hex(6).encode(), itertools.count(1)
        self._second = self._told = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on under its id."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began = time.perf_counter()
        sent = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
        request_id = sent if ACCEPTED.fullmatch(sent) else b"%s-%x" % (self._start, next(self._numbers))
        token = REQUEST_ID.set(request_id.decode())
        SCOPE.set(scope)
        state: dict[str, Any] = scope.setdefault("state", {})
        status = 500

        async def traced(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"]
                headers.append((b"x-request-id", request_id))
                if "model" in state:
                    headers.append((b"x-temper-model", public_name(state["model"]).encode()))
                    headers.append((b"x-temper-version", b"%d" % state["version"]))
            await send(message)

        try:
            if traces.on() and scope["path"] not in QUIET:
                with _span(scope, request_id.decode(), lambda: status):
                    await self._app(scope, receive, traced)
            else:
                await self._app(scope, receive, traced)
        finally:
            self._count(scope, state, status, time.perf_counter() - began)
            REQUEST_ID.reset(token)

    def _count(self, scope: Scope, state: dict[str, Any], status: int, seconds: float) -> None:
        route = _route(scope)
        requests, latency = REQUEST_SERIES.of(route, state.get("model", ""), str(state.get("version", "")), status)
        requests.inc()
        latency.observe(seconds)
        if status in REASONS:
            REJECTIONS.labels(REASONS[status]).inc()
        if (status >= 500 or status == 429) and route not in QUIET:
            self._tell("%s %s: %d after %.0f ms", scope["method"], scope["path"], status, 1000 * seconds)

    def _tell(self, text: str, *values: Any) -> None:
        """Log a failure, or just the number of those beyond `LINES_A_SECOND`."""
        second = int(time.monotonic())
        if second != self._second:
            if self._told > LINES_A_SECOND:
                log.warning("%d more failures", self._told - LINES_A_SECOND)
            self._second, self._told = second, 0
        self._told += 1
        if self._told <= LINES_A_SECOND:
            log.warning(text, *values)


def _route(scope: Scope) -> str:
    """The path of a route as declared, so that clients cannot create series."""
    return getattr(scope.get("route"), "path", "unknown")


@contextmanager
def _span(scope: Scope, request_id: str, status: Callable[[], int]) -> Iterator[None]:
    """The span of a request, in the trace of its client if that sends a `traceparent`."""
    sent = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"traceparent"), None)
    method = scope["method"]
    attributes = {"http.request.method": method, "temper.request_id": request_id}
    with traces.span(method, "server", parent=sent, attributes=attributes) as span:
        try:
            yield
        finally:
            route, state = _route(scope), scope["state"]
            span.update_name(f"{method} {route}")
            span.set_attributes({"http.route": route, "http.response.status_code": status()})
            if "model" in state:
                span.set_attributes({"temper.model": public_name(state["model"]), "temper.version": state["version"]})
            if status() >= 500:
                traces.fail(span)


def answered_by(scope: Scope, model: str, version: int) -> None:
    """Have the response headers and the metrics name this version, of a model by its stored name."""
    scope["state"]["model"], scope["state"]["version"] = model, version


def add_request(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Put the id of the current request, and its job or model, into a log line (a structlog processor)."""
    if (request_id := REQUEST_ID.get()) != NO_REQUEST:
        event["request_id"] = request_id
        scope = SCOPE.get({})
        path, state = scope.get("path_params", {}), scope.get("state", {})
        job = path["id"] if str(path.get("id")).startswith("ftjob-") else None
        version = state.get("version", path.get("version"))
        model = public_name(state["model"]) if "model" in state else path.get("model")
        for name, value in (("job", job), ("model", model), ("version", version)):
            if value is not None:
                event.setdefault(name, value)
    return event
