"""How much a request may send."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http import errors as http_errors
from store.errors import Overloaded, TemperError, TooLarge, UnsupportedMediaType

SMALL = 1 << 16  # bytes, of everything that is no upload and no prediction
MAX_HELD = 32 << 20  # bytes of predictions larger than that, together


def _predicts(path: str) -> bool:
    return path == "/predict" or path.endswith((":predict", "/infer"))


class BodyLimit:
    """Refuses a body as soon as it is known to be larger than its path allows, or more than fits beside the others."""

    def __init__(self, app: ASGIApp, uploads: int, predictions: int) -> None:
        self._app = app
        self._uploads = uploads
        self._predictions = predictions
        self._held = 0  # bytes of large predictions that are in memory or on their way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body counted."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path, headers = scope["path"], dict(scope["headers"])
        limit = self._uploads if path == "/finetune" else self._predictions if _predicts(path) else SMALL
        declared = headers.get(b"content-length")
        size = int(declared) if declared else limit if b"transfer-encoding" in headers else 0
        refusal: TemperError | None = None
        if size > limit:
            refusal = TooLarge(f"the body is larger than {limit} bytes")
        elif headers.get(b"content-encoding", b"identity").lower() != b"identity":
            refusal = UnsupportedMediaType("Content-Encoding: send the body as it is")
        elif size > SMALL and _predicts(path) and self._held and self._held + size > MAX_HELD:
            refusal = Overloaded("too many large bodies are being read")
        if refusal:
            response = http_errors.response(refusal, path)
            response.headers["connection"] = "close"
            return await response(scope, receive, send)
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
        """For a body whose size nobody has said; of others the server lets in no more than was said."""
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise TooLarge(f"the body is larger than {limit} bytes")
            return message

        async def refused(message: Message) -> None:  # whatever the route has made of the error
            if received <= limit:
                await send(message)
            elif message["type"] == "http.response.start":
                refusal = http_errors.response(TooLarge(f"the body is larger than {limit} bytes"), scope["path"])
                await refusal(scope, receive, send)

        return counted, refused
