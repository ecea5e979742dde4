"""Workers on the machines of a Ray cluster: `temper worker --engine ray --address HOST:6379`.

This process keeps a pool of actors, as many as the cluster has room for. An actor holds one warm worker process, which
claims jobs from the store as every worker does. So Ray decides where workers run and on what share of a GPU; whose turn
it is, leases, cancelling and retries are the store's. If a node dies, its jobs are requeued as those of any dead worker
are, and the pool starts actors where there is room. All nodes share the home and the store, and have Temper installed.
"""

import fcntl
import functools
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir
from types import FrameType
from typing import IO, Any

import ray
import structlog

from store.processes import end_with_parent, module_command
from store.settings import Settings

CONNECT_S = 5.0
LOOK_S = 1.0  # between looks at the cluster
GRACE_S = 15.0  # that a worker has to requeue its job and end
YOUNG_S = 10.0  # a worker that ends within these has failed to start
LONGEST_PAUSE_S = 60.0  # before the next attempt
SHARED = ("TEMPER_", "PG", "AWS_", "OTEL_", "SSL_")  # beginnings of the variables that workers on other machines get
GPU_RESERVE = 0.1  # share of a GPU's part for CUDA itself

log: structlog.stdlib.BoundLogger = structlog.get_logger("temper.ray")


@dataclass(frozen=True)
class Size:
    """What one worker needs."""

    cpus: float = 1.0
    gpus: float = 0.0  # below 1 for a share
    gpu_memory_mb: int = 0  # 0: its share of the GPU's memory

    def fits(self, resources: Mapping[str, float]) -> int:
        """How many workers a node with these resources has room for."""
        room = resources.get("CPU", 0.0) / self.cpus
        if not self.gpus:
            return int(room + 1e-9)
        whole = int(resources.get("GPU", 0.0))
        shares = whole * int(1 / self.gpus + 1e-9) if self.gpus < 1 else int(whole / self.gpus)
        return int(min(room + 1e-9, shares))


class Holder:
    """An actor: holds one worker process for as long as the node lives."""

    def __init__(self, environment: Mapping[str, str], size: Size) -> None:
        self._environment, self._size = dict(environment), size
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()

    def run(self) -> int:
        """Run the worker until it ends; returns its exit code."""
        cores, locks = reserve_cores(int(self._size.cpus))
        environment = {**os.environ, **self._environment}
        if self._size.gpus:
            environment["TEMPER_GPU_MEMORY_MB"] = str(gpu_memory_mb(self._size, environment))

        def prepare() -> None:
            end_with_parent()
            if cores:
                os.sched_setaffinity(0, cores)

        self._process = subprocess.Popen(module_command("trainer"), env=environment, preexec_fn=prepare)
        if self._stopping.is_set():
            self._process.terminate()
        code = self._process.wait()
        for lock in locks:
            lock.close()
        return code

    def stop(self) -> None:
        """Have the worker requeue its job and end."""
        self._stopping.set()
        if self._process is not None:
            self._process.terminate()


def reserve_cores(count: int, folder: Path | None = None) -> tuple[list[int], list[IO[bytes]]]:
    """Cores that no other actor on this machine has, for Ray's CPUs are bookkeeping only.

    Returns:
        The cores, and the open files whose locks reserve them; nothing if there are not enough free ones.
    """
    cores, locks = list[int](), list[IO[bytes]]()
    for core in sorted(os.sched_getaffinity(0)):
        if len(cores) == count:
            break
        lock: IO[bytes] = (Path(folder or gettempdir()) / f"temper-core-{core}.lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
        else:
            cores.append(core)
            locks.append(lock)
    if len(cores) < count:
        for lock in locks:
            lock.close()
        return [], []
    return cores, locks


def gpu_memory_mb(size: Size, environment: Mapping[str, str]) -> int:
    """What TensorFlow may take of a GPU, MiB; 0 for a whole one, of which it takes what it needs.

    Raises:
        ValueError: a share was asked for, and the driver does not say how much memory the GPU has.
    """
    if size.gpu_memory_mb or size.gpus >= 1:
        return size.gpu_memory_mb
    command = [shutil.which("nvidia-smi") or "nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    device = environment.get("CUDA_VISIBLE_DEVICES", "")
    try:
        said = subprocess.run([*command, "-i", device], capture_output=True, text=True, check=True).stdout
        return int(float(said.split()[0]) * size.gpus * (1 - GPU_RESERVE))
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError) as exc:
        raise ValueError("cannot tell how much memory the GPU has; give --gpu-memory") from exc


@dataclass
class _Member:
    actor: Any
    ended: Any  # the future of its exit code
    started_at: float


class Pool:
    """Keeps actors on a cluster until it is stopped."""

    def __init__(self, settings: Settings, size: Size, most: int | None) -> None:
        self._size, self._most = size, most
        self._members: list[_Member] = []
        self._pause_s, self._start_at = 0.0, 0.0
        self._stopped = threading.Event()
        shared = {name: value for name, value in os.environ.items() if name.startswith(SHARED)} | {
            "TEMPER_HOME": str(settings.home.resolve())
        }
        actor = ray.remote(num_cpus=size.cpus, num_gpus=size.gpus, max_concurrency=2)(Holder)
        self._start = functools.partial(actor.remote, shared, size)

    def run(self) -> None:
        """Keep the pool until SIGTERM or SIGINT, then let its workers requeue their jobs."""

        def stop(_: int, __: FrameType | None) -> None:
            self._stopped.set()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)
        while not self._stopped.wait(LOOK_S):
            self._reap()
            self._fill()
        for member in self._members:
            member.actor.stop.remote()
        ray.wait([member.ended for member in self._members], num_returns=len(self._members), timeout=GRACE_S)
        for member in self._members:
            ray.kill(member.actor)

    def _reap(self) -> None:
        """Drop the actors that have ended, or whose node has."""
        if not self._members:
            return
        done, _ = ray.wait([member.ended for member in self._members], num_returns=len(self._members), timeout=0)
        for member in [member for member in self._members if member.ended in done]:
            self._members.remove(member)
            try:
                reason = f"exit code {ray.get(member.ended)}"
            except ray.exceptions.RayActorError:
                reason = "its node or its actor died"
            except ray.exceptions.RayTaskError as exc:
                reason = str(exc.cause)
            else:
                with suppress(ray.exceptions.RayError):
                    ray.kill(member.actor)
            young = time.monotonic() - member.started_at < YOUNG_S
            self._pause_s = min(LONGEST_PAUSE_S, max(1.0, 2 * self._pause_s)) if young else 0.0
            self._start_at = time.monotonic() + self._pause_s
            log.warning("a worker ended", reason=reason, next_in_s=self._pause_s)

    def _fill(self) -> None:
        """Start actors for the room that there is; those beyond it wait in Ray for a node."""
        if time.monotonic() < self._start_at:
            return
        room = sum(self._size.fits(node["Resources"]) for node in ray.nodes() if node["Alive"])
        for _ in range(min(room, self._most or room) - len(self._members)):
            actor = self._start()
            self._members.append(_Member(actor, actor.run.remote(), time.monotonic()))
            log.info("a worker starts", workers=len(self._members), room=room)


def check(settings: Settings) -> None:
    """Raise `ValueError` for settings that mean something else on every machine."""
    if settings.store_url.startswith("sqlite"):
        raise ValueError("TEMPER_STORE: workers on several machines need a PostgreSQL")
    if settings.supervised:
        raise ValueError(f"TEMPER_MODEL_SERVER: {settings.model_server!r} is not an address that other machines know")


def run(address: str, settings: Settings, size: Size, most: int | None) -> None:
    """Keep a pool of workers on the cluster at `address` until SIGTERM or SIGINT.

    Args:
        most: workers at a time; None for as many as there is room for.

    Raises:
        ConnectionError: there is no cluster.
        ValueError: this is not an address, or other machines cannot use the settings.
    """
    check(settings)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:  # Ray itself waits for minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
        except OSError as exc:
            raise ConnectionError(f"no Ray cluster answers: {exc.strerror or exc}") from exc
    ray.init(address=address, namespace="temper", logging_level="warning", log_to_driver=True)
    try:
        Pool(settings, size, most).run()
    finally:
        ray.shutdown()
