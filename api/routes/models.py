"""Models, versions, labels: what there is, where requests go, and what may go."""

import asyncio
import logging
from collections.abc import Sequence
from typing import Annotated

from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import FileResponse, HTMLResponse

from api.gateway import Gateway, gateway_of
from api.http.openapi import After, Limit, Name, Number, errors
from api.inference.server_pool import PooledServer
from api.routes.schemas import (
    Deleted,
    LabelMove,
    LabelView,
    ModelList,
    ModelSummary,
    ModelView,
    Verification,
    VersionView,
)
from serving.publishing import Probe, check_files, prove
from serving.registry import LABEL
from store.disk import is_full
from store.errors import NotFound, PublishFailed, TemperError, WrongState

log = logging.getLogger("temper.gateway")

LabelName = Annotated[str, Path(pattern=LABEL, description="A label.")]


def add(app: FastAPI) -> None:
    """The routes under /models."""

    @app.get("/models", tags=["models"], responses=errors(422, 503))
    def list_models(request: Request, after: After = None, limit: Limit = 20) -> ModelList:
        """Models that predictions can go to, by name."""
        found = sorted(gateway_of(request).registry.routes().items())
        later = [(name, route) for name, route in found if after is None or name > after]
        page = [ModelSummary.of(name, route) for name, route in later[:limit]]
        return ModelList(data=page, has_more=len(later) > limit)

    @app.get("/models/{name}", tags=["models"], responses=errors(404, 422, 503))
    def get_model(request: Request, name: Name) -> ModelView:
        """A model with all its live versions and their report cards."""
        registry = gateway_of(request).registry
        versions = [VersionView.of(version) for version in registry.of_model(name)]
        return ModelView.of(name, registry.labels(name), versions)

    @app.delete("/models/{name}", tags=["models"], responses=errors(404, 409, 422, 503, 507))
    async def delete_model(request: Request, name: Name) -> Deleted:
        """Remove a model with all its versions and labels. Their numbers are not given again."""
        return await _delete(gateway_of(request), name, None)

    @app.get("/models/{name}/versions/{version}", tags=["models"], responses=errors(404, 422, 503))
    def get_version(request: Request, name: Name, version: Number) -> VersionView:
        """One live version with its report card."""
        return VersionView.of(gateway_of(request).registry.find(name, version))

    @app.delete("/models/{name}/versions/{version}", tags=["models"], responses=errors(404, 409, 422, 503, 507))
    async def delete_version(request: Request, name: Name, version: Number) -> Deleted:
        """Remove a version for which no label stands."""
        return await _delete(gateway_of(request), name, version)

    @app.post("/models/{name}/versions/{version}/verify", tags=["models"], responses=errors(404, 422, 503))
    async def verify(request: Request, name: Name, version: Number) -> Verification:
        """Check a version's files, and prove anew that every model server answers as the trainer did."""
        gateway = gateway_of(request)
        await asyncio.to_thread(gateway.registry.find, name, version)
        found = await asyncio.to_thread(_verify, gateway, gateway.pool.all, name, version)
        return Verification(model=name, version=version, proven=not any(found.values()), failures=found)

    @app.put("/models/{name}/labels/{label}", tags=["models"], responses=errors(400, 404, 409, 422, 503, 507))
    async def put_label(request: Request, name: Name, label: LabelName, move: LabelMove) -> LabelView:
        """Have a label stand for a version: promote, roll back, or send it a share of the traffic.

        Requests that name neither version nor label follow `stable`, but for the shares of other labels (`weight`).
        """
        gateway = gateway_of(request)
        await asyncio.to_thread(_check_labelled, gateway, name, move.version)
        moved = await asyncio.to_thread(gateway.registry.put_label, name, label, move.version, move.weight)
        log.info("%s: label %s stands for %d, weight %g", name, label, moved.version, moved.weight)
        await gateway.router.refresh()
        return LabelView.of(name, label, moved)

    @app.delete("/models/{name}/labels/{label}", tags=["models"], responses=errors(404, 409, 422, 503, 507))
    async def delete_label(request: Request, name: Name, label: LabelName) -> Deleted:
        """Remove a label; its version stays."""
        gateway = gateway_of(request)
        await asyncio.to_thread(gateway.registry.drop_label, name, label)
        log.info("%s: label %s removed", name, label)
        await gateway.router.refresh()
        return Deleted(model=name, label=label)

    @app.get(
        "/models/{name}/versions/{version}/report", tags=["models"], response_class=Response,
        responses={200: {"content": {"text/html": {}}}, **errors(404, 422, 503)},
    )  # fmt: skip
    def get_report(request: Request, name: Name, version: Number) -> HTMLResponse:
        """The report card as a page with plots, complete in itself."""
        from api.report.page import report_page  # a megabyte for those who look

        found = gateway_of(request).registry.find(name, version)
        return HTMLResponse(report_page(name, version, found.report, found.manifest))

    @app.get(
        "/models/{name}/versions/{version}/delta", tags=["models"], response_class=FileResponse,
        responses={200: {"content": {"application/octet-stream": {}}}, **errors(404, 422, 503)},
    )  # fmt: skip
    def get_delta(request: Request, name: Name, version: Number) -> FileResponse:
        """What the fine-tune changed, an `.npz` for `python -m trainer.delta`, which applies it to the base."""
        gateway = gateway_of(request)
        gateway.registry.find(name, version)
        path = gateway.settings.version(name, version) / "assets.extra" / "delta.npz"
        if not path.is_file():
            raise NotFound(f"{name}:{version} has no delta: it was not fine-tuned here", param="version")
        return FileResponse(path, filename=f"{name}-{version}.delta.npz", media_type="application/octet-stream")


async def _delete(gateway: Gateway, name: str, version: int | None) -> Deleted:
    """Requests stop to reach it, then the model servers unload it, then its files go."""

    def retire() -> list[int]:
        needed = gateway.jobs.open_bases()
        if f"{name}:{version}" in needed or (version is None and any(base.startswith(f"{name}:") for base in needed)):
            raise WrongState("a fine-tune that has not finished starts from it", param="name")
        return gateway.registry.retire(name, version)

    try:
        versions = await asyncio.to_thread(retire)
    except Exception as exc:
        if not is_full(exc):
            raise
        gateway.reserve.release()  # a deletion has to be recorded before its files go
        versions = await asyncio.to_thread(retire)
    log.info("%s: versions %s removed", name, versions)
    await gateway.align()
    await asyncio.to_thread(gateway.reserve.keep)
    return Deleted(model=name, versions=versions)


def _check_labelled(gateway: Gateway, name: str, version: int) -> None:
    """Refuse to send requests to a version whose files are gone or damaged."""
    gateway.registry.find(name, version)
    try:
        check_files(gateway.settings.version(name, version))
    except PublishFailed as exc:
        text = f"{name}:{version} cannot be labelled: {exc.message}; delete the version or restore its files"
        raise WrongState(text, param="version") from exc


def _verify(gateway: Gateway, targets: Sequence[PooledServer], name: str, version: int) -> dict[str, str | None]:
    """What is wrong with the files and with each model server; None where nothing is."""
    failures: dict[str, str | None] = {"files": None}
    place = gateway.settings.version(name, version)
    try:
        check_files(place)
        probe = Probe.load(place)
    except TemperError as exc:
        return {"files": exc.message}
    for target in targets:
        try:
            prove(target.control, name, version, probe)
            failures[target.address] = None
        except TemperError as exc:
            failures[target.address] = exc.message
    return failures
