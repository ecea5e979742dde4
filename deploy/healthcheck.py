"""The health checks of the images: `python -m deploy.healthcheck gateway|trainer|model-server`.

Exits with 0 if the process of this container works, and otherwise with 1 and the reason on standard error.
"""

import os
import sys
import tempfile
import time

import click

from store.settings import LOCAL_TARGET, Settings, from_environment

TIMEOUT_S = 3.0
PULSE_S = 15.0  # a worker touches its pulse file every second; a busy machine or a slow shared directory may delay it
ANY_ADDRESS = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}  # noqa: S104 (compared, not bound)


class Unhealthy(Exception):
    """The process does not work, with the reason."""


def check_gateway(settings: Settings) -> None:
    """Ask the gateway for `/healthz`.

    Raises:
        Unhealthy: it does not answer with 200.
    """
    import httpx

    host = ANY_ADDRESS.get(settings.host, f"[{settings.host}]" if ":" in settings.host else settings.host)
    url = f"{settings.scheme}://{host}:{settings.port}/healthz"
    try:
        # Its certificate is not for this address, and it asks only itself.
        httpx.get(url, timeout=TIMEOUT_S, trust_env=False, verify=False).raise_for_status()  # noqa: S501
    except httpx.HTTPError as exc:
        raise Unhealthy(f"{url}: {exc or type(exc).__name__}") from exc


def check_model_server(settings: Settings, address: str) -> None:
    """Ask the model server at `host:port` with gRPC's health protocol, over TLS if TEMPER_MODEL_SERVER_CA is set.

    Raises:
        Unhealthy: it does not answer, or does not serve.
    """
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from serving.client import credentials

    secure = credentials(address, settings.model_server_tls)
    with grpc.secure_channel(address, secure) if secure else grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as exc:
            raise Unhealthy(f"{address}: {exc.code().name}: {exc.details()}") from exc
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        raise Unhealthy(f"{address}: {health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)}")


def check_trainer(settings: Settings) -> None:
    """Look for a fresh pulse file of a worker on this host.

    Raises:
        Unhealthy: there is none, or the worker is still warming up, or waits for a model server.
    """
    touched_at = []
    for path in settings.home.glob(settings.pulse_file("*").name):
        try:
            touched_at.append(path.stat().st_mtime)
        except FileNotFoundError:  # of a worker that has just ended
            continue
    if not touched_at:
        raise Unhealthy(
            f"no worker of this host has a pulse file in {settings.home}: it is not ready yet, or has ended"
        )
    age_s = _now(settings) - max(touched_at)
    if age_s > PULSE_S:
        raise Unhealthy(f"the worker last showed {age_s:.0f} s ago that it runs")


def _now(settings: Settings) -> float:
    """The time by the clock of the home, which may be another machine's, in Unix seconds."""
    try:
        with tempfile.TemporaryFile(dir=settings.home) as file:
            return os.fstat(file.fileno()).st_mtime
    except OSError:  # a full disk
        return time.time()


@click.command()
@click.argument("process", type=click.Choice(["gateway", "trainer", "model-server"]))
@click.option("--address", default=LOCAL_TARGET, show_default=True, help="host:port of the model server.")
def main(process: str, address: str) -> None:
    """Check the process that runs in this container. The settings are those of the process, TEMPER_*."""
    try:
        match process:
            case "gateway":
                check_gateway(from_environment())
            case "trainer":
                check_trainer(from_environment())
            case _:
                check_model_server(from_environment(), address)
    except (Unhealthy, ValueError) as exc:
        sys.exit(f"unhealthy: {exc}")


if __name__ == "__main__":
    main()
