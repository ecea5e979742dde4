"""`python -m serving`: the embedded model server. It serves nothing until a client configures it."""

import os
import signal
import threading

import click

from serving.quiet import import_tensorflow
from serving.settings import EMBEDDED_TARGET


@click.command()
@click.option("--address", default=EMBEDDED_TARGET, show_default=True, help="Address to listen on, host:port.")
def main(address: str) -> None:
    """Serve SavedModels over TensorFlow Serving's gRPC protocol."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # the GPU belongs to the workers
    import_tensorflow()
    from serving import embedded

    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    server, port = embedded.start(address)
    click.echo(f"model server ready on {address.rpartition(':')[0]}:{port}")
    stopped.wait()
    server.stop(grace=5).wait()


if __name__ == "__main__":
    main()
