"""Publish versions, and keep model servers in step with the registry.

staged -> verified -> renamed -> available -> proven -> warmed -> labelled. A version that fails on the way is
withdrawn, and the one before it goes on answering.
"""

import contextlib
import fcntl
import functools
import io
import json
import logging
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
import sqlalchemy as sa

from serving.client import ModelServer
from serving.registry import BASE, STABLE, Fence, Registry, Version
from store.errors import (
    ModelServerError,
    ModelServerTimeout,
    ModelServerUnavailable,
    Overloaded,
    PublishFailed,
    StorageFailed,
    TemperError,
    UnknownModel,
)
from store.files import make_directory, move, remove_tree
from store.objects import objects_of
from store.records import GREY_28, GateCard, Manifest, ReportCard, public_name
from store.settings import Settings

log = logging.getLogger("temper.publishing")

PARITY = 1e-4  # largest accepted difference of a logit, relative to the largest logit where that is above 1
DISTANCE_PARITY = 0.01  # likewise of a distance, in units of the limit: it is a small difference of large numbers
PATIENCE_S = 300.0  # how long a publication waits for a model server when all are away
ABSENT_S = 3.0  # how long it waits for one that is away when another is there
ANSWER_S = 2.0  # within which a server that is alive says so
LOCK_S = 5.0  # how long a reload waits for another process that reloads the same server
WARM_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)  # sizes for which kernels are chosen before a client needs them
CHUNK_BYTES = 1 << 16
PROBE, FILES = "assets.extra/probe.npz", "assets.extra/files.json"


@dataclass(frozen=True)
class Probe:
    """Images whose logits the trainer computed; every version carries its own."""

    pixels: np.ndarray  # (n, 784) uint8
    logits: np.ndarray  # (n, classes) float32
    distances: np.ndarray | None = None  # (n,) float32, with a detector

    def save(self, version: Path) -> None:
        """Write the probe into the directory of a version."""
        arrays = {"pixels": self.pixels, "logits": self.logits}
        if self.distances is not None:
            arrays["distances"] = self.distances
        np.savez(version / PROBE, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, version: Path) -> Self:
        """Read the probe from the directory of a version."""
        with np.load(version / PROBE, allow_pickle=False) as arrays:
            return cls(arrays["pixels"], arrays["logits"], arrays.get("distances"))

    def forms(self) -> Iterator[np.ndarray]:
        """Yield the images as requests send them: (n, 784) uint8, then (n, 28, 28, 1) float32 in [0, 1]."""
        yield self.pixels
        yield (self.pixels / np.float32(255)).reshape(-1, *GREY_28.shape)


def seal(version: Path) -> None:
    """Record the size and SHA-256 of every file of a staged version. Add nothing to it afterwards."""
    (version / FILES).write_text(json.dumps(_sums(version), indent=1) + "\n", encoding="utf-8")


def check_files(version: Path) -> None:
    """Raise `PublishFailed` unless the files of a version are exactly those that were sealed."""
    try:
        expected = json.loads((version / FILES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise PublishFailed(f"{version.name}: {FILES} cannot be read: {exc}") from exc
    found = _sums(version)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong or "saved_model.pb" not in found:
        raise PublishFailed(f"files of the version are missing or have changed: {', '.join(wrong) or 'saved_model.pb'}")


def _sums(version: Path) -> dict[str, Any]:
    files = sorted(path for path in version.rglob("*") if path.is_file() and path != version / FILES)
    return {
        str(path.relative_to(version)): {"bytes": path.stat().st_size, "sha256": sha256(path.read_bytes()).hexdigest()}
        for path in files
    }


class _Sink(io.RawIOBase):
    """Collects what is written until it is taken. It has no position, so a zip in it is written as a stream."""

    def __init__(self) -> None:
        self._written = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._written += data
        return len(data)

    def take(self) -> bytes:
        """What has been written since the last call."""
        taken = bytes(self._written)
        self._written.clear()
        return taken


def zipped(version: Path, name: str) -> Iterator[bytes]:
    """The files of a version as a zip, below the directory `name`, in chunks; the same bytes every time."""
    sink = _Sink()
    with zipfile.ZipFile(sink, "w") as archive:
        for path in sorted(path for path in version.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(f"{name}/{path.relative_to(version)}")
            entry.external_attr = 0o644 << 16
            with path.open("rb") as file, archive.open(entry, "w") as packed:
                while chunk := file.read(CHUNK_BYTES):
                    packed.write(chunk)
                    yield sink.take()
    yield sink.take()


def reconcile(settings: Settings, registry: Registry, servers: Sequence[ModelServer]) -> None:
    """Make model servers serve exactly the versions that the registry names, and delete files it no longer names.

    Idempotent. Versions without files are left out, because a real TensorFlow Serving waits for them for ever.

    Raises:
        ModelServerError: a server could not be brought up to date (the last such error); the others are.
    """
    failure: TemperError | None = None
    removed = registry.removed()
    for server in servers:
        try:
            server.states(BASE, ANSWER_S)  # one that is down or frozen must not cost the time that a reload may take
            # The registry is read under the lock, so an older view of it never replaces a newer one. One lock per
            # server: a server that freezes holds up nobody who asks another.
            lock = f"reconcile-{sha256(server.target.encode()).hexdigest()[:12]}"
            with exclusive(settings, registry, lock, timeout_s=LOCK_S):
                server.reload(settings.served_root, _present(settings, registry))
        except TemperError as exc:
            failure = exc
    for model, version in removed:
        try:
            _delete(settings, model, version)
        except StorageFailed as exc:  # its record stays, so that the next call tries again
            log.warning("%s:%d is not deleted yet: %s", public_name(model), version, exc.message)
        else:
            registry.forget(model, version)
    if failure:
        raise failure


def _present(settings: Settings, registry: Registry) -> dict[str, list[int]]:
    """The wanted versions whose files are there."""
    unshared = set()
    if settings.objects:  # others have no directory in common; what is live was shared before
        on_the_way = [(each.model, each.version) for each in registry.publishing()]
        unshared = {each for each in on_the_way if not objects_of(settings).is_shared(settings.version(*each))}
    present = {}
    for model, versions in registry.wanted().items():
        there = (each for each in versions if (model, each) not in unshared and has_files(settings, model, each))
        if found := list(there):
            present[model] = found
    return present


def has_files(settings: Settings, model: str, version: int) -> bool:
    """Tell whether the SavedModel of a version is on disk; where an object store is, that nothing says it is gone."""
    return bool(settings.objects) or (settings.version(model, version) / "saved_model.pb").is_file()


def files_of(settings: Settings, model: str, version: int) -> Path:
    """The directory of a version, fetched from the object store if there is one."""
    return objects_of(settings).fetch(settings.version(model, version))


def _delete(settings: Settings, model: str, version: int) -> None:
    place = settings.version(model, version)
    objects_of(settings).remove(place)
    remove_tree(place)


@contextlib.contextmanager
def exclusive(settings: Settings, registry: Registry, task: str, timeout_s: float | None = None) -> Iterator[None]:
    """Let one process at a time in, of all machines that share the store.

    Raises:
        ModelServerTimeout: the lock was not free within `timeout_s`.
    """
    lock = registry.exclusive(task, timeout_s)
    with file_lock(settings, task, timeout_s) if lock is None else lock:
        yield


@contextlib.contextmanager
def file_lock(settings: Settings, task: str, timeout_s: float | None = None) -> Iterator[None]:
    """Let one process at a time in.

    Raises:
        ModelServerTimeout: the lock was not free within `timeout_s`.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with (settings.home / f"{task}.lock").open("w") as lock:
        while deadline is not None:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as exc:
                if time.monotonic() > deadline:
                    raise ModelServerTimeout(f"{task}: another process has held the lock for {timeout_s:g} s") from exc
                time.sleep(0.02)
        else:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def publish(
    settings: Settings,
    registry: Registry,
    servers: Sequence[ModelServer],
    *,
    staged: Path,
    model: str,
    job_id: str | None,
    manifest: Manifest,
    report: Callable[[], ReportCard],
    judge: Callable[[Version | None], GateCard] | None = None,
    label: str = STABLE,
    step: Callable[[str], None] = lambda done: None,
    fence: Fence = lambda _: None,
    finish: Callable[[sa.Connection, int, GateCard | None], None] = lambda connection, version, gate: None,
) -> int:
    """Move a staged SavedModel into place, prove that it is served, and point the label at it.

    Without the label it goes live if its gate fails. That is judged against what `stable` stands for, and again if the
    label has moved by the time of the transaction.

    A server that restarts on the way is told again what to serve. One that stays away is left behind as long as another
    is there: the gateway brings it up to date when it returns. Of servers that stand by for one another the first that
    can do it is enough; the others follow as soon as the version is live.

    Args:
        staged: sealed directory with a probe, on the file system of the models.
        report: makes the report card, once for the record of the version and again when it goes live.
        judge: called with the version that `stable` stands for, if there is one; returns the outcome of the gate, which
            goes into the report card.
        label: requests for the model that follow this label get the new version.
        step: called after every step, and again while the next one waits; raises to abandon the publication.
        fence: called in the transaction that reserves the number; raises if the caller may no longer publish.
        finish: called in the transaction that makes the version live, with its number and the outcome of its gate;
            raises likewise.

    Returns:
        The number of the version, live.

    Raises:
        PublishFailed: a server does not serve it, or answers unlike the trainer. Nothing is left of the version.
        ModelServerError: no server came back in time. Nothing is left either.
        WrongState: the version was withdrawn meanwhile.
    """
    step("staged")
    check_files(staged)
    probe = Probe.load(staged)
    step("verified")
    version = registry.reserve(model, job_id, manifest, report(), fence)
    try:
        place = settings.version(model, version)
        make_directory(place.parent)
        move(staged, place)
        objects_of(settings).share(place)
        step("renamed")

        def load(server: ModelServer, wait: Callable[[], None] = lambda: step(done)) -> None:
            reconcile(settings, registry, [server])
            server.wait_until_available(model, version, wait=wait)

        steps: dict[str, Callable[[ModelServer], object]] = {
            "available": load,
            "proven": lambda server: prove(server, model, version, probe),
            "warmed": lambda server: _warm(server, model, version, probe),
        }
        one = settings.has_standby
        here, done, deadline = list(servers), "renamed", time.monotonic() + PATIENCE_S
        loaded: set[ModelServer] = set()
        for name, act in steps.items():
            did = _on_each(here, act, load, loaded, deadline, wait=functools.partial(step, done), one=one)
            here = [*did, *(server for server in here if server not in did)] if one else did
            done = name
            step(done)
        while not _go_live(registry, model, version, label, report, judge, finish):
            step(done)
    except BaseException:
        with contextlib.suppress(TemperError):
            withdraw(settings, registry, servers, model, version)
        raise
    if one and len(here) > 1:
        steps["available"] = functools.partial(load, wait=lambda: None)  # who is told of steps has finished
        threading.Thread(target=_follow, args=(here[1:], steps.values(), f"{model}:{version}")).start()
    return version


class _Outdated(Exception):
    """`stable` stands for another version than the one that was compared with."""


def _go_live(
    registry: Registry, model: str, version: int, label: str, report: Callable[[], ReportCard],
    judge: Callable[[Version | None], GateCard] | None, finish: Callable[[sa.Connection, int, GateCard | None], None],
) -> bool:  # fmt: skip
    """Judge a version and make it live; False if `stable` has moved meanwhile."""
    stable = registry.stable(model) if judge else None
    gate = judge(stable) if judge else None

    def takes_label(now: int | None) -> bool:
        if judge and now != (stable.version if stable else None):
            raise _Outdated
        return gate is None or gate.passed

    card = report()
    try:
        registry.go_live(
            model, version, label, report=card.model_copy(update={"gate": gate}) if gate else card,
            takes_label=takes_label, fence=lambda connection: finish(connection, version, gate),
        )  # fmt: skip
    except _Outdated:
        return False
    return True


def _follow(servers: Sequence[ModelServer], steps: Iterable[Callable[[ModelServer], object]], what: str) -> None:
    """Load, prove and warm a live version on the servers that stand by."""
    for server in servers:
        try:
            for act in steps:
                act(server)
        except (ModelServerError, UnknownModel, ValueError) as exc:  # it is away, or our channel to it has been closed
            log.info("%s is not on the standby %s yet, the gateway will tell it: %s", what, server.target, exc)
        except Exception as exc:
            log.error("%s is not proven on the standby %s: %s", what, server.target, exc)


def _on_each(
    servers: Sequence[ModelServer],
    act: Callable[[ModelServer], object],
    load: Callable[[ModelServer], None],
    loaded: set[ModelServer],
    deadline: float,
    wait: Callable[[], None],
    one: bool,
) -> list[ModelServer]:
    """Do a step on every server, or on the first that can; return those that did it.

    Args:
        load: comes first on a server that is not among `loaded`, as it may have restarted with nothing to serve.
        deadline: in `time.monotonic()`, up to which the last server is waited for.
        wait: called before each further attempt; raises to give up.
        one: return as soon as a server has done it.
    """
    finished: list[ModelServer] = []
    missed_at: dict[ModelServer, float] = {}  # when a server first failed the step
    waiting = list(servers)
    while True:
        for server in list(waiting):
            try:
                if server not in loaded:
                    load(server)
                    loaded.add(server)
                if act is not load:
                    act(server)
            except (ModelServerUnavailable, ModelServerTimeout, Overloaded, UnknownModel) as exc:
                loaded.discard(server)
                now = time.monotonic()
                since = missed_at.setdefault(server, now)
                if finished and now - since > ABSENT_S:
                    log.warning("published without the model server %s: %s", server.target, exc.message)
                    waiting.remove(server)
                elif now > deadline:
                    if finished or len(waiting) > 1:
                        waiting.remove(server)
                    else:
                        raise
            else:
                waiting.remove(server)
                finished.append(server)
                if one:
                    return finished
        if not waiting:
            return finished
        wait()
        time.sleep(0.2)


def prove(server: ModelServer, model: str, version: int, probe: Probe) -> float:
    """Return the largest difference of a logit between the trainer and a model server, over every form of the probe.

    Raises:
        PublishFailed: it is more than `PARITY` times the largest logit, or another version answers.
    """
    largest, which = 0.0, f"{public_name(model)}:{version}"
    for images in probe.forms():
        answer = server.predict(model, version, images)
        if answer.version != version or answer.logits.shape != probe.logits.shape:
            raise PublishFailed(f"{which} is answered by {answer.version} with shape {answer.logits.shape}")
        difference = float(np.max(np.abs(answer.logits - probe.logits)))
        if not difference <= PARITY * max(1.0, float(np.max(np.abs(probe.logits)))):  # `not`: NaN compares false
            raise PublishFailed(
                f"{which} at {server.target} differs from the trained model by {difference:.2g} in a logit"
            )
        largest = max(largest, difference)
        if probe.distances is not None:
            if answer.distances is None or answer.distances.shape != probe.distances.shape:
                raise PublishFailed(f"{which} is answered without distances")
            difference = float(np.max(np.abs(answer.distances - probe.distances) / np.maximum(1, probe.distances)))
            if not difference <= DISTANCE_PARITY:
                raise PublishFailed(
                    f"{which} at {server.target} differs from the trained model by {difference:.2g} in a distance"
                )
    return largest


def _warm(server: ModelServer, model: str, version: int, probe: Probe) -> None:
    """Run every batch size close to that of a micro-batch: the server picks its kernels before a client waits."""
    for images in probe.forms():
        for size in WARM_BATCHES:
            server.predict(model, version, np.resize(images, (size, *images.shape[1:])))


def withdraw(
    settings: Settings, registry: Registry, servers: Sequence[ModelServer], model: str, version: int,
    fence: Fence = lambda _: None,
) -> None:  # fmt: skip
    """Take a version that did not go live out of the registry, the model servers and the disk.

    A server that cannot be reached drops the version when the gateway brings it up to date.
    """
    registry.remove(model, version, fence)
    with contextlib.suppress(ModelServerError):
        reconcile(settings, registry, servers)
    if not registry.is_recorded(model, version):  # others have forgotten it, perhaps before its files came
        _delete(settings, model, version)
