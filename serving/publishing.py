"""Making versions live, and keeping model servers at what the registry says."""

import contextlib
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from serving.client import ModelServer
from serving.errors import ModelServerTimeout, ModelServerUnavailable, Overloaded, PublishFailed, TemperError
from serving.registry import Registry
from serving.settings import Settings

PARITY = 1e-4  # largest difference of a logit between the trainer and the model server
PATIENCE_S = 60.0  # how long a publication waits for a model server that is away


def reconcile(settings: Settings, registry: Registry, server: ModelServer) -> None:
    """Make the model server serve exactly the versions that the registry names; idempotent.

    Versions whose directory is gone are left out: a real TensorFlow Serving waits for them for ever.
    """
    with alone(settings, "reconcile"):  # an older view of the registry must not replace a newer one
        wanted: dict[str, list[int]] = {}
        for version in registry.all():
            if (settings.models / version.model / str(version.version) / "saved_model.pb").is_file():
                wanted.setdefault(version.model, []).append(version.version)
        server.reload(settings.served_root, wanted)


@contextlib.contextmanager
def alone(settings: Settings, task: str) -> Iterator[None]:
    """One process at a time."""
    with (settings.home / f"{task}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def publish(
    settings: Settings,
    registry: Registry,
    server: ModelServer,
    *,
    staged: Path,
    model: str,
    job_id: str | None,
    manifest: Mapping[str, Any],
    report: Mapping[str, Any],
    probe: np.ndarray,
    expected: np.ndarray,
    may_go_live: Callable[[], None] = lambda: None,
) -> int:
    """Move a staged SavedModel to its place, prove that it is served, and make it current.

    Args:
        staged: complete directory on the file system of the models.
        probe: (n, 28, 28, 1) float32 images in [0, 1] as a client would send them.
        expected: (n, classes) the trainer's own logits for them.
        may_go_live: asked last; raises to take everything back.

    Returns:
        The number of the version, live.

    Raises:
        PublishFailed: the server does not serve it, or answers otherwise than the trainer; nothing is left of it.
    """
    version = registry.reserve(model, job_id, manifest, report)
    try:
        place = settings.models / model / str(version)
        place.parent.mkdir(exist_ok=True)
        os.rename(staged, place)
        deadline = time.monotonic() + PATIENCE_S
        while True:
            may_go_live()
            try:
                _prove(settings, registry, server, model, version, probe, expected)
                break
            except (ModelServerUnavailable, ModelServerTimeout, Overloaded):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        may_go_live()
    except BaseException:
        with contextlib.suppress(TemperError):
            withdraw(settings, registry, server, model, version)
        raise
    registry.go_live(model, version)
    return version


def _prove(
    settings: Settings,
    registry: Registry,
    server: ModelServer,
    model: str,
    version: int,
    probe: np.ndarray,
    expected: np.ndarray,
) -> None:
    """Raise `PublishFailed` unless the model server serves the version and answers the probe as expected."""
    reconcile(settings, registry, server)
    server.wait_until_available(model, version)
    answer = server.predict(model, version, probe)
    if answer.version != version or answer.logits.shape != expected.shape:
        raise PublishFailed(f"{model}:{version} is answered by {answer.version} with shape {answer.logits.shape}")
    difference = float(np.max(np.abs(answer.logits - expected)))
    if not difference <= PARITY:
        raise PublishFailed(f"{model}:{version} differs from the trained model by {difference:.2g} in a logit")


def withdraw(settings: Settings, registry: Registry, server: ModelServer, model: str, version: int) -> None:
    """Take an unproven version back out: of the registry, the model server and the disk."""
    registry.withdraw(model, version)
    try:
        reconcile(settings, registry, server)
    finally:
        shutil.rmtree(settings.models / model / str(version), ignore_errors=True)
