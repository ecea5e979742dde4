"""The part of OpenAI's API that fine-tunes, so that its clients work with `base_url=…/openai/v1`.

A file is a data set that is kept, `model` is what a fine-tune starts from, `suffix` names the model that gets the new
version, and a version is the model `name:version`.
"""

import asyncio
import functools
import hashlib
import json
import re
import secrets
from typing import Annotated, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import ValidationError

from api.gateway import Gateway, gateway_of, stored, tenant_of
from api.http.errors import invalid_request
from api.http.openapi import JobId, Limit, openai_errors
from api.http.repeats import IdempotencyKey, Note, once
from api.routes import models
from api.routes.jobs import METADATA_FILTER, checker, metadata_filter, queue, resolve_base
from api.routes.openai_schemas import (
    FILE_FORM,
    STANDARD_RATE,
    Event,
    EventList,
    File,
    FileDeleted,
    FileFields,
    FileList,
    Job,
    JobCheckpoint,
    JobCheckpointList,
    JobList,
    JobRequest,
    Model,
    ModelDeleted,
    ModelList,
)
from api.uploads import with_validation
from serving.registry import BASE, is_visible
from store.errors import InvalidDataset, InvalidRequest, InvalidSpec, NotFound, UnknownModel
from store.objects import objects_of
from store.records import DatasetCard, public_name
from store.validation import TEXT
from trainer.asked import Asked, parse_asked
from trainer.jobs import records
from trainer.jobs.answers import Answer
from trainer.jobs.library import KeptDataset

router = APIRouter(prefix="/openai/v1", tags=["OpenAI"])

PURPOSE = "fine-tune"
SPEC_FIELDS = {"n_epochs": "epochs", "batch_size": "batch_size"}
FileId = Annotated[str, Path(max_length=100, pattern=TEXT, description="The file's id.")]
ModelId = Annotated[str, Path(max_length=100, description="A version, `name:version`, or a model for its `stable`.")]
After = Annotated[str | None, Query(max_length=120, pattern=TEXT, description="The last item of the previous page.")]


@router.post(
    "/files", response_model=File, responses=openai_errors(413, 415, 429, 507),
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FILE_FORM}}}},
)  # fmt: skip
async def create_file(request: Request, idempotency_key: IdempotencyKey = None) -> Response:
    """Upload labelled images, as `data` of `POST /finetune`: a zip or an `.npz`. Others are refused here."""
    gateway, tenant = gateway_of(request), tenant_of(request)
    names = {field.alias or name for name, field in FileFields.model_fields.items()}
    async with gateway.uploads.receive(request, names, {"file"}, tenant) as form:
        try:
            fields = FileFields.model_validate(form.texts)
        except ValidationError as exc:
            raise invalid_request(exc.errors(include_url=False), FileFields) from exc
        if "file" not in form.files:
            raise InvalidRequest("file: is required", param="file")

        async def create(note: Note) -> Answer:
            upload = await gateway.uploads.keep(form, "file")

            def also(connection: sa.Connection, kept: KeptDataset, created: bool) -> None:
                note(connection, _file_answer(kept))

            kept = await asyncio.to_thread(
                gateway.library.keep, tenant, upload, anew=True, expires_after_s=fields.seconds, also=also
            )
            return _file_answer(kept)

        return await once(request, form.digest(), create)


def _file_answer(kept: KeptDataset) -> Answer:
    return Answer(200, File.of(kept).model_dump_json())


@router.get("/files", responses=openai_errors(404))
def list_files(
    request: Request,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000, description="Maximum number of files.")] = 10_000,
    order: Annotated[Literal["asc", "desc"], Query(description="By time of creation.")] = "desc",
    purpose: Annotated[str | None, Query(max_length=100, description="All files are for `fine-tune`.")] = None,
) -> FileList:
    """Files, newest first unless `order` says otherwise."""
    if purpose not in (None, PURPOSE):
        return FileList(data=[], has_more=False)
    library = gateway_of(request).library
    page, has_more = library.page(tenant_of(request), after=after, limit=limit, oldest_first=order == "asc")
    return FileList(data=[File.of(kept) for kept in page], has_more=has_more)


@router.get("/files/{id}", responses=openai_errors(404))
def get_file(request: Request, id: FileId) -> File:
    """A file. It was processed before its upload was answered."""
    return File.of(gateway_of(request).library.get(tenant_of(request), id))


@router.get(
    "/files/{id}/content", response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {}}}, **openai_errors(404)},
)  # fmt: skip
def get_content(request: Request, id: FileId) -> FileResponse:
    """The bytes that were uploaded."""
    gateway = gateway_of(request)
    kept = gateway.library.get(tenant_of(request), id)
    path = objects_of(gateway.settings).fetch(gateway.settings.datasets / f"{kept.upload}.upload")
    if not path.is_file():
        raise NotFound(f"the content of {id} is gone from the disk; upload it again", param="id")
    return FileResponse(path, filename=kept.dataset.filename, media_type="application/octet-stream")


@router.delete("/files/{id}", responses=openai_errors(404, 409, 507))
async def delete_file(request: Request, id: FileId) -> FileDeleted:
    """Delete a file that no unfinished job needs."""
    gateway, tenant = gateway_of(request), tenant_of(request)
    await gateway.record_deletion(lambda: gateway.library.delete(tenant, id))
    return FileDeleted(id=id)


@router.post("/fine_tuning/jobs", response_model=Job, responses=openai_errors(404, 409, 413, 507))
async def create_job(request: Request, wanted: JobRequest, idempotency_key: IdempotencyKey = None) -> Response:
    """Queue a fine-tune. Whatever is `auto` is searched; `spec` may fix more (schema `Spec`)."""
    gateway, tenant = gateway_of(request), tenant_of(request)
    if wanted.suffix == BASE:
        raise InvalidRequest(f"suffix: {BASE!r} is the base model; choose another name", param="suffix")
    asked = _asked(wanted)

    async def create(note: Note) -> Answer:
        return await asyncio.to_thread(_create_job, gateway, tenant, note, wanted, asked)

    said = json.dumps(await request.json(), sort_keys=True)
    return await once(request, hashlib.sha256(said.encode()).hexdigest(), create)


def _create_job(gateway: Gateway, tenant: str, note: Note, wanted: JobRequest, asked: Asked) -> Answer:
    try:
        base = resolve_base(gateway, tenant, asked.fixed)
    except InvalidSpec as exc:
        if exc.param == "spec.base":
            raise UnknownModel(f"model: there is no model {wanted.model!r} to start from", param="model") from exc
        raise
    dataset = _card(gateway, tenant, wanted.training_file, "training_file")
    if wanted.validation_file is not None:
        apart = _card(gateway, tenant, wanted.validation_file, "validation_file")
        try:
            dataset = with_validation(dataset, apart)
        except InvalidDataset as exc:
            raise InvalidDataset(exc.message, param="validation_file", details=exc.details) from exc
    started_from = wanted.model.partition(":")[0]
    name = wanted.suffix or (f"{BASE}-{secrets.token_hex(4)}" if started_from == BASE else started_from)
    checker(gateway, tenant, name, asked)(dataset)
    answer = functools.partial(_job_answer, tenant)
    return queue(
        gateway, tenant, note, answer,
        model=name, base=base, asked=asked, dataset=dataset, metadata=wanted.metadata,
    )  # fmt: skip


def _asked(wanted: JobRequest) -> Asked:
    """The spec that a request stands for.

    Raises:
        InvalidRequest: a value is given in two places, or the spec is wrong.
    """
    given = {"search": {}} if wanted.spec is None else dict(wanted.spec)
    where, hyperparameters = wanted.asked_hyperparameters()
    multiplier = hyperparameters.pop("learning_rate_multiplier", None)
    values = {SPEC_FIELDS[name]: value for name, value in hyperparameters.items()} | {"base": wanted.model}
    if wanted.seed is not None:
        values["seed"] = wanted.seed
    for field, value in values.items():
        if given.setdefault(field, value) != value:
            raise InvalidRequest(f"spec.{field}: is given twice, with different values", param=f"spec.{field}")
    if multiplier is not None:
        rate = given.get("learning_rate", STANDARD_RATE)
        if isinstance(rate, str):
            param = f"{where}.learning_rate_multiplier"
            raise InvalidRequest(f"{param}: has no rate to multiply, as spec.learning_rate is {rate!r}", param=param)
        given["learning_rate"] = multiplier * rate
    return parse_asked(json.dumps(given))


def _card(gateway: Gateway, tenant: str, id: str, param: str) -> DatasetCard:
    return gateway.library.get(tenant, id, param).card()


def _job_answer(tenant: str, job: records.Job) -> Answer:
    return Answer(200, Job.of(job, tenant).model_dump_json())


@router.get("/fine_tuning/jobs", responses=openai_errors(404), openapi_extra={"parameters": [METADATA_FILTER]})
def list_jobs(request: Request, after: After = None, limit: Limit = 20) -> JobList:
    """Jobs, newest first."""
    tenant, metadata = tenant_of(request), metadata_filter(request)
    found, has_more = gateway_of(request).jobs.page(after=after, limit=limit, tenant=tenant, metadata=metadata)
    return JobList(data=[Job.of(job, tenant) for job in found], has_more=has_more)


@router.get("/fine_tuning/jobs/{id}", responses=openai_errors(404))
async def get_job(request: Request, id: JobId) -> Job:
    """A job."""
    tenant = tenant_of(request)
    return Job.of(await gateway_of(request).job(id, tenant), tenant)


@router.post("/fine_tuning/jobs/{id}/cancel", responses=openai_errors(404, 409))
def cancel_job(request: Request, id: JobId) -> Job:
    """Cancel a job that waits at once, or a running one within a second."""
    tenant = tenant_of(request)
    return Job.of(gateway_of(request).jobs.cancel(id, tenant), tenant)


@router.post("/fine_tuning/jobs/{id}/pause", responses=openai_errors(404, 409))
def pause_job(request: Request, id: JobId) -> Job:
    """Pause a queued job at once, or a running one at the end of its epoch. It is shown as `queued`."""
    tenant = tenant_of(request)
    return Job.of(gateway_of(request).jobs.pause(id, tenant), tenant)


@router.post("/fine_tuning/jobs/{id}/resume", responses=openai_errors(404, 409))
def resume_job(request: Request, id: JobId) -> Job:
    """Queue a paused job again. It goes on from where it was."""
    tenant = tenant_of(request)
    return Job.of(gateway_of(request).jobs.resume(id, tenant), tenant)


@router.get("/fine_tuning/jobs/{id}/events", responses=openai_errors(404))
def list_events(request: Request, id: JobId, after: After = None, limit: Limit = 20) -> EventList:
    """The events of a job, newest first."""
    jobs = gateway_of(request).jobs
    jobs.get(id, tenant=tenant_of(request))
    before = None
    if after is not None:
        match = re.fullmatch(rf"{re.escape(id)}-([0-9]{{1,9}})", after)
        if match is None:
            raise InvalidRequest(f"after: {after!r} is not an event of this job", param="after")
        before = int(match[1])
    found = jobs.latest_events(id, before=before, limit=limit + 1)
    return EventList(data=[Event.of(event) for event in found[:limit]], has_more=len(found) > limit)


@router.get("/fine_tuning/jobs/{id}/checkpoints", responses=openai_errors(404))
def list_checkpoints(request: Request, id: JobId, after: After = None, limit: Limit = 10) -> JobCheckpointList:
    """The versions that a job has made live, newest first: the preview of its search, and its result."""
    gateway = gateway_of(request)
    gateway.jobs.get(id, tenant=tenant_of(request))
    found = [JobCheckpoint.of(version, id) for version in gateway.registry.of_job(id) if version.live]
    if after is not None:
        known = [checkpoint.id for checkpoint in found]
        if after not in known:
            raise InvalidRequest(f"after: {after!r} is not a checkpoint of this job", param="after")
        found = found[known.index(after) + 1 :]
    return JobCheckpointList(data=found[:limit], has_more=len(found) > limit)


@router.get("/models", responses=openai_errors())
def list_models(request: Request) -> ModelList:
    """Every version that can answer predictions, newest first."""
    found, tenant = gateway_of(request).registry.creations(), tenant_of(request)
    seen = [(public_name(name), number, at) for name, number, at in found if is_visible(tenant, name)]
    return ModelList(data=[Model(id=f"{name}:{number}", created=int(at)) for name, number, at in seen])


@router.get("/models/{id}", responses=openai_errors(404))
def get_model(request: Request, id: ModelId) -> Model:
    """A version."""
    name, number = _parsed(id)
    found = gateway_of(request).registry.find(stored(request, name), number)
    return Model(id=f"{name}:{found.version}", created=int(found.created_at))


@router.delete("/models/{id}", responses=openai_errors(404, 409, 507))
async def delete_model(request: Request, id: ModelId) -> ModelDeleted:
    """Delete a version, or a whole model; with its last version a model is gone."""
    name, number = _parsed(id)
    await models.delete(gateway_of(request), stored(request, name), number, last_too=True)
    return ModelDeleted(id=id)


def _parsed(id: str) -> tuple[str, int | None]:
    """The model and version that an id names."""
    match = re.fullmatch(r"([a-z0-9][a-z0-9._-]{0,63})(?::([1-9][0-9]{0,8}))?", id)
    if match is None:
        raise UnknownModel(f"there is no model {id!r}", param="model")
    return match[1], int(match[2]) if match[2] else None
