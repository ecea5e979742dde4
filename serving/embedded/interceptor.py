"""Something around every call that a client asks for with an entry of its metadata."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import grpc


class Around(grpc.ServerInterceptor):  # type: ignore[misc]
    """Runs calls whose metadata has `key` inside of `enter(method, value)`; others as they are."""

    def __init__(self, key: str, enter: Callable[[str, str], AbstractContextManager[Any]]) -> None:
        self._key, self._enter = key, enter

    def intercept_service(self, continuation: Any, details: Any) -> Any:
        """The handler of a call."""
        handler = continuation(details)
        value = next((value for key, value in details.invocation_metadata if key == self._key), None)
        if value is None or handler is None or handler.unary_unary is None:
            return handler

        def within(request: Any, context: Any) -> Any:
            with self._enter(details.method.removeprefix("/"), value):
                return handler.unary_unary(request, context)

        return grpc.unary_unary_rpc_method_handler(within, handler.request_deserializer, handler.response_serializer)
