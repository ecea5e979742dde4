"""`temper serve`: one gateway, the workers and the model servers, each replaced when it dies or freezes."""

import errno
import fcntl
import functools
import json
import logging as standard
import math
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO

import click
import httpx
import structlog

from serving.registry import BASE
from serving.tensorflow_serving import INFO_LINE, tensorflow_serving_command
from store import logging
from store.engine import stored_revision
from store.errors import ModelServerTimeout, ModelServerUnavailable, StoreUnavailable, TemperError
from store.memory import allocator_environment, available_bytes
from store.processes import end_with_parent, free_port, has_tensorflow, module_command
from store.settings import (
    AUTO,
    EMBEDDED,
    LOCAL_TARGET,
    MAX_MODEL_SERVERS,
    Settings,
    unknown_variables,
    warn_of_unknown_variables,
)

GRACE_S = 10.0
PROBE_S, PROBE_TIMEOUT_S = 1.0, 2.0  # between probes of a sibling, and after which one has failed
PULSE_S = 5.0  # a worker touches its pulse file every second
MAX_MISSES = 5  # probes in a row without an answer, after which a sibling counts as frozen
SOCKETS = ("model_server.sock", *(f"model_server_{number}.sock" for number in range(2, MAX_MODEL_SERVERS + 1)))
LONGEST_SOCKET = 100  # bytes of a Unix socket's path; the system's limit is 107
# Available memory from which on a second model server runs: it takes 0.3 GB, the rest 1.3, decoding an upload up to 2.
STANDBY_BYTES = 4 << 30

log: structlog.stdlib.BoundLogger = structlog.get_logger("temper.supervisor")


@dataclass
class Sibling:
    """A process that is kept running.

    Attributes:
        answers: asks the process with this id for a sign of life; None where that cannot be known now.
        quiet: keep TensorFlow's INFO lines out of the log.
        start_at: in `time.monotonic()`; infinite for one that stands by, which waits until the service is ready.
    """

    name: str
    command: list[str]
    environment: Mapping[str, str]
    answers: Callable[[int], bool | None]
    quiet: bool = False
    process: subprocess.Popen[bytes] | None = None
    relay: threading.Thread | None = None  # of what it writes
    started_at: float = 0.0
    start_at: float = field(default_factory=time.monotonic)
    delay_s: float = 0.0

    def keep_running(self) -> None:
        """Start the process, or start it again; one that dies young waits, each time twice as long."""
        now = time.monotonic()
        if self.process is not None and self.process.poll() is not None:
            self.delay_s = min(10.0, max(0.5, 2 * self.delay_s)) if now - self.started_at < 10 else 0.0
            log.warning(f"{self.name} exited ({_reason(self.process.returncode)}); restarting in {self.delay_s:g} s")
            self.process, self.start_at = None, now + self.delay_s
        if self.process is None and now >= self.start_at:
            as_json = logging.is_json()
            self.process = subprocess.Popen(
                self.command, env=dict(self.environment), start_new_session=True, preexec_fn=end_with_parent,
                stdout=subprocess.PIPE if as_json else None,
                stderr=subprocess.STDOUT if as_json else subprocess.PIPE if self.quiet else None,
            )  # fmt: skip
            self.started_at = now
            if written := self.process.stdout or self.process.stderr:
                name = self.name if as_json else None
                self.relay = threading.Thread(target=_relay, args=(written, name), daemon=True)
                self.relay.start()

    def watch(self) -> None:
        """Kill the process when it has answered once and then no longer does; runs for ever."""
        pid, misses, answered = 0, 0, False
        while True:
            time.sleep(PROBE_S)
            process = self.process
            if process is None or process.poll() is not None:
                continue
            if process.pid != pid:
                pid, misses, answered = process.pid, 0, False
            try:
                answer = self.answers(pid)
            except Exception as exc:  # a home that cannot be read, for example; the watch must go on
                log.warning(f"cannot tell whether the {self.name} responds: {exc}")
                answer = None
            if answer is not None:
                answered |= answer
                misses = 0 if answer else misses + 1
            if answered and misses >= MAX_MISSES:
                log.warning(f"{self.name} is not responding; killing it")
                process.kill()

    def ask_to_end(self) -> None:
        """Send SIGTERM."""
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
        if self.relay is not None:
            self.relay.join(1.0)  # the last lines


def _relay(written: IO[bytes], name: str | None) -> None:
    """Pass on the lines of a sibling; with a name, what is not JSON (of a library in C++, say) as lines of ours."""
    for line in written:
        if INFO_LINE.match(line):
            continue
        if name is not None and not _is_record(line):
            if text := line.decode(errors="replace").strip():
                log.warning(text, process=name)
            continue
        sys.stderr.buffer.write(line)
        sys.stderr.buffer.flush()


def _is_record(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _reason(code: int) -> str:
    return f"exit code {code}" if code >= 0 else signal.Signals(-code).name


def serve(settings: Settings) -> None:
    """Run the service until SIGTERM or SIGINT.

    Raises:
        click.ClickException: the home, the store or the port cannot be used.
    """
    logging.configure("supervisor")
    standard.getLogger("httpx").setLevel(standard.WARNING)  # it tells of every probe
    warn_of_unknown_variables(os.environ)
    with ExitStack() as stack:
        stack.enter_context(_only_one_in(settings))
        _check_store(settings)
        settings = settings.model_copy(update={"port": settings.port or free_port(settings.host)})
        settings = _what_can_run(settings)
        check_address(settings.host, settings.port)
        sockets: list[Path] = []
        if settings.supervised:
            folder = stack.enter_context(_socket_folder(settings))
            sockets = [folder / name for name in SOCKETS[: _model_servers(settings)]]
        address = ",".join(f"unix:{path}" for path in sockets) or settings.model_server
        client = gateway_client(settings)
        siblings = _siblings(settings, address, sockets, client)
        # After the siblings' environment is made. The supervisor forks beside threads of gRPC, but only to execute.
        os.environ |= {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "NONE"}
        servers = "model servers" if "," in address else "model server"
        log.info(f"Temper starts in {settings.home.resolve()}, {servers} {address}")
        _run(siblings, url_of(settings), client)
    log.info("stopped")


def _run(siblings: list[Sibling], url: str, client: httpx.Client) -> None:
    stopped = announced = False

    def stop(_: int, __: FrameType | None) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    for sibling in siblings:
        threading.Thread(target=sibling.watch, daemon=True).start()
    while not stopped:
        for sibling in siblings:
            sibling.keep_running()
        if not announced and _answers(client, f"{url}/readyz"):
            announced = True
            for sibling in siblings:
                if sibling.start_at == math.inf:
                    sibling.start_at = time.monotonic()
            log.info(f"ready at {url} (documentation at {url}/docs)")
        time.sleep(0.1)
    for sibling in siblings:
        sibling.ask_to_end()
    for sibling in siblings:
        sibling.end(time.monotonic() + GRACE_S)


@contextmanager
def _only_one_in(settings: Settings) -> Iterator[None]:
    try:
        settings.make_home()
        lock = (settings.home / "serve.lock").open("w")
    except OSError as exc:
        raise click.ClickException(f"TEMPER_HOME cannot be used: {exc}") from exc
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise click.ClickException(f"another `temper serve` runs in {settings.home.resolve()}") from exc
        for stale in settings.home.glob("worker-*.pulse"):
            stale.unlink(missing_ok=True)
        yield


def _what_can_run(settings: Settings) -> Settings:
    """The settings without the worker and the embedded model server where TensorFlow is not installed."""
    if has_tensorflow():
        return settings
    embedded = settings.model_server in (AUTO, EMBEDDED) and tensorflow_serving_binary(settings.model_server) is None
    if settings.workers or embedded:
        parts = " and ".join(["no worker"] * bool(settings.workers) + ["no model server"] * embedded)
        log.warning("TensorFlow is not installed, so %s can run here: pip install 'temper[trainer]'", parts)
    server = {"model_server": LOCAL_TARGET} if embedded else {}
    return settings.model_copy(update={"workers": 0, **server})


def _check_store(settings: Settings) -> None:
    try:
        stored_revision(settings.store_url)
    except StoreUnavailable as exc:
        raise click.ClickException(exc.message) from exc


def check_address(host: str, port: int) -> None:
    """Raise `click.ClickException` if the gateway could not listen there; it says why."""
    where = f"cannot listen on {host}:{port}"
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except socket.gaierror as exc:
        raise click.ClickException(f"{where}: {host} is neither an address nor a known name (TEMPER_HOST)") from exc
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            raise click.ClickException(f"{where}: the port is taken; choose another with --port") from exc
        if exc.errno == errno.EADDRNOTAVAIL:
            raise click.ClickException(f"{where}: {host} is not an address of this machine (TEMPER_HOST)") from exc
        raise click.ClickException(f"{where}: {exc.strerror}") from exc


@contextmanager
def _socket_folder(settings: Settings) -> Iterator[Path]:
    """Directory for the model servers' Unix sockets, which only this user can enter."""
    if folder := socket_folder(settings):
        folder.mkdir(mode=0o700, exist_ok=True)
        yield folder
    else:
        with tempfile.TemporaryDirectory(prefix="temper-") as short:
            yield Path(short)


def socket_folder(settings: Settings) -> Path | None:
    """The directory in the home for sockets; None where its path is too long for one."""
    folder = settings.home.resolve() / "run"
    return folder if len(os.fsencode(folder / SOCKETS[-1])) <= LONGEST_SOCKET else None


def _model_servers(settings: Settings) -> int:
    """How many model servers to run."""
    return settings.model_servers or (2 if available_bytes() >= STANDBY_BYTES else 1)


def _model_server_command(settings: Settings, listen: Path) -> list[str]:
    binary = tensorflow_serving_binary(settings.model_server)
    if binary is None:
        return [*module_command("serving"), "--address", f"unix:{listen}", "--rest-address", ""]
    return tensorflow_serving_command(binary, 0, 0, settings.home.resolve() / "model_server.config", listen)


def _siblings(settings: Settings, address: str, sockets: Sequence[Path], client: httpx.Client) -> list[Sibling]:
    """All that `temper serve` runs, with a model server for each of the sockets."""
    url = url_of(settings)
    environment = _environment(settings, address)
    gateway = {**environment, **allocator_environment()}
    siblings = [Sibling("gateway", module_command("api"), gateway, lambda _: _answers(client, f"{url}/healthz"))]
    for number, listen in enumerate(sockets):
        command = _model_server_command(settings, listen)
        name = f"model server {number + 1}" if len(sockets) > 1 else "model server"
        quiet = command[0] != sys.executable
        its_own = {"TF_CPP_MIN_LOG_LEVEL": "1", **environment} if quiet else environment
        answers = functools.partial(_model_server_answers, f"unix:{listen}")
        siblings.append(Sibling(name, command, its_own, answers, quiet))
        if number:  # starting takes seconds of a core, which the others need until the service is ready
            siblings[-1].start_at = math.inf
    if settings.objects and sockets:
        siblings.append(Sibling("mirror", module_command("serving.mirror"), environment, lambda _: None))
    for number in range(settings.workers):
        siblings.append(Sibling(f"worker {number + 1}", module_command("trainer"), environment, WorkerPulse(settings)))
    return siblings


def _environment(settings: Settings, address: str) -> dict[str, str]:
    """What the siblings read: these settings, and where the model servers listen."""
    unknown = unknown_variables(os.environ)
    inherited = {name: value for name, value in os.environ.items() if name not in unknown}
    given = {f"TEMPER_{name.upper()}": str(value) for name, value in settings if value is not None}
    decided = {"TEMPER_MODEL_SERVER": address, "TEMPER_HOME": str(settings.home.resolve()), "PYTHONUNBUFFERED": "1"}
    return {**inherited, **given, **decided}


def _model_server_answers(address: str, _: int) -> bool:
    from serving.client import ModelServer  # gRPC reads its environment when it is imported

    try:
        with ModelServer(address) as server:
            server.states(BASE, PROBE_TIMEOUT_S)
    except (ModelServerUnavailable, ModelServerTimeout):
        return False
    except TemperError:
        pass  # an answer all the same
    return True


class WorkerPulse:
    """Tells whether a worker touches its pulse file, which it does whether or not it can reach the store."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._last: tuple[int, float, float] = (0, 0.0, 0.0)  # pid, time of the file, our time when it was first seen

    def __call__(self, pid: int) -> bool | None:
        """Answer for the worker with this id; None while it is warming up."""
        try:
            touched_at = self._settings.pulse_file(pid).stat().st_mtime
        except FileNotFoundError:
            return None
        if self._last[:2] != (pid, touched_at):
            self._last = (pid, touched_at, time.monotonic())
        return time.monotonic() - self._last[2] < PULSE_S


def gateway_client(settings: Settings) -> httpx.Client:
    """A client that threads share. With TLS it trusts the gateway's own certificate, whatever name that has."""
    if settings.tls_cert is None:
        return httpx.Client(timeout=PROBE_TIMEOUT_S, trust_env=False)
    try:
        context = ssl.create_default_context(cafile=settings.tls_cert)
    except OSError as exc:  # SSLError is one
        raise click.ClickException(f"TEMPER_TLS_CERT cannot be used: {settings.tls_cert}: {exc}") from exc
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return httpx.Client(timeout=PROBE_TIMEOUT_S, trust_env=False, verify=context)


def _answers(client: httpx.Client, url: str) -> bool:
    """Tell whether a URL answers as the gateway does where all is well: status 200, and JSON."""
    with suppress(httpx.HTTPError, ValueError):
        answer = client.get(url)
        return answer.status_code == 200 and answer.json() is not None
    return False


def url_of(settings: Settings) -> str:
    """The gateway's URL."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{settings.scheme}://{host}:{settings.port}"


def tensorflow_serving_binary(wanted: str) -> str | None:
    """The binary to run, or None for the embedded server."""
    if wanted == EMBEDDED:
        return None
    binary = shutil.which("tensorflow_model_server" if wanted == AUTO else wanted)
    if binary is None and wanted != AUTO:
        raise click.ClickException(f"TEMPER_MODEL_SERVER: {wanted} was not found or is not executable")
    return binary
