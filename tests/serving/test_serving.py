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
from store.settings import LOCAL_TARGET, Settings
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
    ],
)
def test_a_model_server_is_a_word_a_path_or_addresses(given: str, supervised: bool, targets: tuple[str, ...]) -> None:
    settings = Settings(model_server=given)
    assert (settings.supervised, settings.server_addresses) == (supervised, targets)


@pytest.mark.parametrize("given", ["", "nowhere", "a:b", "a:1,,b:2", "a:123456"])
def test_what_is_none_of_these_is_refused(given: str) -> None:
    with pytest.raises(ValidationError, match="neither auto, embedded, a path nor host:port"):
        Settings(model_server=given)


STAND_IN = """#!{python}
import os, pathlib, sys
flags = dict(flag[2:].split("=", 1) for flag in sys.argv[1:])
config = pathlib.Path(flags["model_config_file"]).read_text()
pathlib.Path({log!r}).write_text("\\n".join(sys.argv[1:]) + "\\n" + config)
os.chdir({root!r})
os.execv({python!r}, [{python!r}, "-m", "serving", "--address", "127.0.0.1:" + flags["port"], "--rest-address", ""])
"""


@pytest.mark.parametrize("how", ["auto", "path"])
def test_a_tensorflow_serving_that_is_installed_is_supervised(tmp_path: Path, how: str) -> None:
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
        assert "--max_num_load_retries=0" in flags
        assert "--grpc_max_threads=64" in flags
        assert flags.endswith("model_config_list {}\n")
        answer = service.api.post(
            "/predict?model=lenet5", content=bytes(784), headers={"Content-Type": "application/octet-stream"}
        )
        assert answer.status_code == 200


def test_a_model_server_that_is_no_program_is_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cli", "serve", "--port", "1"]
    environment = {**os.environ, "TEMPER_HOME": str(tmp_path), "TEMPER_MODEL_SERVER": "/no/such/program"}
    refused = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "/no/such/program is no program" in refused.stderr
