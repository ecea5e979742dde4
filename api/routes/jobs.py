"""Fine-tuning jobs: upload, list, inspect, pause, cancel."""

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args

import sqlalchemy as sa
import structlog
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError, WithJsonSchema

from api.gateway import Gateway, gateway_of, stored, tenant_of
from api.http.errors import invalid_request
from api.http.openapi import After, JobId, Limit, errors
from api.http.repeats import IdempotencyKey, Note, once
from api.routes.examples import SPEC_EXAMPLE
from api.uploads import URLENCODED, Form
from serving.registry import BASE, LABEL, STABLE, stored_name
from store.errors import InvalidRequest, TooMany, UnknownModel, WrongState
from store.records import DatasetCard, public_name
from store.validation import TEXT, in_words
from trainer.asked import Asked, check_dataset, default_folds, parse_asked, refused
from trainer.jobs.answers import Answer
from trainer.jobs.estimates import Standing
from trainer.jobs.layouts import MAX_PATH
from trainer.jobs.library import KeptDataset
from trainer.jobs.records import AGING_S, MAX_PRIORITY, Job, Status
from trainer.jobs.statistics import Stage
from trainer.spec import FEWEST_OF_A_CLASS, MODEL_NAME, Gate, Spec, pinned

log: structlog.stdlib.BoundLogger = structlog.get_logger("temper.gateway")
router = APIRouter(tags=["fine-tune"])

QUOTA_RETRY_S = 10.0  # when a client may ask again whether a fine-tune has finished

FILES = {
    "data": "Labelled images: a zip of class folders, perhaps inside `train/`, `val/` and `test/`, or of images and a "
    "CSV of `file`, `label` and perhaps `split`; or an .npz of `images` and `labels`, or of `x_train`, `y_train`, "
    "`x_test` and so on. Images of `val/` take the place of `validation`, those of `test/` are scored apart.",
    "validation": "Images to validate on, in the same format; without them images of `data` are held out in turn, or "
    "some of them, as the spec says.",
}
INSTEAD = {"dataset": "data", "validation_dataset": "validation"}  # fields that name a kept data set, and those files


_KEY = in_words(r"^[ !#-\[\]-~]{1,64}$", '1 to 64 printable ASCII characters without " and \\')
_VALUE = in_words(r"^[^\x00]{0,512}$", "up to 512 characters")
Metadata = Annotated[
    dict[Annotated[str, Field(pattern=_KEY)], Annotated[str, Field(pattern=_VALUE)]], Field(max_length=16)
]
METADATA = TypeAdapter(Metadata)


def _parsed(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"is not valid JSON: {exc}") from exc


def _excluded(value: Any) -> list[str | int]:
    names = _parsed(value)
    if not isinstance(names, list) or not all(_is_name(name) for name in names):
        raise ValueError("must be a JSON array of file names, or of indices")
    return names


def _is_name(name: Any) -> bool:
    """Tell whether this can name an image: text that an answer can repeat, or a whole number."""
    if isinstance(name, str):
        return len(name) <= MAX_PATH and not re.search("[\ud800-\udfff]", name)
    return isinstance(name, int) and not isinstance(name, bool) and name >= 0


class FinetuneFields(BaseModel):
    """The text fields of the form."""

    model: str = Field(pattern=MODEL_NAME, description="The model that gets a new version.")
    dataset: str | None = Field(
        None, max_length=100, pattern=TEXT, description="Id of a kept data set to train on, instead of the file `data`."
    )
    validation_dataset: str | None = Field(
        None, max_length=100, pattern=TEXT,
        description="Id of a kept data set to validate on, instead of the file `validation`.",
    )  # fmt: skip
    exclude: Annotated[
        list[str | int] | None, BeforeValidator(_excluded), WithJsonSchema({"type": "string"}),
    ] = Field(
        None,
        description="Images of `data` or `dataset` to leave out, as a JSON array of the names that `findings` and "
        "reports give them: files in the zip, or indices in the array of images.",
        examples=['["7/a.png", "7/b.png"]'],
    )  # fmt: skip
    corrections: bool = Field(
        False,
        description="Learn from the corrections of the model (`POST /feedback`) as well: they are added to the kept "
        "data set `dataset`, or without it to the one that `stable` was trained on.",
    )
    label: str = Field(
        STABLE, pattern=LABEL, description="Label to move to the new version, such as `stable` or `canary`."
    )
    spec: str | None = Field(
        None,
        description='How to train, as JSON (schema `Spec`, in which `"auto"` stands for what is searched); without it '
        "everything is.",
        examples=[SPEC_EXAMPLE],
    )
    priority: int = Field(
        0, ge=-MAX_PRIORITY, le=MAX_PRIORITY,
        description="Of a tenant's queued jobs that with the highest priority is next, and of equal ones the oldest. "
        f"{AGING_S / 60:g} minutes of waiting make up for one point.",
    )  # fmt: skip
    dry_run: bool = Field(
        False, description="Validate everything, answer 200 with an estimate (schema `DryRun`), and create nothing."
    )
    metadata: Annotated[Metadata | None, BeforeValidator(_parsed), WithJsonSchema({"type": "string"})] = Field(
        None,
        description="Up to 16 names with values of your own, as a JSON object of strings; jobs can be listed by them.",
        examples=['{"team": "meters"}'],
    )


def _form() -> dict[str, Any]:
    """JSON schema of the form."""
    schema = FinetuneFields.model_json_schema()
    binary = {"type": "string", "contentMediaType": "application/octet-stream"}
    files = {name: {**binary, "description": text} for name, text in FILES.items()}
    return {"type": "object", "properties": {**files, **schema["properties"]}, "required": ["model"]}


def _fields(texts: dict[str, str]) -> FinetuneFields:
    try:
        return FinetuneFields.model_validate(texts)
    except ValidationError as exc:
        raise invalid_request(exc.errors(include_url=False), FinetuneFields) from exc


class JobError(BaseModel):
    """Why a job failed."""

    code: str = Field("internal_error", description="Stable name of the kind of failure.")
    message: str = Field("", description="What went wrong.")
    param: str | None = Field(None, description="The field of the spec that is to blame.")


def _one_of(names: Any, *, null: bool = False) -> Any:
    """Documents the values of this release; a stored record may have another one."""
    enum = {"type": "string", "enum": list(get_args(names))}
    return WithJsonSchema({"anyOf": [enum, {"type": "null"}]} if null else enum)


class JobView(BaseModel):
    """A fine-tuning job."""

    id: str = Field(description="Name of the job.", examples=["ftjob-0198c0ffee01a2b3c4d5e6"])
    object: Literal["fine_tuning.job"] = Field("fine_tuning.job", description="Kind of this object.")
    model: str = Field(description="The model that gets a new version.")
    version: int | None = Field(description="That version, once it is live; without its label if its gate failed.")
    preview_version: int | None = Field(description="A version from a quick recipe, live while the job searches.")
    label: str = Field(description="The label that moves to it if it passes its gate.")
    base: str = Field(description="What training starts from, `name:version`.")
    status: Annotated[str, _one_of(Status)] = Field(description="Where the job stands.")
    stage: Annotated[str | None, _one_of(Stage, null=True)] = Field(description="What a running job is doing.")
    progress: dict[str, Any] = Field(
        description="Of the search: the last `trial` and the `best` so far. Of the last epoch: `epoch` of `epochs`, "
        "the data loss and each penalty apart, validation accuracy. `publishing` has the time of every step: staged, "
        "verified, renamed, available, proven, warmed, labelled."
    )
    attempts: int = Field(
        description="How often a worker has started it. When a worker dies, the next attempt goes on from the last "
        "checkpoint; after three the job fails. Pauses do not count."
    )
    cancel_requested: bool = Field(description="Is a running job to be cancelled? Its worker looks twice a second.")
    pause_requested: bool = Field(description="Is a running job to pause? It does at the end of its epoch.")
    created_at: float = Field(description="Unix seconds.")
    started_at: float | None = Field(description="Unix seconds.")
    finished_at: float | None = Field(description="Unix seconds.")
    spec: Annotated[Spec | dict[str, Any], Field(union_mode="left_to_right")] = Field(
        description="The spec with every default filled in, and `auto` where it is searched; as it was stored if this "
        "release cannot read it."
    )
    resolved_spec: dict[str, Any] | None = Field(
        description="The spec with what the search has chosen. Sent as the spec with the same data, it gives the same "
        "weights."
    )
    dataset: dict[str, Any] = Field(
        description="What it learns from: number of images, of each class, polarity, hash. `validation` and `test` are "
        "parts that are apart, `findings` say what is wrong with images (`kind`, `message`, number of `images`, the "
        "first ones `listed`), `kept` is the id of a data set that was given by it."
    )
    error: Annotated[JobError | dict[str, Any] | None, Field(union_mode="left_to_right")] = Field(
        description="Why it failed."
    )
    report_status: Annotated[str, _one_of(Literal["none", "quick", "complete"])] = Field(
        description="How much of the report card is there."
    )
    priority: int = Field(description="The highest is next.")
    queue_position: int | None = Field(
        description="1 if it is the next one; null unless it is queued, and in the answer that queues it."
    )
    estimated_start_at: float | None = Field(
        description="Unix seconds; null unless it is queued, and while no job of its kind has finished here."
    )
    estimated_end_at: float | None = Field(description="Likewise; also while it runs.")
    metadata: dict[str, str] | None = Field(description="What the client has noted on the job.")
    checkpoint: dict[str, Any] | None = Field(
        description="The `job` and `epoch` whose checkpoint it publishes instead of training."
    )
    gate: dict[str, Any] | None = Field(
        description="Whether its version has `passed` the gate and so got its label: every condition with its limit, "
        "what was measured and a sentence (`doubt` if it passed and there is reason to look), and the version that it "
        "was `compared_with`. null until the version is live."
    )

    @classmethod
    def of(cls, job: Job, standing: Standing = Standing()) -> "JobView":  # noqa: B008 (frozen)
        """The public face of a job record, also of one that another release has stored."""
        spec: Spec | dict[str, Any]
        try:
            spec = Spec.model_validate(job.spec, strict=False)
        except ValidationError:
            spec = dict(job.spec or {})
        fields = {name: value for name, value in vars(job).items() if name in cls.model_fields}
        fields |= {"model": public_name(job.model), "base": public_name(job.base)}
        lenient = {"spec": spec, "progress": job.progress.dump(), "dataset": job.dataset.dump()}
        runs = job.finished_at is None
        stands = {
            "cancel_requested": job.cancel_requested and runs, "pause_requested": job.pause_requested and runs,
            "queue_position": standing.position, "estimated_start_at": standing.start_at,
            "estimated_end_at": standing.end_at,
        }  # fmt: skip
        return cls.model_validate({**fields, **lenient, **stands})


class JobList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[JobView] = Field(description="The jobs of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last id.")


class Estimated(BaseModel):
    """What a fine-tune would take."""

    seconds: float = Field(description="From its start until its version is live.")
    seconds_within: float = Field(description="How far off that may be, as a share of it.", examples=[0.2])
    memory_bytes: int = Field(description="Peak of the worker's memory.")
    jobs: int = Field(description="Finished jobs of its kind that this rests on; 0 for another machine's figures.")


class DryRun(BaseModel):
    """What a fine-tune would be."""

    object: Literal["fine_tuning.dry_run"] = Field("fine_tuning.dry_run", description="Kind of this object.")
    model: str = Field(description="The model that would get a new version.")
    base: str = Field(description="What training would start from, `name:version`.")
    dataset: dict[str, Any] = Field(description="What was uploaded: number of images, of each class, polarity, hash.")
    spec: dict[str, Any] = Field(
        description="The spec with every default filled in, also the `folds` of a search, and `auto` where it searches."
    )
    resolved_spec: dict[str, Any] | None = Field(description="The same with its base, if nothing is searched.")
    warnings: list[str] = Field(
        description="What is wrong with the images, and what would be done in another way than asked for."
    )
    estimate: Estimated = Field(description="What it would take.")


@router.post(
    "/finetune", status_code=202, response_model=JobView,
    responses={
        200: {"model": DryRun, "description": "With `dry_run`: valid, and nothing was created."},
        **errors(400, 404, 413, 415, 422, 429, 503, 507),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {"schema": _form()},
                URLENCODED: {"schema": FinetuneFields.model_json_schema()},  # with a data set that is kept
            },
        }
    },
)  # fmt: skip
async def finetune(request: Request, idempotency_key: IdempotencyKey = None) -> Response:
    """Queue a fine-tune on labelled images: an upload, or a data set that is kept."""
    gateway, tenant = gateway_of(request), tenant_of(request)
    async with gateway.uploads.receive(request, set(FinetuneFields.model_fields), set(FILES), tenant) as form:
        fields = _fields(form.texts)
        ids = {field: name for field in INSTEAD if (name := getattr(fields, field)) is not None}
        for field, file in INSTEAD.items():
            if field in ids and file in form.files:
                raise InvalidRequest(f"{field}: give either it or the file {file!r}", param=field)
        if "data" not in form.files and "dataset" not in ids and not fields.corrections:
            raise InvalidRequest("data: is required, or `dataset`", param="data")
        for field in {"data", "exclude"} & {*form.files, *form.texts} if fields.corrections else ():
            instead = "keep the data set (POST /datasets), and give `dataset`" if field == "data" else "leave it out"
            text = f"corrections: not together with {field!r}; {instead}"
            raise InvalidRequest(text, param="corrections")
        if fields.model == BASE:
            raise InvalidRequest(f"model: {BASE!r} is the base model; choose another name", param="model")
        asked, said = parse_asked(fields.spec), form.digest()

        async def prepare(*, keep: bool = True) -> tuple[str, DatasetCard]:
            base = await asyncio.to_thread(resolve_base, gateway, tenant, asked.fixed)
            kept = await asyncio.to_thread(_kept, gateway, tenant, ids)
            corrected = []
            if fields.corrections:
                corrected = await asyncio.to_thread(_corrected, gateway, tenant, fields.model, form, kept)
            check = await asyncio.to_thread(checker, gateway, tenant, fields.model, asked)
            dataset = await gateway.uploads.store(form, check, kept, exclude=fields.exclude or (), keep=keep)
            return base, dataset.model_copy(update={"corrections": corrected}) if corrected else dataset

        async def create(note: Note) -> Answer:
            await asyncio.to_thread(check_quota, gateway, tenant)  # before all the work
            base, dataset = await prepare()
            return await asyncio.to_thread(
                queue, gateway, tenant, note, accepted,
                model=fields.model, base=base, asked=asked, dataset=dataset, label=fields.label,
                metadata=fields.metadata, priority=fields.priority,
            )  # fmt: skip

        if fields.dry_run:
            base, dataset = await prepare(keep=False)
            plan = await asyncio.to_thread(_dry_run, gateway, fields.model, base, asked, dataset)
            return JSONResponse(plan.model_dump())
        return await once(request, said, create)


def accepted(job: Job) -> Answer:
    """The answer to a request that has queued a job."""
    return Answer(202, JobView.of(job).model_dump_json(), f"/finetune/{job.id}")


def _kept(gateway: Gateway, tenant: str, ids: Mapping[str, str]) -> dict[str, KeptDataset]:
    """The data sets that stand for the files of the form."""
    return {INSTEAD[field]: gateway.library.get(tenant, name, field) for field, name in ids.items()}


def _corrected(gateway: Gateway, tenant: str, model: str, form: Form, kept: dict[str, KeptDataset]) -> list[str]:
    """Make the model's data set with its corrections the upload.

    Returns:
        What each of the last images was taken for.

    Raises:
        InvalidRequest: there are no corrections, or they cannot be added.
        WrongState: the data set that they belong to is gone.
    """
    name = stored_name(tenant, model)
    found = gateway.feedback.of_model(tenant, name)
    if not found:
        raise InvalidRequest(f"corrections: there are none of {model!r}", param="corrections")
    card = kept.pop("data").card() if "data" in kept else stable_dataset(gateway, name)
    gateway.uploads.add_corrections(form, card, found)
    return [one.predicted for one in found]


def stable_dataset(gateway: Gateway, model: str) -> DatasetCard:
    """The data set that a model's `stable` version was trained on.

    Raises:
        UnknownModel: there is no such version.
        WrongState: it was not trained here.
    """
    label = gateway.registry.labels(model).get(STABLE)
    if label is None:
        raise UnknownModel(f"model {public_name(model)!r} has no label {STABLE!r}; give `dataset`", param="dataset")
    card = gateway.registry.find(model, label.version).manifest.dataset
    if card is None:
        raise WrongState(f"{public_name(model)}:{label.version} was not trained here; give `dataset`", param="dataset")
    return card


def checker(gateway: Gateway, tenant: str, model: str, asked: Asked) -> Callable[[DatasetCard], None]:
    """What refuses a spec, or the gate of the model that it is for, that a data set does not allow."""
    gate = Gate.stored(gateway.registry.gate(stored_name(tenant, model)))
    return lambda dataset: check_dataset(
        asked, dataset.classes, held_out=dataset.validation is not None, models_gate=gate
    )


def queue(
    gateway: Gateway, tenant: str, note: Note, answer: Callable[[Job], Answer], *,
    model: str, base: str, asked: Asked, dataset: DatasetCard, label: str = STABLE,
    metadata: Mapping[str, str] | None = None, priority: int = 0,
) -> Answer:  # fmt: skip
    """Queue a job, and in the same transaction note the answer and see that its data sets are still there.

    Args:
        model: its public name.
        base: stored name and version.
    """
    kept = [card.kept for card in dataset.parts if card.kept]

    check_quota(gateway, tenant)

    def also(connection: sa.Connection, job: Job) -> None:
        gateway.library.hold(connection, tenant, kept)
        note(connection, answer(job))

    job = gateway.jobs.create(
        tenant=tenant, model=stored_name(tenant, model), base=base, spec=asked.described(), dataset=dataset,
        label=label, priority=priority, metadata=metadata, also=also,
        resolved_spec=None if asked.auto else pinned(asked.fixed, public_name(base)),
    )  # fmt: skip
    log.info("job queued", job=job.id, model=model, images=dataset.images)
    return answer(job)


METADATA_FILTER = {
    "name": "metadata", "in": "query", "style": "deepObject", "explode": True,
    "description": "Only jobs with these metadata, as in `metadata[team]=meters`.",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}  # fmt: skip


def metadata_filter(request: Request) -> dict[str, str] | None:
    """What `metadata[key]=value` asks for; None for `metadata=null`.

    Raises:
        InvalidRequest: it cannot be metadata of a job.
    """
    found: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name == "metadata":
            if value != "null":
                raise InvalidRequest("metadata: write metadata[key]=value", param="metadata")
            return None
        if match := re.fullmatch(r"metadata\[(.*)\]", name, re.DOTALL):
            found[match[1]] = value
    try:
        return METADATA.validate_python(found)
    except ValidationError as exc:
        located = [{**error, "loc": ("metadata", *error["loc"])} for error in exc.errors(include_url=False)]
        raise invalid_request(located) from exc


@router.get("/finetune", responses=errors(404, 422, 503), openapi_extra={"parameters": [METADATA_FILTER]})
def list_jobs(
    request: Request,
    model: Annotated[str | None, Query(pattern=MODEL_NAME, description="Only the jobs of this model.")] = None,
    status: Annotated[Status | None, Query(description="Only the jobs that have it.")] = None,
    after: After = None,
    limit: Limit = 20,
) -> JobList:
    """Jobs, newest first."""
    gateway, tenant = gateway_of(request), tenant_of(request)
    page, has_more = gateway.jobs.page(
        after=after, limit=limit, tenant=tenant, model=model and stored(request, model), status=status,
        metadata=metadata_filter(request),
    )  # fmt: skip
    return JobList(data=_views(gateway, page), has_more=has_more)


@router.get("/finetune/{id}", responses=errors(404, 422, 503))
async def get_job(request: Request, id: JobId) -> JobView:
    """A job with its status, its progress, and its version or error."""
    gateway = gateway_of(request)
    job = await gateway.job(id, tenant_of(request))
    return await asyncio.to_thread(_view, gateway, job)


@router.post("/finetune/{id}/cancel", responses=errors(404, 409, 422, 503))
def cancel_job(request: Request, id: JobId) -> JobView:
    """Cancel a job that is queued or paused at once, or a running one within a second."""
    gateway = gateway_of(request)
    return _view(gateway, gateway.jobs.cancel(id, tenant_of(request)))


@router.post("/finetune/{id}/pause", responses=errors(404, 409, 422, 503))
def pause_job(request: Request, id: JobId) -> JobView:
    """Pause a queued job at once, or a running one at the end of its epoch; it frees its worker and stands as `paused`.

    A job that is trained already is published instead.
    """
    gateway = gateway_of(request)
    return _view(gateway, gateway.jobs.pause(id, tenant_of(request)))


@router.post("/finetune/{id}/resume", responses=errors(404, 409, 422, 503))
def resume_job(request: Request, id: JobId) -> JobView:
    """Queue a paused job again. It goes on from where it was."""
    gateway = gateway_of(request)
    return _view(gateway, gateway.jobs.resume(id, tenant_of(request)))


def _view(gateway: Gateway, job: Job) -> JobView:
    """A job with where it stands in the queue."""
    return _views(gateway, [job])[0]


def _views(gateway: Gateway, jobs: Sequence[Job]) -> list[JobView]:
    return [JobView.of(job, standing) for job, standing in zip(jobs, gateway.estimates.standings(jobs), strict=True)]


def _dry_run(gateway: Gateway, model: str, base: str, asked: Asked, dataset: DatasetCard) -> DryRun:
    """What a fine-tune would be, and what it would take."""

    def peak_of(job: Job) -> int | None:
        try:
            cost = gateway.registry.find(job.model, job.version).report.cost
        except UnknownModel:  # removed since
            return None
        return cost.peak_memory_bytes if cost else None

    spec, warnings = asked.described(), dataset.warnings
    fewest = min(dataset.classes.values())
    if asked.auto and fewest < FEWEST_OF_A_CLASS:
        warnings.append(
            f"a class has fewer than {FEWEST_OF_A_CLASS} images: nothing is searched, a fixed recipe is used"
        )
    elif asked.auto:
        spec["search"]["folds"] = min(spec["search"]["folds"] or default_folds(dataset.images), fewest)
    found = gateway.estimates.of(asked, dataset, peak_of)
    return DryRun(
        model=model, base=public_name(base), dataset=dataset.dump(), spec=spec,
        resolved_spec=None if asked.auto else pinned(asked.fixed, public_name(base)), warnings=warnings,
        estimate=Estimated(
            seconds=round(found.seconds, 1), seconds_within=found.within, memory_bytes=found.memory_bytes,
            jobs=found.jobs,
        ),
    )  # fmt: skip


def check_quota(gateway: Gateway, tenant: str) -> None:
    """Refuse one more job of a tenant that has as many unfinished ones as it may have."""
    most = gateway.settings.max_jobs
    if most and gateway.jobs.unfinished(tenant) >= most:
        text = f"{most} fine-tune{'s are' if most > 1 else ' is'} unfinished; wait for one, or cancel it"
        raise TooMany(text, retry_after_s=QUOTA_RETRY_S)


def resolve_base(gateway: Gateway, tenant: str, spec: Spec) -> str:
    """The live version that training starts from, as `name:version` with the stored name."""
    name, _, number = spec.base.partition(":")
    if spec.base == BASE and not gateway.registry.has_live(BASE):
        return f"{BASE}:1"  # the worker publishes it before it claims a job
    try:
        found = gateway.registry.find(stored_name(tenant, name), int(number) if number else None)
    except UnknownModel as exc:
        raise refused("base", exc.message) from exc
    has = found.manifest.adapter_bottleneck
    if spec.adapter and has not in (0, spec.adapter.bottleneck):
        raise refused("adapter.bottleneck", f"must be {has}, as in {name}:{found.version}")
    return f"{found.model}:{found.version}"
