"""A short way to the routes whose microseconds count.

FastAPI has a dozen layers between its server and an endpoint, which take as long as a prediction itself. Here the
endpoints of some routes are called at once. FastAPI has the same routes, to document them. Nothing that FastAPI would
do for them (dependencies, middleware) happens here, so whatever guards requests has to stand in front of both.
"""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.routing import BaseRoute, Match, Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.http import errors

Handler = Callable[[Request], Awaitable[Response]]


class FastRoute(APIRoute):
    """A route for the fast path: its endpoint reads the request itself and returns a response."""


class Json(Response):
    """A JSON response whose arrays may be NumPy's."""

    def __init__(self, content: Any) -> None:
        self.body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        self.status_code = 200
        self.raw_headers = [(b"content-length", b"%d" % len(self.body)), (b"content-type", b"application/json")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send head and body."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body})


def fast_path(app: FastAPI, routes: Iterable[BaseRoute]) -> Router:
    """A router that calls the `FastRoute`s among `routes` itself and leaves everything else to `app`."""
    fast = [_Post(route, app) for route in routes if isinstance(route, FastRoute)]
    return Router(fast, default=HeadAsGet(app), redirect_slashes=False, lifespan=app.router.lifespan_context)


class _Post(Route):
    """Matches POST alone: other methods are left to FastAPI, which answers 405."""

    def __init__(self, route: FastRoute, owner: FastAPI) -> None:
        super().__init__(route.path, _Endpoint(route.endpoint), methods=["POST"], name=route.name)
        self._owner = owner

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] != "http" or scope["method"] != "POST":
            return Match.NONE, {}
        match, found = super().matches(scope)
        if match is Match.FULL:
            found["app"] = self._owner  # Starlette translates errors of its form parser only inside of an app
        return match, found


class _Endpoint:
    """A request handler as an ASGI application."""

    def __init__(self, handle: Handler) -> None:
        self._handle = handle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self._handle(request)
        except Exception as failure:
            response = errors.answer_to(request, failure)
        await response(scope, receive, send)


class HeadAsGet:
    """Answers HEAD as GET without the body, wherever there is a GET."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, HEAD in the guise of GET."""
        if scope["type"] != "http" or scope["method"] != "HEAD":
            return await self._app(scope, receive, send)

        async def send_without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        as_get = {**scope, "method": "GET"}
        try:
            await self._app(as_get, receive, send_without_body)
        finally:
            scope["route"] = as_get.get("route")  # for the metrics
