"""Connections: answers that leave in one piece, and clients that must not hold on to them."""

import asyncio
import re
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

STALLED_S = 20.0  # after which a connection is closed on which a request has begun and nothing more comes
MAX_HEAD = 1 << 16  # bytes of a request before its body
UPGRADE = re.compile(rb"\r\n(upgrade:)", re.IGNORECASE)


class Connection(HttpToolsProtocol):
    """uvicorn's HTTP protocol, but for three things that it leaves open.

    It writes the head and the body of an answer apart: here one system call does for both. It waits for ever for the
    rest of a request, however much of it is there. And it loses the body of a request that offers to speak another
    protocol from then on (`Upgrade: h2c`), which a server may ignore (RFC 9110, 7.8).
    """

    def connection_made(self, transport: Any) -> None:
        """Take the connection, with a transport that waits for the rest of the answer."""
        super().connection_made(_Joined(transport, self.loop))  # type: ignore[arg-type]  # it is one in all that is used
        self._heard = self.loop.time()
        self._in_head, self._head_bytes = False, 0
        self._watch = self.loop.call_later(STALLED_S, self._look)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what has come."""
        self._heard = self.loop.time()
        if not self._is_within_request() and b"pgrade:" in data[:MAX_HEAD]:
            head, end, body = data.partition(b"\r\n\r\n")
            data = UPGRADE.sub(rb"\r\nx-\1", head) + end + body
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self.transport.close()

    def on_message_begin(self) -> None:
        """Begin with the head of a request."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Go on to the body."""
        self._in_head = False
        super().on_headers_complete()

    def _is_within_request(self) -> bool:
        return self._in_head or (self.cycle is not None and self.cycle.more_body)

    def _look(self) -> None:
        """Close the connection if a request has begun to come, and does not go on though it is read."""
        stalled = self.loop.time() - self._heard > STALLED_S and not self.flow.read_paused
        if stalled and self._is_within_request():
            self.transport.close()
        else:
            self._watch = self.loop.call_later(STALLED_S, self._look)


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
