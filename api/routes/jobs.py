"""Fine-tuning jobs: upload, look, cancel."""

import asyncio
import logging
from typing import Annotated, Any

from fastapi import FastAPI, Path, Request, Response
from pydantic import BaseModel, Field, ValidationError

from api.gateway import Gateway, gateway_of
from api.http.errors import invalid_request
from api.http.openapi import After, Limit, errors
from api.routes.examples import SPEC_EXAMPLE
from api.routes.schemas import JobList, JobView
from serving.registry import BASE, LABEL, STABLE
from store.errors import InvalidRequest, UnknownModel
from trainer.spec import MODEL_NAME, Spec, check_dataset, described, parse_spec, refused

log = logging.getLogger("temper.gateway")

JobId = Annotated[str, Path(max_length=100, description="The job's id.")]
FILES = {
    "data": "Labelled images: a zip of class folders, or an .npz of `images` and `labels`.",
    "validation": "Images to measure on, in the same form; without them some of `data` are held out.",
}


class FinetuneFields(BaseModel):
    """The text fields of the form."""

    model: str = Field(pattern=MODEL_NAME, description="The model that gets a new version.")
    label: str = Field(
        STABLE, pattern=LABEL, description="The label that moves to the new version: `stable`, or `canary`."
    )
    spec: str | None = Field(
        None, description="How to train, as JSON (schema `Spec`); regularized by default.", examples=[SPEC_EXAMPLE]
    )


def _form() -> dict[str, Any]:
    """JSON schema of the form."""
    schema = FinetuneFields.model_json_schema()
    binary = {"type": "string", "contentMediaType": "application/octet-stream"}
    files = {name: {**binary, "description": text} for name, text in FILES.items()}
    return {"type": "object", "properties": {**files, **schema["properties"]}, "required": ["data", "model"]}


def _fields(texts: dict[str, str]) -> FinetuneFields:
    try:
        return FinetuneFields.model_validate(texts)
    except ValidationError as exc:
        raise invalid_request(exc.errors(include_url=False), FinetuneFields) from exc


def add(app: FastAPI) -> None:
    """The routes under /finetune."""

    @app.post(
        "/finetune", status_code=202, tags=["fine-tune"], responses=errors(400, 413, 415, 422, 429, 503, 507),
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _form()}}}},
    )  # fmt: skip
    async def finetune(request: Request, response: Response) -> JobView:
        """Upload labelled images and queue a fine-tune on them."""
        gateway = gateway_of(request)
        async with gateway.uploads.receive(request, set(FinetuneFields.model_fields), set(FILES)) as form:
            fields = _fields(form.texts)
            if "data" not in form.files:
                raise InvalidRequest("data: is required", param="data")
            if fields.model == BASE:
                raise InvalidRequest(f"model: {BASE!r} is the base model; choose another name", param="model")
            spec = parse_spec(fields.spec)
            base = await asyncio.to_thread(_resolve_base, gateway, spec)

            def check(dataset: dict[str, Any]) -> None:
                check_dataset(spec, dataset["classes"], held_out="validation" in form.files)

            dataset = await gateway.uploads.store(form, check)
        job = await asyncio.to_thread(
            gateway.jobs.create,
            model=fields.model, base=base, spec=described(spec), dataset=dataset, label=fields.label,
        )  # fmt: skip
        log.info("job %s: %s on %d images", job.id, job.model, dataset["images"])
        response.headers["Location"] = f"/finetune/{job.id}"
        return JobView.of(job)

    @app.get("/finetune", tags=["fine-tune"], responses=errors(404, 422, 503))
    def list_jobs(request: Request, after: After = None, limit: Limit = 20) -> JobList:
        """Jobs, newest first."""
        page, has_more = gateway_of(request).jobs.page(after=after, limit=limit)
        return JobList(data=[JobView.of(job) for job in page], has_more=has_more)

    @app.get("/finetune/{id}", tags=["fine-tune"], responses=errors(404, 422, 503))
    async def get_job(request: Request, id: JobId) -> JobView:
        """One job: its state, its progress, its error or its version."""
        gateway = gateway_of(request)
        job = await asyncio.to_thread(gateway.jobs.get, id)
        if job.version is not None and not gateway.router.knows(job.model, job.version):
            await gateway.router.refresh()  # who reads of a version may ask for it at once
        return JobView.of(job)

    @app.post("/finetune/{id}/cancel", tags=["fine-tune"], responses=errors(404, 409, 422, 503))
    def cancel_job(request: Request, id: JobId) -> JobView:
        """Cancel a queued job at once, or a running one at the end of its epoch."""
        return JobView.of(gateway_of(request).jobs.cancel(id))


def _resolve_base(gateway: Gateway, spec: Spec) -> str:
    """`name:version` of a live version to start from."""
    name, _, number = spec.base.partition(":")
    if spec.base == BASE and not gateway.registry.has_live(BASE):
        return f"{BASE}:1"  # the worker publishes it before it claims any job
    try:
        found = gateway.registry.find(name, int(number) if number else None)
    except UnknownModel as exc:
        raise refused("base", exc.message) from exc
    has = found.manifest.get("adapter_bottleneck", 0)
    if spec.adapter and has not in (0, spec.adapter.bottleneck):
        raise refused("adapter.bottleneck", f"{name}:{found.version} has adapters of {has} units already")
    return f"{name}:{found.version}"
