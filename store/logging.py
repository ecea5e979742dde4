"""One form of log line for all processes: time, level, process, the request or job at hand, and the message."""

import logging
import sys
from typing import Any

_rich = sys.modules.get("rich")
sys.modules["rich"] = None  # type: ignore[assignment]  # structlog would load it for tracebacks that nobody asks for
import structlog  # noqa: E402

if _rich is None:
    del sys.modules["rich"]
else:
    sys.modules["rich"] = _rich

from structlog.typing import EventDict, Processor, WrappedLogger  # noqa: E402

LEADING = ("timestamp", "level", "process")


def configure(process: str, *processors: Processor, level: int = logging.INFO) -> None:
    """Send every log record of this process to stderr.

    Code logs through structlog or the standard library. Fields of the event, and those that are bound with
    `structlog.contextvars`, are part of the line.

    Args:
        process: what the lines say they come from, such as `gateway`.
        processors: add fields of their own, as structlog's processors do.
        level: the least level that is logged.
    """

    def name_process(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event["process"] = process
        return event

    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper("iso"),
        name_process,
        *processors,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.PositionalArgumentsFormatter(),
            *before,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    after = (structlog.stdlib.ProcessorFormatter.remove_processors_meta, structlog.processors.format_exc_info, render)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=after))
    logging.basicConfig(level=level, handlers=[handler], force=True)


def render(_: WrappedLogger, __: str, event: EventDict) -> str:
    """`2026-01-31T12:00:00.000000Z warning gateway: the message [request_id=...]`, and below it the traceback."""
    leading = " ".join(str(event.pop(name)) for name in LEADING)
    message, exception = event.pop("event"), event.pop("exception", None)
    fields: dict[str, Any] = dict(event)
    context = " ".join(f"{name}={value}" for name, value in fields.items())
    line = f"{leading}: {message}" + (f" [{context}]" if context else "")
    return line if exception is None else f"{line}\n{exception}"
