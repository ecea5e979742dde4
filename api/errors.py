"""Our errors as HTTP: one table of statuses, one shape of body, nothing of a traceback."""

import json
import logging
from typing import Any

import sqlalchemy as sa
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from serving import errors

log = logging.getLogger("temper.gateway")

# The status of a class is also that of its subclasses that are not named.
STATUS: dict[type[errors.TemperError], int] = {
    errors.TemperError: 500,
    errors.MalformedRequest: 400,
    errors.InvalidRequest: 422,
    errors.TooLarge: 413,
    errors.UnsupportedMediaType: 415,
    errors.NotFound: 404,
    errors.WrongState: 409,
    errors.Overloaded: 429,
    errors.ModelServerError: 503,
    errors.ModelServerTimeout: 504,
    errors.StoreUnavailable: 503,
}
FORMS = ("", "multipart/form-data", "application/x-www-form-urlencoded")
RETRY_AFTER_S = {429: 1, 503: 1}


def status_of(error: errors.TemperError) -> int:
    """HTTP status of an error."""
    return next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)


class ErrorResponse(JSONResponse):
    """JSON in ASCII: what a client got wrong may hold text that no encoding can carry."""

    def render(self, content: Any) -> bytes:
        """Encode the body."""
        return json.dumps(content).encode()


def response(error: errors.TemperError) -> JSONResponse:
    """The answer that tells a client of an error."""
    status = status_of(error)
    headers = {"Retry-After": str(RETRY_AFTER_S[status])} if status in RETRY_AFTER_S else None
    return ErrorResponse({"error": error.body()}, status, headers)


def install(app: FastAPI) -> None:
    """Answer every failure of `app` in the one shape."""

    @app.exception_handler(errors.TemperError)
    async def ours(_: Request, exc: errors.TemperError) -> JSONResponse:
        return response(exc)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, exc: RequestValidationError) -> JSONResponse:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.url.path == "/finetune" and kind not in FORMS:
            return response(errors.UnsupportedMediaType(f"Content-Type {kind!r}: send multipart/form-data"))
        return response(invalid_request(exc.errors()))

    @app.exception_handler(HTTPException)
    async def http(_: Request, exc: HTTPException) -> JSONResponse:
        kinds: dict[int, str] = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
        code = kinds.get(exc.status_code, "malformed_request")
        body: dict[str, Any] = {"code": code, "message": str(exc.detail), "param": None, "details": []}
        return ErrorResponse({"error": body}, exc.status_code, exc.headers)

    @app.exception_handler(sa.exc.SQLAlchemyError)
    async def store(_: Request, exc: sa.exc.SQLAlchemyError) -> JSONResponse:
        log.error("the store failed: %s", exc)
        return response(errors.StoreUnavailable("the store of jobs and models cannot be reached"))

    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, exc: ClientDisconnect) -> Response:
        return Response(status_code=499)  # nobody is there to read it

    @app.exception_handler(Exception)
    async def unforeseen(_: Request, exc: Exception) -> JSONResponse:
        return response(errors.TemperError("an unforeseen failure; the gateway's log tells why"))


def invalid_request(found: Any) -> errors.TemperError:
    """The error that names every parameter or field that pydantic has refused."""
    if any(error["type"] == "json_invalid" for error in found):
        return errors.MalformedRequest(f"the body is no JSON: {found[0].get('ctx', {}).get('error', found[0]['msg'])}")
    details = []
    for error in found:
        location = [str(part) for part in error["loc"] if part not in ("body", "query", "path")]
        details.append({"field": ".".join(location) or "body", "reason": error["msg"].removeprefix("Value error, ")})
    summary = "; ".join(f"{detail['field']}: {detail['reason']}" for detail in details)
    return errors.InvalidRequest(summary, param=details[0]["field"], details=details)
