"""TLS between gateway and model server, with certificates made as docs/operations.md says."""

import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from serving.client import ModelServer
from serving.registry import BASE
from store.errors import ModelServerUnavailable
from store.processes import free_port
from store.settings import ClientTLS, from_environment
from tests.conftest import PostgreSQL, eventually, listens

PAGE = Path(__file__).parents[2] / "docs/operations.md"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the CA and the certificates of all parts."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    folder = tmp_path_factory.mktemp("keys")
    (commands,) = re.findall(r"```bash\n(curve=.*?)```", PAGE.read_text(), re.DOTALL)
    subprocess.run(["bash", "-euc", commands], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def store(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a PostgreSQL server that speaks TLS. Not for this process: see `Worker._run`."""
    folder = tmp_path_factory.mktemp("postgresql")
    server = PostgreSQL(folder)
    server.stop()
    cert, key = (shutil.copy(keys / f"model-server.{kind}", folder / kind) for kind in ("crt", "key"))
    if os.getuid() == 0:
        shutil.chown(key, "postgres")
    tls = ["-c", "ssl=on", "-c", f"ssl_cert_file={cert}", "-c", f"ssl_key_file={key}"]
    port = server.url.rpartition(":")[2].partition("/")[0]
    with subprocess.Popen([*server._command, *tls], stderr=subprocess.DEVNULL, cwd="/") as process:
        try:
            eventually(lambda: listens(int(port)), "PostgreSQL listens")
            yield f"{server.url}?sslmode=verify-full&sslrootcert={keys / 'ca.crt'}"
        finally:
            process.send_signal(signal.SIGINT)


def presented(keys: Path, part: str | None) -> ClientTLS:
    cert, key = (keys / f"{part}.crt", keys / f"{part}.key") if part else (None, None)
    return ClientTLS(keys / "ca.crt", cert, key)


@contextmanager
def secured(keys: Path) -> Iterator[tuple[str, str]]:
    """The addresses, gRPC and REST, of a model server that demands certificates."""
    port, rest = free_port(), free_port()
    command: list[str | Path] = [
        sys.executable, "-m", "serving", "--address", f"127.0.0.1:{port}", "--rest-address", f"127.0.0.1:{rest}",
        "--tls-cert", keys / "model-server.crt", "--tls-key", keys / "model-server.key",
        "--client-ca", keys / "ca.crt",
    ]  # fmt: skip
    with subprocess.Popen(command) as process:
        try:
            eventually(lambda: listens(port) and listens(rest), "the model server listens")
            yield f"127.0.0.1:{port}", f"https://127.0.0.1:{rest}"
        finally:
            process.kill()


@contextmanager
def running(module: str, keys: Path, part: str, home: Path, **more: str) -> Iterator[None]:
    """A process of ours that has the certificate of its part."""
    files = {"MODEL_SERVER_CA": "ca.crt", "MODEL_SERVER_CERT": f"{part}.crt", "MODEL_SERVER_KEY": f"{part}.key"}
    if part == "gateway":
        files |= {"TLS_CERT": "gateway.crt", "TLS_KEY": "gateway.key"}
    settings = {f"TEMPER_{name}": str(keys / file) for name, file in files.items()}
    with subprocess.Popen(
        [sys.executable, "-m", module], env={**os.environ, "TEMPER_HOME": str(home), **settings, **more}
    ) as process:  # fmt: skip
        try:
            yield
        finally:
            process.terminate()


@pytest.mark.exhaustive
def test_gateway_and_worker_reach_a_model_server_that_lets_in_nobody_else(
    keys: Path, store: str, tmp_path: Path
) -> None:
    with secured(keys) as (target, rest):
        parts = {"TEMPER_MODEL_SERVER": target, "TEMPER_STORE": store}
        trusting, port = ssl.create_default_context(cafile=str(keys / "ca.crt")), free_port()
        with (
            running("api", keys, "gateway", tmp_path, TEMPER_PORT=str(port), **parts),
            running("trainer", keys, "worker", tmp_path, **parts),
            httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusting) as api,
        ):
            raw = {"Content-Type": "application/octet-stream"}

            def predicted() -> bool:
                return api.post(f"/predict?model={BASE}", content=bytes(784), headers=raw).status_code == 200

            eventually(predicted, "the worker has published the base, and the gateway predicts with it")
        with ModelServer(target, presented(keys, "worker")) as server:
            assert server.available(BASE) == {1}
        for stranger in (None, presented(keys, None)):  # in clear, and without a certificate
            with ModelServer(target, stranger) as server, pytest.raises(ModelServerUnavailable):
                server.states(BASE, 2)
        status = f"{rest}/v1/models/{BASE}"
        with pytest.raises(httpx.TransportError):
            httpx.get(status.replace("https", "http"))
        with pytest.raises(httpx.TransportError):
            httpx.get(status, verify=trusting)
        trusting.load_cert_chain(keys / "worker.crt", keys / "worker.key")
        assert httpx.get(status, verify=trusting).json()["model_version_status"][0]["state"] == "AVAILABLE"


def test_another_database_in_the_place_of_ours_is_not_believed(keys: Path, store: str, tmp_path: Path) -> None:
    url = store.replace("ca.crt", "worker.crt")
    environment = {**os.environ, "TEMPER_HOME": str(tmp_path), "TEMPER_STORE": url}
    done = subprocess.run([sys.executable, "-m", "api"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "certificate verify failed" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tls-cert", "gateway.crt"], "need each other"),
        (["--client-ca", "ca.crt"], "--client-ca needs both"),
        (["--tls-cert", "gateway.crt", "--tls-key", "gateway.key", "--address", "unix:/x"], "nothing is encrypted on"),
        (["--tls-cert", "gateway.crt", "--tls-key", "worker.key"], "cannot use gateway.crt, worker.key: "),
    ],
)
def test_options_that_would_not_protect_are_refused(keys: Path, options: list[str], says: str) -> None:
    root = PAGE.parents[1]
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from serving.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *options], cwd=keys, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["CERT", "CA"], "TEMPER_MODEL_SERVER_CERT and TEMPER_MODEL_SERVER_KEY need each other"),
        (["KEY", "CA"], "TEMPER_MODEL_SERVER_CERT and TEMPER_MODEL_SERVER_KEY need each other"),
        (["CERT", "KEY"], "needs TEMPER_MODEL_SERVER_CA"),
    ],
)
def test_half_of_the_settings_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: list[str], says: str
) -> None:
    file = tmp_path / "x.pem"
    file.touch()
    for name in given:
        monkeypatch.setenv(f"TEMPER_MODEL_SERVER_{name}", str(file))
    with pytest.raises(ValueError, match=says):
        from_environment()
