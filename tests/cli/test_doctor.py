"""`temper doctor`: every fault is made, found, and has an advice; a sound service has none."""

import json
import os
import shutil
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from cli import doctor
from cli.doctor import CHECKS, TENSORFLOW
from serving.pb import model_server_pb2 as pb
from store.engine import connect
from store.processes import free_port
from store.records import DatasetCard
from store.settings import Settings
from tests.api.test_health import damage, fill, small_disk  # noqa: F401  (a fixture)
from tests.conftest import Service
from trainer.jobs.records import Jobs

ROOT = Path(__file__).parents[2]


def found(check: str, settings: Settings) -> list[tuple[str, str, str]]:
    """Level, finding and advice; everything but `ok` has one."""
    findings: list[tuple[str, str, str]] = [
        (level, text, advice or "") for level, text, advice in CHECKS[check](settings)
    ]
    assert all((level == "ok") == (advice == "") for level, _, advice in findings)
    return findings


def one(check: str, settings: Settings) -> tuple[str, str, str]:
    (finding,) = found(check, settings)
    return finding


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def self_signed(folder: Path, name: str, days: int = 365) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    cert, key = folder / f"{name}.crt", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", cert, "-days", str(days), "-subj", f"/CN={name}",
         "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    key.chmod(0o600)
    return cert, key


@contextmanager
def model_server(credentials: grpc.ServerCredentials | None = None) -> Iterator[str]:
    """The address of a server that serves version 7 of every model."""
    available = pb.ModelVersionStatus(version=7, state=pb.ModelVersionStatus.AVAILABLE)
    status = grpc.unary_unary_rpc_method_handler(
        lambda _, __: pb.GetModelStatusResponse(model_version_status=[available]),
        pb.GetModelStatusRequest.FromString, pb.GetModelStatusResponse.SerializeToString,
    )  # fmt: skip
    server = grpc.server(ThreadPoolExecutor(1))
    handlers = grpc.method_handlers_generic_handler("tensorflow.serving.ModelService", {"GetModelStatus": status})
    server.add_generic_rpc_handlers((handlers,))
    address = "127.0.0.1:0"
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def test_settings_that_are_wrong_or_unknown_are_named_and_the_rest_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TEMPER_PORT", "many")
    monkeypatch.setenv("TEMPER_TLS_KEY", str(tmp_path))
    monkeypatch.setenv("TEMPER_WORKRES", "2")
    monkeypatch.setenv("TEMPER_HOME", str(tmp_path))
    settings, findings = doctor.read_settings()
    assert (settings.home, settings.port, settings.tls_key) == (tmp_path, 8080, None)
    said = {text.partition(" ")[0]: (level, advice) for level, text, advice in findings}
    assert said["TEMPER_PORT:"][0] == said["TEMPER_TLS_KEY:"][0] == "fault"
    assert said["TEMPER_WORKRES"] == ("warning", "did you mean TEMPER_WORKERS?")


def test_a_port_is_free_or_a_gateways_or_taken_by_a_program_that_is_named(service: Service, tmp_path: Path) -> None:
    assert one("port", Settings(port=free_port()))[0] == "ok"
    level, text, _ = one("port", Settings(port=int(service.url.rpartition(":")[2])))
    assert (level, "a gateway answers" in text) == ("ok", True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        level, text, advice = one("port", Settings(port=other.getsockname()[1]))
    assert (level, f"(process {os.getpid()})" in text, "TEMPER_PORT" in advice) == ("fault", True, True)
    level, text, advice = one("port", Settings(host="192.0.2.1"))
    assert (level, "not an address of this machine" in text, "TEMPER_HOST" in advice) == ("fault", True, True)


def test_a_home_that_can_be_used_is_left_as_it_was(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path / "home")
    assert one("home", settings)[0] == "ok"
    assert not settings.home.exists()
    settings.make_home()
    before = contents(tmp_path)
    assert one("home", settings)[0] == "ok"
    assert contents(tmp_path) == before


def test_a_home_that_cannot_be_used_is_a_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for home in (Path("/proc"), tmp_path / "file" / "home"):  # not even root may write there
        level, _, advice = one("home", Settings(home=home))
        assert (level, "TEMPER_HOME" in advice) == ("fault", True)
    if Path("/dev/shm").stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("/dev/shm is on the same file system as the tests")
    settings = Settings(home=tmp_path)
    settings.make_home()
    settings.models.rmdir()
    elsewhere = Path("/dev/shm") / f"temper-{os.getpid()}"
    elsewhere.mkdir()
    try:
        settings.models.symlink_to(elsewhere)
        level, text, advice = one("home", settings)
        assert (level, "different file systems" in text) == ("fault", True)
        assert "one file system" in advice
        assert list(elsewhere.iterdir()) == []
    finally:
        shutil.rmtree(elsewhere)


def test_a_full_disk_is_a_fault_and_a_small_one_a_warning(small_disk: Path) -> None:  # noqa: F811
    settings = Settings(home=small_disk)
    assert one("home", settings)[0] == "warning"
    fill(small_disk)
    level, text, advice = one("home", settings)
    assert (level, "delete models" in advice) == ("fault", True), text


def test_certificates_that_do_not_fit_or_expire_are_found(tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path, "one")
    soon, soon_key = self_signed(tmp_path, "two", days=2)
    assert one("certificates", Settings(tls_cert=cert, tls_key=key))[0] == "ok"
    level, text, _ = one("certificates", Settings(tls_cert=cert, tls_key=soon_key))
    assert (level, "is not the key of" in text) == ("fault", True)
    level, text, advice = one("certificates", Settings(tls_cert=soon, tls_key=soon_key))
    assert (level, "expires in" in text, "docs/operations.md" in advice) == ("warning", True, True)
    key.chmod(0o644)
    level, _, advice = found("certificates", Settings(tls_cert=cert, tls_key=key))[0]
    assert (level, advice) == ("warning", f"chmod 600 {key}")
    empty = tmp_path / "empty"
    empty.touch()
    assert one("certificates", Settings(model_server_ca=empty))[0] == "fault"


def test_a_certificate_that_has_expired_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = self_signed(tmp_path, "old", days=1)
    from time import time

    monkeypatch.setattr("cli.doctor.time.time", lambda: time() + 2 * 86400)
    level, text, advice = one("certificates", Settings(tls_cert=cert, tls_key=key))
    assert (level, "has expired on" in text, "make a new one" in advice) == ("fault", True, True)


def test_a_store_is_named_with_its_schema_and_not_changed(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    assert one("store", settings)[0] == "ok"
    assert list(tmp_path.iterdir()) == []
    engine = connect(settings.store_url)
    level, text, _ = one("store", settings)  # while it is open
    assert (level, "(SQLite) has schema" in text) == ("ok", True)
    for version, expected, advised in (
        ("9999", "fault", "install the newer release"), ("0001", "warning", "back it up"),
    ):  # fmt: skip
        with engine.begin() as connection:
            connection.execute(sa.text(f"UPDATE alembic_version SET version_num = '{version}'"))
        level, text, advice = one("store", settings)
        assert (level, version in text, advised in advice) == (expected, True, True)
    engine.dispose()
    before = contents(tmp_path)
    assert one("store", settings)[0] == "warning"  # and after it was closed
    assert contents(tmp_path) == before
    damage(tmp_path)
    level, text, advice = one("store", settings)
    assert (level, "is damaged" in text, "backup" in advice) == ("fault", True, True)


def test_a_database_that_is_away_or_misspelt_is_a_fault_without_its_password() -> None:
    level, text, advice = one("store", Settings(store="postgresql+psycopg://temper:secret@127.0.0.1:1/t"))
    assert (level, "cannot be used" in text, "start the database" in advice) == ("fault", True, True)
    assert "secret" not in text + advice
    for wrong in ("postgres", "postgres://u:secret@h/n", "mysql://h/n", "postgresql+psycopg://u:secret@h:port/n"):
        with pytest.raises(ValidationError, match=r"as in postgresql\+psycopg://") as exc:
            Settings(store=wrong)
        assert "secret" not in str([each["msg"] for each in exc.value.errors()])
    level, text, _ = one("store", Settings(store="sqlite:////proc/none/temper.db"))
    assert (level, "cannot be created in /proc/none" in text) == ("fault", True)


def test_the_release_and_the_clock_of_postgresql_are_told(engine: sa.Engine) -> None:
    if engine.dialect.name != "postgresql":
        return
    settings = Settings(store=engine.url.render_as_string(hide_password=False))
    clock, schema = found("store", settings)
    assert (clock[0], "clock is 0.0 s" in clock[1]) == ("ok", True)
    assert (schema[0], "PostgreSQL 1" in schema[1]) == ("ok", True)
    assert doctor._skew(-5.0)[0] == "warning"


def test_a_model_server_that_answers_says_what_it_serves(tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path, "server")
    with model_server() as address:
        level, text, _ = one("model server", Settings(home=tmp_path, model_server=address))
        assert (level, "without encryption, and serves lenet5 7" in text) == ("ok", True)
    pair = (key.read_bytes(), cert.read_bytes())
    with model_server(grpc.ssl_server_credentials([pair])) as address:
        level, text, _ = one("model server", Settings(home=tmp_path, model_server=address, model_server_ca=cert))
        assert (level, "over TLS" in text) == ("ok", True)


def test_why_a_model_server_cannot_be_reached_is_found_out(tmp_path: Path) -> None:
    cert, key = self_signed(tmp_path, "server")
    stranger, stranger_key = self_signed(tmp_path, "stranger")
    pair = (key.read_bytes(), cert.read_bytes())

    def looked(address: str, **files: Path) -> tuple[str, str, str]:
        return one("model server", Settings(home=tmp_path, model_server=address).model_copy(update=files))

    level, text, advice = looked(f"127.0.0.1:{free_port()}")
    assert (level, "nobody answers" in text, "temper model-server" in advice) == ("fault", True, True)
    with model_server() as address:
        level, text, advice = looked(address, model_server_ca=cert)
        assert (level, "speaks plain text" in text, "--tls-cert" in advice) == ("fault", True, True)
    with model_server(grpc.ssl_server_credentials([pair])) as address:
        level, text, advice = looked(address)
        assert (level, "speaks TLS" in text, "TEMPER_MODEL_SERVER_CA" in advice) == ("fault", True, True)
        level, text, advice = looked(address, model_server_ca=stranger)
        assert (level, "is refused: self-signed certificate" in text) == ("fault", True)
    with model_server(grpc.ssl_server_credentials([pair], cert.read_bytes(), require_client_auth=True)) as address:
        none: dict[str, Path] = {}
        for presented in (none, {"model_server_cert": stranger, "model_server_key": stranger_key}):
            level, text, advice = looked(address, model_server_ca=cert, **presented)
            assert (level, "does not accept" in text, "TEMPER_MODEL_SERVER_CERT" in advice) == ("fault", True, True)
        assert looked(address, model_server_ca=cert, model_server_cert=cert, model_server_key=key)[0] == "ok"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        level, text, _ = looked(f"127.0.0.1:{silent.getsockname()[1]}")
        assert (level, "does not answer as a model server" in text) == ("fault", True)


def test_jobs_that_nobody_runs_are_a_fault(engine: sa.Engine) -> None:
    settings, jobs = Settings(store=engine.url.render_as_string(hide_password=False)), Jobs(engine)
    assert one("workers", settings)[0] == "warning"
    jobs.create(model="m", base="lenet5:1", spec={}, dataset=DatasetCard())
    level, text, advice = one("workers", settings)
    assert (level, "1 jobs are queued" in text, "temper worker" in advice) == ("fault", True, True)
    jobs.heartbeat("w", "idle")
    assert one("workers", settings)[:2] == ("ok", "1 idle; 1 jobs are queued")


def test_a_gpu_that_is_not_used_has_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "NVIDIA", (tmp_path / "none",))
    assert doctor._devices([], False)[0] == "ok"
    monkeypatch.setattr(doctor, "NVIDIA", (tmp_path,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert doctor._devices(["/physical_device:GPU:0"], True)[0] == "ok"
    assert "without CUDA" in doctor._devices([], False)[1]
    assert "nvidia-smi" in str(doctor._devices([], True)[2])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "CUDA_VISIBLE_DEVICES" in doctor._devices([], True)[1]


def test_a_collector_that_is_away_is_a_warning() -> None:
    level, text, _ = one("traces", Settings(traces=f"http://127.0.0.1:{free_port()}"))
    assert (level, "cannot be reached" in text) == ("warning", True)


def test_the_release_of_tensorflow_is_that_of_the_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert f"tensorflow=={TENSORFLOW}.*" in extras["trainer"]


def run(*options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-m", "cli", "doctor", "--json"], cwd=ROOT, capture_output=True, text=True,
        check=False, env={**os.environ, **environment}, timeout=120,
    )  # fmt: skip


@pytest.mark.slow
def test_a_running_service_is_sound(service: Service) -> None:
    done = run(TEMPER_HOME=str(service.home), TEMPER_PORT=service.url.rpartition(":")[2])
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    levels = {finding["check"]: finding["level"] for finding in report["findings"]}
    assert report["sound"]
    assert levels.keys() == {"settings", *CHECKS}
    found = {finding["check"]: finding["found"] for finding in report["findings"]}
    assert "a gateway answers" in found["port"]
    assert "without encryption, and serves lenet5" in found["model server"]
    assert "idle" in found["workers"] or "reporting" in found["workers"]


def test_without_tensorflow_the_rest_is_checked(tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    packages.mkdir()
    for package in Path(sa.__file__).parents[1].iterdir():
        if not package.name.startswith(("tensorflow", "__editable__")):
            (packages / package.name).symlink_to(package)
    done = run("-S", PYTHONPATH=f"{ROOT}:{packages}", TEMPER_HOME=str(tmp_path / "home"), TEMPER_STORE="nonsense")
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)["findings"]
    (tensorflow,) = [finding for finding in findings if finding["check"] == "tensorflow"]
    assert (tensorflow["level"], "temper[trainer]" in tensorflow["advice"]) == ("warning", True)
    assert [finding["check"] for finding in findings if finding["level"] == "fault"] == ["settings"]
