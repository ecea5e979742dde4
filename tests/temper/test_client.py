"""The Python client against a real service, and against what breaks on the way to one."""

import asyncio
import inspect
import itertools
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from api.http.errors import status_of
from store import errors as server_errors
from store.processes import free_port
from temper import (
    AsyncClient,
    Client,
    Conflict,
    GateFailed,
    InvalidDataset,
    InvalidImage,
    InvalidInstances,
    InvalidRequest,
    InvalidSpec,
    Job,
    JobFailed,
    NotFound,
    ServerError,
    TemperError,
    Unreachable,
)
from temper.client import EventStream, Verbs
from temper.errors import from_answer
from tests.conftest import Service, eventually, npz, png, running_service

Digits = tuple[np.ndarray, np.ndarray]
QUICK = {"method": "head", "epochs": 1}


@pytest.fixture(scope="module")
def temper(service: Service) -> Iterator[Client]:
    with Client(service.url) as client:
        yield client


@pytest.fixture(scope="module")
def states(temper: Client, digits: Digits) -> list[Job]:
    """What was told of the job that made `typed:1`; it is `stable`. Another made `typed:2`, which is `canary`."""
    told: list[Job] = []
    arrays = digits[0][:60], digits[1][:60]
    done = temper.finetune(arrays, "typed", QUICK, wait=True, on_progress=told.append)
    assert done == told[-1]
    temper.finetune(arrays, "typed", QUICK, label="canary", wait=True)
    return told


@pytest.fixture(scope="module")
def job(states: list[Job]) -> Job:
    return states[-1]


def test_a_finetune_that_is_waited_for_tells_its_progress_and_returns_the_version(states: list[Job]) -> None:
    first, last = states[0], states[-1]
    assert first.status in ("queued", "running")
    assert (last.status, last.version, last.label, last.error) == ("succeeded", 1, "stable", None)
    assert last.finished
    assert not first.finished
    assert last.dataset["images"] == 60
    assert last.json["object"] == "fine_tuning.job"
    assert all(earlier != later for earlier, later in itertools.pairwise(states))


@pytest.mark.exhaustive
def test_a_folder_a_zip_bytes_and_arrays_are_the_same_upload(temper: Client, digits: Digits, tmp_path: Path) -> None:
    images, labels = digits[0][:40], digits[1][:40]
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (tmp_path / "folder" / str(label)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / str(label) / f"{number:02}.png").write_bytes(png(image))
    with zipfile.ZipFile(tmp_path / "digits.zip", "w") as archive:
        for file in sorted((tmp_path / "folder").rglob("*.png")):
            archive.write(file, file.relative_to(tmp_path / "folder"))
    slow = {"method": "full", "epochs": 1000}
    queued = [
        temper.finetune(tmp_path / "folder", "forms", slow),
        temper.finetune(str(tmp_path / "digits.zip"), "forms", slow),
        temper.finetune((tmp_path / "digits.zip").read_bytes(), "forms", slow),
    ]
    with pytest.raises(TimeoutError, match="still"):
        temper.wait(queued[0].id, timeout_s=0.0)
    arrays = images, [str(label) for label in labels]
    others = npz(images=digits[0][40:80], labels=digits[1][40:80])
    queued.append(temper.finetune(arrays, "forms", slow, validation=others))
    for one in queued:
        temper.cancel(one.id)
    assert len({one.dataset["id"] for one in queued[:3]}) == 1
    assert queued[0].dataset["classes"] == queued[3].dataset["classes"]
    assert queued[3].dataset["validation"]["images"] == 40
    with pytest.raises(JobFailed) as failure:
        temper.wait(queued[-1].id)
    assert failure.value.job.status == "cancelled"
    assert failure.value.code == "cancelled"


def test_answers_are_explained_corrected_and_learned_from(temper: Client, digits: Digits) -> None:
    images, labels = digits[0][:40], [str(label) for label in digits[1][:40]]
    temper.finetune((images, labels), "explains", {"method": "head", "epochs": 1}, wait=True)
    found = temper.explain(images[:2], "explains", target="3", feedback=True)
    assert [one.explanation["class"] for one in found.predictions if one.explanation] == ["3", "3"]
    assert found.id
    correction = temper.correct(found.id, "5", 1)
    assert (correction.model, correction.label, correction.predicted) == ("explains", "5", found.labels[1])
    assert list(temper.corrections("explains")) == [correction]
    planned = temper.dry_run(None, "explains", {"method": "head"}, corrections=True)
    assert planned.dataset["images"] == 41
    assert temper.delete_correction(correction.id).id == correction.id
    with pytest.raises(NotFound):
        temper.correct("pred-none", "5")


def test_what_is_wrong_with_images_is_told_and_they_can_be_excluded(temper: Client, digits: Digits) -> None:
    arrays = np.concatenate([digits[0][:40], digits[0][:1]]), [*digits[1][:40], (digits[1][0] + 1) % 10]
    dry = temper.dry_run(arrays, "excluding", {"method": "head"})
    (warning,) = dry.warnings
    assert "2 images equal to one of another class: 0 " in warning
    (finding,) = dry.dataset["findings"]
    last = finding["listed"][-1]["index"]
    without = temper.dry_run(arrays, "excluding", {"method": "head"}, exclude=[last])
    assert (without.dataset["images"], without.dataset["excluded"], without.warnings) == (40, 1, [])
    with pytest.raises(InvalidDataset, match="41: is not in the data set"):
        temper.finetune(arrays, "excluding", exclude=[41])


def test_a_data_set_is_kept_used_by_its_id_and_deleted(temper: Client, digits: Digits) -> None:
    kept = temper.upload((digits[0][100:180], digits[1][100:180]))
    assert (kept.report["images"], kept.report["duplicates"]) == (80, 0)
    assert temper.dataset(kept.id) == kept
    assert kept.id in [one.id for one in temper.datasets()]
    slow = {"method": "full", "epochs": 1000}
    first = temper.finetune(None, "kept", slow, dataset=kept.id, priority=-7, metadata={"team": "meters"})
    assert (first.dataset["images"], first.priority, first.metadata) == (80, -7, {"team": "meters"})
    with pytest.raises(Conflict):
        temper.delete_dataset(kept.id)
    with pytest.raises(ValueError, match="either data or dataset"):
        temper.finetune(None, "kept")
    temper.cancel(first.id)
    with pytest.raises(JobFailed):
        temper.wait(first.id)
    assert temper.delete_dataset(kept.id).id == kept.id
    with pytest.raises(NotFound):
        temper.dataset(kept.id)


def test_a_dry_run_says_what_a_fine_tune_would_take_and_creates_nothing(temper: Client, digits: Digits) -> None:
    arrays = digits[0][:60], digits[1][:60]
    others = digits[0][60:100], digits[1][60:100]
    dry = temper.dry_run(arrays, "dry", {"method": "full"}, validation=others)
    assert (dry.model, dry.base, dry.dataset["images"], dry.warnings) == ("dry", "lenet5:1", 60, [])
    assert dry.dataset["validation"]["images"] == 40
    assert dry.resolved_spec
    assert dry.resolved_spec["method"] == "full"
    assert dry.estimate.seconds > 0
    assert 0 < dry.estimate.seconds_within < 1
    assert dry.estimate.memory_bytes > 1e8
    searched = temper.dry_run(arrays, "dry")
    assert (searched.spec["method"], searched.resolved_spec) == ("auto", None)
    (warning,) = temper.dry_run((digits[0][:20], 2 * [*range(10)]), "dry").warnings
    assert "nothing is searched" in warning
    assert "dry" not in {job.model for job in temper.jobs()}
    with pytest.raises(InvalidSpec):
        temper.dry_run(arrays, "dry", {"epochs": 0})
    with pytest.raises(InvalidDataset):
        temper.dry_run(b"no archive", "dry")
    with pytest.raises(InvalidRequest, match="priority"):
        temper.dry_run(arrays, "dry", priority=101)
    with pytest.raises(ValueError, match="either data or dataset"):
        temper.dry_run(None, "dry")


def test_a_webhook_is_registered_rotated_told_replayed_and_deleted(
    temper: Client, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}/"
    made = temper.create_webhook(nowhere, ["fine_tuning.job.created"])
    assert (made.url, made.types, made.status) == (nowhere, ["fine_tuning.job.created"], "enabled")
    assert made.secret
    assert made.secret.startswith("whsec_")
    assert made.secret not in repr(made)
    assert temper.webhook(made.id).secret is None  # it is shown once
    assert made.id in [one.id for one in temper.webhooks()]
    rotated = temper.rotate_webhook(made.id)
    assert rotated.secret not in (None, made.secret)
    assert rotated.old_secret_until
    slow = {"method": "full", "epochs": 1000}
    queued = [temper.finetune((digits[0][:40], digits[1][:40]), "hooked", slow).id for _ in range(2)]
    for job in queued:
        temper.cancel(job)
    monkeypatch.setattr("temper.client.MOST", 1)
    told = list(temper.deliveries(made.id))
    assert [(one.type, one.data["id"]) for one in told] == [("fine_tuning.job.created", job) for job in queued[::-1]]
    assert [one.id for one in temper.deliveries(made.id, "pending", limit=1)] == [told[0].id]
    assert list(temper.deliveries(made.id, status="succeeded")) == []
    assert temper.replay_delivery(made.id, told[0].id).id == told[0].id
    with pytest.raises(NotFound):
        temper.replay_delivery(made.id, "msg-0")
    with pytest.raises(InvalidRequest, match="status"):
        list(temper.deliveries(made.id, status="lost"))
    with pytest.raises(InvalidRequest, match=r"types\.0"):
        temper.create_webhook(nowhere, ["job.done"])
    with pytest.raises(InvalidRequest, match="url"):
        temper.create_webhook("ftp://example.com")
    assert temper.delete_webhook(made.id).id == made.id
    for gone in (temper.webhook, temper.rotate_webhook, temper.delete_webhook):
        with pytest.raises(NotFound):
            gone(made.id)


def test_a_job_is_paused_and_resumed(temper: Client, digits: Digits) -> None:
    one = temper.finetune((digits[0][:40], digits[1][:40]), "paused", {"method": "full", "epochs": 1000})
    temper.pause(one.id)
    eventually(lambda: temper.job(one.id).status == "paused", "the job is paused")
    with pytest.raises(Conflict):
        temper.pause(one.id)
    assert temper.resume(one.id).status == "queued"
    temper.cancel(one.id)


@pytest.mark.slow
def test_checkpoints_are_listed_and_published(temper: Client, service: Service, digits: Digits) -> None:
    spec = {"method": "head", "epochs": 3, "checkpoints": 3}
    job = temper.finetune((digits[0][:60], digits[1][:60]), "stepwise", spec, wait=True)
    assert job.checkpoint is None
    assert [one.epoch for one in temper.checkpoints(job.id)] == [3, 2, 1]
    queued = temper.publish_checkpoint(job.id, 2, "early", idempotency_key="early")
    assert queued.checkpoint == {"job": job.id, "epoch": 2}
    assert temper.publish_checkpoint(job.id, 2, "early", idempotency_key="early").id == queued.id
    done = temper.wait(queued.id)
    assert temper.model("stepwise").labels == {"stable": 1, "early": done.version}
    assert [one.version for one in temper.checkpoints(job.id)] == [None, done.version, None]
    with pytest.raises(NotFound) as failure:
        temper.publish_checkpoint(job.id, 4)
    assert (failure.value.code, failure.value.param) == ("unknown_checkpoint", "epoch")

    async def listed() -> list[int]:
        async with AsyncClient(service.url) as client:
            return [one.epoch async for one in client.checkpoints(job.id)]

    assert asyncio.run(listed()) == [3, 2, 1]


def test_lists_go_over_all_pages(temper: Client, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = list(temper.jobs())
    assert job.id in [one.id for one in everything]
    monkeypatch.setattr("temper.client.MOST", 1)
    assert [one.id for one in temper.jobs()] == [one.id for one in everything]
    assert [one.id for one in temper.jobs(limit=2)] == [one.id for one in everything[:2]]
    names = [model.name for model in temper.models()]
    assert names == sorted(names)
    assert {"lenet5", "typed"} <= set(names)


def test_events_are_the_same_in_pages_and_followed(
    temper: Client, job: Job, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.completed(job.id)
    followed = list(temper.events(job.id, follow=True))
    assert [event.seq for event in followed] == list(range(1, len(followed) + 1))
    assert followed[-1].data == {"report_status": "complete"}
    assert list(temper.events(job.id, follow=True, after=3)) == followed[3:]
    monkeypatch.setattr("temper.client.MOST_EVENTS", 2)
    assert list(temper.events(job.id)) == followed
    assert list(temper.events(job.id, after=3)) == followed[3:]


def test_server_sent_events_are_read_however_they_are_cut() -> None:
    sent = b': hello\n\nid: 1\nevent: x\ndata: {"a": 1}\n\nid: 2\r\ndata: {"a":\r\ndata: 2}\r\n\r\ndata: {"a"'
    for size in range(1, len(sent)):
        stream = EventStream()
        chunks = (sent[at : at + size] for at in range(0, len(sent), size))
        assert [event for chunk in chunks for event in stream.read(chunk)] == [{"a": 1}, {"a": 2}]


def test_images_are_predicted_as_path_bytes_array_and_batch(
    temper: Client, job: Job, digits: Digits, tmp_path: Path
) -> None:
    image = digits[0][0]
    (tmp_path / "image").write_bytes(png(image))  # the kind is seen in the content
    one = temper.predict(tmp_path / "image", "typed")
    assert (one.model, one.version, len(one.classes)) == ("typed", 1, 10)
    assert temper.predict(png(image), "typed").labels == temper.predict(image, "typed").labels == one.labels
    many = temper.predict(digits[0][:5] / 255, "typed", label="canary", top_k=2)
    assert (many.version, len(many.labels)) == (2, 5)
    assert many.predictions[0].top_k
    assert len(many.predictions[0].top_k) == 2
    assert temper.predict(image, "typed", version=2).version == 2


def test_labels_move_forth_and_back(temper: Client, job: Job) -> None:
    assert temper.model("typed").labels == {"stable": 1, "canary": 2}
    with pytest.raises(Conflict, match="no live version before 1"):
        temper.rollback("typed")
    assert temper.promote("typed", 2).version == 2
    assert temper.rollback("typed").version == 1
    assert temper.set_label("typed", "canary", 1, weight=0.25).weight == 0.25
    assert temper.delete_label("typed", "canary").label == "canary"
    with pytest.raises(NotFound, match="canary"):
        temper.rollback("typed", label="canary")


@pytest.mark.exhaustive
def test_a_version_that_failed_its_gate_needs_an_override(temper: Client, digits: Digits) -> None:
    upload = digits[0][:60], [str(label) for label in digits[1][:60]]
    quick: dict[str, Any] = {"method": "head", "epochs": 1}
    temper.finetune(upload, "gated-client", quick, wait=True)
    given = temper.set_gate("gated-client", {"calibration_error": 0.0}).gate
    assert given is not None
    assert temper.gate("gated-client").gate == temper.model("gated-client").gate == given
    job = temper.finetune(upload, "gated-client", quick, wait=True)
    assert "the calibration error is" in job.gate_failures[0]
    with pytest.raises(GateFailed) as refused:
        temper.promote("gated-client", 2)
    assert isinstance(refused.value, Conflict)
    assert refused.value.code == "gate_failed"
    assert temper.promote("gated-client", 2, override=True).version == 2
    assert temper.delete_gate("gated-client").gate is None
    assert not temper.finetune(upload, "gated-client", quick, wait=True).gate_failures
    assert temper.rollback("gated-client").version == 1
    with pytest.raises(GateFailed):
        temper.set_label("gated-client", "canary", 2)
    assert temper.set_label("gated-client", "canary", 2, override=True).version == 2


def test_reports_proofs_and_health_are_read(temper: Client, job: Job) -> None:
    assert temper.version("typed").version == 1
    assert temper.report("typed", 2)["validation"]["images"] > 0
    assert temper.report_page("typed").startswith("<!DOCTYPE html>")
    proof = temper.verify("typed")
    assert proof.proven
    assert proof.failures["files"] is None
    assert temper.health().ready


def test_a_download_is_the_model_that_is_served(temper: Client, job: Job, digits: Digits, tmp_path: Path) -> None:
    path = temper.download("typed", tmp_path)
    assert path == tmp_path / "typed-1.zip"
    assert temper.download("typed", tmp_path / "again.zip", version=1).read_bytes() == path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        archive.extractall(tmp_path)
    served = temper.predict(digits[0][:8], "typed")
    signature = tf.saved_model.load(str(tmp_path / "typed" / "1")).signatures["serving_bytes"]
    found = signature(image=tf.constant(digits[0][:8].reshape(8, 784)))["probabilities"].numpy()
    np.testing.assert_allclose(found, [one.probabilities for one in served.predictions], atol=1e-5)
    delta = temper.delta("typed", tmp_path)
    assert delta.name == "typed-1.delta.npz"
    with np.load(delta) as arrays:
        assert "card" in arrays
    with pytest.raises(NotFound):
        temper.delta("lenet5", tmp_path / "none")
    assert {file.name for file in tmp_path.iterdir()} == {"typed-1.zip", "again.zip", "typed-1.delta.npz", "typed"}


def test_a_damaged_version_is_not_downloaded(temper: Client, job: Job, service: Service, tmp_path: Path) -> None:
    (service.home / "models" / "typed" / "2" / "assets.extra" / "probe.npz").write_bytes(b"")
    with pytest.raises(Conflict, match=r"probe\.npz"):
        temper.download("typed", tmp_path / "x.zip", version=2)
    assert list(tmp_path.iterdir()) == []
    assert not temper.verify("typed", 2).proven
    assert temper.delete("typed", 2).versions == [2]
    with pytest.raises(NotFound):
        temper.version("typed", 2)


def test_refusals_are_classes_with_all_that_the_service_says(temper: Client, job: Job, digits: Digits) -> None:
    with pytest.raises(NotFound) as unknown:
        temper.model("no-such")
    assert (unknown.value.status, unknown.value.code, unknown.value.param) == (404, "unknown_model", "model")
    assert unknown.value.request_id
    with pytest.raises(NotFound):
        temper.model("..")
    with pytest.raises(NotFound):
        temper.model("a/b")
    with pytest.raises(InvalidRequest, match="model"):
        temper.model("No Such")
    with pytest.raises(NotFound):
        temper.job("none")
    with pytest.raises(InvalidSpec) as wrong:
        temper.finetune((digits[0][:60], digits[1][:60]), "m", {"epochs": 0})
    assert wrong.value.param == wrong.value.details[0]["field"] == "spec.epochs"
    with pytest.raises(InvalidDataset):
        temper.finetune(b"no archive", "m")
    with pytest.raises(InvalidInstances):
        temper.predict(np.zeros((2, 3), np.uint8), "typed")
    with pytest.raises(InvalidImage, match="the content is not a PNG"):
        temper.predict(b"no image", "typed")
    with pytest.raises(Conflict):
        temper.delete("typed", 1)
    with pytest.raises(Conflict):
        temper.cancel(job.id)


def kinds(base: type[server_errors.TemperError]) -> Iterator[type[server_errors.TemperError]]:
    yield base
    for kind in base.__subclasses__():
        yield from kinds(kind)


def test_every_error_of_the_service_has_a_class_here() -> None:
    for kind in kinds(server_errors.TemperError):
        if not issubclass(kind, server_errors.JobFailed):
            error = kind("message")
            found = from_answer(status_of(error), error.body())
            assert type(found) not in (TemperError, ServerError) or kind is server_errors.TemperError, kind
            assert isinstance(found, ServerError) == (status_of(error) >= 500)
            if issubclass(kind, server_errors.InvalidRequest):
                assert type(found).__name__ == kind.__name__


class Proxy:
    """Passes connections on to a service, but hangs up on the first `lost` once it has read what was sent."""

    def __init__(self, target: str, lost: int) -> None:
        host, _, port = target.removeprefix("http://").partition(":")
        self._target, self._lost = (host, int(port)), lost
        self.received: list[bytes] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            with connection:
                request = self._read(connection)
                if not request:
                    return
                self.received.append(request)
                if len(self.received) > self._lost:
                    with socket.create_connection(self._target) as upstream:
                        upstream.sendall(request.replace(b"Connection: keep-alive", b"Connection: close"))
                        while data := upstream.recv(1 << 16):
                            connection.sendall(data)

    @staticmethod
    def _read(connection: socket.socket) -> bytes:
        request = b""
        while data := connection.recv(1 << 16):
            request += data
            head, end, body = request.partition(b"\r\n\r\n")
            lengths = [int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
            if end and len(body) >= sum(lengths):
                break
        return request

    def close(self) -> None:
        with socket.create_connection(self._listener.getsockname()):
            pass
        self._thread.join()
        self._listener.close()


@contextmanager
def proxied(service: Service, lost: int) -> Iterator[Proxy]:
    proxy = Proxy(service.url, lost)
    try:
        yield proxy
    finally:
        proxy.close()


def body(request: bytes) -> bytes:
    return request.partition(b"\r\n\r\n")[2]


def header(request: bytes, name: str) -> bytes:
    (line,) = (line for line in request.split(b"\r\n") if line.lower().startswith(name.encode() + b":"))
    return line


def test_what_can_be_repeated_is_repeated_as_it_was(service: Service, digits_zip: bytes) -> None:
    with proxied(service, lost=2) as proxy, Client(proxy.url, api_key="secret") as temper:
        queued = temper.finetune(digits_zip, "forms", {"method": "full", "epochs": 1000})
        assert len(proxy.received) == 3
        assert len({body(request) for request in proxy.received}) == 1
        assert len({header(request, "idempotency-key") for request in proxy.received}) == 1
        assert header(proxy.received[0], "authorization").endswith(b"Bearer secret")
        temper.cancel(queued.id)
    with proxied(service, lost=3) as proxy, Client(proxy.url) as temper:
        assert temper.health().ready
        assert len(proxy.received) == 4


def test_what_may_not_be_repeated_is_asked_once(service: Service, job: Job) -> None:
    with proxied(service, lost=1) as proxy, Client(proxy.url) as temper:
        with pytest.raises(Unreachable, match="temper serve"):
            temper.set_label("typed", "canary", 1)
        assert len(proxy.received) == 1


def test_a_service_that_is_not_there_is_an_error_with_its_url() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with Client(url, retries=0) as temper, pytest.raises(Unreachable, match=url) as away:
        temper.health()
    assert away.value.status is None
    for wrong in ("localhost:8080", "ftp://x", "http://[::1", "http://"):
        with pytest.raises(ValueError, match=r"://|URL"):
            Client(wrong)


@pytest.mark.slow
def test_the_asynchronous_client_does_the_same(
    temper: Client, job: Job, service: Service, digits: Digits, tmp_path: Path
) -> None:
    async def use() -> None:
        async with AsyncClient(service.url) as client:
            assert await client.job(job.id) == temper.job(job.id)
            assert [one.id async for one in client.jobs(limit=3)] == [one.id for one in temper.jobs(limit=3)]
            events = [event async for event in client.events(job.id, follow=True)]
            assert events == list(temper.events(job.id))
            found, health = await asyncio.gather(client.predict(png(digits[0][0]), "typed"), client.health())
            assert found.labels == temper.predict(digits[0][0], "typed").labels
            assert health.ready
            dry = await client.dry_run((digits[0][:60], digits[1][:60]), "typed", QUICK)
            assert (dry.model, dry.dataset["images"]) == ("typed", 60)
            made = await client.create_webhook(f"http://127.0.0.1:{free_port()}/")
            assert made.id in [one.id async for one in client.webhooks()]
            assert [one async for one in client.deliveries(made.id)] == []
            assert (await client.delete_webhook(made.id)).id == made.id
            path = await client.download("typed", tmp_path)
            assert zipfile.ZipFile(path).testzip() is None
            told: list[Job] = []
            done = await client.finetune(
                (digits[0][:60], digits[1][:60]), "typed", QUICK, wait=True, on_progress=told.append
            )
            assert told[-1] == done
            with pytest.raises(NotFound):
                await client.model("no-such")
        async with AsyncClient(f"http://127.0.0.1:{free_port()}", retries=0) as client:
            with pytest.raises(Unreachable):
                await client.health()

    service.completed(job.id)
    asyncio.run(use())


def test_both_clients_have_the_same_verbs_with_their_documentation() -> None:
    verbs = [name for name in vars(Verbs) if not name.startswith("_")]
    assert {"finetune", "wait", "events", "predict", "rollback", "download"} <= set(verbs)
    blocking, other = Client(), AsyncClient()
    for name in verbs:
        mine, theirs = getattr(blocking, name), getattr(other, name)
        assert inspect.signature(mine) == inspect.signature(theirs)
        assert "self" not in inspect.signature(mine).parameters
        assert mine.__doc__ == theirs.__doc__
        assert mine.__doc__


def test_importing_the_client_loads_nothing_heavy() -> None:
    heavy = {"numpy", "pydantic", "PIL", "tensorflow", "fastapi", "sqlalchemy", "store", "trainer", "api"}
    program = f"import sys, temper; print(*({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.exhaustive
def test_events_are_followed_across_a_killed_gateway(tmp_path: Path, digits_zip: bytes) -> None:
    with running_service(tmp_path) as service, Client(service.url) as temper:
        job = temper.finetune(digits_zip, "m", {"epochs": 40})
        waited: list[Job] = []
        waiting = threading.Thread(target=lambda: waited.append(temper.wait(job.id)))
        waiting.start()
        seen: list[Any] = []
        for event in temper.events(job.id, follow=True):
            seen.append(event.seq)
            if len(seen) in (6, 20):
                service.kill("api")
        assert seen == list(range(1, len(seen) + 1))
        assert seen == [event.seq for event in temper.events(job.id)]
        assert event.data == {"report_status": "complete"}
        waiting.join(30)
        assert waited[0].status == "succeeded"
