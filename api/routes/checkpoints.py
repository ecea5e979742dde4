"""Checkpoints of jobs: list what their trainings have kept, and publish one as a version."""

import asyncio
import logging
import os
from hashlib import sha256
from pathlib import Path as FilePath
from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request, Response
from pydantic import BaseModel, ConfigDict, Field

from api.gateway import Gateway, gateway_of, tenant_of
from api.http.openapi import After, JobId, Limit, errors
from api.http.repeats import IdempotencyKey, Note, once
from api.routes.jobs import JobView, accepted, check_quota
from serving.registry import LABEL, STABLE
from store.errors import UnknownCheckpoint, UnknownModel, WrongState
from store.objects import objects_of
from store.records import public_name
from trainer.jobs.answers import Answer
from trainer.jobs.kept import KeptEpoch, epochs, folder_of, is_publishable, listed
from trainer.jobs.records import FINISHED, Job

log = logging.getLogger("temper.gateway")
router = APIRouter(tags=["fine-tune"])

EpochNumber = Annotated[int, Path(ge=1, lt=2**63, description="A checkpoint's epoch.")]


class CheckpointView(BaseModel):
    """What the final training of a job had after an epoch."""

    id: str = Field(description="The job's id and the epoch.", examples=["ftjob-0198c0ffee01a2b3c4d5e6-epoch-5"])
    object: Literal["fine_tuning.checkpoint"] = Field("fine_tuning.checkpoint", description="Kind of this object.")
    job: str = Field(description="The job.")
    epoch: int = Field(description="The epoch, by which it is published.")
    validation_accuracy: float | None = Field(
        description="Accuracy on validation images after it; null if all images were trained on."
    )
    validation_cross_entropy: float | None = Field(description="Likewise the cross-entropy, in nats.")
    created_at: float = Field(description="Unix seconds.")
    version: int | None = Field(description="The newest live version of the job's model that was published from it.")

    @classmethod
    def of(cls, job: Job, kept: KeptEpoch, version: int | None) -> "CheckpointView":
        """The public face of an epoch that is kept."""
        figures = {name: kept.record.get(name) for name in ("validation_accuracy", "validation_cross_entropy")}
        return cls(
            id=f"{job.id}-epoch-{kept.epoch}", job=job.id, epoch=kept.epoch, created_at=kept.created_at,
            version=version, **figures,
        )  # fmt: skip


class CheckpointList(BaseModel):
    """Checkpoints, the last epoch first."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[CheckpointView] = Field(description="The checkpoints of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last id.")


class Publication(BaseModel):
    """How to publish a checkpoint."""

    model_config = ConfigDict(extra="forbid", strict=True)

    label: Annotated[str, Field(pattern=LABEL)] = Field(STABLE, description="Label to move to the new version.")


@router.get("/finetune/{id}/checkpoints", responses=errors(404, 422, 503))
def list_checkpoints(request: Request, id: JobId, after: After = None, limit: Limit = 20) -> CheckpointList:
    """The checkpoints of a job, the last epoch first.

    There are those that `checkpoints` of the spec asks for, from when they are made until 30 days after the job has
    succeeded, while its model has a version. A job that fails or is cancelled keeps none.
    """
    gateway = gateway_of(request)
    job = gateway.jobs.get(id, tenant=tenant_of(request))
    folder = _folder(gateway, job)
    kept = listed(folder) if folder else []
    versions = _published(gateway, job) if kept else {}
    found = [CheckpointView.of(job, one, versions.get(one.epoch)) for one in kept]
    if after is not None:
        known = [checkpoint.id for checkpoint in found]
        if after not in known:
            raise UnknownCheckpoint(f"job {id} has no checkpoint {after!r}", param="after")
        found = found[known.index(after) + 1 :]
    return CheckpointList(data=found[:limit], has_more=len(found) > limit)


@router.post(
    "/finetune/{id}/checkpoints/{epoch}/publish", status_code=202, response_model=JobView,
    responses=errors(400, 404, 409, 413, 422, 429, 503, 507),
)  # fmt: skip
async def publish_checkpoint(
    request: Request, id: JobId, epoch: EpochNumber, wanted: Publication | None = None,
    idempotency_key: IdempotencyKey = None,
) -> Response:  # fmt: skip
    """Queue a job that publishes a checkpoint as the next version of the model, without training.

    It evaluates, exports and proves the weights of the epoch as any job does. Its `checkpoint`, and that of the
    version's manifest, names the job and the epoch they are from; `spec`, `resolved_spec` and `dataset` are as there.
    """
    gateway, tenant = gateway_of(request), tenant_of(request)
    label = wanted.label if wanted else STABLE

    async def create(note: Note) -> Answer:
        return await asyncio.to_thread(_publish, gateway, tenant, note, id, epoch, label)

    return await once(request, sha256(label.encode()).hexdigest(), create)


def _publish(gateway: Gateway, tenant: str, note: Note, id: str, epoch: int, label: str) -> Answer:
    source = gateway.jobs.get(id, tenant=tenant)
    if source.status not in FINISHED:
        raise WrongState(f"job {id} is {source.status}; wait until it has succeeded", param="id")
    folder = _folder(gateway, source)
    if folder is None or epoch not in epochs(folder):
        raise UnknownCheckpoint(f"job {id} has no checkpoint of epoch {epoch}", param="epoch")
    _check_inputs(gateway, source)
    check_quota(gateway, tenant)
    job = gateway.jobs.create(
        tenant=tenant, model=source.model, base=source.base, spec=source.spec, resolved_spec=source.resolved_spec,
        dataset=source.dataset, label=label, checkpoint={"job": id, "epoch": epoch},
        also=lambda connection, job: note(connection, accepted(job)),
    )  # fmt: skip
    log.info("job %s: publishes epoch %d of %s", job.id, epoch, id)
    return accepted(job)


def _folder(gateway: Gateway, job: Job) -> FilePath | None:
    """Where a job keeps epochs; None if it has ended in a way that leaves nothing to publish."""
    if not is_publishable(job, gateway.registry):
        return None
    return objects_of(gateway.settings).fetch(folder_of(gateway.settings, job.id, job.resolved_spec))


def _published(gateway: Gateway, job: Job) -> dict[int, int]:
    """The newest live version that was published from each epoch of a job."""
    versions = gateway.registry.of_model(job.model) if gateway.registry.has_live(job.model) else []
    origins = [(version.version, version.manifest.checkpoint or {}) for version in reversed(versions)]
    return {origin["epoch"]: version for version, origin in origins if origin.get("job") == job.id}


def _check_inputs(gateway: Gateway, job: Job) -> None:
    """Refuse to publish what cannot be evaluated any more."""
    try:
        for card in job.dataset.parts:
            # Or the worker's sweep might find it old and unused.
            path = objects_of(gateway.settings).fetch(gateway.settings.datasets / card.file)
            os.utime(path)
            objects_of(gateway.settings).share(path)
    except FileNotFoundError as exc:
        raise WrongState(f"the images that {job.id} learned from have been deleted", param="id") from exc
    model, _, version = job.base.partition(":")
    try:
        gateway.registry.find(model, int(version))
    except UnknownModel as exc:
        raise WrongState(f"{public_name(job.base)}, which {job.id} started from, has been deleted", param="id") from exc
