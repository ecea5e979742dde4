"""`temper doctor`: what is wrong with an installation, and what to do about it.

Every check looks at the real thing, whether or not the service runs, and changes nothing but for a small file in the
home, and one in the object store, that it writes and removes.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import click
import httpx
import sqlalchemy as sa
from pydantic import ValidationError

from cli.supervisor import (
    STANDBY_BYTES,
    check_address,
    gateway_client,
    socket_folder,
    tensorflow_serving_binary,
    url_of,
)  # fmt: skip
from serving.registry import BASE, Registry
from store.disk import LOW_BYTES, is_full
from store.engine import now, reason
from store.errors import ObjectStoreUnavailable, StorageFailed, TemperError
from store.memory import available_bytes
from store.migrations import HEAD, revision
from store.objects import objects_of
from store.processes import has_tensorflow
from store.records import public_name
from store.settings import ClientTLS, Settings, is_loopback, unknown_variables
from trainer.jobs.statistics import Statistics

Level = Literal["ok", "warning", "fault"]

TENSORFLOW = "2.21"  # as in pyproject.toml
WORKING_BYTES = 1300 << 20  # memory that gateway, worker and model server take
LITTLE_BYTES = 1 << 30  # of disk: some hundred versions
SKEW_S = 2.0
EXPIRY_DAYS = 30
CONNECT_S = 3.0
IMPORT_S = 180.0
MODELS = 50  # whose versions are looked for at a model server
RESTORE = "stop the service, move the home away, and bring back a backup (docs/operations.md)"
NVIDIA = (Path("/dev/nvidiactl"), Path("/dev/dxg"))  # a driver's devices, the latter within WSL
LOOK = """
import json
from serving.quiet import import_tensorflow
import_tensorflow()
import tensorflow as tf
gpus = [gpu.name for gpu in tf.config.list_physical_devices("GPU")]
print(json.dumps({"version": tf.__version__, "gpus": gpus, "cuda": tf.test.is_built_with_cuda()}))
"""


@dataclass(frozen=True)
class Finding:
    """What a check has found, and what to do about it unless all is well."""

    check: str
    level: Level
    found: str
    advice: str | None = None


Findings = Iterator[tuple[Level, str, str | None]]


def ok(found: str) -> tuple[Level, str, str | None]:
    """A check that has found nothing wrong."""
    return "ok", found, None


def warning(found: str, advice: str) -> tuple[Level, str, str | None]:
    """Something that works, or is not needed everywhere."""
    return "warning", found, advice


def fault(found: str, advice: str) -> tuple[Level, str, str | None]:
    """Something that does not work."""
    return "fault", found, advice


def examine() -> Iterator[Finding]:
    """Make every check, and yield what each finds."""
    os.environ |= {"GRPC_VERBOSITY": "NONE"}  # read when gRPC is imported, which would log every refused handshake
    settings, found = read_settings()
    yield from (Finding("settings", *each) for each in found)
    for check, look in CHECKS.items():
        try:
            yield from (Finding(check, *each) for each in look(settings))
        except Exception as exc:  # one check that fails must not hide what the others find
            text = f"could not be checked: {type(exc).__name__}: {' '.join(str(exc).split())}"
            yield Finding(check, "fault", text, "please report this as a bug of temper doctor")


def read_settings() -> tuple[Settings, list[tuple[Level, str, str | None]]]:
    """The settings, with defaults for those that are wrong, and what is wrong."""
    found: list[tuple[Level, str, str | None]] = []
    replaced: dict[str, Any] = {}
    together = ({"tls_cert", "tls_key"}, {"model_server_ca", "model_server_cert", "model_server_key"})
    while True:
        try:
            settings = Settings(**replaced)
            break
        except ValidationError as exc:
            for error in exc.errors():
                name = str(error["loc"][0])
                said = error["msg"].removeprefix("Value error, ")
                found.append(fault(f"TEMPER_{name.upper()}: {said}", "correct the variable, or unset it"))
                for other in {name}.union(*(group for group in together if name in group)):
                    replaced[other] = Settings.model_fields[other].default
    for name, nearest in unknown_variables(os.environ).items():
        advice = f"did you mean {nearest}?" if nearest else "unset it; docs/reference/settings.md lists the settings"
        found.append(warning(f"{name} is not a setting and is ignored", advice))
    known = {f"TEMPER_{name.upper()}" for name in Settings.model_fields}
    given = sorted(name for name in os.environ if name.upper() in known)
    return settings, found or [ok(f"{', '.join(given)} given, the rest as by default" if given else "all by default")]


def _python(_: Settings) -> Findings:
    version = ".".join(map(str, sys.version_info[:3]))
    if (3, 11) <= sys.version_info[:2] < (3, 14):
        yield ok(f"Python {version} at {sys.executable}")
    else:
        yield fault(f"Python {version} is not supported", "use Python 3.11, 3.12 or 3.13")


def _tensorflow(settings: Settings) -> Findings:
    """Whether TensorFlow can be imported, and which devices it sees."""
    if not has_tensorflow():
        text = "TensorFlow is not installed: this machine can run a gateway, but no worker and no embedded model server"
        if settings.supervised or settings.workers:
            yield warning(text, "pip install 'temper[trainer]', unless only `python -m api` is to run here")
        else:
            yield ok(text)
        return
    done = subprocess.run(
        [sys.executable, "-c", LOOK], capture_output=True, text=True, check=False, timeout=IMPORT_S, env=os.environ
    )
    if done.returncode:
        last = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
        installed = importlib.metadata.version("tensorflow")
        yield fault(f"TensorFlow {installed} cannot be imported: {last}", "pip install --force-reinstall tensorflow")
        return
    seen = json.loads(done.stdout.splitlines()[-1])
    if seen["version"].startswith(f"{TENSORFLOW}."):
        yield ok(f"TensorFlow {seen['version']}")
    else:
        text = f"TensorFlow {seen['version']} is installed; Temper is tested with {TENSORFLOW}"
        yield warning(text, f"pip install 'tensorflow=={TENSORFLOW}.*'")
    yield _devices(seen["gpus"], seen["cuda"])


def _devices(gpus: list[str], cuda: bool) -> tuple[Level, str, str | None]:
    """Which GPUs workers use, or why none."""
    cores = len(os.sched_getaffinity(0))
    if gpus:
        return ok(f"workers train on {', '.join(gpus)}")
    if not any(path.exists() for path in NVIDIA):
        return ok(f"no NVIDIA GPU on this machine; workers train on {cores} cores")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        return warning("CUDA_VISIBLE_DEVICES hides the GPU of this machine", "unset it, or name the GPU to use")
    if not cuda:
        return warning("this TensorFlow is built without CUDA, and leaves the GPU unused", "pip install 'temper[gpu]'")
    text = "TensorFlow does not see the GPU of this machine: its driver or CUDA's libraries are missing or too old"
    return warning(text, "pip install 'temper[gpu]', and see whether nvidia-smi works")


def _memory(_: Settings) -> Findings:
    free = available_bytes()
    text = f"{free / 2**30:.1f} GiB of memory are available"
    if free < WORKING_BYTES:
        yield warning(
            f"{text}; the running service takes about {WORKING_BYTES / 2**30:.1f}", "free memory, or add some"
        )
    else:
        yield ok(f"{text}{'' if free >= STANDBY_BYTES else '; too little for a standby of the model server'}")


def _port(settings: Settings) -> Findings:
    """Whether the gateway can listen, or does."""
    if not settings.port:
        yield ok("the gateway takes a free port")
        return
    where = f"{settings.host}:{settings.port}"
    try:
        check_address(settings.host, settings.port)
    except click.ClickException as exc:
        if "taken" not in exc.message:
            yield fault(exc.message, "correct TEMPER_HOST, or take a port above 1023 with TEMPER_PORT")
        elif _is_gateway(settings):
            yield ok(f"a gateway answers on {where}")
        else:
            holder = _listener(settings.port)
            taken = f"{where} is taken by {holder or 'another program'}, which does not answer as a gateway"
            what = "HTTPS" if settings.tls_cert else "plain HTTP"
            advice = "choose another port with TEMPER_PORT; if it is a gateway, run the doctor with its TEMPER_TLS_CERT"
            yield fault(f"{taken} over {what}", advice)
    else:
        yield ok(f"{where} is free")


def _is_gateway(settings: Settings) -> bool:
    """Tell whether a gateway listens on the configured address."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)  # noqa: S104 # nosec B104
    url = url_of(settings.model_copy(update={"host": host}))
    with contextlib.suppress(httpx.HTTPError, ValueError, click.ClickException), gateway_client(settings) as client:
        answer = client.get(f"{url}/healthz")
        return answer.json() == {"status": "ok"} and "x-request-id" in answer.headers
    return False


def _listener(port: int) -> str | None:
    """The program that listens on a TCP port, as far as this user may see it."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text(encoding="ascii").splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(os.readlink(handle) in inodes for handle in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text(encoding='utf-8').strip()} (process {process.name})"
    return None


def _is_writable(folder: Path) -> bool:
    """Tell whether files can be made in a directory; permissions alone say yes to root everywhere."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _home(settings: Settings) -> Findings:
    """Whether the home can be written, has space, and is one file system, as publishing by rename needs."""
    home = settings.home.resolve()
    if not home.exists():
        parent = next(path for path in home.parents if path.exists())
        if _is_writable(parent):
            yield ok(f"{home} does not exist yet; the service creates it")
        else:
            yield fault(f"{home} cannot be created: {parent} is not writable", "correct TEMPER_HOME or the permissions")
        return
    places = [path for path in (settings.staging, settings.models) if path.is_dir()]
    places = places if len(places) == 2 else [home, home]
    advice = f"give this user (id {os.getuid()}) the right to write there, or correct TEMPER_HOME"
    name = f".doctor-{os.getpid()}"
    written, moved = places[0] / name, places[1] / name
    try:
        with written.open("xb") as file:
            file.write(b"temper doctor")
            file.flush()
            os.fsync(file.fileno())
        if places[0] == places[1]:
            moved = moved.with_suffix(".moved")
        written.rename(moved)
    except OSError as exc:
        if places[0].stat().st_dev != places[1].stat().st_dev:
            apart = f"{settings.staging} and {settings.models} are on different file systems: nothing can be published"
            yield fault(apart, "put all of TEMPER_HOME on one file system")
        elif is_full(exc):
            yield fault(f"no space is left at {home}", "delete models or data sets, or enlarge the disk")
        else:
            yield fault(f"{home} cannot be used: {exc.strerror or exc}", advice)
        return
    finally:
        for path in (written, moved):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
    free = shutil.disk_usage(home).free
    text = f"{home} can be written, and has {free / 2**30:.1f} GiB left"
    if free < LOW_BYTES:
        yield fault(text, "delete models or data sets, or enlarge the disk: uploads and fine-tunes are about to fail")
    elif free < LITTLE_BYTES:
        yield warning(text, "lower TEMPER_KEEP_VERSIONS, delete models, or enlarge the disk")
    else:
        yield ok(text)


def _certificates(settings: Settings) -> Findings:
    """Whether keys belong to their certificates, and until when these are valid."""
    pairs = {
        "TLS": (settings.tls_cert, settings.tls_key),
        "MODEL_SERVER": (settings.model_server_cert, settings.model_server_key),
    }
    for prefix, (cert, key) in pairs.items():
        if cert is None or key is None:
            continue
        variables = f"TEMPER_{prefix}_CERT and TEMPER_{prefix}_KEY"
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")  # nosec B106
        except OSError as exc:  # ssl.SSLError is one
            if isinstance(exc, ssl.SSLError) and exc.reason == "KEY_VALUES_MISMATCH":
                yield fault(f"{key} is not the key of {cert}", f"let {variables} name a pair")
            else:
                why = getattr(exc, "reason", None) or exc.strerror or exc
                yield fault(f"{cert} and {key} cannot be used: {why}", f"{variables} must be PEM, without a passphrase")
            continue
        if stat.S_IMODE(key.stat().st_mode) & 0o077:
            yield warning(f"{key} can be read by other users of this machine", f"chmod 600 {key}")
        yield _validity(cert)
    if settings.model_server_ca:
        yield _validity(settings.model_server_ca)
    elif settings.tls_cert is None:
        yield ok("none are set")


def _validity(cert: Path) -> tuple[Level, str, str | None]:
    """Until when the first certificate of a file is valid."""
    try:
        decoded = ssl._ssl._test_decode_cert(str(cert))  # type: ignore[attr-defined]  # nothing public reads a file
    except OSError:
        return fault(f"{cert} is not a certificate in PEM", "give a file that begins with BEGIN CERTIFICATE")
    begins, ends = (ssl.cert_time_to_seconds(decoded[name]) for name in ("notBefore", "notAfter"))
    days = (ends - time.time()) / 86400
    renew = "make a new one (docs/operations.md), and restart the processes that use it"
    if days < 0:
        return fault(f"{cert} has expired on {decoded['notAfter']}", renew)
    if begins > time.time():
        return fault(f"{cert} is not valid before {decoded['notBefore']}", "correct this machine's clock, or wait")
    if days < EXPIRY_DAYS:
        return warning(f"{cert} expires in {days:.0f} days", renew)
    return ok(f"{cert} is valid for {days:.0f} days")


@contextlib.contextmanager
def _opened(settings: Settings) -> Iterator[sa.Connection | None]:
    """A connection to the store that cannot change it; None if it is a file that does not exist yet.

    Raises:
        sa.exc.SQLAlchemyError: it is away.
        ImportError: its driver is not installed.
    """
    url = sa.make_url(settings.store_url)
    arguments: dict[str, Any] = {}
    if url.get_backend_name() == "sqlite":
        file = Path(url.database or "")
        if not file.is_file():
            yield None
            return
        # Without a write-ahead log nobody has the file open, and reading it may create none.
        mode = "mode=ro" if file.with_name(f"{file.name}-wal").exists() else "immutable=1"
        url = sa.make_url(f"sqlite:///file:{file}?{mode}&uri=true")
    elif url.get_backend_name() == "postgresql":
        arguments = {"connect_timeout": int(CONNECT_S), "options": "-c default_transaction_read_only=on"}
    engine = sa.create_engine(url, connect_args=arguments, poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _store(settings: Settings) -> Findings:
    """Whether the store can be reached, is whole, has this release's schema and agrees on the time."""
    try:
        url = sa.make_url(settings.store_url)
        shown = url.render_as_string(hide_password=True)
        with _opened(settings) as connection:
            if connection is None:
                folder = Path(url.database or "").parent
                if folder in (settings.home, settings.home.resolve()) or _is_writable(folder):
                    yield ok(f"{shown} does not exist yet; the service creates it")
                else:
                    yield fault(f"{shown} cannot be created in {folder}", "correct TEMPER_STORE or the permissions")
                return
            yield from _contents(connection, shown)
    except sa.exc.ArgumentError as exc:
        yield fault(f"TEMPER_STORE is not a database URL: {reason(exc)}", "as in postgresql+psycopg://user@host/name")
    except ImportError as exc:
        yield fault(f"the driver for TEMPER_STORE is not installed: {exc}", "pip install 'temper[postgres]'")
    except sa.exc.OperationalError as exc:
        yield fault(f"{shown} cannot be used: {reason(exc)}", "correct TEMPER_STORE, or start the database")
    except sa.exc.DatabaseError as exc:
        if url.get_backend_name() == "sqlite":
            yield fault(f"{shown} is damaged: {reason(exc)}", RESTORE)
        else:
            yield fault(f"{shown} refuses: {reason(exc)}", "let the user of TEMPER_STORE own the database it names")


def _contents(connection: sa.Connection, shown: str) -> Findings:
    before = time.time()
    at = connection.execute(sa.select(now())).scalar_one()
    skew_s = at - (before + time.time()) / 2
    if connection.dialect.name == "sqlite":
        said = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if said != "ok":
            yield fault(f"{shown} is damaged: {said}", RESTORE)
            return
        kind = "SQLite"
    else:
        kind = f"PostgreSQL {connection.exec_driver_sql('SHOW server_version').scalar_one()}"
        yield _skew(skew_s)
        encrypted = connection.exec_driver_sql("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").scalar()
        host = connection.engine.url.host
        if host and not encrypted and not is_loopback(host):
            yield warning(f"the connection to {host} is not encrypted", "add ?sslmode=verify-full to TEMPER_STORE")
    stored = revision(connection)
    if stored is None and not sa.inspect(connection).has_table("jobs"):
        yield ok(f"{shown} ({kind}) is empty; the service fills it")
    elif stored is not None and stored > HEAD:
        text = f"{shown} has schema {stored} of a newer release; this one knows {HEAD}"
        yield fault(text, "install the newer release, or restore a backup from before it was used")
    elif stored != HEAD:
        text = f"{shown} has schema {stored or 'without a number'} of an earlier release; this one has {HEAD}"
        yield warning(text, "back it up; the next process that starts brings it up to date")
    else:
        yield ok(f"{shown} ({kind}) has schema {stored}")


def _skew(seconds: float) -> tuple[Level, str, str | None]:
    """Whether the database's clock agrees with ours."""
    text = f"the database's clock is {abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'} this machine's"
    if abs(seconds) > SKEW_S:
        return warning(text, "synchronize the clocks (NTP): times of jobs and of log lines disagree")
    return ok(text)


def _is_served(home: Path) -> bool:
    """Tell whether `temper serve` runs in a home, without taking its lock for a moment, which might disturb one."""
    try:
        inode = (home / "serve.lock").stat().st_ino
        locks = Path("/proc/locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return False
    return any(f":{inode} " in line and "FLOCK" in line for line in locks)


def _model_servers(settings: Settings) -> Findings:
    if not settings.supervised:
        for address in settings.server_addresses:
            yield from _model_server(settings, address)
        return
    try:
        binary = tensorflow_serving_binary(settings.model_server)
    except click.ClickException as exc:
        yield fault(exc.message, "install it there, correct the path, or set TEMPER_MODEL_SERVER=embedded")
        return
    kind = binary or "the embedded server"
    if not _is_served(settings.home):
        if binary is None and not has_tensorflow():
            text = "there is no model server to start: TensorFlow is not installed"
            yield warning(text, "set TEMPER_MODEL_SERVER to the host:port of one, or pip install 'temper[trainer]'")
        elif binary and "model_server" not in Path(binary).name:
            yield warning(f"{binary} does not look like TensorFlow Serving", "name its tensorflow_model_server")
        else:
            yield ok(f"`temper serve` does not run in this home; it would start {kind}")
        return
    folder = socket_folder(settings)
    sockets = sorted(folder.glob("*.sock")) if folder else []
    for path in sockets:
        yield from _model_server(settings, f"unix:{path}")
    if not sockets:
        yield ok("`temper serve` runs, with its sockets elsewhere because the path of the home is long; see /readyz")


def _model_server(settings: Settings, address: str) -> Findings:
    """Whether a model server answers, how it speaks, and what it serves."""
    from serving.client import ModelServer, credentials

    tls = settings.model_server_tls
    how = "over TLS" if credentials(address, tls) else "without encryption"
    try:
        with ModelServer(address, tls) as server:
            served = server.available(BASE, CONNECT_S)
            missing = _missing(settings, server.available)
    except TemperError as exc:
        yield _unreachable(address, tls, exc.message)
        return
    versions = ", ".join(map(str, sorted(served)))
    if missing:
        some = f"{', '.join(missing[:3])}{' and others' if len(missing) > 3 else ''}"
        text = f"{address} answers {how}, but does not serve {some}"
        yield warning(text, "see its log; does it see the directory of the models (TEMPER_MODEL_ROOT)?")
    elif not served:
        yield warning(f"{address} answers {how}, and serves nothing yet", "start a worker, which publishes the base")
    else:
        yield ok(f"{address} answers {how}, and serves {BASE} {versions} and all else that is live")


def _missing(settings: Settings, available: Callable[[str], set[int]]) -> list[str]:
    """Versions that the store names and a model server does not serve, of the first `MODELS` models."""
    with contextlib.suppress(sa.exc.SQLAlchemyError, ImportError), _opened(settings) as connection:
        if connection is not None and revision(connection) == HEAD:
            wanted = list(Registry(connection.engine).wanted().items())[:MODELS]
            return [
                f"{public_name(model)}:{version}" for model, versions in wanted
                for version in sorted(set(versions) - available(model))
            ]  # fmt: skip
    return []


def _unreachable(address: str, tls: ClientTLS | None, said: str) -> tuple[Level, str, str | None]:
    """Why a model server does not answer."""
    if address.startswith("unix:"):
        return fault(f"{said}", "see the log of `temper serve`, which restarts it")
    host, _, port = address.rpartition(":")
    where = (host.strip("[]"), int(port))
    try:
        socket.create_connection(where, CONNECT_S).close()
    except OSError as exc:
        text = f"nobody answers at {address}: {exc.strerror or exc}"
        return fault(text, f"start it (temper model-server --address {address}), or correct TEMPER_MODEL_SERVER")
    encrypted = _handshake(where, None) is None
    if tls is None and encrypted:
        return fault(f"{address} speaks TLS", "set TEMPER_MODEL_SERVER_CA to the certificate of the CA of its own")
    if tls is None:
        return fault(f"{address} listens, but does not answer as a model server", "correct TEMPER_MODEL_SERVER")
    if not encrypted:
        advice = "start it with --tls-cert and --tls-key, or unset TEMPER_MODEL_SERVER_CA"
        return fault(f"{address} speaks plain text where TEMPER_MODEL_SERVER_CA expects TLS", advice)
    try:
        failure = _handshake(where, tls)
    except OSError as exc:
        return fault(f"the certificates for model servers cannot be used: {exc}", "see the check of certificates")
    if isinstance(failure, ssl.SSLCertVerificationError):
        advice = "let TEMPER_MODEL_SERVER_CA name the CA that signed it, and the certificate the address in use"
        return fault(f"the certificate of {address} is refused: {failure.verify_message}", advice)
    if failure is not None:
        advice = "set TEMPER_MODEL_SERVER_CERT and TEMPER_MODEL_SERVER_KEY to a pair that its --client-ca has signed"
        return fault(f"{address} does not accept the certificate of its client, or there is none", advice)
    return fault(f"{address} speaks TLS, but does not answer as a model server: {said}", "correct TEMPER_MODEL_SERVER")


def _handshake(where: tuple[str, int], tls: ClientTLS | None) -> OSError | None:
    """What goes wrong when we speak TLS to a server as its client does; without `tls`, trusting anybody.

    Raises:
        OSError: our own files cannot be used.
    """
    context = ssl.create_default_context(cafile=tls.ca if tls else None)
    context.set_alpn_protocols(["h2"])
    if tls is None:
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    elif tls.cert:
        context.load_cert_chain(tls.cert, tls.key, password="")  # nosec B106
    try:
        with (
            socket.create_connection(where, CONNECT_S) as plain,
            context.wrap_socket(plain, server_hostname=where[0]) as secure,
            contextlib.suppress(TimeoutError),  # of what follows: something that waits for us to speak
        ):
            # A server that refuses our certificate says so only after the handshake of TLS 1.3, or just hangs up. One
            # that does not begins with its settings.
            if tls is not None and not secure.recv(1):
                return ConnectionResetError("closed after the handshake")
    except OSError as exc:
        return exc
    return None


def _workers(settings: Settings) -> Findings:
    """Whether somebody runs the jobs."""
    try:
        with _opened(settings) as connection:
            if connection is None or revision(connection) != HEAD:
                yield ok("not known before the store has this release's schema")
                return
            found = Statistics(connection.engine).snapshot()
    except (sa.exc.SQLAlchemyError, ImportError):
        yield ok("not known while the store is away")
        return
    living = {state: count for state, count in found.workers.items() if count}
    waiting = found.jobs["queued"]
    if living:
        yield ok(f"{', '.join(f'{count} {state}' for state, count in living.items())}; {waiting} jobs are queued")
    elif waiting:
        text = (
            f"{waiting} jobs are queued, the oldest for {found.oldest_queued_s:.0f} s, and no worker sends heartbeats"
        )
        yield fault(text, "start one (`temper serve`, or `temper worker`), or see its log for why it ended")
    else:
        yield warning("no worker sends heartbeats", "start one before somebody fine-tunes: `temper serve`")


def _objects(settings: Settings) -> Findings:
    """Whether the object store can be used."""
    if not settings.objects:
        yield ok("none: all machines share the home")
        return
    try:
        objects_of(settings).probe()
    except ObjectStoreUnavailable as exc:
        yield fault(f"{settings.objects}: {exc.message}", "start it, or correct AWS_ENDPOINT_URL")
    except StorageFailed as exc:
        yield fault(f"{settings.objects}: {exc.message}", "correct TEMPER_OBJECTS, the key (AWS_*), or its policy")
    else:
        yield ok(f"{settings.objects} can be written, read and deleted from")


def _traces(settings: Settings) -> Findings:
    """Whether traces can be sent."""
    if not settings.traces:
        yield ok("off")
        return
    url = urlsplit(settings.traces)
    if importlib.util.find_spec("opentelemetry") is None or not _has("opentelemetry-exporter-otlp-proto-http"):
        yield fault("TEMPER_TRACES is set, but OpenTelemetry is not installed", "pip install 'temper[otel]'")
        return
    port = url.port or (443 if url.scheme == "https" else 80)
    try:
        socket.create_connection((url.hostname or "", port), CONNECT_S).close()
    except OSError as exc:
        text = f"the collector at {url.hostname}:{port} cannot be reached: {exc.strerror or exc}"
        yield warning(text, "start it, or correct TEMPER_TRACES; without it traces are lost, and nothing else")
    else:
        yield ok(f"the collector at {url.hostname}:{port} listens")


def _has(distribution: str) -> bool:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version(distribution)
        return True
    return False


CHECKS: dict[str, Callable[[Settings], Findings]] = {
    "python": _python,
    "tensorflow": _tensorflow,
    "memory": _memory,
    "port": _port,
    "home": _home,
    "certificates": _certificates,
    "store": _store,
    "object store": _objects,
    "model server": _model_servers,
    "workers": _workers,
    "traces": _traces,
}
