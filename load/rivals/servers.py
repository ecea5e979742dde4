"""Servers to send predictions to: Temper, and alternatives that serve the same SavedModel."""

import contextlib
import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import httpx
import psutil

from serving.registry import BASE
from serving.tensorflow_serving import tensorflow_serving_command
from store.processes import end_with_parent, free_port

PATIENCE_S = 180.0
GRACE_S = 20.0


def private_mb(pid: int) -> float:
    """Memory that a process has for itself: pages that it has written to or that no file backs, which overlap."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    sizes = {name: int(kilobytes) for name, kilobytes in re.findall(r"(\w+): +(\d+) kB", rollup)}
    return max(sizes["Private_Dirty"], sizes["Anonymous"]) * 1024 / 1e6


@dataclass(frozen=True)
class Server:
    """A server and its processes."""

    name: str
    url: str
    log: Path
    roots: tuple[psutil.Process, ...]

    def processes(self) -> list[Any]:
        """Its current processes."""
        found = []
        for root in self.roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [root, *root.children(recursive=True)]
        return found

    def cpu_s(self) -> float:
        """CPU seconds that they have used."""
        seconds = 0.0
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                seconds += times.user + times.system
        return seconds

    def private_mb(self, module: str | None = None) -> float:
        """Private memory of all of them together, or of the largest one that runs `python -m module`."""
        if module is None:
            return sum(private_mb(process.pid) for process in self.processes())
        return max(private_mb(each.pid) for each in self.processes() if each.cmdline()[1:3] == ["-m", module])

    def pause(self) -> None:
        """SIGSTOP."""
        for process in self.processes():
            process.suspend()

    def resume(self) -> None:
        """SIGCONT."""
        for process in self.processes():
            process.resume()

    def get(self, path: str) -> httpx.Response:
        """Send one request."""
        return httpx.get(self.url + path, timeout=10)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready` returns true; HTTP errors and refused connections count as false."""
        began = time.monotonic()
        while time.monotonic() - began < PATIENCE_S and self.roots[0].status() != psutil.STATUS_ZOMBIE:
            with contextlib.suppress(httpx.HTTPError, OSError):
                if ready():
                    return
            time.sleep(0.1)
        raise click.ClickException(f"{self.name} is not ready; its log ends with\n{self.log.read_text()[-3000:]}")


def start(stack: contextlib.ExitStack, folder: Path, names: set[str]) -> dict[str, Server]:
    """Start those of the named servers that are available here. Temper always runs, because it publishes the model."""
    servers = {"temper": stack.enter_context(temper("temper", folder / "home"))}
    models, python = folder / "home" / "models" / BASE, sys.executable
    environment = {"SAVED_MODEL": str(models / "1"), "TF_CPP_MIN_LOG_LEVEL": "2"}

    def add(name: str, command: list[str], port: int, path: str, said: str = "") -> None:
        server = stack.enter_context(running(name, folder, command, port, environment))
        server.wait(lambda: (response := server.get(path)).is_success and said in response.text)
        servers[name] = server

    if "plain" in names:
        port = free_port()
        command = [python, "-m", "uvicorn", "load.rivals.plain:app", f"--port={port}", "--no-access-log"]
        add("plain", command, port, "/openapi.json")
    if "litserve" in names and importlib.util.find_spec("litserve"):
        port = free_port()
        add("litserve", [python, "-m", "load.rivals.batched", f"{port}"], port, "/health")
    elif "litserve" in names:
        click.echo("litserve is left out: it is not installed", err=True)
    binary = os.environ.get("TEMPER_TFS_BINARY")
    if binary and "tfs" in names:
        port = free_port()
        command = [binary, f"--port={free_port()}", f"--rest_api_port={port}"]
        command += [f"--model_name={BASE}", f"--model_base_path={models}"]
        add("tfs", command, port, f"/v1/models/{BASE}", "AVAILABLE")
    if binary and "temper-tfs" in names:
        port = free_port()
        command = tensorflow_serving_command(binary, port, 0, folder / "empty.config")
        behind = stack.enter_context(running("tfs-behind", folder, command, port, environment))
        behind.wait(lambda: bool(socket.create_connection(("127.0.0.1", port), 1)))
        ahead = stack.enter_context(temper("temper-tfs", folder / "home-tfs", f"127.0.0.1:{port}"))
        servers["temper-tfs"] = replace(ahead, roots=(*ahead.roots, *behind.roots))
    return servers


@contextlib.contextmanager
def temper(name: str, home: Path, model_server: str = "embedded") -> Iterator[Server]:
    """Run Temper; yield it once its base model is published and its worker idle."""
    home.mkdir(exist_ok=True)
    port = free_port()
    command = [sys.executable, "-m", "cli", "serve", "--port", f"{port}"]
    environment = {"TEMPER_HOME": str(home), "TEMPER_MODEL_SERVER": model_server, "TEMPER_WORKERS": "1"}
    with running(name, home.parent, command, port, environment) as server:
        server.wait(lambda: "idle" in server.get("/readyz").json()["workers"].values())
        server.wait(lambda: server.get(f"/models/{BASE}").is_success)
        yield server


@contextlib.contextmanager
def running(name: str, folder: Path, command: list[str], port: int, environment: dict[str, str]) -> Iterator[Server]:
    """Run a server; it and its children end with the block."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("TEMPER_")}
    path = folder / f"{name}.log"
    with path.open("w") as log:
        child = subprocess.Popen(
            command, env=inherited | environment, stdout=log, stderr=log, start_new_session=True,
            preexec_fn=end_with_parent,
        )  # fmt: skip
    server = Server(name, f"http://127.0.0.1:{port}", path, (psutil.Process(child.pid),))
    try:
        yield server
    finally:
        server.resume()
        members = server.processes()
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(GRACE_S)
        for process in members:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        child.wait()
