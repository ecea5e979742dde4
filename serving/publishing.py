"""Making versions live, and keeping model servers at what the registry says.

staged -> verified -> renamed -> available -> proven -> warmed -> labelled, each on every model server. What fails on
the way is taken back out, and the version before goes on answering.
"""

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np

from serving.client import ModelServer
from serving.registry import STABLE, Registry
from store.errors import ModelServerTimeout, ModelServerUnavailable, Overloaded, PublishFailed, TemperError
from store.settings import Settings

PARITY = 1e-4  # largest difference of a logit between the trainer and the model server
PATIENCE_S = 60.0  # how long a publication waits for a model server that is away
WARM_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128)  # sizes for which kernels are chosen before a client needs them
PROBE, FILES = "assets.extra/probe.npz", "assets.extra/files.json"


@dataclass(frozen=True)
class Probe:
    """Images whose logits the trainer knows; every version carries its own."""

    pixels: np.ndarray  # (n, 784) uint8
    logits: np.ndarray  # (n, classes) float32

    def save(self, version: Path) -> None:
        """Write it into the directory of a version."""
        np.savez(version / PROBE, allow_pickle=False, pixels=self.pixels, logits=self.logits)

    @classmethod
    def load(cls, version: Path) -> Self:
        """Read it from there."""
        with np.load(version / PROBE, allow_pickle=False) as arrays:
            return cls(arrays["pixels"], arrays["logits"])

    def forms(self) -> Iterator[np.ndarray]:
        """The images in each form that a request may have."""
        yield self.pixels
        yield (self.pixels / np.float32(255)).reshape(-1, 28, 28, 1)


def seal(version: Path) -> None:
    """Write down the size and the SHA-256 of every file of a staged version; nothing is added to it afterwards."""
    (version / FILES).write_text(json.dumps(_sums(version), indent=1) + "\n", encoding="utf-8")


def check_files(version: Path) -> None:
    """Raise `PublishFailed` unless the files of a version are those that were sealed."""
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


def reconcile(settings: Settings, registry: Registry, servers: Sequence[ModelServer]) -> None:
    """Make model servers serve exactly the versions that the registry names, and remove what it no longer names.

    Idempotent. Versions whose directory is gone are left out: a real TensorFlow Serving waits for them for ever.

    Raises:
        ModelServerError: of the last of the servers that could not be reached; the others are done.
    """
    failure: TemperError | None = None
    with file_lock(settings, "reconcile"):  # an older view of the registry must not replace a newer one
        removed = registry.removed()
        wanted = {
            model: there
            for model, versions in registry.wanted().items()
            if (there := [v for v in versions if (settings.version(model, v) / "saved_model.pb").is_file()])
        }
        for server in servers:
            try:
                server.reload(settings.served_root, wanted)
            except TemperError as exc:
                failure = exc
        for model, version in removed:
            shutil.rmtree(settings.version(model, version), ignore_errors=True)
            registry.forget(model, version)
    if failure:
        raise failure


@contextlib.contextmanager
def file_lock(settings: Settings, task: str) -> Iterator[None]:
    """One process at a time."""
    with (settings.home / f"{task}.lock").open("w") as lock:
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
    manifest: Mapping[str, Any],
    report: Mapping[str, Any],
    label: str = STABLE,
    step: Callable[[str], None] = lambda done: None,
) -> int:
    """Move a staged SavedModel to its place, prove that it is served, and move the label to it.

    Args:
        staged: sealed directory with a probe, on the file system of the models.
        label: what requests for the model will follow to the new version.
        step: told of every step that is done, again while the next one has to wait; raises to take everything back.

    Returns:
        The number of the version, live.

    Raises:
        PublishFailed: a server does not serve it, or answers otherwise than the trainer; nothing is left of it.
        ModelServerError: a server stayed away; the same.
    """
    step("staged")
    check_files(staged)
    probe = Probe.load(staged)
    step("verified")
    version = registry.reserve(model, job_id, manifest, report)
    try:
        place = settings.version(model, version)
        place.parent.mkdir(exist_ok=True)
        os.rename(staged, place)
        step("renamed")
        done, deadline = "renamed", time.monotonic() + PATIENCE_S

        def patiently(name: str, act: Callable[[ModelServer], object]) -> None:
            nonlocal done
            for server in servers:
                while True:
                    try:
                        act(server)
                        break
                    except (ModelServerUnavailable, ModelServerTimeout, Overloaded):
                        if time.monotonic() > deadline:
                            raise
                    step(done)
                    time.sleep(0.2)
            done = name
            step(done)

        def load(server: ModelServer) -> None:
            reconcile(settings, registry, [server])
            server.wait_until_available(model, version)

        patiently("available", load)
        patiently("proven", lambda server: prove(server, model, version, probe))
        patiently("warmed", lambda server: _warm(server, model, version, probe))
    except BaseException:
        with contextlib.suppress(TemperError):
            withdraw(settings, registry, servers, model, version)
        raise
    registry.go_live(model, version, label)
    return version


def prove(server: ModelServer, model: str, version: int, probe: Probe) -> float:
    """The largest difference of a logit between the trainer and a model server, over every form of the probe.

    Raises:
        PublishFailed: it is more than `PARITY`, or another version answers.
    """
    largest = 0.0
    for images in probe.forms():
        answer = server.predict(model, version, images)
        if answer.version != version or answer.logits.shape != probe.logits.shape:
            raise PublishFailed(f"{model}:{version} is answered by {answer.version} with shape {answer.logits.shape}")
        difference = float(np.max(np.abs(answer.logits - probe.logits)))
        if not difference <= PARITY:  # a NaN is none either
            raise PublishFailed(
                f"{model}:{version} at {server.target} differs from the trained model by {difference:.2g} in a logit"
            )
        largest = max(largest, difference)
    return largest


def _warm(server: ModelServer, model: str, version: int, probe: Probe) -> None:
    """Have the server choose its kernels for every batch size that micro-batches come close to."""
    for images in probe.forms():
        for size in WARM_BATCHES:
            server.predict(model, version, np.resize(images, (size, *images.shape[1:])))


def withdraw(settings: Settings, registry: Registry, servers: Sequence[ModelServer], model: str, version: int) -> None:
    """Take a version out: of the registry, the model servers and the disk."""
    registry.remove(model, version)
    reconcile(settings, registry, servers)
