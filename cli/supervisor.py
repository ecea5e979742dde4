"""`temper serve`: one gateway, the workers and a model server, each started again when it dies."""

import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType

import click
import httpx
import sqlalchemy as sa

from serving.tensorflow_serving import tensorflow_serving_command
from store.memory import allocator_environment
from store.processes import end_with_parent, free_port
from store.settings import AUTO, EMBEDDED, LOCAL_REST, LOCAL_TARGET, Settings

GRACE_S = 10.0


@dataclass
class Sibling:
    """A process that shall always run."""

    name: str
    command: list[str]
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = field(default_factory=time.monotonic)
    delay_s: float = 0.0

    def keep_running(self) -> None:
        """Start it, or start it again; one that dies young waits, each time twice as long."""
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            self.delay_s = min(10.0, max(0.5, 2 * self.delay_s)) if now - self.started_at < 10 else 0.0
            click.echo(f"{self.name} ended ({_reason(self.process.returncode)}); starts again in {self.delay_s:g} s")
            self.process, self.start_at = None, now + self.delay_s
        if self.process is None and now >= self.start_at:
            self.process = subprocess.Popen(
                self.command, env=dict(self.environment), start_new_session=True, preexec_fn=end_with_parent
            )
            self.started_at = now

    def ask_to_end(self) -> None:
        """SIGTERM."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def end(self, deadline: float) -> None:
        """Wait for its end, and force it at the deadline."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _reason(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def serve(settings: Settings) -> None:
    """Run the service until SIGTERM or SIGINT.

    Raises:
        click.ClickException: the home, the port or the store cannot be had.
    """
    try:
        settings.make_home()
        sa.make_url(settings.store_url).get_dialect()
    except OSError as exc:
        raise click.ClickException(f"TEMPER_HOME cannot be used: {exc}") from exc
    except sa.exc.ArgumentError as exc:
        raise click.ClickException(f"TEMPER_STORE is no store: {exc}") from exc
    lock = (settings.home / "serve.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        raise click.ClickException(f"another `temper serve` runs in {settings.home.resolve()}") from exc
    if not _free(settings.host, settings.port):
        raise click.ClickException(f"{settings.host}:{settings.port} is taken; choose another with --port")
    environment = _environment(settings)
    siblings = _siblings(settings, environment)
    stopped = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    url, announced = f"http://{settings.host}:{settings.port}", False
    click.echo(f"Temper starts in {settings.home.resolve()}, model server {environment['TEMPER_MODEL_SERVER']}")
    while not stopped:
        for sibling in siblings:
            sibling.keep_running()
        if not announced and _ready(url):
            announced = True
            click.echo(f"ready at {url} (documentation at {url}/docs)")
        time.sleep(0.1)
    for sibling in siblings:
        sibling.ask_to_end()
    for sibling in siblings:
        sibling.end(time.monotonic() + GRACE_S)
    click.echo("stopped")


def _environment(settings: Settings) -> dict[str, str]:
    """What the siblings shall read: these settings, with the model servers' addresses decided."""
    given = {f"TEMPER_{name.upper()}": str(value) for name, value in settings if value is not None}
    if settings.supervised:
        given["TEMPER_MODEL_SERVER"] = _address(LOCAL_TARGET)
    return {**os.environ, **given, "TEMPER_HOME": str(settings.home.resolve()), "PYTHONUNBUFFERED": "1"}


def _address(usual: str) -> str:
    host, _, port = usual.rpartition(":")
    return usual if _free(host, int(port)) else f"{host}:{free_port(host)}"


def _siblings(settings: Settings, environment: dict[str, str]) -> list[Sibling]:
    python = sys.executable
    siblings = [Sibling("gateway", [python, "-m", "api"], {**environment, **allocator_environment()})]
    if settings.supervised:
        address, rest = environment["TEMPER_MODEL_SERVER"], _address(LOCAL_REST)
        binary = _tensorflow_serving(settings.model_server)
        if binary is None:
            command = [python, "-m", "serving", "--address", address, "--rest-address", rest]
        else:
            port, rest_port = (int(each.rpartition(":")[2]) for each in (address, rest))
            config = settings.home.resolve() / "model_server.config"
            command = tensorflow_serving_command(binary, port, rest_port, config)
        siblings.append(Sibling("model server", command, environment))
    for number in range(settings.workers):
        siblings.append(Sibling(f"worker {number + 1}", [python, "-m", "trainer"], environment))
    return siblings


def _tensorflow_serving(wanted: str) -> str | None:
    """The binary to run, or None for the embedded server."""
    if wanted == EMBEDDED:
        return None
    binary = shutil.which("tensorflow_model_server" if wanted == AUTO else wanted)
    if binary is None and wanted != AUTO:
        raise click.ClickException(f"TEMPER_MODEL_SERVER: {wanted} is no program")
    return binary


def _free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False
