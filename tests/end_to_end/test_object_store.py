"""Machines that share a store and a bucket, and no directory: each has a home of its own."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import s3fs

from cli.doctor import CHECKS
from store.errors import StorageFailed
from store.objects import Objects
from store.processes import free_port
from store.settings import Settings
from tests.conftest import SMALL, eventually, listens, npz

QUICK = {"epochs": 2}


@contextlib.contextmanager
def process(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    running = subprocess.Popen([sys.executable, "-m", *command], env={**os.environ, **environment})
    try:
        yield running
    finally:
        running.terminate()
        running.wait(30)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[s3fs.S3FileSystem, subprocess.Popen[bytes]]]:
    """A moto server with an empty bucket; the environment says how to reach it."""
    port = free_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with process(["moto.server", "-p", str(port)], {}) as server:
        eventually(lambda: listens(port), "the object store listens")
        store = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
        store.mkdir("temper")
        yield store, server


def keys(store: s3fs.S3FileSystem, prefix: str) -> list[str]:
    return [str(key) for key in store.find(f"temper/house/{prefix}")]


@pytest.mark.slow
def test_files_and_directories_reach_another_machine_complete_or_not_at_all(tmp_path: Path, bucket: Any) -> None:
    store, server = bucket
    homes = [Settings(home=tmp_path / name, objects="s3://temper/house") for name in ("a", "b")]
    for settings in homes:
        settings.make_home()
    ours, theirs = (Objects(settings) for settings in homes)
    here, there = (settings.version("m", 1) for settings in homes)
    (here / "variables").mkdir(parents=True)
    (here / "saved_model.pb").write_bytes(b"graph")
    (here / "variables" / "index").write_bytes(b"weights")
    assert not theirs.is_shared(there)
    assert not theirs.fetch(there).exists()
    ours.share(here)
    assert theirs.is_shared(there)
    assert (theirs.fetch(there) / "variables" / "index").read_bytes() == b"weights"
    other = homes[0].version("m", 2)
    other.mkdir()
    (other / "saved_model.pb").write_bytes(b"graph")
    ours.share(other)
    store.rm("temper/house/models/m/2/saved_model.pb")  # as if only part of it had arrived
    with pytest.raises(StorageFailed, match="lacks"):
        theirs.fetch(homes[1].version("m", 2))
    assert not homes[1].version("m", 2).exists()
    assert list((homes[1].home / "fetching").iterdir()) == []
    store.rm("temper/house/models/m/2/.complete")
    assert not Objects(homes[1]).is_shared(homes[1].version("m", 2))  # although part of it is there
    (homes[0].datasets / "d.npz").write_bytes(b"images")
    ours.share(homes[0].datasets / "d.npz")
    assert theirs.fetch(homes[1].datasets / "d.npz").read_bytes() == b"images"
    assert theirs.older_than(homes[1].datasets, -1.0) == [homes[1].datasets / "d.npz"]
    assert theirs.older_than(homes[1].datasets, 60.0) == []
    theirs.drop_cached(homes[1].datasets, -1.0)
    assert not (homes[1].datasets / "d.npz").exists()
    theirs.remove_if_older(homes[1].datasets / "d.npz", 60.0)
    assert keys(store, "datasets") == ["temper/house/datasets/d.npz"]
    ours.remove(here)
    assert keys(store, "models/m/1") == []
    ours.share_missing(here)  # as after a restart with an object store that the version has never seen
    assert theirs.is_shared(there)
    assert [level for level, *_ in CHECKS["object store"](homes[0])] == ["ok"]
    assert keys(store, "probe") == []
    ((level, text, _),) = CHECKS["object store"](Settings(home=tmp_path / "c", objects="s3://nowhere"))
    assert (level, "lacks" in text) == ("fault", True)
    server.terminate()
    server.wait(30)
    ((level, text, advice),) = CHECKS["object store"](homes[0])
    assert (level, "cannot be reached" in text, "AWS_ENDPOINT_URL" in (advice or "")) == ("fault", True, True)
    with pytest.raises(StorageFailed, match="the object store cannot be reached"):
        ours.share(homes[0].datasets / "d.npz")


@pytest.mark.exhaustive
def test_three_machines_exchange_data_sets_and_versions_through_a_bucket(
    tmp_path: Path, bucket: Any, empty_postgresql: str, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    store, server = bucket
    address, port = f"127.0.0.1:{free_port()}", free_port()
    shared = {
        **SMALL, "TEMPER_STORE": empty_postgresql, "TEMPER_OBJECTS": "s3://temper/house",
        "TEMPER_MODEL_SERVER": address, "TEMPER_PORT": str(port),
        "TEMPER_MODEL_ROOT": str(tmp_path / "server" / "models"),
    }  # fmt: skip
    on = {name: {**shared, "TEMPER_HOME": str(tmp_path / name)} for name in ("gateway", "server", "one", "two")}
    upload = npz(images=digits[0][:60], labels=digits[1][:60])
    with contextlib.ExitStack() as machines:
        machines.enter_context(process(["serving", "--address", address, "--rest-address", ""], on["server"]))
        machines.enter_context(process(["api"], on["gateway"]))
        api = machines.enter_context(httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120))
        eventually(lambda: api.get("/healthz").status_code == 200, "the gateway answers")
        machines.enter_context(process(["serving.mirror"], on["server"]))

        def finished(model: str, **spec: Any) -> dict[str, Any]:
            form = {"model": model, "spec": json.dumps({**QUICK, **spec})}
            job = api.post("/finetune", data=form, files={"data": upload}).json()

            def look() -> dict[str, Any] | None:
                found: dict[str, Any] = api.get(f"/finetune/{job['id']}").json()
                return found if found["finished_at"] else None

            return eventually(look, "it is done", 180)

        def predicted(model: str) -> int:
            body = {"model": model, "range": "byte", "instances": digits[0][:2].tolist()}
            answer = api.post("/predict", json=body)
            assert answer.status_code == 200, answer.text
            return int(answer.json()["version"])

        with process(["trainer"], on["one"]):
            first = finished("m", checkpoints=2)
            assert (first["status"], predicted("m")) == ("succeeded", 1), first
        with process(["trainer"], on["two"]):  # which has neither the version to start from nor the checkpoints
            second = finished("m", base="m")
            assert (second["status"], second["version"], predicted("m")) == ("succeeded", 2, 2), second
            epochs = api.get(f"/finetune/{first['id']}/checkpoints").json()["data"]
            again = api.post(f"/finetune/{first['id']}/checkpoints/{epochs[-1]['epoch']}/publish").json()
            published = lambda: api.get(f"/finetune/{again['id']}").json()["status"] == "succeeded"  # noqa: E731
            eventually(published, "the epoch is published", 180)
            assert api.get("/models/m/versions/2/saved_model").content[:2] == b"PK"
            assert api.post("/models/m/versions/1/verify").json()["proven"]
            assert api.delete("/models/m").status_code == 200
            eventually(lambda: not (tmp_path / "server/models/m/1").exists(), "the mirror deletes the files")
            eventually(lambda: keys(store, "models/m") == [], "the bucket has none of them")
            server.send_signal(signal.SIGKILL)
            server.wait()
            refused = api.post(
                "/finetune", data={"model": "n"}, files={"data": npz(images=digits[0][:50], labels=digits[1][:50])}
            )
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "object_store_unavailable")
            assert api.get("/finetune?model=n").json()["data"] == []
            assert predicted("lenet5") == 1
