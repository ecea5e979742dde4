"""How much a request may send."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import errors as http_errors
from serving.errors import TooLarge


class BodyLimit:
    """Refuses a body as soon as it is known to be larger than its path allows."""

    def __init__(self, app: ASGIApp, limits: dict[str, int]) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body counted."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit = self._limits.get(scope["path"], 1 << 16)
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > limit:
            refusal = http_errors.response(TooLarge(f"the body is larger than {limit} bytes"))
            refusal.headers["connection"] = "close"
            return await refusal(scope, receive, send)
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
                await http_errors.response(TooLarge(f"the body is larger than {limit} bytes"))(scope, receive, send)

        return await self._app(scope, counted, refused)
