"""Traces for OpenTelemetry: spans, and how a trace goes on in another process.

Without `TEMPER_TRACES` nothing is imported, measured or sent, and every function here returns at once. A trace is
handed on as a W3C traceparent: in HTTP headers, in gRPC metadata, and in the record of a job. Spans name requests,
jobs, models and versions; what clients send and what exceptions say never goes into one.
"""

import contextlib
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal
from urllib.parse import urlsplit

TRACEPARENT = "traceparent"
TIMEOUT_S = 3.0  # of an export, and so of the wait for a collector that is away when a process ends
Kind = Literal["internal", "server", "client", "consumer"]
Attributes = Mapping[str, str | int | float]

_tracer: Any = None
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


def checked(endpoint: str) -> str:
    """Return what may be the URL of a collector, or empty.

    Raises:
        ValueError: it is neither.
    """
    if endpoint and not re.fullmatch(r"https?://[^\s/]+\S*", endpoint):
        raise ValueError(f"{endpoint!r} is not an http:// or https:// URL")
    return endpoint


def configure(process: str, endpoint: str) -> None:
    """Send this process's spans to an OTLP collector from now on; nothing without an endpoint.

    The SDK's own variables hold as well: `OTEL_TRACES_SAMPLER`, `OTEL_EXPORTER_OTLP_HEADERS` and others.

    Args:
        process: becomes the service `temper-<process>`.
        endpoint: base URL of the collector; `/v1/traces` is added.

    Raises:
        ValueError: that is no URL, or OpenTelemetry is not installed.
    """
    global _tracer
    if not checked(endpoint):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
    except ImportError as exc:
        raise ValueError(f"TEMPER_TRACES needs OpenTelemetry (pip install 'temper[otel]'): {exc}") from exc
    from store.health import Notice

    class Exporter(OTLPSpanExporter):
        """Tells once when a collector goes away, and once when it is back."""

        sending = Notice(f"sending traces to {urlsplit(endpoint).hostname}")  # a URL may have a password

        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            result = super().export(spans)
            if result is SpanExportResult.SUCCESS:
                self.sending.worked()
            else:
                self.sending.failed(OSError("the collector is away or refuses them; they are dropped"))
            return result

    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # it tells of every attempt
    own = {"OTEL_EXPORTER_OTLP_TIMEOUT", "OTEL_EXPORTER_OTLP_TRACES_TIMEOUT"} & os.environ.keys()
    timeout_s = None if own else TIMEOUT_S
    url = endpoint.rstrip("/").removesuffix("/v1/traces") + "/v1/traces"
    resource = Resource.create({"service.name": f"temper-{process}", "service.instance.id": _instance()})
    provider = TracerProvider(resource=resource)
    provider.add_span_processor(BatchSpanProcessor(Exporter(url, timeout=timeout_s)))
    _tracer = provider.get_tracer("temper")


def _instance() -> str:
    return f"{os.uname().nodename}-{os.getpid()}"


def on() -> bool:
    """Tell whether spans are made; on the fast path, ask before computing what would go into one."""
    return _tracer is not None


def span(
    name: str, kind: Kind = "internal", *, parent: str | None = None, links: Sequence[str | None] = (),
    attributes: Attributes | None = None,
) -> AbstractContextManager[Any]:  # fmt: skip
    """A span around the body of a `with`, which gets it; None while traces are off.

    Args:
        kind: of OpenTelemetry.
        parent: a traceparent; without one, the current span if there is one.
        links: traceparents of spans that share this one.
        attributes: of the span; more can be set on what the `with` gets.
    """
    return _NOTHING if _tracer is None else _span(name, kind, parent, links, attributes)


def child(name: str, kind: Kind = "internal", attributes: Attributes | None = None) -> AbstractContextManager[Any]:
    """Like `span`, but only within a span: what nobody asked for, like the looks at servers, makes no traces."""
    return _NOTHING if _tracer is None or current() is None else _span(name, kind, None, (), attributes)


@contextlib.contextmanager
def _span(
    name: str, kind: Kind, parent: str | None, links: Sequence[str | None], attributes: Attributes | None
) -> Iterator[Any]:
    from opentelemetry import context as contexts
    from opentelemetry import trace

    linked = [trace.Link(found) for link in links if (found := _context_of(link)) is not None]
    made = _tracer.start_span(
        name, context=_parent(parent), kind=trace.SpanKind[kind.upper()], attributes=attributes, links=linked
    )
    token = contexts.attach(trace.set_span_in_context(made))
    try:
        yield made
    except BaseException as exc:
        made.set_attribute("error.type", type(exc).__name__)  # its message may quote what a client has sent
        if isinstance(exc, Exception):
            fail(made)
        raise
    finally:
        contexts.detach(token)
        made.end()


def past(name: str, parent: str | None, seconds: float) -> None:
    """Make a span of what has just ended and took so long."""
    if _tracer is not None:
        end = time.time_ns()
        _tracer.start_span(name, context=_parent(parent), start_time=end - int(1e9 * seconds)).end(end)


def event(name: str) -> None:
    """Note on the current span that something has happened."""
    if _tracer is not None:
        from opentelemetry import trace

        trace.get_current_span().add_event(name)


def fail(made: Any) -> None:
    """Mark a span as that of a failure."""
    from opentelemetry import trace

    made.set_status(trace.StatusCode.ERROR)


def current() -> str | None:
    """The traceparent of the current span; None without one, and while traces are off."""
    if _tracer is None:
        return None
    from opentelemetry import trace

    found = trace.get_current_span().get_span_context()
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}" if found.is_valid else None


def metadata() -> tuple[tuple[str, str], ...] | None:
    """Metadata of a gRPC call with which the server's span becomes a child of the current one."""
    traceparent = current()
    return None if traceparent is None else ((TRACEPARENT, traceparent),)


def _parent(traceparent: str | None) -> Any:
    """The context that a span begins in: that of the traceparent, or else the current one."""
    from opentelemetry import trace

    found = _context_of(traceparent)
    return None if found is None else trace.set_span_in_context(trace.NonRecordingSpan(found))


def _context_of(traceparent: str | None) -> Any:
    """What a traceparent says, or None if it is malformed: the standard has a new trace begin then."""
    if traceparent is None:
        return None
    from opentelemetry import trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    nothing = trace.set_span_in_context(trace.INVALID_SPAN)
    context = TraceContextTextMapPropagator().extract({TRACEPARENT: traceparent}, nothing)
    found = trace.get_current_span(context).get_span_context()
    return found if found.is_valid else None
