"""The steps of a job, apart from the processes around them."""

import functools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa
import tensorflow as tf

from serving.registry import stored_name
from store.errors import Diverged
from store.records import Manifest, ReportCard
from tests.conftest import Place, eventually
from trainer import report
from trainer.asked import parse_spec
from trainer.export import export
from trainer.fit import Split, begin, fit
from trainer.jobs.records import LeaseLost
from trainer.lenet import initial
from trainer.report import HeldOut
from trainer.worker.pretrained import pretrained
from trainer.worker.run_job import clear_leftovers


def test_a_run_that_diverges_stops_at_once_and_leaves_nothing(place: Place) -> None:
    hot = {name: value * np.float32(1e18) for name, value in initial(10, seed=0).items()}
    (place.settings.models / "lenet5/1/variables").rename(place.settings.home / "aside")
    export(place.settings.staging / "hot", hot, invert=False, manifest={})
    (place.settings.staging / "hot/variables").rename(place.settings.models / "lenet5/1/variables")
    job = place.claimed({"epochs": 50, "method": "full"})
    with pytest.raises(Diverged, match=r"in step \d, epoch 1"):
        place.run(job)
    assert list(place.registry.wanted()) == ["lenet5"]
    assert list(place.settings.staging.glob("ftjob-*")) == []


def test_a_loss_that_explodes_without_end_is_divergence_too(place: Place) -> None:
    job = place.claimed({"epochs": 5, "method": "full", "learning_rate": 1.0})
    with pytest.raises(Diverged, match=r"the loss is .* epoch 1"):
        place.run(job)
    assert list(place.registry.wanted()) == ["lenet5"]


def test_early_stopping_ends_training_and_keeps_the_best_weights(place: Place) -> None:
    spec = {
        "epochs": 200,
        "method": "full",
        "learning_rate": 0.01,
        "early_stopping": {"patience": 2},
        "calibrate": False,
    }
    done = place.run(place.claimed(spec))
    assert done.progress.epoch < 200
    card = place.registry.find("m").report.dump()
    best = min(epoch["validation_cross_entropy"] for epoch in card["history"])
    assert card["validation"]["cross_entropy"] == pytest.approx(best, abs=1e-6)
    assert card["history"][-1]["validation_cross_entropy"] > best


def test_the_same_job_gives_the_same_version_bit_for_bit(place: Place) -> None:
    spec = {"epochs": 3, "adversarial": {"attack": "fgsm", "epsilon": 0.1}, "seed": 5}
    hashes = []
    for _ in range(2):
        place.run(place.claimed(spec))
        hashes.append(place.registry.find("m").manifest.sha256)
    assert hashes[0] == hashes[1]


def test_a_version_is_live_if_and_only_if_its_job_has_succeeded(place: Place) -> None:
    job = place.claimed({"epochs": 1})
    failing = sa.exc.OperationalError("COMMIT", {}, Exception("the power fails"))

    def fail(connection: object, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE jobs SET version"):
            sa.event.remove(place.engine, "before_cursor_execute", fail)
            raise failing

    sa.event.listen(place.engine, "before_cursor_execute", fail)
    with pytest.raises(sa.exc.OperationalError):
        place.run(job)
    assert place.jobs.get(job.id).status == "running"
    assert list(place.registry.wanted()) == ["lenet5"]
    done = place.run(job)
    assert (done.status, done.version) == ("succeeded", 2)
    assert [version.version for version in place.registry.of_model("m")] == [2]


def test_an_attempt_that_was_frozen_leaves_a_later_one_alone(place: Place) -> None:
    """Nothing that the later one stages or publishes is taken for a leftover."""
    frozen = place.claimed({"epochs": 1})
    place.jobs.recover("w")
    job = place.jobs.claim("v")
    assert job is not None
    half = place.registry.reserve("m", job.id, Manifest(classes=("a",)), ReportCard())
    staged = place.settings.staging / f"{job.id}.{job.lease}"
    staged.mkdir()
    happened = place.jobs.events(job.id)
    with pytest.raises(LeaseLost):
        place.run(frozen)
    rest = {"settings": place.settings, "registry": place.registry, "servers": place.servers}
    with pytest.raises(LeaseLost):  # as when it freezes between the two
        clear_leftovers(frozen, **rest, fence=functools.partial(place.jobs.check_lease, frozen))  # type: ignore[arg-type]
    assert place.registry.wanted()["m"] == [half]
    assert staged.exists()
    assert place.jobs.events(job.id) == happened


def test_what_a_dead_worker_left_half_published_is_taken_back(place: Place) -> None:
    job = place.claimed({"epochs": 1})
    half = place.registry.reserve("m", job.id, Manifest(classes=("a",)), ReportCard())
    export(place.settings.models / "m" / str(half), initial(10, 0), invert=False, manifest={})
    (place.settings.staging / f"{job.id}.0").mkdir()
    done = place.run(job)
    assert (done.status, done.version) == ("succeeded", 2)
    assert not (place.settings.models / "m/1").exists()
    assert list(place.settings.staging.iterdir()) == []
    eventually(lambda: place.servers[0].available("m") == {2}, "only the new version is served")


@pytest.mark.exhaustive
def test_a_worker_does_not_grow_over_200_jobs(place: Place) -> None:
    """From the data to the export, which is what a worker does in its own process."""
    directory = place.settings.home / "out"
    base, _ = pretrained()
    images = np.random.default_rng(0).random((40, 28, 28, 1), np.float32)
    split = Split(tf.constant(images), np.arange(40, dtype=np.int32) % 10)
    specs = [parse_spec(json.dumps({"method": method, "epochs": 1, "l2": 1e-3})) for method in ("lora", "full")]
    memory = []
    for number in range(250):
        spec = specs[number % 2].model_copy(update={"seed": number, "learning_rate": 1e-3 + 1e-6 * number})
        fitted = fit(spec, begin(spec, base, classes=10, same_classes=True), split, split, classes=10)
        report.quick(fitted, split, HeldOut.apart(fitted, split, split), tuple("0123456789"), spec)
        export(directory, fitted.params, invert=False, manifest={"number": number})
        shutil.rmtree(directory)
        memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
    assert max(memory[-20:]) - max(memory[:50]) < 10  # MiB


def test_a_tenants_model_is_published_under_its_stored_name_and_shows_its_own(place: Place) -> None:
    spec = {"epochs": 1, "method": "head"}
    name = stored_name("acme", "m")
    place.run(place.claimed(spec, model=name))
    job = place.run(place.claimed(spec | {"base": "m"}, base=f"{name}:1", model=name))
    assert (job.status, job.version, job.model) == ("succeeded", 2, "acme~m")
    assert (place.settings.models / "acme~m" / "2" / "saved_model.pb").is_file()
    manifest = place.registry.find(name).manifest
    assert (manifest.base, (manifest.resolved_spec or {})["base"]) == ("m:1", "m:1")
    assert "acme" not in (place.settings.version(name, 2) / "assets.extra" / "manifest.json").read_text()
    answer = place.servers[0].predict(name, 2, np.zeros((1, 784), np.uint8))
    assert answer.version == 2
