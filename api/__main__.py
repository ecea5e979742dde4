"""`python -m api`: the gateway."""

import json
import logging as standard
import os
import ssl

import click
import uvicorn

from api.http.tracing import add_request
from store import logging, traces
from store.engine import connect, prepare
from store.errors import StoreUnavailable
from store.keys import Keys
from store.processes import choose_grpc_event_loop
from store.settings import Settings, from_environment, warn_of_unknown_variables

log = standard.getLogger("temper.gateway")
COMMAND = "python -m api"


@click.command()
def main() -> None:
    """Serve the HTTP API. Settings come from TEMPER_* variables; `temper serve` starts this and everything else."""
    logging.configure("gateway", add_request)
    warn_of_unknown_variables(os.environ)
    try:
        settings = from_environment()
        traces.configure("gateway", settings.traces)
        settings.make_home()
        prepare(settings.store_url)
        _check_tls(settings)
        _create_first_key(settings)
    except ValueError as exc:
        logging.fail(COMMAND, str(exc))
    except ssl.SSLError as exc:
        logging.fail(COMMAND, f"cannot use TEMPER_TLS_CERT and TEMPER_TLS_KEY: {exc.reason or exc}")
    except OSError as exc:
        logging.fail(COMMAND, f"cannot use TEMPER_HOME: {exc}")
    except StoreUnavailable as exc:
        logging.fail(COMMAND, exc.message)
    choose_grpc_event_loop()
    os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # children exec at once; read when gRPC is imported
    from api.app import create_app
    from api.http.protocol import Connection

    uvicorn.run(
        create_app(settings), host=settings.host, port=settings.port,
        ssl_certfile=settings.tls_cert, ssl_keyfile=settings.tls_key,
        access_log=False, log_config=None, log_level="warning", timeout_graceful_shutdown=5,
        loop="uvloop", http=Connection, ws="none", proxy_headers=False, server_header=False,
    )  # fmt: skip


def _check_tls(settings: Settings) -> None:
    """Raise `ssl.SSLError` unless certificate and key can be used."""
    if settings.tls_cert:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_cert, settings.tls_key)


def _create_first_key(settings: Settings) -> None:
    """Where keys are required and there has never been one, create one and print it: nobody could get in otherwise."""
    if settings.keys == "required" or (settings.keys == "auto" and not settings.is_local):
        engine = connect(settings.store_url)
        token = Keys(engine).create_first()
        engine.dispose()
        if token:
            line = {"event": "the first API key, with the scope admin; it is not shown again", "key": token}
            text = f"The first API key, with the scope admin; it is not shown again:\n{token}"
            click.echo(json.dumps(line) if logging.is_json() else text, err=True)  # not logged: that is kept elsewhere
    elif not settings.is_local:
        log.warning("TEMPER_KEYS=off: whoever reaches %s may do everything", settings.host)


if __name__ == "__main__":
    main()
