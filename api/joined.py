"""Answers that leave in one piece."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


class JoinedWrites(HttpToolsProtocol):
    """uvicorn's HTTP protocol, which writes the head and the body of an answer apart, with one system call for both."""

    def connection_made(self, transport: Any) -> None:
        """Take the connection, with a transport that waits for the rest of the answer."""
        super().connection_made(_Joined(transport, self.loop))  # type: ignore[arg-type]  # it is one in all that is used


class _Joined:
    """A transport whose writes of one turn of the loop go out together."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._parts:
            data, self._parts = b"".join(self._parts), []
            if not self._transport.is_closing():
                self._transport.write(data)
