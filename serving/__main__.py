"""`python -m serving`: the embedded model server. It serves nothing until a client configures it."""

import gc
import logging as standard
import os
import signal
import ssl
import threading
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import click

from serving.quiet import import_tensorflow
from store import logging, traces
from store.memory import settle
from store.processes import choose_grpc_event_loop
from store.settings import LOCAL_REST, LOCAL_TARGET

log = standard.getLogger("temper.model_server")
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option(
    "--address",
    default=LOCAL_TARGET,
    show_default=True,
    help="Where to listen for gRPC: host:port (port 0 picks a free one) or unix:/path.",
)
@click.option(
    "--rest-address", default=LOCAL_REST, show_default=True, help='Where to listen for REST: host:port, or "" for none.'
)
@click.option("--tls-cert", type=FILE, help="Certificate (chain), PEM: gRPC and REST use TLS, and nothing else.")
@click.option("--tls-key", type=FILE, help="Private key of that certificate, PEM.")
@click.option(
    "--traces", "traces_to", envvar="TEMPER_TRACES", default="", help="Base URL of an OTLP collector that gets traces."
)
@click.option("--client-ca", type=FILE, help="Certificates, PEM, that sign those of clients; no other gets in.")
def main(
    address: str, rest_address: str, tls_cert: Path | None, tls_key: Path | None, client_ca: Path | None,
    traces_to: str,
) -> None:  # fmt: skip
    """Serve SavedModels over TensorFlow Serving's gRPC protocol and REST API."""
    logging.configure("model-server")
    _check_tls(address, tls_cert, tls_key, client_ca)
    try:
        traces.configure("model-server", traces_to)
    except ValueError as exc:
        logging.fail("Error", f"--traces (TEMPER_TRACES): {exc}")
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # GPUs are for the workers
    choose_grpc_event_loop()
    # Read when gRPC is imported: its own log lines about a taken port would precede our error message.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import_tensorflow()
    import grpc

    from serving.embedded import rest
    from serving.embedded import server as embedded
    from serving.embedded.interceptor import Around
    from serving.embedded.model_manager import Models

    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    models, credentials = Models(), None
    interceptors = [Around(traces.TRACEPARENT, _server_span)] if traces.on() else []
    if tls_cert and tls_key:
        trusted = client_ca.read_bytes() if client_ca else None
        pair = tls_key.read_bytes(), tls_cert.read_bytes()
        credentials = grpc.ssl_server_credentials([pair], trusted, require_client_auth=client_ca is not None)
    try:
        server, port = embedded.start(address, models, credentials=credentials, interceptors=interceptors)
    except RuntimeError:
        problem = f"cannot listen on {address} (--address): is it taken, malformed, or in a missing directory?"
        logging.fail("Error", problem)
    ready = address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
    http = None
    if rest_address:
        try:
            listener = rest.listening(rest_address)
        except (OSError, ValueError) as exc:
            server.stop(grace=None)
            logging.fail("Error", f"cannot listen on {rest_address} (--rest-address): {exc}")
        http = rest.start(listener, models, tls_cert, tls_key, client_ca)
        ready += f", REST on {rest_address.rpartition(':')[0]}:{listener.getsockname()[1]}"
    settle()
    gc.set_threshold(50_000, 50, 1000)  # a full collection over TensorFlow's objects takes a third of a second
    if logging.is_json():
        log.info("ready on %s", ready)
    else:
        click.echo(f"model server ready on {ready}")
    stopped.wait()
    if http:
        http[0].should_exit = True
        http[1].join(timeout=6)
    server.stop(grace=5).wait()


def _check_tls(address: str, cert: Path | None, key: Path | None, client_ca: Path | None) -> None:
    """Refuse what would serve in clear by mistake, and files that gRPC would not complain about before a client does.

    Raises:
        click.UsageError: options are missing, or mean nothing together.
    """
    if (cert is None) != (key is None) or (client_ca and not cert):
        raise click.UsageError("--tls-cert and --tls-key need each other, and --client-ca needs both")
    if cert and address.startswith("unix:"):
        raise click.UsageError(f"--tls-cert is for a host:port: nothing is encrypted on {address}")
    if cert is None:
        return
    try:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        if client_ca:
            context.load_verify_locations(client_ca)
    except OSError as exc:  # ssl.SSLError is one
        logging.fail("Error", f"cannot use {cert}, {key}{f', {client_ca}' if client_ca else ''}: {exc}")


def _server_span(method: str, traceparent: str) -> AbstractContextManager[Any]:
    return traces.span(method, "server", parent=traceparent)


if __name__ == "__main__":
    main()
