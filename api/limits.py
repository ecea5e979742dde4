"""How much a request may send."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import errors as http_errors
from serving.errors import TooLarge

SMALL = 1 << 16  # bytes, of everything that is no upload and no prediction


def _predicts(path: str) -> bool:
    return path == "/predict" or path.endswith((":predict", "/infer"))


class BodyLimit:
    """Refuses a body as soon as it is known to be larger than its path allows."""

    def __init__(self, app: ASGIApp, uploads: int, predictions: int) -> None:
        self._app = app
        self._uploads = uploads
        self._predictions = predictions

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body counted."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"]
        limit = self._uploads if path == "/finetune" else self._predictions if _predicts(path) else SMALL
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > limit:
            refusal = http_errors.response(TooLarge(f"the body is larger than {limit} bytes"), path)
            refusal.headers["connection"] = "close"
            return await refusal(scope, receive, send)
        if declared.isdigit() and declared != b"0":  # the server lets no more than that in
            return await self._app(scope, receive, send)
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
                refusal = http_errors.response(TooLarge(f"the body is larger than {limit} bytes"), path)
                await refusal(scope, receive, send)

        return await self._app(scope, counted, refused)
