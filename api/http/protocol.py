"""uvicorn's HTTP/1.1 protocol, with faster writes and stricter handling of slow, rude or early-answered clients."""

import asyncio
from collections.abc import Callable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

STALLED_S = 20.0  # close a connection whose request has started to arrive and then stopped for this long
MAX_HEAD = 1 << 16  # bytes of a request line and its headers
LINGER_BYTES, LINGER_S = 64 << 20, 10.0  # how much of a refused body is read and thrown away, and for how long


class Connection(HttpToolsProtocol):
    """Differs from uvicorn's protocol in four ways.

    - The head and the body of a response leave in one system call instead of two.
    - A request that stops arriving half way is timed out.
    - `Upgrade: h2c` and the like are ignored, as RFC 9110 (7.8) allows, without losing the request's body.
    - A connection that is closed before its request has fully arrived drains the rest for a while ("lingering close").
      Closing at once would reset it, and the client would see a broken pipe instead of the response.
    """

    def connection_made(self, transport: Any) -> None:
        """Wrap the transport so that writes are joined and closes may linger."""
        super().connection_made(_Transport(transport, self.loop, self._begin_to_linger))  # type: ignore[arg-type]
        self._heard = self.loop.time()
        self._in_head, self._head_bytes = False, 0
        self._declines_upgrade = False
        self._lingered: int | None = None  # bytes thrown away since the connection was closed from this side
        self._watch = self.loop.call_later(STALLED_S, self._check_progress)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel the timer."""
        self._watch.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse a segment of the request, or throw it away if the response is out already."""
        self._heard = self.loop.time()
        if self._lingered is not None:
            self._lingered += len(data)
            if self._lingered > LINGER_BYTES:
                self.transport.close()
            return
        self._unset_keepalive_if_required()
        try:
            self._parse(data)
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD:
                self.transport.close()

    def _parse(self, data: bytes) -> None:
        rest: bytes | memoryview = data
        while True:
            try:
                return self.parser.feed_data(rest)
            except httptools.HttpParserUpgrade as exc:
                if not self._declines_upgrade:  # CONNECT
                    return None
                # The parser treats what follows the head as another protocol: parse the head again without the offer.
                self._declines_upgrade = False
                rest = memoryview(rest)[exc.args[0] :]
                head = [self.parser.get_method(), b" ", self.url, b" HTTP/", self.parser.get_http_version().encode()]
                for name, value in self.headers:
                    if name != b"upgrade":
                        head += [b"\r\n", name, b": ", value]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
                self.parser.feed_data(b"".join([*head, b"\r\n\r\n"]))

    def on_message_begin(self) -> None:
        """Begin with the head of a request."""
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Start the application, unless the head has to be parsed again without its `Upgrade`."""
        self._in_head = False
        self._declines_upgrade = self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"
        if not self._declines_upgrade:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Finish the request's body."""
        if not self._declines_upgrade:
            super().on_message_complete()

    def _is_within_request(self) -> bool:
        return self._in_head or (self.cycle is not None and self.cycle.more_body)

    def _check_progress(self) -> None:
        """Close the connection if its request has stalled although this side is reading."""
        stalled = self.loop.time() - self._heard > STALLED_S and not self.flow.read_paused
        if stalled and self._is_within_request():
            self.transport.close()
            self.transport.close()  # the second one does not linger
        else:
            self._watch = self.loop.call_later(STALLED_S, self._check_progress)

    def _begin_to_linger(self) -> bool:
        """Tell whether the peer still sends a request that has been answered; if so, drain it before closing."""
        cycle = self.cycle
        if cycle is None or not (cycle.response_complete and cycle.more_body):
            return False
        self._lingered = 0
        self.flow.resume_reading()
        self._watch.cancel()
        self._watch = self.loop.call_later(LINGER_S, self.transport.close)
        return True


class _Transport:
    """Joins the writes of one turn of the event loop, and lets the protocol delay the first `close`."""

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, begins_to_linger: Callable[[], bool]
    ) -> None:
        self._transport = transport
        self._loop = loop
        self._begins_to_linger = begins_to_linger
        self._lingers = False
        self._parts: list[bytes] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._parts:
            self._loop.call_soon(self._flush)
        self._parts.append(data)

    def is_closing(self) -> bool:
        return self._lingers or self._transport.is_closing()

    def close(self) -> None:
        self._flush()
        if not self._lingers and not self._transport.is_closing() and self._begins_to_linger():
            self._lingers = True
            if self._transport.can_write_eof():  # TLS cannot close one direction
                self._transport.write_eof()
        else:
            self._transport.close()

    def _flush(self) -> None:
        if self._parts:
            data, self._parts = b"".join(self._parts), []
            if not self._transport.is_closing():
                self._transport.write(data)
