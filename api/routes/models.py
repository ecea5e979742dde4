"""Models, versions and labels: list, route, verify, delete."""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from api.gateway import Gateway, gateway_of, stored, tenant_of
from api.http.openapi import After, Limit, Name, Number, errors
from api.http.pages import SELF_CONTAINED
from api.inference.server_pool import PooledServer
from serving.publishing import Probe, check_files, files_of, prove, zipped
from serving.registry import BASE, LABEL, STABLE, Label, Route, Version, is_visible
from store.errors import Forbidden, NotFound, PublishFailed, StorageFailed, TemperError, UnknownModel, WrongState
from store.objects import objects_of
from store.records import DEFAULT_TENANT, DatasetCard, public_name
from trainer.jobs.datasets import Dataset
from trainer.jobs.kept import sweep_kept
from trainer.spec import Gate

log = logging.getLogger("temper.gateway")
router = APIRouter(tags=["models"])

LabelName = Annotated[str, Path(pattern=LABEL, description="A label.")]


class VersionView(BaseModel):
    """A live version of a model with its manifest and report card."""

    version: int = Field(description="Its number.")
    created_at: float = Field(description="Unix seconds.")
    classes: list[str] = Field(description="Class names, in the order of the probabilities.")
    base: str | None = Field(description="What it was fine-tuned from.")
    job: str | None = Field(description="The job that made it.")
    manifest: dict[str, Any] = Field(description="Spec, data set, polarity and hashes.")
    report: dict[str, Any] = Field(
        description="The report card; its `inspection`, which names images, only where a single version is asked for."
    )

    @classmethod
    def of(cls, version: Version, *, whole: bool = True) -> "VersionView":
        """The public face of a version record; `inspection`, which may be long, only of the whole one."""
        report = version.report.dump()
        if not whole:
            report.pop("inspection", None)
        return cls(
            version=version.version, created_at=version.created_at, classes=list(version.manifest.classes),
            base=version.manifest.base, job=version.manifest.job, manifest=version.manifest.dump(),
            report=report,
        )  # fmt: skip


class LabelView(BaseModel):
    """A label: a movable name for a version."""

    model: str = Field(description="The model.")
    object: Literal["label"] = Field("label", description="Kind of this object.")
    label: str = Field(description="The label.")
    version: int = Field(description="The version it stands for.")
    weight: float = Field(description="Share of the requests naming neither version nor label that follow it.")

    @classmethod
    def of(cls, model: str, name: str, label: Label) -> "LabelView":
        """The public face of a label record."""
        return cls(model=model, label=name, version=label.version, weight=label.weight)


class LabelMove(BaseModel):
    """Where to move a label."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Annotated[int, Field(ge=1, lt=2**63)] = Field(description="A live version.", examples=[1])
    weight: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Share of the requests that name neither version nor label; those with the same "
        "`X-Sticky-Key` follow the same label. If omitted, the share stays as it is."
    )  # fmt: skip
    override: bool = Field(
        False, description="Move it to a version whose gate has failed; its report card then says so."
    )


class GateView(BaseModel):
    """What the versions to come of a model must fulfil to get their label."""

    model: str = Field(description="The model.")
    object: Literal["gate"] = Field("gate", description="Kind of this object.")
    gate: Gate | None = Field(
        description="Its gate; null for the default. A fine-tune with a `gate` in its spec is judged by that instead."
    )


class Deleted(BaseModel):
    """What was deleted."""

    model: str = Field(description="The model.")
    versions: list[int] | None = Field(None, description="The deleted versions.")
    label: str | None = Field(None, description="The deleted label.")
    deleted: Literal[True] = Field(True, description="Always true.")


class Verification(BaseModel):
    """Whether the files of a version and the answers of every model server match what was trained."""

    model: str = Field(description="The model.")
    version: int = Field(description="The version.")
    proven: bool = Field(description="Whether the files are intact and every server answers as the trainer did.")
    failures: dict[str, str | None] = Field(
        description="For `files` and for every model server: what is wrong, or null.",
        examples=[{"files": None, "127.0.0.1:8500": None}],
    )


class ModelSummary(BaseModel):
    """A model with its labels and the numbers of its live versions."""

    name: str = Field(description="Its name.")
    object: Literal["model"] = Field("model", description="Kind of this object.")
    versions: list[int] = Field(description="Live versions, newest first.")
    labels: dict[str, int] = Field(description="The version of each label.")
    weights: dict[str, float] = Field(description="Share of the traffic of each label besides `stable`.")
    classes: list[str] = Field(description="Class names of `stable`, or of the newest version.")

    @classmethod
    def of(cls, name: str, route: Route) -> "ModelSummary":
        """The public face of a route."""
        versions = sorted(route.classes, reverse=True)
        shown = route.labels[STABLE].version if STABLE in route.labels else versions[0]
        return cls(name=name, versions=versions, classes=list(route.classes[shown]), **_labels(route.labels))


def _labels(labels: dict[str, Label]) -> dict[str, Any]:
    return {
        "labels": {name: label.version for name, label in labels.items()},
        "weights": {name: label.weight for name, label in labels.items() if label.weight},
    }


class ModelList(BaseModel):
    """Models by name."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[ModelSummary] = Field(description="The models of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last name.")


class ModelView(BaseModel):
    """A model with its versions and their reports."""

    name: str = Field(description="Its name.")
    object: Literal["model"] = Field("model", description="Kind of this object.")
    labels: dict[str, int] = Field(description="The version of each label.")
    weights: dict[str, float] = Field(description="Share of the traffic of each label besides `stable`.")
    versions: list[VersionView] = Field(description="Live versions, newest first.")
    gate: dict[str, Any] | None = Field(description="What its versions must fulfil to get a label; null: the default.")

    @classmethod
    def of(
        cls, name: str, labels: dict[str, Label], versions: list[VersionView], gate: dict[str, Any] | None
    ) -> "ModelView":
        """The public face of a model's records."""
        return cls(name=name, versions=versions, gate=gate, **_labels(labels))


@router.get("/models", responses=errors(422, 503))
def list_models(request: Request, after: After = None, limit: Limit = 20) -> ModelList:
    """List the models that can answer predictions, by name."""
    tenant, routes = tenant_of(request), gateway_of(request).registry.routes()
    found = sorted((public_name(model), route) for model, route in routes.items() if is_visible(tenant, model))
    later = [(name, route) for name, route in found if after is None or name > after]
    page = [ModelSummary.of(name, route) for name, route in later[:limit]]
    return ModelList(data=page, has_more=len(later) > limit)


@router.get("/models/{model}", responses=errors(404, 422, 503))
def get_model(request: Request, model: Name) -> ModelView:
    """A model with all its live versions and their report cards."""
    registry, name = gateway_of(request).registry, stored(request, model)
    versions = [VersionView.of(version, whole=False) for version in registry.of_model(name)]
    return ModelView.of(model, registry.labels(name), versions, registry.gate(name))


@router.delete("/models/{model}", responses=errors(404, 409, 422, 503, 507))
async def delete_model(request: Request, model: Name) -> Deleted:
    """Delete a model with all its versions and labels. Version numbers are never reused."""
    return await delete(gateway_of(request), stored(request, model), None)


@router.get("/models/{model}/versions/{version}", responses=errors(404, 422, 503))
def get_version(request: Request, model: Name, version: Number) -> VersionView:
    """One live version with its report card."""
    return VersionView.of(gateway_of(request).registry.find(stored(request, model), version))


@router.delete("/models/{model}/versions/{version}", responses=errors(404, 409, 422, 503, 507))
async def delete_version(request: Request, model: Name, version: Number) -> Deleted:
    """Delete a version that has no label."""
    return await delete(gateway_of(request), stored(request, model), version)


@router.post("/models/{model}/versions/{version}/verify", responses=errors(404, 422, 503))
async def verify(request: Request, model: Name, version: Number) -> Verification:
    """Check the files of a version, and that every model server still answers as the trainer did."""
    gateway, name = gateway_of(request), stored(request, model)
    await asyncio.to_thread(gateway.registry.find, name, version)
    found = await asyncio.to_thread(_verify, gateway, gateway.pool.all, name, version)
    return Verification(model=model, version=version, proven=not any(found.values()), failures=found)


@router.put("/models/{model}/labels/{label}", responses=errors(400, 404, 409, 422, 503, 507))
async def put_label(request: Request, model: Name, label: LabelName, move: LabelMove) -> LabelView:
    """Move a label to a version: promote, roll back, or send it a share of the traffic.

    Requests that name neither version nor label follow `stable`, except for the shares (`weight`) of other labels.
    A version whose gate has failed gets a label only with `override` (409, `gate_failed`).
    """
    gateway, name = gateway_of(request), _own(request, model)
    await asyncio.to_thread(_check_intact, gateway, name, move.version, "labelled")
    moved = await asyncio.to_thread(
        gateway.registry.put_label, name, label, move.version, move.weight, override=move.override
    )
    log.info("%s: label %s stands for %d, weight %g", name, label, moved.version, moved.weight)
    await gateway.router.refresh()
    return LabelView.of(model, label, moved)


@router.delete("/models/{model}/labels/{label}", responses=errors(404, 409, 422, 503, 507))
async def delete_label(request: Request, model: Name, label: LabelName) -> Deleted:
    """Delete a label; its version stays."""
    gateway, name = gateway_of(request), _own(request, model)
    await asyncio.to_thread(gateway.registry.drop_label, name, label)
    log.info("%s: label %s removed", name, label)
    await gateway.router.refresh()
    return Deleted(model=model, label=label)


@router.get("/models/{model}/gate", responses=errors(404, 422, 503))
def get_gate(request: Request, model: Name) -> GateView:
    """The gate of a model."""
    registry, name = gateway_of(request).registry, stored(request, model)
    if not registry.has_live(name):
        raise UnknownModel(f"there is no model {model!r}", param="model")
    return GateView(model=model, gate=Gate.stored(registry.gate(name)))


@router.put("/models/{model}/gate", responses=errors(400, 404, 409, 422, 503, 507))
def put_gate(request: Request, model: Name, gate: Gate) -> GateView:
    """Give a model a gate: what its versions must fulfil to get their label.

    It is for fine-tunes that are evaluated from now on and have no `gate` in their spec.
    """
    name = _own(request, model)
    if name == BASE:
        raise WrongState(f"{BASE!r} is what fine-tunes start from and gets no versions", param="model")
    gateway_of(request).registry.set_gate(name, gate.model_dump(mode="json"))
    return GateView(model=model, gate=gate)


@router.delete("/models/{model}/gate", responses=errors(404, 422, 503, 507))
def delete_gate(request: Request, model: Name) -> GateView:
    """Take a model's gate away; the default is in its place."""
    gateway_of(request).registry.set_gate(_own(request, model), None)
    return GateView(model=model, gate=None)


@router.get(
    "/models/{model}/versions/{version}/report", response_class=Response,
    responses={200: {"content": {"text/html": {}}}, **errors(404, 422, 503)},
)  # fmt: skip
def get_report(request: Request, model: Name, version: Number) -> HTMLResponse:
    """The report card as a self-contained HTML page with plots."""
    from api.report.page import report_page  # takes a megabyte: load it on first use

    gateway, name = gateway_of(request), stored(request, model)
    found = gateway.registry.find(name, version)
    page = report_page(
        model, version, found.report, found.manifest, created_at=found.created_at,
        versions=gateway.router.versions(name),
        images=_pictured(gateway, found.manifest.dataset),
    )  # fmt: skip
    return HTMLResponse(page, headers={"Content-Security-Policy": SELF_CONTAINED})


def _pictured(gateway: Gateway, dataset: DatasetCard | None) -> dict[str, np.ndarray]:
    """The prepared images of a data set by part, as far as they are still there."""
    found = {}
    parts = {"": dataset, "validation": dataset and dataset.validation, "test": dataset and dataset.test}
    for part, card in parts.items():
        if card:
            with contextlib.suppress(OSError):
                found[part] = Dataset.images_in(
                    objects_of(gateway.settings).fetch(gateway.settings.datasets / card.file)
                )
    return found


@router.get(
    "/models/{model}/versions/{version}/delta", response_class=FileResponse,
    responses={200: {"content": {"application/octet-stream": {}}}, **errors(404, 422, 503)},
)  # fmt: skip
def get_delta(request: Request, model: Name, version: Number) -> FileResponse:
    """What the fine-tune changed: an `.npz` that `python -m trainer.delta` applies to the base."""
    gateway, name = gateway_of(request), stored(request, model)
    gateway.registry.find(name, version)
    path = files_of(gateway.settings, name, version) / "assets.extra" / "delta.npz"
    if not path.is_file():
        raise NotFound(f"{model}:{version} has no delta: it is a pretrained model", param="version")
    return FileResponse(path, filename=f"{model}-{version}.delta.npz", media_type="application/octet-stream")


@router.get(
    "/models/{model}/versions/{version}/saved_model", response_class=StreamingResponse,
    responses={200: {"content": {"application/zip": {}}}, **errors(404, 409, 422, 503)},
)  # fmt: skip
def get_saved_model(request: Request, model: Name, version: Number) -> StreamingResponse:
    """A version as a zip of `model/version/`, a SavedModel that TensorFlow and TensorFlow Serving load."""
    gateway, name = gateway_of(request), stored(request, model)
    _check_intact(gateway, name, version, "downloaded")
    return StreamingResponse(
        zipped(files_of(gateway.settings, name, version), f"{model}/{version}"), media_type="application/zip",
        headers={"Content-Disposition": f'attachment; filename="{model}-{version}.zip"'},
    )  # fmt: skip


def _own(request: Request, model: str) -> str:
    """The stored name of a model whose labels or gate the request may change: the base model's are everyone's."""
    if model == BASE and tenant_of(request) != DEFAULT_TENANT:
        raise Forbidden(f"{BASE!r} is shared by all tenants; only the tenant {DEFAULT_TENANT!r} may change it")
    return stored(request, model)


async def delete(gateway: Gateway, model: str, version: int | None, *, last_too: bool = False) -> Deleted:
    """Take it out of the routes, unload it from the model servers, then remove its files.

    Args:
        model: the stored name.
        version: None for the whole model.
        last_too: also a labelled version, if the model has no other.
    """

    def retire() -> list[int]:
        needed = gateway.jobs.open_bases()
        if f"{model}:{version}" in needed or (version is None and any(base.startswith(f"{model}:") for base in needed)):
            raise WrongState("an unfinished fine-tune starts from it; wait for that job or cancel it", param="model")
        return gateway.registry.retire(model, version, last_too=last_too)

    versions = await gateway.record_deletion(retire)
    log.info("%s: versions %s removed", model, versions)
    if not await asyncio.to_thread(gateway.registry.has_live, model):
        await asyncio.to_thread(gateway.feedback.forget, model)
    await gateway.align()
    with contextlib.suppress(StorageFailed):  # the model is gone; workers sweep what is left
        await asyncio.to_thread(sweep_kept, gateway.settings, gateway.jobs, gateway.registry)
    await asyncio.to_thread(gateway.reserve.keep)
    return Deleted(model=public_name(model), versions=versions)


def _check_intact(gateway: Gateway, model: str, version: int, done: str) -> None:
    """Refuse what would be `done` to a version whose files are gone or damaged."""
    gateway.registry.find(model, version)
    try:
        check_files(files_of(gateway.settings, model, version))
    except PublishFailed as exc:
        which = f"{public_name(model)}:{version}"
        text = f"{which} cannot be {done}: {exc.message}; delete the version or restore its files"
        raise WrongState(text, param="version") from exc


def _verify(gateway: Gateway, targets: Sequence[PooledServer], model: str, version: int) -> dict[str, str | None]:
    """What is wrong with the files and with each model server; None where all is well."""
    failures: dict[str, str | None] = {"files": None}
    try:
        place = files_of(gateway.settings, model, version)
        check_files(place)
        probe = Probe.load(place)
    except TemperError as exc:
        return {"files": exc.message}
    for target in targets:
        try:
            prove(target.control, model, version, probe)
            failures[target.address] = None
        except TemperError as exc:
            failures[target.address] = exc.message
    return failures
