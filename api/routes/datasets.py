"""Data sets as a resource: upload and validate once, use by id, delete."""

import asyncio
import logging
from typing import Any, Literal

import sqlalchemy as sa
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field

from api.gateway import gateway_of, tenant_of
from api.http.openapi import After, DatasetId, Limit, errors
from api.http.repeats import IdempotencyKey, Note, once
from store.errors import InvalidRequest
from store.records import DatasetReport
from trainer.jobs.answers import Answer
from trainer.jobs.library import KeptDataset

log = logging.getLogger("temper.gateway")
router = APIRouter(tags=["data sets"])

_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["data"],
    "properties": {
        "data": {
            "type": "string", "contentMediaType": "application/octet-stream",
            "description": "Labelled images, as `POST /finetune` takes them: a zip of class folders, perhaps inside "
            "`train/`, `val/` and `test/`, or of images with a CSV; or an .npz of `images` and `labels`.",
        }
    },
}  # fmt: skip


class DatasetView(BaseModel):
    """A data set that is kept."""

    id: str = Field(description="Name of the data set: the hash of its content, or that of a file, `file-…`.")
    object: Literal["dataset"] = Field("dataset", description="Kind of this object.")
    created_at: float = Field(description="Unix seconds.")
    expires_at: float | None = Field(description="Unix seconds after which it is deleted.")
    filename: str = Field(description="Name of the uploaded file.")
    size_bytes: int = Field(description="Size of the uploaded file.")
    sha256: str = Field(
        description="Hash of the content: of the prepared images, their labels and classes, in all parts."
    )
    polarity: str = Field(description="`light_on_dark` or `dark_on_light`, as `auto` decides it.")
    report: DatasetReport = Field(description="What is worth knowing before training on it.")

    @classmethod
    def of(cls, kept: KeptDataset) -> "DatasetView":
        """The public face of a data set's record."""
        return cls(
            id=kept.id, created_at=kept.created_at, expires_at=kept.expires_at, filename=kept.dataset.filename,
            size_bytes=kept.size_bytes, sha256=kept.dataset.content, polarity=kept.dataset.polarity, report=kept.report,
        )  # fmt: skip


class DatasetList(BaseModel):
    """Data sets, newest first."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[DatasetView] = Field(description="The data sets of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last id.")


class DatasetDeleted(BaseModel):
    """What was deleted."""

    id: str = Field(description="The data set.")
    object: Literal["dataset"] = Field("dataset", description="Kind of this object.")
    deleted: Literal[True] = Field(True, description="Always true.")


@router.post(
    "/datasets", status_code=201, response_model=DatasetView,
    responses={
        200: {"model": DatasetView, "description": "The content is kept already, and stays as it is."},
        **errors(400, 413, 415, 422, 429, 503, 507),
    },
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
)  # fmt: skip
async def create_dataset(request: Request, idempotency_key: IdempotencyKey = None) -> Response:
    """Upload labelled images, see what is in them, and keep them until they are deleted.

    Jobs take them by id (`dataset` of `POST /finetune`). The same content is one data set, however often it is sent.
    """
    gateway, tenant = gateway_of(request), tenant_of(request)
    async with gateway.uploads.receive(request, set(), {"data"}, tenant_of(request)) as form:
        if "data" not in form.files:
            raise InvalidRequest("data: is required", param="data")

        async def create(note: Note) -> Answer:
            upload = await gateway.uploads.keep(form, "data")
            told: list[Answer] = []

            def also(connection: sa.Connection, kept: KeptDataset, created: bool) -> None:
                body = DatasetView.of(kept).model_dump_json()
                told[:] = [Answer(201 if created else 200, body, f"/datasets/{kept.id}")]
                note(connection, told[0])

            kept = await asyncio.to_thread(gateway.library.keep, tenant, upload, also=also)
            log.info("data set %s: %d images", kept.id, kept.dataset.images)
            return told[0]

        return await once(request, form.digest(), create)


@router.get("/datasets", responses=errors(404, 422, 503))
def list_datasets(request: Request, after: After = None, limit: Limit = 20) -> DatasetList:
    """Data sets that are kept, newest first; files of `/openai/v1/files` are among them."""
    page, has_more = gateway_of(request).library.page(tenant_of(request), after=after, limit=limit)
    return DatasetList(data=[DatasetView.of(kept) for kept in page], has_more=has_more)


@router.get("/datasets/{id}", responses=errors(404, 422, 503))
def get_dataset(request: Request, id: DatasetId) -> DatasetView:
    """A data set with its report."""
    return DatasetView.of(gateway_of(request).library.get(tenant_of(request), id))


@router.delete("/datasets/{id}", responses=errors(404, 409, 422, 503, 507))
async def delete_dataset(request: Request, id: DatasetId) -> DatasetDeleted:
    """Delete a data set that no job needs: none that took it by id and has not finished, its report included."""
    gateway, tenant = gateway_of(request), tenant_of(request)
    await gateway.record_deletion(lambda: gateway.library.delete(tenant, id))
    await asyncio.to_thread(gateway.answers.forget, tenant, f"/datasets/{id}")
    log.info("data set %s removed", id)
    return DatasetDeleted(id=id)
