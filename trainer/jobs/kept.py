"""Epochs of final trainings that clients can publish.

They are files, `kept/<job>/<training>/<network>-<epoch>.npz`: the served network is number 0, those of the folds are
numbered from 1. What is there is all that is known of them, whichever gateway asks.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from store.errors import UnknownJob
from store.files import remove_tree
from store.objects import objects_of
from store.settings import Settings
from trainer.checkpoints import Checkpoint
from trainer.jobs.records import FINISHED, Job, Jobs

KEPT_S = 30 * 86400.0  # for which what a finished job keeps is there


@dataclass(frozen=True)
class KeptEpoch:
    """An epoch of the served network."""

    epoch: int
    created_at: float  # Unix seconds, of the home's file system
    record: Mapping[str, Any]  # of the epoch, as in `store.records.Epoch`


def folder_of(settings: Settings, job_id: str, resolved_spec: Mapping[str, Any] | None) -> Path:
    """Where a job keeps epochs of its training with this spec: a search may train again with another."""
    text = json.dumps(resolved_spec, sort_keys=True)
    return settings.kept / job_id / sha256(text.encode()).hexdigest()[:16]


def file_of(folder: Path, network: int, epoch: int) -> Path:
    """The file of a network after an epoch."""
    return folder / f"{network}-{epoch}.npz"


def epochs(folder: Path, network: int = 0) -> list[int]:
    """The epochs of a network that are kept, ascending."""
    found = (re.fullmatch(rf"{network}-(\d+)\.npz", path.name) for path in folder.glob(f"{network}-*.npz"))
    return sorted(int(match[1]) for match in found if match)


def listed(folder: Path) -> list[KeptEpoch]:
    """What is kept of the served network, the last epoch first."""
    found = []
    for epoch in reversed(epochs(folder)):
        path = file_of(folder, 0, epoch)
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            record = Checkpoint(path).record()
            if record is not None:
                found.append(KeptEpoch(epoch, path.stat().st_mtime, record["history"][-1]))
    return found


class Versions(Protocol):
    """What has to be known of the models: a part of `serving.registry.Registry`."""

    def has_live(self, model: str) -> bool:
        """Tell whether the model has a live version."""

    def clock(self) -> float:
        """Unix seconds."""


def is_publishable(job: Job, versions: Versions) -> bool:
    """Tell whether what a job keeps can be published, now or when it has succeeded."""
    return job.status not in FINISHED or (job.status == "succeeded" and versions.has_live(job.model))


def sweep_kept(settings: Settings, jobs: Jobs, versions: Versions) -> None:
    """Delete what jobs have kept for long, or without a version, or for a model that has been deleted."""
    # First: a job is in the store before it has a directory.
    found = {*settings.kept.iterdir(), *objects_of(settings).listed(settings.kept)}
    needed = jobs.open_sources() if found else set()
    for path in found:
        if path.name not in needed and not _stays(path.name, jobs, versions):
            objects_of(settings).remove(path)
            remove_tree(path)


def _stays(job_id: str, jobs: Jobs, versions: Versions) -> bool:
    try:
        job = jobs.get(job_id)
    except UnknownJob:
        return False
    expired = job.finished_at is not None and versions.clock() > job.finished_at + KEPT_S
    return not expired and is_publishable(job, versions)
