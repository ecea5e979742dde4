"""One form of log line for all processes: time, level, process, the request or job at hand, and the message.

`TEMPER_LOG=json` makes every line a JSON object, with a traceback in its field `exception`.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any, NoReturn

_rich = sys.modules.get("rich")
sys.modules["rich"] = None  # type: ignore[assignment]  # structlog would load it for tracebacks that nobody asks for
import structlog  # noqa: E402

if _rich is None:
    del sys.modules["rich"]
else:
    sys.modules["rich"] = _rich

from structlog.typing import EventDict, Processor, WrappedLogger  # noqa: E402

from store import traces  # noqa: E402

LEADING = ("timestamp", "level", "process")
log = logging.getLogger("temper")


def is_json(environment: Mapping[str, str] = os.environ) -> bool:
    """Tell whether lines are JSON. Read here, because the line that says what is wrong with a setting is one, too."""
    return environment.get("TEMPER_LOG", "").lower() == "json"


def configure(process: str, *processors: Processor, level: int = logging.INFO) -> None:
    """Send every log record of this process to stderr.

    Code logs through structlog or the standard library. Fields of the event, and those that are bound with
    `structlog.contextvars`, are part of the line. Where lines are JSON, warnings and exceptions that nobody catches
    are records as well.

    Args:
        process: what the lines say they come from, such as `gateway`.
        processors: add fields of their own, as structlog's processors do.
        level: the least level that is logged.
    """
    as_json = is_json()

    def name_process(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        event.setdefault("process", process)
        return event

    before: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper("iso"),
        name_process,
        add_trace_id,
        *processors,
    ]
    if as_json:
        before.append(structlog.stdlib.add_logger_name)
    structlog.configure(
        processors=[
            structlog.stdlib.PositionalArgumentsFormatter(),
            *before,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    after = (
        structlog.stdlib.ProcessorFormatter.remove_processors_meta,
        structlog.processors.format_exc_info,
        render_json if as_json else render,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=after))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    if as_json:
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = _log_uncaught_in_thread


def add_trace_id(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Put the id of the current trace into a line (a structlog processor)."""
    if (traceparent := traces.current()) is not None:
        event["trace_id"] = traceparent.split("-")[1]
    return event


def render(_: WrappedLogger, __: str, event: EventDict) -> str:
    """`2026-01-31T12:00:00.000000Z warning gateway: the message [request_id=...]`, and below it the traceback."""
    leading = " ".join(str(event.pop(name)) for name in LEADING)
    message, exception = event.pop("event"), event.pop("exception", None)
    fields: dict[str, Any] = dict(event)
    context = " ".join(f"{name}={value}" for name, value in fields.items())
    line = f"{leading}: {message}" + (f" [{context}]" if context else "")
    return line if exception is None else f"{line}\n{exception}"


def render_json(_: WrappedLogger, __: str, event: EventDict) -> str:
    """One JSON object in ASCII on one line; what JSON cannot express appears as its `str`."""
    leading = {name: event.pop(name) for name in (*LEADING, "event")}
    return json.dumps({**leading, **event}, default=str)


def fail(command: str, message: str) -> NoReturn:
    """End the process with exit code 1 and a line that says why; `command` begins it where it is text."""
    if is_json():
        log.critical(message)
        sys.exit(1)
    sys.exit(f"{command}: {message}")


def _log_uncaught(kind: type[BaseException], exc: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, exc, traceback)
    else:
        log.critical("an exception that nobody caught", exc_info=(kind, exc, traceback))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_type is not SystemExit and args.exc_value is not None:
        _log_uncaught(args.exc_type, args.exc_value, args.exc_traceback)
