"""Limits on the bodies of requests."""

from collections.abc import Mapping
from types import MappingProxyType

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http import errors as http_errors
from store.errors import Overloaded, TemperError, TooLarge, UnsupportedMediaType

SMALL = 1 << 16  # bytes of a body that is neither an upload nor a prediction
PREDICTIONS = ("/predict", "/explain")
UPLOADS = ("/finetune", "/datasets", "/openai/v1/files")
MAX_HELD = 32 << 20  # bytes of all larger predictions together


def _predicts(path: str) -> bool:
    return path in PREDICTIONS or path.endswith((":predict", "/infer"))


async def refuse(
    refusal: TemperError, scope: Scope, receive: Receive, send: Send, more: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Answer with an error, and close the connection if there is a body, since it is not read.

    Args:
        more: further headers.
    """
    response = http_errors.response(refusal, scope["path"])
    response.headers.update(more)
    if any(name in (b"content-length", b"transfer-encoding") for name, _ in scope["headers"]):
        response.headers["connection"] = "close"
    await response(scope, receive, send)


class BodyLimit:
    """Refuses bodies that are larger than their path allows, or that do not fit in memory beside the others."""

    def __init__(self, app: ASGIApp, uploads: int, predictions: int) -> None:
        self._app = app
        self._uploads = uploads
        self._predictions = predictions
        self._held = 0  # bytes of large predictions in memory or on their way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on unless its body is too large."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path, headers = scope["path"], dict(scope["headers"])
        limit = self._uploads if path in UPLOADS else self._predictions if _predicts(path) else SMALL
        declared = headers.get(b"content-length")
        size = int(declared) if declared else limit if b"transfer-encoding" in headers else 0
        refusal: TemperError | None = None
        if size > limit:
            refusal = TooLarge(f"the body is larger than the limit of {limit} bytes")
        elif headers.get(b"content-encoding", b"identity").lower() != b"identity":
            refusal = UnsupportedMediaType("Content-Encoding is not supported; send the body uncompressed")
        elif size > SMALL and _predicts(path) and self._held and self._held + size > MAX_HELD:
            refusal = Overloaded("too many large bodies are being read; try again")
        if refusal:
            return await refuse(refusal, scope, receive, send)
        if declared is None:
            receive, send = self._counted(limit, scope, receive, send)
        if size <= SMALL or not _predicts(path):
            return await self._app(scope, receive, send)
        self._held += size
        try:
            return await self._app(scope, receive, send)
        finally:
            self._held -= size

    def _counted(self, limit: int, scope: Scope, receive: Receive, send: Send) -> tuple[Receive, Send]:
        """Count a body without Content-Length; the server itself holds others to theirs."""
        received, text = 0, f"the body is larger than the limit of {limit} bytes"

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise TooLarge(text)
            return message

        async def refused(message: Message) -> None:  # whatever the route made of the error
            if received <= limit:
                await send(message)
            elif message["type"] == "http.response.start":
                await refuse(TooLarge(text), scope, receive, send)

        return counted, refused
