"""The short way to the routes whose microseconds count.

Between its server and a route FastAPI has a dozen layers, which take as long as the route itself. Here a route's
endpoint is called at once; to FastAPI it is a route like any other, which documents it.
"""

from typing import Any

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from starlette.routing import Match
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http import errors


class FastRoute(APIRoute):
    """A route that reads its request itself: its endpoint takes that alone and returns a response."""


class Json(Response):
    """An answer in JSON; arrays may be NumPy's."""

    def __init__(self, content: Any) -> None:
        self.body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
        self.status_code = 200
        self.raw_headers = [(b"content-length", b"%d" % len(self.body)), (b"content-type", b"application/json")]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self.body})


class FastPath:
    """Calls the endpoints of `FastRoute` routes, and FastAPI for all else."""

    def __init__(self, app: FastAPI) -> None:
        self._app: ASGIApp = app
        self._owner = app
        routes = [route for route in app.router.routes if isinstance(route, FastRoute)]
        self._fixed = {route.path: route for route in routes if "{" not in route.path}
        self._with_parameters = [route for route in routes if "{" in route.path]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on one way or the other."""
        if scope["type"] == "http" and scope["method"] == "POST":
            route = self._fixed.get(scope["path"])
            if route is not None:
                scope.update(app=self._owner, route=route, path_params={})
                return await _answer(route, scope, receive, send)
            for route in self._with_parameters:
                match, found = route.matches(scope)
                if match is Match.FULL:
                    scope.update(found, app=self._owner, route=route)
                    return await _answer(route, scope, receive, send)
        return await self._app(scope, receive, send)


async def _answer(route: FastRoute, scope: Scope, receive: Receive, send: Send) -> None:
    request = Request(scope, receive)
    try:
        response = await route.endpoint(request)
    except Exception as failure:
        response = errors.answer_to(request, failure)
    await response(scope, receive, send)
