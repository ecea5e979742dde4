"""TensorFlow Serving's REST API over the same models: a plain ASGI application.

Messages and layout are those of TensorFlow Serving 2.20, down to its odd ones.
"""

import asyncio
import json
import re
import socket
import threading
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

import grpc
import tensorflow as tf
import uvicorn
from google.protobuf import json_format
from tensorflow_serving.apis import get_model_metadata_pb2, model_pb2

from serving.embedded.json_tensors import arrays_of, columns, listing, rows, shown
from serving.embedded.model_manager import Models
from serving.embedded.servable import DEFAULT_SIGNATURE, Refused, invalid, status_of
from serving.embedded.server import metadata, refuse_examples, status

PREDICT = re.compile(
    r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?:(classify|regress|predict)", re.IGNORECASE | re.ASCII
)
STATUS = re.compile(
    r"/v1/models(?:/([^/:]+))?(?:/versions/(\d+)|/labels/([^/:]+))?(?:/(metadata))?", re.IGNORECASE | re.ASCII
)
NOT_FOUND = b"<HTML><HEAD>\n<TITLE>404 Not Found</TITLE>\n</HEAD><BODY>\n<H1>Not Found</H1>\n</BODY></HTML>\n"
JSON = "application/json"
HTTP = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.FAILED_PRECONDITION: 412,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
PARSE_ERRORS = {  # json's words: RapidJSON's
    "Expecting value": "Invalid value.",
    "Extra data": "The document root must not be followed by other values.",
    "Expecting property name enclosed in double quotes": "Missing a name for object member.",
    "Illegal trailing comma before end of object": "Missing a name for object member.",
    "Expecting ':' delimiter": "Missing a colon after a name of object member.",
    "Unterminated string starting at": "Missing a closing quotation mark in string.",
}


class _Empty(Exception):
    """A version that is no number of 64 bits is answered by 400 and nothing."""


def create_app(models: Models) -> Callable[..., Awaitable[None]]:
    """The application: status, metadata and predict, refusals for the rest."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        method, path = scope["method"], scope["path"]
        body = await _body(receive)
        if method == "OPTIONS":
            return await _send(send, 400, b"", "text/html; charset=ISO-8859-1")
        if not path.lower().startswith("/v1/"):
            return await _send(send, 404, NOT_FOUND, "text/html", ((b"connection", b"close"),))
        if query := scope["query_string"].decode("latin-1"):
            path = f"{path}?{query}"
        if any(name == b"content-encoding" and b"gzip" in value.lower() for name, value in scope["headers"]):
            body = b""  # what the real server makes of it
        code, text = await asyncio.to_thread(_answer, models, method, path, body)
        return await _send(send, code, text, JSON, head=method == "HEAD")

    return app


async def _body(receive: Any) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


async def _send(
    send: Any, code: int, body: bytes, kind: str, headers: Iterable[tuple[bytes, bytes]] = (), head: bool = False
) -> None:
    length = [] if head else [(b"content-length", b"%d" % len(body))]
    headers = [(b"content-type", kind.encode()), *length, *headers]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": b"" if head else body})


def _answer(models: Models, method: str, path: str, body: bytes) -> tuple[int, bytes]:
    try:
        text = _called(models, method, path, body)
    except _Empty:
        return 400, b""
    except Refused as exc:
        return HTTP.get(exc.code, 500), _error(exc.message)
    except tf.errors.OpError as exc:
        return HTTP.get(status_of(exc), 500), _error(exc.message)
    return 200, text.encode("utf-8", "surrogateescape")


def _error(message: str) -> bytes:
    return f'{{\n    "error": {json.dumps(message, ensure_ascii=False)}\n}}'.encode(errors="replace")


def _called(models: Models, method: str, path: str, body: bytes) -> str:
    if method == "POST" and (match := PREDICT.fullmatch(path)):
        spec = _spec(*match.group(1, 2, 3))
        match match.group(4):
            case "predict":
                return _predict(models, spec, body)
            case "classify" | "regress" as verb:
                document = _parsed(body)
                if not document.get("examples"):
                    raise invalid("When method is classify, key 'examples' is expected and was not found")
                refuse_examples(models, spec, {"classify": "classification", "regress": "regression"}[verb])
    if method == "GET" and (match := STATUS.fullmatch(path)):
        name, number, label, what = match.groups()
        if not name:
            raise invalid("Missing model name in request.")
        spec = _spec(name, number, label)
        if what:
            return _metadata(metadata(models, spec))
        # A label is ignored here, as over gRPC.
        return _printed(status(models, name, spec.version.value if number else None)) + "\n"
    raise invalid(f"Malformed request: {method} {path}")


def _spec(name: str, number: str | None, label: str | None) -> Any:
    spec = model_pb2.ModelSpec(name=name)
    if number is not None:
        if int(number) >= 1 << 63:
            raise _Empty
        spec.version.value = int(number)
    elif label is not None:
        spec.version_label = label
    return spec


def _parsed(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; bare NaN and Infinity are numbers."""
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    try:
        document = json.loads(body.decode("utf-8", "surrogateescape"))
    except json.JSONDecodeError as exc:
        raise invalid(f"JSON Parse error: {_parse_error(exc)} at offset: {exc.pos}") from exc
    except ValueError as exc:  # an integer of thousands of digits
        raise invalid("JSON Parse error: Number too big to be stored in double. at offset: 0") from exc
    except RecursionError as exc:
        raise invalid("JSON Parse error: Terminate parsing due to Handler error. at offset: 0") from exc
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {shown(document)} Is not object")
    return document


def _parse_error(exc: json.JSONDecodeError) -> str:
    if exc.msg == "Expecting ',' delimiter":
        try:
            json.loads(exc.doc[: exc.pos] + "]")
        except json.JSONDecodeError as other:
            if other.pos <= exc.pos and other.msg == exc.msg:
                return "Missing a comma or } after an object member."
        return "Missing a comma or ] after an array element."
    return PARSE_ERRORS.get(exc.msg, "Invalid value.")


def _predict(models: Models, spec: Any, body: bytes) -> str:
    document = _parsed(body)
    key = document.get("signature_name", "")
    if not isinstance(key, str):
        raise invalid(
            f"JSON Value: {shown(document)} not formatted correctly. 'signature_name' key must be a string value."
        )
    _, servable = models.find(spec)
    key = key or DEFAULT_SIGNATURE
    try:
        inputs = {known.name: known.dtype for known in servable.inputs(key)}
    except Refused as exc:
        raise invalid(f'Serving signature name: "{key}" not found in signature def') from exc
    if not inputs:
        raise invalid(f"Failed to get input map for signature: {key}")
    by_row = "instances" in document
    if by_row and "inputs" in document:
        raise invalid(
            f"JSON Value: {shown(document)} Not formatted correctly expecting only one of 'inputs' or 'instances' "
            "keys to exist "
        )
    if by_row:
        instances = document["instances"]
        if not isinstance(instances, list):
            raise invalid(f"JSON Value: {shown(document)} Expecting 'instances' to be an list/array")
        if not instances:
            raise invalid(f"JSON Value: {shown(document)} No values in 'instances' array")
        return listing("predictions", rows(servable.run(key, arrays_of(instances, inputs, by_row=True))))
    if "inputs" not in document:
        raise invalid("Missing 'inputs' or 'instances' key")
    return listing("outputs", columns(servable.run(key, arrays_of(document["inputs"], inputs, by_row=False))))


def _printed(message: Any) -> str:
    text: str = json_format.MessageToJson(
        message, indent=1, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return text


def _metadata(response: Any) -> str:
    signatures = get_model_metadata_pb2.SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    return (
        f'{{\n"model_spec":{_printed(response.model_spec)}\n,\n'
        f'"metadata": {{"signature_def": {_printed(signatures)}\n}}\n}}\n'
    )


def listening(address: str) -> socket.socket:
    """A socket that listens at host:port.

    Raises:
        OSError: the address cannot be had.
    """
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=1024)


def start(listener: socket.socket, models: Models) -> tuple[uvicorn.Server, threading.Thread]:
    """Serve in a thread until the server's `should_exit` is set."""
    config = uvicorn.Config(create_app(models), log_config=None, access_log=False, lifespan="off")
    config.server_header = config.date_header = False
    config.timeout_graceful_shutdown = 5
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="rest", daemon=True)
    thread.start()
    return server, thread
