"""`python -m api`: the gateway."""

import os
import sys

import click
import uvicorn

from api.http.tracing import add_request_id
from store import logging
from store.engine import prepare
from store.errors import StoreUnavailable
from store.processes import choose_grpc_event_loop
from store.settings import from_environment, warn_of_unknown_variables


@click.command()
def main() -> None:
    """Serve the HTTP API. Settings come from TEMPER_* variables; `temper serve` starts this and everything else."""
    logging.configure("gateway", add_request_id)
    warn_of_unknown_variables(os.environ)
    try:
        settings = from_environment()
        settings.make_home()
        prepare(settings.store_url)
    except ValueError as exc:
        sys.exit(f"python -m api: {exc}")
    except OSError as exc:
        sys.exit(f"python -m api: cannot use TEMPER_HOME: {exc}")
    except StoreUnavailable as exc:
        sys.exit(f"python -m api: {exc.message}")
    choose_grpc_event_loop()
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # children exec at once; read when gRPC is imported
    from api.app import create_app
    from api.http.protocol import Connection

    uvicorn.run(
        create_app(settings), host=settings.host, port=settings.port,
        access_log=False, log_config=None, log_level="warning", timeout_graceful_shutdown=5,
        loop="uvloop", http=Connection, ws="none", proxy_headers=False, server_header=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
