"""Workers on a Ray cluster of several nodes, on this machine."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from store.engine import connect
from tests.conftest import Place, eventually, opened
from trainer.asked import parse_asked
from trainer.jobs.records import Jobs
from trainer.worker.ray_pool import Size, gpu_memory_mb, reserve_cores

ELSEWHERE = {"TEMPER_STORE": "postgresql+psycopg://temper@127.0.0.1:1/t", "TEMPER_MODEL_SERVER": "127.0.0.1:1"}


@pytest.mark.parametrize(
    ("size", "resources", "room"),
    [
        (Size(), {"CPU": 8.0}, 8),
        (Size(cpus=3), {"CPU": 8.0}, 2),
        (Size(cpus=0.1), {"CPU": 0.3}, 3),
        (Size(cpus=1, gpus=0.25), {"CPU": 64.0, "GPU": 2.0}, 8),
        (Size(cpus=1, gpus=0.3), {"CPU": 64.0, "GPU": 2.0}, 6),  # a share is of one GPU
        (Size(cpus=1, gpus=2), {"CPU": 64.0, "GPU": 5.0}, 2),
        (Size(cpus=4, gpus=1), {"CPU": 8.0, "GPU": 8.0}, 2),
        (Size(gpus=1), {"CPU": 8.0}, 0),
        (Size(), {"memory": 1.0}, 0),
    ],
)
def test_as_many_workers_as_a_node_has_room_for(size: Size, resources: dict[str, float], room: int) -> None:
    assert size.fits(resources) == room


def test_actors_on_one_machine_have_cores_of_their_own(tmp_path: Path) -> None:
    mine = sorted(os.sched_getaffinity(0))
    first, locks = reserve_cores(1, tmp_path)
    rest, more = reserve_cores(len(mine) - 1, tmp_path)
    assert sorted(first + rest) == mine
    assert reserve_cores(1, tmp_path) == ([], [])  # none is left, so this one is not bound to any
    for lock in (*locks, *more):
        lock.close()
    again, held = reserve_cores(len(mine), tmp_path)
    assert again == mine
    for lock in held:
        lock.close()


def test_a_share_of_a_gpu_is_a_share_of_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$4" = 3 ] && echo 24000\n')  # of GPU 3, MiB
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    on = {"CUDA_VISIBLE_DEVICES": "3"}
    assert gpu_memory_mb(Size(gpus=0.25), on) == 5400
    assert gpu_memory_mb(Size(gpus=0.25, gpu_memory_mb=1000), on) == 1000
    assert gpu_memory_mb(Size(gpus=1), on) == 0
    with pytest.raises(ValueError, match="give --gpu-memory"):
        gpu_memory_mb(Size(gpus=0.5), {"CUDA_VISIBLE_DEVICES": "4"})


def test_without_a_cluster_it_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "trainer", "--engine", "ray", "--address", "127.0.0.1:1"]
    done = subprocess.run(
        command, env={**os.environ, "TEMPER_HOME": str(tmp_path), **ELSEWHERE}, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    message = "python -m trainer: --address 127.0.0.1:1: no Ray cluster answers: Connection refused\n"
    assert (done.returncode, done.stderr) == (1, message)


@pytest.mark.parametrize("given", [{"TEMPER_STORE": ""}, {"TEMPER_MODEL_SERVER": "embedded"}])
def test_settings_that_mean_something_else_on_every_machine_are_refused(tmp_path: Path, given: dict[str, str]) -> None:
    environment = {**os.environ, "TEMPER_HOME": str(tmp_path), **ELSEWHERE, **given}
    command = [sys.executable, "-m", "trainer", "--engine", "ray", "--address", "127.0.0.1:1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith(f"python -m trainer: --engine ray: {next(iter(given))}: ")


@contextlib.contextmanager
def pool(address: str, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "--engine", "ray", "--address", address],
            env={**os.environ, **environment}, stdout=out, stderr=out,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without workers, and two nodes with room for one each."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.mark.exhaustive
def test_a_job_goes_on_at_another_node_when_its_own_is_killed(
    cluster: Cluster, place: Place, empty_postgresql: str, tmp_path: Path
) -> None:
    connect(empty_postgresql).dispose()
    home = tmp_path / "shared"
    environment = {
        "TEMPER_HOME": str(home),
        "TEMPER_STORE": empty_postgresql,
        "TEMPER_MODEL_SERVER": place.servers[0].target,
    }
    (home / "datasets").mkdir(parents=True)
    name = f"{place.dataset.id}.npz"
    (home / "datasets" / name).write_bytes((place.settings.datasets / name).read_bytes())

    def submitted(model: str, **spec: Any) -> str:
        asked = parse_asked(json.dumps({"epochs": 2, **spec})).described()
        return jobs.create(model=model, base="lenet5:1", spec=asked, dataset=place.dataset).id

    with opened(empty_postgresql) as engine, pool(cluster.address, environment, tmp_path / "log") as driver:
        jobs = Jobs(engine)
        eventually(lambda: list(jobs.worker_states().values()) == ["idle"] * 2, "both nodes have a warm worker", 180)
        both = set(jobs.worker_states())
        long = submitted("long", epochs=1000, method="full")
        eventually(lambda: jobs.get(long).progress.epoch, "it trains", 120)
        worker = jobs.get(long).worker
        assert worker in both
        kill_node_of(worker, cluster)
        done = [submitted(f"m{number}") for number in range(3)]
        eventually(lambda: jobs.get(long).attempts == 2, "the job is at the other node", 240)
        assert jobs.get(long).worker != worker
        eventually(lambda: jobs.get(long).progress.epoch, "it trains there", 120)
        jobs.cancel(long)
        eventually(lambda: jobs.get(long).status == "cancelled", "it is cancelled there", 20)
        eventually(lambda: all(jobs.get(job).status == "succeeded" for job in done), "the node does the others", 240)
        cluster.add_node(num_cpus=1)
        eventually(lambda: len(jobs.worker_states()) == 2, "a new node gets a worker", 180)
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(60) == 0
        eventually(lambda: jobs.worker_states() == {}, "the workers have said goodbye", 5)


def kill_node_of(worker: str, cluster: Cluster) -> None:
    """SIGKILL everything that runs on a worker's node, the worker included, which cannot requeue its job then."""
    pid = int(worker.split("-")[-2])
    with open(f"/proc/{pid}/stat") as stat:
        actor = int(stat.read().rpartition(")")[2].split()[1])
    with open(f"/proc/{actor}/stat") as stat:
        raylet = int(stat.read().rpartition(")")[2].split()[1])
    (node,) = [each for each in cluster.worker_nodes if each.all_processes["raylet"][0].process.pid == raylet]
    for process in (pid, actor):
        os.kill(process, signal.SIGKILL)
    cluster.remove_node(node, allow_graceful=False)
