"""TensorFlow Serving's REST API over the same models, as a plain ASGI application.

Status codes, messages and layout are those of TensorFlow Serving 2.20, oddities included.
"""

import asyncio
import json
import re
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
import tensorflow as tf
import uvicorn
from google.protobuf import json_format
from tensorflow_serving.apis import get_model_metadata_pb2, model_pb2

from serving.embedded.json_tensors import arrays_of, check_examples, columns, listing, rows, shown
from serving.embedded.model_manager import Models
from serving.embedded.rapid_json import ParseError, parse
from serving.embedded.servable import DEFAULT_SIGNATURE, Refused, invalid, status_of
from serving.embedded.server import metadata, refuse_examples, status

PREDICT = re.compile(
    r"/v1/models/([^/:]+)(?:/versions/(\d+)|/labels/([^/:]+))?:(classify|regress|predict)", re.IGNORECASE | re.ASCII
)
STATUS = re.compile(
    r"/v1/models(?:/([^/:]+))?(?:/versions/(\d+)|/labels/([^/:]+))?(?:/(metadata))?", re.IGNORECASE | re.ASCII
)
PAGE = "<HTML><HEAD>\n<TITLE>{0} {1}</TITLE>\n</HEAD><BODY>\n<H1>{1}</H1>\n</BODY></HTML>\n"
MAX_VERSION_DIGITS = 19  # of 2^63 - 1
METHODS = ("GET", "POST", "HEAD", "PUT", "DELETE", "PATCH", "OPTIONS")
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


class _Empty(Exception):
    """The version does not fit into 64 bits. The real server answers 400 without a body."""


def create_app(models: Models) -> Callable[..., Awaitable[None]]:
    """The application. It serves status, metadata and predict, and refuses the rest."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        method, path = scope["method"], scope["path"]
        body = await _body(receive)
        if method not in METHODS:
            return await _send_page(send, 501, "Not Implemented")
        if method == "OPTIONS":
            return await _send(send, 400, b"", "text/html; charset=ISO-8859-1")
        if not path.lower().startswith("/v1/"):
            return await _send_page(send, 404, "Not Found")
        if query := scope["query_string"].decode("latin-1"):
            path = f"{path}?{query}"
        if any(name == b"content-encoding" and b"gzip" in value.lower() for name, value in scope["headers"]):
            body = b""  # the real server cannot decompress, and sees no body
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


async def _send_page(send: Any, code: int, phrase: str) -> None:
    await _send(send, code, PAGE.format(code, phrase).encode(), "text/html", ((b"connection", b"close"),))


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
    except ParseError as exc:
        return 400, _error(f"JSON Parse error: {exc.message} at offset: {exc.offset}")
    except RecursionError:  # from the parser, or from what walks the parsed lists
        return 400, _error("JSON Parse error: The document is nested too deeply.")
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
                spec.signature_name = _signature(document)
                check_examples(document)
                refuse_examples(models, spec, verb)
    if method == "GET" and (match := STATUS.fullmatch(path)):
        name, number, label, what = match.groups()
        if not name:
            raise invalid("Missing model name in request.")
        spec = _spec(name, number, label)
        if what:
            return _metadata(metadata(models, spec))
        # The real server ignores a label here, over gRPC too.
        return _printed(status(models, name, spec.version.value if number else None)) + "\n"
    raise invalid(f"Malformed request: {method} {path}")


def _spec(name: str, number: str | None, label: str | None) -> Any:
    spec = model_pb2.ModelSpec(name=name)
    if number is not None:
        digits = number.lstrip("0") or "0"
        # int() itself refuses thousands of digits.
        if len(digits) > MAX_VERSION_DIGITS or int(digits) >= 1 << 63:
            raise _Empty
        spec.version.value = int(digits)
    elif label is not None:
        spec.version_label = label
    return spec


def _parsed(body: bytes) -> dict[str, Any]:
    """The JSON object in a body."""
    if not body:
        raise invalid("JSON Parse error: The document is empty")
    document = parse(body)
    if not isinstance(document, dict):
        raise invalid(f"JSON Value: {shown(document)} Is not object")
    return document


def _signature(document: dict[str, Any]) -> str:
    """The signature's name, or "" for the default one."""
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise invalid(
            f"JSON Value: {shown(document)} not formatted correctly. 'signature_name' key must be a string value."
        )
    return name


def _predict(models: Models, spec: Any, body: bytes) -> str:
    document = _parsed(body)
    key = _signature(document) or DEFAULT_SIGNATURE
    _, servable = models.find(spec)
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
    """A socket that listens on `host:port`.

    Raises:
        OSError: the address is taken, or not ours.
        ValueError: the port is not a number.
    """
    host, _, port = address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host.strip("[]"), int(port)), family=family, backlog=1024)


def start(
    listener: socket.socket, models: Models, cert: Path | None = None, key: Path | None = None,
    client_ca: Path | None = None,
) -> tuple[uvicorn.Server, threading.Thread]:  # fmt: skip
    """Serve in a thread of its own until `should_exit` of the returned server is set.

    Args:
        cert: certificate (chain), PEM, for HTTPS.
        key: its private key.
        client_ca: certificates that sign those of clients, which are then demanded.
    """
    config = uvicorn.Config(
        create_app(models), log_config=None, access_log=False, lifespan="off",
        ssl_certfile=cert, ssl_keyfile=key, ssl_ca_certs=str(client_ca) if client_ca else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if client_ca else ssl.CERT_NONE,
    )  # fmt: skip
    config.server_header = config.date_header = False
    config.timeout_graceful_shutdown = 5
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="rest", daemon=True)
    thread.start()
    return server, thread
