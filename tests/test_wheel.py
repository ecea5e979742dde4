"""The wheel: everything is inside `temper`, and it works where there is no checkout."""

import contextlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from store.processes import free_port
from tests.conftest import SMALL, eventually

ROOT = Path(__file__).parents[1]
PIP = ["-m", "pip", "--quiet", "--disable-pip-version-check"]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git knows, in a folder of its own, so that nothing unversioned slips in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    for name in listed.decode().rstrip("\0").split("\0"):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, *PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    subprocess.run(command, check=True)
    (built,) = out.glob("temper-*.whl")
    return built


def environment(folder: Path) -> Path:
    """An empty virtual environment; returns its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin/python"


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(("TEMPER_", "PYTHON"))}


@contextlib.contextmanager
def served(python: Path, home: Path, ready: str) -> Iterator[httpx.Client]:
    """`temper serve` of an installation, run from an empty directory until the path `ready` answers."""
    home.mkdir()
    port = free_port()
    server = subprocess.Popen(
        [python.parent / "temper", "serve", "--port", str(port)],
        cwd=home, env={**clean_environment(), **SMALL, "TEMPER_HOME": str(home / "var")},
    )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as api:
            eventually(lambda: api.get(ready).status_code == 200, f"{ready} succeeds")
            yield api
    finally:
        server.terminate()
        server.wait(30)


def test_everything_is_inside_temper_and_imports_itself_from_there(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        modules = {name: archive.read(name).decode() for name in names if name.endswith(".py")}
    assert {name.partition("/")[0] for name in names} == {"temper", f"{wheel.name.rpartition('-py3')[0]}.dist-info"}
    for needed in (
        "trainer/base/lenet5.npz", "api/report/templates/report.html", "api/ui/index.html", "api/ui/app.js",
        "api/ui/vendor/htm-preact.js", "api/ui/vendor/htm-LICENSE", "py.typed",
        "store/migrations/versions/m0001_before_migrations.py",
    ):  # fmt: skip
        assert f"temper/{needed}" in names
    rooms = ("api", "cli", "load", "serving", "store", "trainer")
    for name, text in modules.items():
        for line in text.splitlines():
            words = line.split()
            if len(words) > 1 and words[0] in ("from", "import"):
                assert words[1].partition(".")[0] not in rooms, f"{name}: {line}"


@pytest.mark.exhaustive
def test_alone_in_an_empty_environment_it_is_a_gateway(wheel: Path, tmp_path: Path) -> None:
    python = environment(tmp_path / "venv")
    locked = ["--require-hashes", "-r", str(ROOT / "requirements/gateway.txt")]
    subprocess.run([python, *PIP, "install", *locked], check=True)
    subprocess.run([python, *PIP, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    subprocess.run([python, *PIP, "check"], check=True)
    with served(python, tmp_path / "home", "/healthz") as api:
        assert api.get("/docs").status_code == 200
        assert api.get("/readyz").json()["store"] == "ok"
        refused = api.post("/finetune", data={"model": "m"}, files={"data": b"no zip"})  # its decoder runs, too
        assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_dataset")
    alone = subprocess.run(
        [python.parent / "temper", "worker"], env=clean_environment(), capture_output=True, text=True, check=False
    )
    assert alone.stderr == "Error: this needs tensorflow, which is not installed: pip install 'temper[trainer]'\n"


@pytest.mark.exhaustive
def test_with_tensorflow_it_fine_tunes_and_predicts(
    wheel: Path, tmp_path: Path, digits: tuple[np.ndarray, np.ndarray], digits_zip: bytes
) -> None:
    python = environment(tmp_path / "venv")
    subprocess.run([python, *PIP, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # not its .pth files: no checkout
    with served(python, tmp_path / "home", "/readyz") as api:
        form = {"model": "digits", "spec": '{"epochs": 2}'}
        job = api.post("/finetune", data=form, files={"data": digits_zip}).json()
        eventually(lambda: api.get(f"/finetune/{job['id']}").json()["status"] == "succeeded", "the job succeeds", 180)
        body = {"model": "digits", "range": "byte", "instances": digits[0][:4].tolist()}
        assert api.post("/predict", json=body).json()["version"] == 1
        page = api.get("/models/digits/versions/1/report", headers={"Accept": "text/html"})
        assert "<svg" in page.text
        command = [str(python.parent / "temper"), "load", "--url", str(api.base_url), "--duration-s", "3"]
        loose = ["--p95-ms", "5000", "--p99-ms", "9000", "--requests", "10", "--kinds", "clean=1"]
        loaded = subprocess.run(
            [*command, *loose, "--out", str(tmp_path / "out")],
            cwd=tmp_path, capture_output=True, text=True, check=False, env=clean_environment(),
        )  # fmt: skip
        assert loaded.returncode in (0, 4), loaded.stdout + loaded.stderr  # 4: a busy machine
        assert (tmp_path / "out" / "summary.json").is_file()
    running = subprocess.run(
        [python, "-c", "import temper.trainer; print(temper.trainer.__file__)"],
        cwd=tmp_path, env=clean_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(tmp_path) in running.stdout
