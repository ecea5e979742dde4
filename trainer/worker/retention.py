"""What is thrown away: versions that newer ones have replaced, and data sets that nothing needs any more."""

import logging
import time
from collections.abc import Sequence
from contextlib import suppress

from serving.client import ModelServer
from serving.publishing import reconcile
from serving.registry import BASE, Registry
from store.errors import ModelServerError, WrongState
from store.settings import Settings
from trainer.jobs.records import Jobs

log = logging.getLogger("temper.worker")

UNUSED_S = 3600.0  # age at which a data set goes that nothing needs; a job may be about to be made of a younger one


def retire_surplus(
    model: str, *, settings: Settings, jobs: Jobs, registry: Registry, servers: Sequence[ModelServer]
) -> None:
    """Remove a model's versions beyond the newest `keep_versions`, but those with a label or a job that needs them."""
    if not settings.keep_versions or model == BASE:
        return
    needed = jobs.open_bases()
    surplus = [v for v in registry.surplus(model, settings.keep_versions) if f"{model}:{v}" not in needed]
    for version in surplus:
        with suppress(WrongState):  # labelled in this moment
            registry.retire(model, version)
            log.info("%s:%d retired: %d newer versions are kept", model, version, settings.keep_versions)
    if surplus:
        with suppress(ModelServerError):  # done by whoever reconciles next
            reconcile(settings, registry, servers)


def sweep_datasets(settings: Settings, jobs: Jobs, registry: Registry) -> None:
    """Remove prepared data sets that neither a job nor a live version needs."""
    records = [*jobs.needed_datasets(), *(version.manifest.get("dataset") for version in registry.live())]
    needed = {part["id"] for record in records if record for part in (record, record.get("validation")) if part}
    for path in settings.datasets.glob("*.npz"):
        with suppress(FileNotFoundError):
            if path.stem not in needed and time.time() - path.stat().st_mtime > UNUSED_S:
                path.unlink()
