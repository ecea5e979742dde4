"""`python -m serving`: the embedded model server. It serves nothing until a client configures it."""

import gc
import os
import signal
import threading

import click

from serving.quiet import import_tensorflow
from store.memory import settle
from store.processes import choose_grpc_event_loop
from store.settings import LOCAL_REST, LOCAL_TARGET


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
def main(address: str, rest_address: str) -> None:
    """Serve SavedModels over TensorFlow Serving's gRPC protocol and REST API."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # GPUs are for the workers
    choose_grpc_event_loop()
    # Read when gRPC is imported: its own log lines about a taken port would precede our error message.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import_tensorflow()
    from serving.embedded import rest
    from serving.embedded import server as embedded
    from serving.embedded.model_manager import Models

    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    models = Models()
    try:
        server, port = embedded.start(address, models)
    except RuntimeError as exc:
        problem = f"cannot listen on {address} (--address): is it taken, malformed, or in a missing directory?"
        raise click.ClickException(problem) from exc
    ready = address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
    http = None
    if rest_address:
        try:
            listener = rest.listening(rest_address)
        except (OSError, ValueError) as exc:
            server.stop(grace=None)
            raise click.ClickException(f"cannot listen on {rest_address} (--rest-address): {exc}") from exc
        http = rest.start(listener, models)
        ready += f", REST on {rest_address.rpartition(':')[0]}:{listener.getsockname()[1]}"
    settle()
    gc.set_threshold(50_000, 50, 1000)  # a full collection over TensorFlow's objects takes a third of a second
    click.echo(f"model server ready on {ready}")
    stopped.wait()
    if http:
        http[0].should_exit = True
        http[1].join(timeout=6)
    server.stop(grace=5).wait()


if __name__ == "__main__":
    main()
