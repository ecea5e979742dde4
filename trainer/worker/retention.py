"""What is deleted: versions that newer ones have replaced, unneeded files, and what dead workers have left."""

import shutil
import time
from collections.abc import Sequence
from contextlib import suppress

import structlog

from serving.client import ModelServer
from serving.mirror import remove_others
from serving.publishing import reconcile, withdraw
from serving.registry import BASE, Registry
from store.errors import TemperError, UnknownJob
from store.files import remove_tree
from store.objects import objects_of
from store.settings import Settings
from trainer.jobs.feedback import Feedback
from trainer.jobs.library import Library
from trainer.jobs.records import FINISHED, Jobs

log: structlog.stdlib.BoundLogger = structlog.get_logger("temper.worker")

DEAD_S = 86400.0  # a worker touches its pulse file every second
UNUSED_S = 3600.0  # age at which an unused data set is deleted; a younger one may be about to get its job


def retire_surplus(
    model: str, *, settings: Settings, jobs: Jobs, registry: Registry, servers: Sequence[ModelServer]
) -> None:
    """Retire a model's versions beyond the newest `keep_versions`, except labelled ones and bases of open jobs."""
    if not settings.keep_versions or model == BASE:
        return
    needed = jobs.open_bases()
    surplus = [v for v in registry.surplus(model, settings.keep_versions) if f"{model}:{v}" not in needed]
    for version in surplus:
        try:
            registry.retire(model, version)
        except TemperError as exc:  # a client has just labelled it, or deleted it or the whole model
            log.info("version not retired", model=model, version=version, reason=exc.message)
        else:
            log.info("version retired", model=model, version=version, newer_kept=settings.keep_versions)
    if surplus:
        try:
            reconcile(settings, registry, servers)
        except TemperError as exc:  # whoever reconciles next does so
            log.warning("model servers keep retired versions for now", model=model, reason=exc.message)


def sweep_datasets(settings: Settings, jobs: Jobs, registry: Registry, library: Library) -> None:
    """Delete the files of data sets that no client keeps and that neither a job nor a live version needs.

    Those that are needed, and were uploaded before there was an object store, are shared.
    """
    needed = library.files()  # before the jobs: who deletes a data set has made sure that no job took it from there
    cards = [*jobs.needed_datasets(), *(version.manifest.dataset for version in registry.live())]
    needed |= {part.file for card in cards if card for part in card.parts}
    for path in (*settings.datasets.glob("*.npz"), *settings.datasets.glob("*.upload")):
        with suppress(FileNotFoundError):
            if path.name not in needed and time.time() - path.stat().st_mtime > UNUSED_S:
                path.unlink()
    objects = objects_of(settings)
    for name in needed:
        objects.share_missing(settings.datasets / name)
    for path in objects.older_than(settings.datasets, UNUSED_S):
        if path.name not in needed:
            objects.remove_if_older(path, UNUSED_S)


def sweep_versions(settings: Settings, registry: Registry) -> None:
    """Share what was made before there was an object store, and delete what this machine has fetched of versions that
    another one has deleted.
    """
    if not settings.objects:
        return
    objects = objects_of(settings)
    for version in registry.live():
        objects.share_missing(settings.version(version.model, version.version))
    remove_others(settings, registry)
    objects.sweep()


def sweep_checkpoints(settings: Settings, jobs: Jobs) -> None:
    """Delete checkpoints of jobs that have finished without a worker: cancelled while they waited, or given up."""
    found = list(settings.checkpoints.iterdir())  # first: a job is in the store before it has a directory
    needed = jobs.open()
    for path in found:
        if path.name not in needed:
            remove_tree(path)


def sweep_feedback(feedback: Feedback, registry: Registry) -> None:
    """Delete the images of predictions after their hour, and corrections of models that are gone."""
    feedback.sweep(registry.has_live)


def sweep_leftovers(settings: Settings, jobs: Jobs, registry: Registry, servers: Sequence[ModelServer]) -> None:
    """Remove what workers that died, or that others had replaced, left of finished jobs."""

    def has_ended(job_id: str) -> bool:
        try:
            return jobs.get(job_id).status in FINISHED
        except UnknownJob:
            return False

    for path in settings.home.glob("worker-*.pulse"):  # of containers that were killed; each has a name of its own
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > DEAD_S:
                path.unlink()
    for path in settings.staging.glob("ftjob-*"):
        if has_ended(path.stem):
            shutil.rmtree(path, ignore_errors=True)
    for version in registry.publishing():
        if version.job_id and has_ended(version.job_id):
            withdraw(settings, registry, servers, version.model, version.version)
    if registry.removed():
        with suppress(TemperError):  # whoever reconciles next does so
            reconcile(settings, registry, servers)
