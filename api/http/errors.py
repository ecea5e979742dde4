"""Errors as HTTP responses: one table of statuses, one shape of body, never a traceback."""

import json
import logging
import math
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http.tracing import REQUEST_ID
from store import errors
from store.disk import is_full
from store.validation import reason

log = logging.getLogger("temper.gateway")

# A class that is not named has the status of the nearest base class that is.
STATUS: dict[type[errors.TemperError], int] = {
    errors.TemperError: 500,
    errors.MalformedRequest: 400,
    errors.InvalidRequest: 422,
    errors.TooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.Unauthorized: 401,
    errors.Forbidden: 403,
    errors.NotFound: 404,
    errors.WrongState: 409,
    errors.Overloaded: 429,
    errors.ModelServerError: 503,
    errors.ModelServerTimeout: 504,
    errors.StoreUnavailable: 503,
    errors.StorageFull: 507,
    errors.StorageFailed: 503,
    errors.JobFailed: 500,  # goes into a job, not into a response
}
HEADERS = {
    401: {"WWW-Authenticate": 'Bearer realm="temper"'},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}


def status_of(error: errors.TemperError) -> int:
    """The HTTP status of an error."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


class ErrorResponse(JSONResponse):
    """JSON in ASCII: an error may quote text from a request that cannot be encoded otherwise."""

    def render(self, content: Any) -> bytes:
        """Encode the body."""
        return json.dumps(content).encode()


def answer(path: str, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> ErrorResponse:
    """An error in the form that a path's clients expect. TensorFlow Serving and Open Inference send one string."""
    if path.startswith("/openai/"):
        return _as_openai(status, body, headers or {})
    if path == "/v2" or path.startswith(("/v1/", "/v2/")):
        status = 400 if status == 422 else status
        return ErrorResponse({"error": body["message"]}, status, headers)
    return ErrorResponse({"error": {**body, "request_id": REQUEST_ID.get()}}, status, headers)


def _as_openai(status: int, body: dict[str, Any], headers: dict[str, str]) -> ErrorResponse:
    """As OpenAI writes it. Its clients repeat a request that was answered with 409, unless they are told not to."""
    status = 400 if status == 422 else status
    if status == 409:
        headers = {**headers, "x-should-retry": "false"}
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return ErrorResponse(
        {"error": {**{name: body[name] for name in ("code", "message", "param")}, "type": kind}}, status, headers
    )


def response(error: errors.TemperError, path: str) -> ErrorResponse:
    """The response for an error of ours."""
    status = status_of(error)
    headers = HEADERS.get(status)
    if isinstance(error, errors.TooMany):
        headers = {"Retry-After": str(math.ceil(error.retry_after_s))}
    return answer(path, status, error.body(), headers)


def answer_to(request: Request, failure: Exception) -> Response:
    """The response for whatever a route has raised."""
    path = request.url.path
    full = is_full(failure)
    if full:
        request.scope["state"]["gateway"].health.note_full_disk()
    match failure:
        case errors.TemperError():
            if isinstance(failure, errors.StorageFailed):
                log.error("%s %s: %r", request.method, path, failure.__cause__)
            return response(failure, path)
        case RequestValidationError():
            field = getattr(request.scope.get("route"), "body_field", None)
            # The first part of a location says where the field was: body, query or path.
            found = [{**error, "loc": error["loc"][1:]} for error in failure.errors()]
            return response(invalid_request(found, field and field.field_info.annotation), path)
        case HTTPException():
            kinds: dict[int, str] = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
            code = kinds.get(failure.status_code, "malformed_request")
            body: dict[str, Any] = {"code": code, "message": str(failure.detail), "param": None, "details": []}
            headers = dict(failure.headers or {})
            if failure.status_code == 405:
                headers["Allow"] = ", ".join(_methods(request))
            return answer(path, failure.status_code, body, headers)
        case _ if full:
            log.error("no space left: %s", failure)
            return response(errors.StorageFull("no space is left on the disk; delete models or free space"), path)
        case sa.exc.SQLAlchemyError():
            log.error("store: %s", failure)
            return response(errors.StoreUnavailable("the store of jobs and models cannot be reached"), path)
        case ClientDisconnect():
            return Response(status_code=499)  # nobody is left to read it
    log.error("%s %s", request.method, path, exc_info=failure)
    return response(errors.TemperError("internal error; the gateway's log has the traceback"), path)


def _methods(request: Request) -> list[str]:
    """The methods of a path. Starlette's own `Allow` has those of its first route alone."""

    def has(method: str) -> bool:
        scope = {**request.scope, "method": method}
        return any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)

    found = [method for method in ("GET", "POST", "PUT", "PATCH", "DELETE") if has(method)]
    return [*found, "HEAD"] if "GET" in found else found


def install(app: FastAPI) -> None:
    """Have `app` answer every failure in this shape."""

    async def handle(request: Request, failure: Exception) -> Response:
        return answer_to(request, failure)

    kinds = (errors.TemperError, RequestValidationError, HTTPException, sa.exc.SQLAlchemyError, ClientDisconnect)
    for kind in kinds:
        app.add_exception_handler(kind, handle)
    app.add_middleware(_Unforeseen)


class _Unforeseen:
    """Answers what no handler expects. Starlette's own way raises it again, and uvicorn then closes the connection."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def noting(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as failure:
            if started or scope["type"] != "http":
                raise
            await answer_to(Request(scope), failure)(scope, receive, send)


def invalid_request(found: Any, model: Any = None) -> errors.TemperError:
    """The error that names every parameter or field that pydantic refused.

    Args:
        found: the errors of a `ValidationError`.
        model: what was validated, to name the nearest field for an unknown one.
    """
    if any(error["type"] == "json_invalid" for error in found):
        cause = found[0].get("ctx", {}).get("error", found[0]["msg"])
        return errors.MalformedRequest(f"the body is not valid JSON: {cause}")
    details = [
        {
            "field": ".".join(str(part) for part in error["loc"] if part != "[key]") or "body",
            "reason": reason(error, model),
        }
        for error in found
    ]
    return errors.InvalidRequest(errors.listed("", details), param=details[0]["field"], details=details)
