"""`python -m api`: the gateway."""

import logging
import os
import sys

import click
import uvicorn

from store.engine import prepare
from store.errors import StoreUnavailable
from store.memory import give_memory_back
from store.settings import Settings, warn_of_unknown_variables


@click.command()
def main() -> None:
    """Serve the HTTP API. Settings are read from TEMPER_* environment variables."""
    give_memory_back()
    logging.basicConfig(level=logging.INFO, format="%(request_id)s %(message)s")
    settings = Settings()
    try:
        settings.make_home()
        prepare(settings.store_url)
    except OSError as exc:
        sys.exit(f"python -m api: cannot use TEMPER_HOME: {exc}")
    except StoreUnavailable as exc:
        sys.exit(f"python -m api: {exc.message}")
    # Read when gRPC is imported. Its older event loop takes a tenth less of the processor for a call.
    os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client,-event_engine_callback_cq")
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # its children exec at once; read when gRPC is imported
    from api.app import create_app
    from api.http.protocol import Connection
    from api.http.tracing import WithRequestId

    for handler in logging.getLogger().handlers:
        handler.addFilter(WithRequestId())
    warn_of_unknown_variables(os.environ)
    uvicorn.run(
        create_app(settings), host=settings.host, port=settings.port, access_log=False, log_level="warning",
        timeout_graceful_shutdown=5, loop="uvloop", http=Connection, ws="none",
        proxy_headers=False, server_header=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
