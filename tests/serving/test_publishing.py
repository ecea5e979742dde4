"""Going live, staying live, going: real model servers, real files."""

import contextlib
import functools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
import tensorflow as tf

from serving.client import ModelServer, Prediction
from serving.publishing import ABSENT_S, FILES, Probe, check_files, prove, publish, reconcile, seal
from serving.registry import Label, Registry
from store.errors import ModelServerTimeout, ModelServerUnavailable, PublishFailed, UnknownModel, WrongState
from store.processes import free_port
from store.records import DatasetCard, DatasetReport, Manifest, ReportCard
from store.settings import Settings
from tests.conftest import Place, eventually, freeze, opened, running_model_server
from trainer.export import export
from trainer.jobs.library import Library, Upload
from trainer.jobs.records import Jobs, LeaseLost
from trainer.lenet import initial, logits
from trainer.worker.retention import DEAD_S, UNUSED_S, retire_surplus, sweep_datasets, sweep_leftovers

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 784), np.uint8)
IMAGES = (PIXELS / np.float32(255)).reshape(-1, 28, 28, 1)
STEPS = ["staged", "verified", "renamed", "available", "proven", "warmed"]


def expected(seed: int) -> np.ndarray:
    found: np.ndarray = logits(initial(10, seed), tf.constant(IMAGES)).numpy()
    return found


@dataclass
class Press:
    """Publishes versions of a model `m`."""

    settings: Settings
    registry: Registry
    servers: list[ModelServer]

    def staged(self, seed: int, claimed: int | None = None) -> Path:
        """Weights of `seed`, with a probe that says that they give the logits of `claimed`."""
        folder = self.settings.staging / "job"
        export(folder, initial(10, seed), invert=False, manifest={})
        Probe(PIXELS, expected(seed if claimed is None else claimed)).save(folder)
        seal(folder)
        return folder

    def publish(self, seed: int, **how: object) -> int:
        claimed = how.pop("claimed", None)
        return publish(
            self.settings, self.registry, self.servers, staged=self.staged(seed, claimed),  # type: ignore[arg-type]
            model="m", job_id="job", manifest=Manifest(classes=("a",)), report=ReportCard, **how,  # type: ignore[arg-type]
        )  # fmt: skip

    def left(self) -> list[str]:
        """Directories of versions."""
        return sorted(path.name for path in (self.settings.models / "m").iterdir())


@pytest.fixture
def press(tmp_path: Path, model_server: str) -> Iterator[Press]:
    settings = Settings(home=tmp_path, model_server=model_server)
    settings.make_home()
    with opened(settings.store_url) as engine, ModelServer(model_server) as server:
        yield Press(settings, Registry(engine), [server])
        server.reload(tmp_path, {})


def test_a_published_version_is_live_and_served(press: Press) -> None:
    steps: list[str] = []
    assert [press.publish(seed, step=steps.append) for seed in (1, 2)] == [1, 2]
    assert steps == STEPS * 2
    assert press.registry.find("m").version == 2
    for version in (1, 2):
        for images in (IMAGES, PIXELS):
            answer = press.servers[0].predict("m", version, images)
            np.testing.assert_allclose(answer.logits, expected(version), atol=1e-4)


def test_a_version_that_answers_otherwise_than_trained_leaves_nothing(press: Press) -> None:
    press.publish(1)
    with pytest.raises(PublishFailed, match="differs from the trained model"):
        press.publish(2, claimed=3)
    assert press.registry.find("m").version == 1
    assert press.registry.wanted() == {"m": [1]}
    assert press.left() == ["1"]
    eventually(lambda: press.servers[0].available("m") == {1}, "version 2 is unloaded")
    assert press.publish(3) == 3


@pytest.mark.parametrize("stop", STEPS)
def test_what_is_stopped_at_any_step_is_taken_back(press: Press, stop: str) -> None:
    press.publish(1)

    def step(done: str) -> None:
        if done == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        press.publish(2, step=step)
    shutil.rmtree(press.settings.staging / "job", ignore_errors=True)  # which is the job's
    assert press.left() == ["1"]
    assert press.registry.wanted() == {"m": [1]}
    assert press.registry.find("m").version == 1
    np.testing.assert_allclose(press.servers[0].predict("m", 1, IMAGES).logits, expected(1), atol=1e-4)


@pytest.mark.parametrize("damage", ["variables/variables.data-00000-of-00001", "saved_model.pb", FILES])
def test_files_that_are_not_those_that_were_exported_are_never_published(press: Press, damage: str) -> None:
    folder = press.staged(1)
    (folder / damage).write_bytes((folder / damage).read_bytes()[:-3])
    with pytest.raises(PublishFailed, match=damage):
        publish(
            press.settings, press.registry, press.servers, staged=folder, model="m", job_id=None,
            manifest=Manifest(classes=("a",)), report=ReportCard,
        )  # fmt: skip
    assert press.registry.wanted() == {}


def test_a_file_that_nobody_exported_is_noticed(press: Press) -> None:
    folder = press.staged(1)
    check_files(folder)
    (folder / "more").touch()
    with pytest.raises(PublishFailed, match="have changed: more"):
        check_files(folder)


def test_one_version_that_cannot_be_loaded_does_not_keep_others_from_going_live(press: Press) -> None:
    press.publish(1)
    broken = press.registry.reserve("broken", None, Manifest(classes=("a",)), ReportCard())
    press.registry.go_live("broken", broken)
    place = press.settings.version("broken", broken)
    place.mkdir(parents=True)
    (place / "saved_model.pb").write_bytes(b"garbage")
    assert press.publish(2) == 2


def test_every_server_has_to_prove_a_version(press: Press) -> None:
    port = free_port()
    with running_model_server(port), ModelServer(f"127.0.0.1:{port}") as second:
        press.servers.append(second)
        press.publish(1)
        for server in press.servers:
            assert prove(server, "m", 1, Probe.load(press.settings.version("m", 1))) < 1e-4
    with ModelServer(f"127.0.0.1:{port}") as gone:  # the other is done all the same
        press.servers[:] = [gone, press.servers[0]]
        press.registry.retire("m")
        with pytest.raises(ModelServerUnavailable):
            reconcile(press.settings, press.registry, press.servers)
    eventually(lambda: press.servers[1].available("m") == set(), "version 1 is unloaded")
    del press.servers[0]


def test_a_standby_follows_a_live_version_and_publishes_alone_when_it_has_to(
    press: Press, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    press.settings = press.settings.model_copy(update={"model_server": "unix:/one,unix:/standby"})
    port = free_port()
    with ModelServer(f"127.0.0.1:{port}") as standby:
        press.servers.append(standby)
        began = time.monotonic()
        assert press.publish(1) == 1
        press.servers.reverse()
        assert press.publish(2) == 2
        assert time.monotonic() - began < 2 * ABSENT_S  # nobody waits for one that is away
        with running_model_server(port):
            eventually(lambda: is_reachable(standby), "the channel is back")
            press.servers.reverse()
            lease: list[str] = []

            def step(done: str) -> None:
                if lease:
                    raise LeaseLost

            until = ModelServer.wait_until_available

            def waits(server: ModelServer, model: str, version: int, wait: Callable[[], None]) -> None:
                wait()  # as it does where a version is slow to load
                until(server, model, version, wait=wait)

            monkeypatch.setattr(ModelServer, "wait_until_available", waits)
            assert press.publish(3, step=step, finish=lambda *_: lease.append("is over")) == 3
            eventually(lambda: standby.available("m") == {1, 2, 3}, "the standby has followed")
            assert prove(standby, "m", 3, Probe.load(press.settings.version("m", 3))) < 1e-4
            assert "not proven" not in caplog.text
        press.servers.remove(standby)


@pytest.mark.slow
def test_reconcile_repairs_a_server_that_lost_everything(tmp_path: Path) -> None:
    port = free_port()
    settings = Settings(home=tmp_path, model_server=f"127.0.0.1:{port}")
    settings.make_home()
    with opened(settings.store_url) as engine, ModelServer(settings.server_addresses[0]) as server:
        press = Press(settings, Registry(engine), [server])
        with running_model_server(port):
            press.publish(1)
            press.publish(2)
        with pytest.raises(ModelServerUnavailable):
            server.predict("m", 2, IMAGES)
        with running_model_server(port):
            shutil.rmtree(settings.version("m", 1))  # must not keep the other from coming back
            eventually(lambda: is_reachable(server), "the channel is back")
            reconcile(settings, press.registry, [server])
            np.testing.assert_allclose(server.predict("m", 2, IMAGES).logits, expected(2), atol=1e-4)


@pytest.mark.parametrize("stop", ["renamed", "available", "proven", "warmed"])
@pytest.mark.exhaustive
def test_a_model_server_that_dies_at_any_step_costs_no_fine_tune(tmp_path: Path, stop: str) -> None:
    port = free_port()
    settings = Settings(home=tmp_path, model_server=f"127.0.0.1:{port}")
    settings.make_home()
    with (
        contextlib.ExitStack() as stack,
        opened(settings.store_url) as engine,
        ModelServer(settings.server_addresses[0]) as server,
    ):
        dying = stack.enter_context(running_model_server(port))
        press = Press(settings, Registry(engine), [server])
        killed = False

        def step(done: str) -> None:
            nonlocal killed
            if done == stop and not killed:
                killed = True
                dying.kill()
                dying.wait()
                stack.enter_context(running_model_server(port))  # comes back, and serves nothing

        assert press.publish(1, step=step) == 1
        assert press.registry.find("m").version == 1
        if stop == "warmed":  # nothing was left to do at the server, so the gateway's watch tells it what to serve
            reconcile(settings, press.registry, [server])
            server.wait_until_available("m", 1)
        np.testing.assert_allclose(server.predict("m", 1, IMAGES).logits, expected(1), atol=1e-4)


def test_a_version_goes_live_on_the_servers_that_are_there(press: Press) -> None:
    with ModelServer(f"127.0.0.1:{free_port()}") as absent:
        press.servers.insert(0, absent)
        began = time.monotonic()
        assert press.publish(1) == 1
        assert time.monotonic() - began < 30
        press.servers.remove(absent)
    assert press.registry.find("m").version == 1
    np.testing.assert_allclose(press.servers[0].predict("m", 1, IMAGES).logits, expected(1), atol=1e-4)


def test_a_version_that_was_withdrawn_meanwhile_never_goes_live(press: Press) -> None:
    press.publish(1)

    def step(done: str) -> None:
        if done == "warmed":  # here the worker stalls, and another one clears up after it
            press.registry.remove("m", 2)

    with pytest.raises(WrongState, match="m:2 has been withdrawn"):
        press.publish(2, step=step)
    assert press.registry.find("m").version == 1
    assert list(press.registry.routes()["m"].classes) == [1]


@pytest.mark.parametrize("loss", ["reassigned", "cancelled"])
def test_only_the_holder_of_the_lease_makes_a_version_live(engine: sa.Engine, loss: str) -> None:
    jobs, registry = Jobs(engine), Registry(engine)
    jobs.create(model="m", base="lenet5:1", spec={}, dataset=DatasetCard())
    job = jobs.claim("stalled")
    assert job is not None
    fence = functools.partial(jobs.check_lease, job)
    registry.go_live("m", registry.reserve("m", job.id, Manifest(classes=("a",)), ReportCard()), fence=fence)
    second = registry.reserve("m", job.id, Manifest(classes=("a",)), ReportCard(), fence)
    if loss == "cancelled":
        jobs.cancel(job.id)
    else:
        jobs.requeue(job)
        jobs.claim("other")
    revision = registry.revision()
    with pytest.raises(LeaseLost):
        registry.go_live("m", second, "canary", fence=fence)
    for change in (
        lambda: registry.reserve("m", job.id, Manifest(classes=("a",)), ReportCard(), fence),
        lambda: registry.set_report("m", 1, ReportCard(warnings=["late"]), fence),
        lambda: registry.remove("m", second, fence),
    ):
        with pytest.raises(LeaseLost):
            change()
    assert (registry.revision(), registry.labels("m")) == (revision, {"stable": Label(1)})
    assert [version.version for version in registry.of_model("m")] == [1]


def test_files_that_arrive_after_their_version_was_forgotten_are_removed(press: Press) -> None:
    def step(done: str) -> None:
        if done == "renamed":  # just before, the worker froze, and another one cleared up after it
            press.registry.remove("m", 1)
            press.registry.forget("m", 1)
            raise LeaseLost("job")

    with pytest.raises(LeaseLost):
        press.publish(1, step=step)
    assert press.left() == []


@pytest.mark.parametrize(("scale", "accepted"), [(1.0, False), (1000.0, True)])
def test_parity_is_relative_to_the_scale_of_the_logits(scale: float, accepted: bool) -> None:
    known = np.array([[scale, -scale, 0.0]] * 3, np.float32)

    class Server:
        target = "here"

        def predict(self, model: str, version: int, images: np.ndarray) -> Prediction:
            return Prediction(version, known + np.float32(1e-2), known)

    with contextlib.nullcontext() if accepted else pytest.raises(PublishFailed, match="differs from the trained"):
        prove(Server(), "m", 1, Probe(PIXELS, known))  # type: ignore[arg-type]


@pytest.mark.exhaustive
def test_a_frozen_server_holds_up_neither_other_servers_nor_other_processes(press: Press) -> None:
    port = free_port()
    with running_model_server(port) as process, ModelServer(f"127.0.0.1:{port}") as frozen:
        press.publish(1)
        press.publish(2)
        reconcile(press.settings, press.registry, [frozen])
        freeze(process.pid)
        with ThreadPoolExecutor(1) as pool:
            stuck = pool.submit(lambda: frozen.reload(press.settings.served_root, {"m": [1]}, timeout_s=8))
            press.registry.retire("m", 1)
            began = time.monotonic()
            with pytest.raises(ModelServerTimeout):
                reconcile(press.settings, press.registry, [frozen, *press.servers])
            assert time.monotonic() - began < 4
            assert press.left() == ["2"]
            assert press.publish(3) == 3
            assert time.monotonic() - began < 7
            with pytest.raises(ModelServerTimeout):
                stuck.result()


def is_reachable(server: ModelServer) -> bool:
    try:
        server.states("m")
    except ModelServerUnavailable:
        return False
    return True


def test_a_removed_version_goes_from_the_servers_and_the_disk(press: Press) -> None:
    press.publish(1)
    press.publish(2)
    press.registry.retire("m", 1)
    reconcile(press.settings, press.registry, press.servers)
    eventually(lambda: press.servers[0].available("m") == {2}, "version 1 is unloaded")
    assert press.left() == ["2"]
    assert press.registry.removed() == []


# --- retention ----------------------------------------------------------------------------------------------------


def test_the_newest_and_the_labelled_versions_are_kept(place: Place) -> None:
    settings = place.settings.model_copy(update={"keep_versions": 2})
    for _ in range(3):
        place.run(place.claimed({"epochs": 1, "method": "head"}))
    place.registry.put_label("m", "canary", 1)
    for _ in range(2):
        place.run(place.claimed({"epochs": 1, "method": "head"}))
    place.jobs.create(model="n", base="m:2", spec={}, dataset=DatasetCard(id="x"))  # it will start from version 2
    rest = {"jobs": place.jobs, "registry": place.registry, "servers": place.servers}
    retire_surplus("m", settings=settings, **rest)  # type: ignore[arg-type]
    assert [version.version for version in place.registry.of_model("m")] == [5, 4, 2, 1]
    assert not settings.version("m", 3).exists()
    retire_surplus("m", settings=settings.model_copy(update={"keep_versions": 0}), **rest)  # type: ignore[arg-type]
    assert len(place.registry.of_model("m")) == 4


def test_data_sets_go_when_neither_a_job_nor_a_version_needs_them(place: Place) -> None:
    done = place.run(place.claimed({"epochs": 1, "method": "head"}))
    used, unused, young = (place.settings.datasets / f"{name}.npz" for name in (done.dataset.id, "0" * 64, "1" * 64))
    unused.touch()
    young.touch()
    for path in (used, unused):
        os.utime(path, (0, time.time() - UNUSED_S - 60))
    place.jobs.reported(done, "complete")
    sweep_datasets(place.settings, place.jobs, place.registry, Library(place.engine))
    assert [path.exists() for path in (used, unused, young)] == [True, False, True]
    place.registry.retire("m")
    library = Library(place.engine)
    raw, unknown = (place.settings.datasets / f"{name}.upload" for name in ("2" * 64, "3" * 64))
    for path in (raw, unknown):
        path.touch()
        os.utime(path, (0, time.time() - UNUSED_S - 60))
    library.keep("t", Upload(raw.stem, 1, done.dataset, DatasetReport()))
    sweep_datasets(place.settings, place.jobs, place.registry, library)
    assert [path.exists() for path in (used, raw, unknown)] == [True, True, False]
    library.delete("t", done.dataset.id)
    sweep_datasets(place.settings, place.jobs, place.registry, library)
    assert [path.exists() for path in (used, raw)] == [False, False]


def test_what_dead_workers_left_of_finished_jobs_is_removed(place: Place) -> None:
    ended, running = (place.claimed({"epochs": 1}, model=model) for model in ("m", "n"))
    for job in (ended, running):
        half = place.registry.reserve(job.model, job.id, Manifest(classes=("a",)), ReportCard())
        place.settings.version(job.model, half).mkdir(parents=True)
        (place.settings.staging / f"{job.id}.{job.lease}").mkdir()
    place.jobs.finish(ended, "failed")
    gone = place.registry.reserve("o", None, Manifest(classes=("a",)), ReportCard())
    place.registry.remove("o", gone)  # by one that died before it deleted the files
    dead, living = (place.settings.home / f"worker-{host}-1.pulse" for host in ("dead", "living"))
    living.touch()
    dead.touch()
    os.utime(dead, (0, time.time() - DEAD_S - 60))
    sweep_leftovers(place.settings, place.jobs, place.registry, place.servers)
    assert (dead.exists(), living.exists()) == (False, True)
    assert place.registry.wanted() == {"lenet5": [1], "n": [1]}
    assert place.registry.removed() == []
    assert not place.settings.version("m", 1).exists()
    assert [path.stem for path in place.settings.staging.iterdir()] == [running.id]


def test_a_job_whose_base_has_gone_fails_and_says_so(place: Place) -> None:
    place.run(place.claimed({"epochs": 1, "method": "head"}))
    job = place.claimed({"epochs": 1, "method": "head", "base": "m:1"}, base="m:1")
    place.registry.retire("m")
    reconcile(place.settings, place.registry, place.servers)
    with pytest.raises(UnknownModel, match="there is no model 'm'"):
        place.run(job)


def test_the_steps_of_a_publication_can_be_seen_on_the_job(place: Place) -> None:
    done = place.run(place.claimed({"epochs": 1, "method": "head"}))
    times = list(done.progress.publishing.values())
    assert list(done.progress.publishing) == [*STEPS, "labelled"]
    assert times == sorted(times)
    assert done.progress.epoch == 1
    assert json.loads((place.settings.version("m", 1) / "assets.extra/manifest.json").read_text())["job"] == done.id
