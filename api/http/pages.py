"""Headers that tell a browser what a page of ours may do."""

import base64
import hashlib
import re

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

NO_MORE = "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
NOTHING = f"default-src 'none'; {NO_MORE}"  # for what is no page
SELF_CONTAINED = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; {NO_MORE}"  # a page with its styles
DOCUMENTATION = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; "
    f"script-src 'self' {{scripts}}; {NO_MORE}"
)
APPLICATION = (  # our page: only what this gateway serves, and images that the user brings
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    f"connect-src 'self'; {NO_MORE}"
)
SCRIPT = re.compile(rb"<script>(.*?)</script>", re.DOTALL)


class PageHeaders:
    """Adds the headers to every response of FastAPI's routes; a route may bring a policy of its own."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        is_documentation = scope["path"].startswith("/docs")
        start: Message | None = None  # held back until the page's scripts are known

        async def send_with_headers(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                headers = MutableHeaders(raw=message["headers"])
                headers.setdefault("X-Content-Type-Options", "nosniff")
                headers.setdefault("Referrer-Policy", "no-referrer")
                if is_documentation:
                    start = message
                    return
                headers.setdefault("Content-Security-Policy", NOTHING)
            elif start is not None:
                MutableHeaders(raw=start["headers"])["Content-Security-Policy"] = _policy(message.get("body", b""))
                await send(start)
                start = None
            await send(message)

        return await self._app(scope, receive, send_with_headers)


def _policy(page: bytes) -> str:
    """The policy of a documentation page, which may run the scripts that are written in it."""
    digests = (base64.b64encode(hashlib.sha256(script).digest()).decode() for script in SCRIPT.findall(page))
    return DOCUMENTATION.format(scripts=" ".join(f"'sha256-{digest}'" for digest in digests)).replace(" ;", ";")
