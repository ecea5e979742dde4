"""The client's view of a model server, and which model server `temper serve` takes."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from serving.client import ModelServer
from store.errors import PublishFailed, UnknownModel
from store.processes import free_port
from store.settings import LOCAL_TARGET, Settings, unknown_variables
from tests.conftest import eventually, running_service
from trainer.export import export
from trainer.lenet import initial

IMAGES = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)


def put(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    export(folder, initial(10, seed=0), invert=False, manifest={})
    return folder


def test_a_version_that_cannot_be_loaded_is_told_with_its_reason(tmp_path: Path, model_server: str) -> None:
    put(tmp_path / "d" / "1")
    (put(tmp_path / "d" / "2") / "saved_model.pb").unlink()
    with ModelServer(model_server) as server:
        server.reload(tmp_path, {"d": [1]})
        server.reload(tmp_path, {"d": [1, 2]})
        with pytest.raises(PublishFailed, match=r"version 2 of d is END at .* does not appear to contain a SavedModel"):
            server.wait_until_available("d", 2)
        server.predict("d", 1, IMAGES)
        with pytest.raises(UnknownModel, match=r"Servable not found for request: Specific\(d, 2\)"):
            server.predict("d", 2, IMAGES)
        server.reload(tmp_path, {})


def test_a_version_that_was_unloaded_once_can_come_back(tmp_path: Path, model_server: str) -> None:
    for version in (1, 2):
        put(tmp_path / "again" / str(version))
    with ModelServer(model_server) as server:
        for versions in ([1], [2], [1, 2]):
            server.reload(tmp_path, {"again": versions})
            for version in versions:
                server.wait_until_available("again", version)
        eventually(lambda: server.available("again") == {1, 2}, "both are served")
        server.reload(tmp_path, {})


@pytest.mark.parametrize(
    ("given", "supervised", "targets"),
    [
        ("auto", True, (LOCAL_TARGET,)),
        ("embedded", True, (LOCAL_TARGET,)),
        ("/opt/tensorflow_model_server", True, (LOCAL_TARGET,)),
        ("serving:8500", False, ("serving:8500",)),
        ("a:1, [::1]:2,a:1", False, ("a:1", "[::1]:2")),
        ("unix:/run/a.sock", False, ("unix:/run/a.sock",)),
        ("unix:/run/a.sock, b:1", False, ("unix:/run/a.sock", "b:1")),
    ],
)
def test_a_model_server_is_a_word_a_path_or_addresses(given: str, supervised: bool, targets: tuple[str, ...]) -> None:
    settings = Settings(model_server=given)
    assert (settings.supervised, settings.server_addresses) == (supervised, targets)


@pytest.mark.parametrize(
    ("given", "has_standby"),
    [("unix:/run/a.sock,unix:/run/b.sock", True), ("unix:/run/a.sock", False), ("a:1,b:1", False), ("embedded", False)],
)
def test_of_several_servers_on_unix_sockets_all_but_one_stand_by(given: str, has_standby: bool) -> None:
    assert Settings(model_server=given).has_standby is has_standby


@pytest.mark.parametrize("given", ["", "nowhere", "a:b", "a:1,,b:2", "a:123456", "unix:relative/path"])
def test_what_is_none_of_these_is_refused(given: str) -> None:
    with pytest.raises(ValidationError, match="must be auto, embedded, a path, host:port or unix:/path"):
        Settings(model_server=given)


STAND_IN = """#!{python}
import os, pathlib, sys
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
config = pathlib.Path(flags["model_config_file"]).read_text()
pathlib.Path({log!r}).write_text("\\n".join(sys.argv[1:]) + "\\n" + config)
print("2026-01-31 12:00:00.123456: I server_core.cc:1] chatter", file=sys.stderr)
print("I0131 12:00:00.123456 1 server_core.cc:1] chatter", file=sys.stderr)
print("2026-01-31 12:00:00.123456: W server_core.cc:1] a warning", file=sys.stderr, flush=True)
os.chdir({root!r})
address = "unix:" + flags["grpc_socket_path"]
os.execv({python!r}, [{python!r}, "-m", "serving", "--address", address, "--rest-address", ""])
"""


@pytest.mark.parametrize("how", ["auto", "path"])
@pytest.mark.exhaustive
def test_a_tensorflow_serving_that_is_installed_is_supervised(
    tmp_path: Path, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """With a stand-in that takes the binary's flags and runs the embedded server."""
    binary, log = tmp_path / "bin" / "tensorflow_model_server", tmp_path / "flags"
    binary.parent.mkdir()
    root = str(Path(__file__).parents[2])
    binary.write_text(STAND_IN.format(python=sys.executable, log=str(log), root=root))
    binary.chmod(binary.stat().st_mode | stat.S_IXUSR)
    path = f"{binary.parent}:{os.environ['PATH']}"
    environment = {"PATH": path} if how == "auto" else {"TEMPER_MODEL_SERVER": str(binary)}
    with running_service(tmp_path / "home", **environment) as service:
        flags = log.read_text()
        assert "--port=0\n--rest_api_port=0\n--grpc_socket_path=/" in flags
        assert "--max_num_load_retries=0" in flags
        assert "--grpc_max_threads=64" in flags
        assert flags.endswith("model_config_list {}\n")
        answer = service.api.post(
            "/predict?model=lenet5", content=bytes(784), headers={"Content-Type": "application/octet-stream"}
        )
        assert answer.status_code == 200
        (pid,) = service.children("serving")
        assert listeners(pid) == []
    said = capfd.readouterr().err
    assert "a warning" in said
    assert "chatter" not in said


def listeners(pid: int) -> list[str]:
    """Local addresses of the TCP sockets on which a process listens."""
    held = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    rows = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in held]


@pytest.mark.exhaustive
def test_a_home_with_a_long_path_gets_a_socket_elsewhere(tmp_path: Path) -> None:
    home = tmp_path / ("long" * 25)
    with running_service(home) as service:
        (address,) = service.api.get("/readyz").json()["model_servers"]
        socket = Path(address.removeprefix("unix:"))
        assert socket.is_socket()
        assert not socket.is_relative_to(home)
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
    assert not socket.parent.exists()


def test_a_model_server_that_is_no_program_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path, TEMPER_MODEL_SERVER="/no/such/program") == (
        "Error: TEMPER_MODEL_SERVER: /no/such/program was not found or is not executable"
    )


def refused(home: Path, **environment: str) -> str:
    """The single line with which `temper serve` refuses to start."""
    command = [sys.executable, "-m", "cli", "serve", "--port", str(free_port())]
    given = {**os.environ, "TEMPER_HOME": str(home), **environment}
    ended = subprocess.run(command, env=given, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    return line


def test_a_home_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "TEMPER_HOME cannot be used" in refused(tmp_path / "file")
    home = tmp_path / "home"
    (home / "serve.lock").mkdir(parents=True)  # what even root cannot open for writing
    assert "TEMPER_HOME cannot be used" in refused(home)


def test_a_store_that_cannot_be_reached_is_refused(tmp_path: Path) -> None:
    store = f"postgresql+psycopg://me:secret@127.0.0.1:{free_port()}/temper"
    line = refused(tmp_path, TEMPER_STORE=store)
    assert "me:***@127.0.0.1" in line
    assert "cannot open the store at" in line
    assert "secret" not in line


def test_an_address_that_cannot_be_had_is_refused_with_the_reason(tmp_path: Path) -> None:
    assert "192.0.2.1 is not an address of this machine" in refused(tmp_path, TEMPER_HOST="192.0.2.1")
    assert "nowhere.invalid is neither an address nor a known name" in refused(tmp_path, TEMPER_HOST="nowhere.invalid")


def test_a_mistyped_variable_is_reported_with_the_nearest_name() -> None:
    given = {"TEMPER_WORKER": "2", "TEMPER_zzz": "1", "TEMPER_PORT": "1", "TEMPER_URL": "", "PATH": ""}
    assert unknown_variables(given) == {"TEMPER_WORKER": "TEMPER_WORKERS", "TEMPER_zzz": None}


@pytest.mark.parametrize("module", ["api", "trainer", "cli"])
def test_every_process_warns_of_a_mistyped_variable(tmp_path: Path, module: str) -> None:
    command = [sys.executable, "-m", module, *(["serve", "--port", "1"] if module == "cli" else [])]
    (tmp_path / "file").touch()  # no home: the process ends right after it has started
    environment = {**os.environ, "TEMPER_HOME": str(tmp_path / "file"), "TEMPER_WORKRES": "2"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert "TEMPER_WORKRES is not a setting and is ignored; did you mean TEMPER_WORKERS?" in ended.stderr
