"""The gateway's routes. Each parses, calls and answers."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI, File, Form, Path, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi_offline import FastAPIOffline

from api import __version__
from api import errors as http_errors
from api.examples import IMAGE_EXAMPLE, SPEC_EXAMPLE
from api.instances import parse_instances
from api.limits import BodyLimit
from api.predicting import MicroBatcher, Routes
from api.report_page import report_page
from api.schemas import (
    Error,
    JobList,
    JobView,
    ModelList,
    ModelName,
    ModelSummary,
    ModelView,
    PredictRequest,
    PredictResponse,
    Ready,
    VersionView,
)
from api.uploads import Uploads, sweep
from serving.client import ModelServer, Predictor
from serving.errors import (
    InvalidImage,
    InvalidRequest,
    NotFound,
    TemperError,
    UnknownModel,
    UnsupportedMediaType,
)
from serving.publishing import reconcile
from serving.registry import BASE, Registry
from serving.settings import Settings
from serving.store import connect
from trainer.jobs import Jobs
from trainer.spec import MODEL_NAME, Spec, check_dataset, described, parse_spec, refused

log = logging.getLogger("temper.gateway")

LOOK_S = 0.5  # between looks at the model server and the registry
IMAGE_PIXELS = 1 << 22  # of an image to predict on: its decoding shares the gateway's memory

After = Annotated[str | None, Query(max_length=100, description="The last item of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Most items of the page.")]
Name = Annotated[ModelName, Path()]
Number = Annotated[int, Path(ge=1, lt=2**63, description="A version.")]
JobId = Annotated[str, Path(max_length=100, description="The job's id.")]


@dataclass
class Gateway:
    """What the routes share."""

    settings: Settings
    jobs: Jobs
    registry: Registry
    server: ModelServer
    routes: Routes
    batcher: MicroBatcher
    uploads: Uploads
    server_is_up: bool = False
    server_may_have_forgotten: bool = True

    async def look_after(self) -> None:
        """Keep the routes fresh, and the model server at what the registry says whenever it comes back."""
        while True:
            try:
                await self.routes.refresh()
                await asyncio.to_thread(self._look_at_server)
            except TemperError as exc:
                self.server_is_up, self.server_may_have_forgotten = False, True
                log.debug("model server: %s", exc)
            except Exception:
                log.exception("looking after the model server")
            await asyncio.sleep(LOOK_S)

    def _look_at_server(self) -> None:
        available = self.server.available(BASE)
        self.server_is_up = True
        if (self.server_may_have_forgotten or not available) and self.registry.all():
            reconcile(self.settings, self.registry, self.server)
        self.server_may_have_forgotten = False


def create_app(settings: Settings) -> FastAPI:
    """The gateway as an ASGI application."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        settings.make_home()
        sweep(settings)
        engine = await asyncio.to_thread(connect, settings.store_url)
        registry = Registry(engine)
        async with Predictor(settings.target) as predictor, Uploads(settings) as uploads:
            with ModelServer(settings.target) as server:
                batcher = MicroBatcher(predictor, settings.predict_timeout_s)
                gateway = Gateway(settings, Jobs(engine), registry, server, Routes(registry), batcher, uploads)
                app.state.gateway = gateway
                looking = asyncio.create_task(gateway.look_after())
                yield
                looking.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await looking
        engine.dispose()

    app = FastAPIOffline(  # its documentation page needs no other host
        title="Temper",
        version=__version__,
        description="Fine-tune a LeNet-5 on few images without overfitting, and predict with the result.",
        lifespan=lifespan,
        separate_input_output_schemas=False,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.add_middleware(
        BodyLimit, limits={"/finetune": settings.max_upload_bytes, "/predict": settings.max_predict_bytes}
    )
    http_errors.install(app)
    _add_finetune(app)
    _add_predict(app)
    _add_models(app)
    _add_health(app)
    return app


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documentation of the answers that are no success."""
    texts = {
        400: "The request cannot be parsed",
        404: "Unknown model, version or job",
        409: "The state does not allow it",
        413: "Too large",
        415: "Media type not supported",
        422: "Invalid content",
        429: "Too much at once",
        503: "The store or the model server is away",
        504: "The model server did not answer in time",
    }
    return {status: {"model": Error, "description": texts[status]} for status in statuses}


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _add_finetune(app: FastAPI) -> None:
    @app.post("/finetune", status_code=202, tags=["fine-tune"], responses=_errors(400, 413, 415, 422, 429, 503))
    async def finetune(
        request: Request,
        response: Response,
        data: Annotated[
            UploadFile,
            File(description="Labelled images: a zip of class folders, or an .npz of `images` and `labels`."),
        ],
        model: Annotated[str, Form(pattern=MODEL_NAME, description="The model that gets a new version.")],
        validation: Annotated[
            UploadFile | None,
            File(description="Images to measure on, in the same form; without them some of `data` are held out."),
        ] = None,
        spec: Annotated[
            str | None,
            Form(description="How to train, as JSON (schema `Spec`); regularized by default.", examples=[SPEC_EXAMPLE]),
        ] = None,
    ) -> JobView:
        """Upload labelled images and queue a fine-tune on them."""
        gateway = _gateway(request)
        if model == BASE:
            raise InvalidRequest(f"{BASE!r} is the base model; choose another name", param="model")
        extra = sorted(set(await request.form()) - {"data", "validation", "model", "spec"})
        if extra:
            raise InvalidRequest(f"unknown form fields: {', '.join(extra)}", param=extra[0])
        parsed = parse_spec(spec)
        base = await asyncio.to_thread(_resolve_base, gateway, parsed)

        def check(dataset: dict[str, Any]) -> None:
            check_dataset(parsed, dataset["classes"], held_out=validation is not None)

        dataset = await gateway.uploads.store(data, validation, check)
        job = await asyncio.to_thread(
            gateway.jobs.create, model=model, base=base, spec=described(parsed), dataset=dataset
        )
        response.headers["Location"] = f"/finetune/{job.id}"
        return JobView.of(job)

    @app.get("/finetune", tags=["fine-tune"], responses=_errors(404, 422, 503))
    def list_jobs(request: Request, after: After = None, limit: Limit = 20) -> JobList:
        """Jobs, newest first."""
        page, has_more = _gateway(request).jobs.page(after=after, limit=limit)
        return JobList(data=[JobView.of(job) for job in page], has_more=has_more)

    @app.get("/finetune/{id}", tags=["fine-tune"], responses=_errors(404, 422, 503))
    async def get_job(request: Request, id: JobId) -> JobView:
        """One job: its state, its progress, its error or its version."""
        gateway = _gateway(request)
        job = await asyncio.to_thread(gateway.jobs.get, id)
        if job.version is not None and not gateway.routes.knows(job.model, job.version):
            await gateway.routes.refresh()  # who reads of a version may ask for it at once
        return JobView.of(job)

    @app.post("/finetune/{id}/cancel", tags=["fine-tune"], responses=_errors(404, 409, 422, 503))
    def cancel_job(request: Request, id: JobId) -> JobView:
        """Cancel a queued job at once, or a running one at the end of its epoch."""
        return JobView.of(_gateway(request).jobs.cancel(id))


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


def _add_predict(app: FastAPI) -> None:
    schema = PredictRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    image = {"schema": {"type": "string", "format": "binary"}}
    bodies = {"application/json": {"schema": schema, "example": IMAGE_EXAMPLE}, "image/png": image, "image/jpeg": image}

    @app.post(
        "/predict",
        tags=["predict"],
        responses=_errors(400, 404, 413, 415, 422, 429, 503, 504),
        response_model=PredictResponse,
        openapi_extra={"requestBody": {"required": True, "content": bodies}},
    )
    async def predict(
        request: Request,
        model: Annotated[ModelName | None, Query(description="With an image body: the model.")] = None,
        version: Annotated[int | None, Query(ge=1, lt=2**63, description="With an image body: a version.")] = None,
        label: Annotated[str | None, Query(min_length=1, max_length=64, description="Likewise: a label.")] = None,
    ) -> Response:
        """Classify images: JSON instances, or one PNG or JPEG as the body."""
        gateway = _gateway(request)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        body = await request.body()
        if kind in ("image/png", "image/jpeg"):
            if model is None:
                raise InvalidRequest("model: a query parameter is needed with an image body", param="model")
            pixels = await asyncio.to_thread(_decode, body)
            images = (pixels / pixels.dtype.type(255)).astype("f4").reshape(1, 28, 28, 1)
        elif kind == "application/json" or (not kind and body):
            wanted, images = parse_instances(body, gateway.settings.max_instances)
            model, version, label = wanted.model, wanted.version, wanted.label
        else:
            raise UnsupportedMediaType(f"Content-Type {kind!r}: send application/json, image/png or image/jpeg")
        if version is not None and label is not None:
            raise InvalidRequest("give a version or a label, not both", param="label")
        number, classes = await gateway.routes.resolve(model, version, label)
        probabilities = await gateway.batcher.predict(model, number, images)
        best = probabilities.argmax(axis=1).tolist()
        answers = [
            {"label": classes[top], "probabilities": row}
            for top, row in zip(best, probabilities.astype(float).round(7).tolist(), strict=True)
        ]
        return JSONResponse({"model": model, "version": number, "classes": classes, "predictions": answers})


def _decode(body: bytes) -> Any:
    from trainer.images import decode  # Pillow is for gateways that get images

    try:
        return decode(body, IMAGE_PIXELS)
    except InvalidImage as exc:
        raise InvalidImage(f"the body is {exc.message}", param="body") from exc


def _add_models(app: FastAPI) -> None:
    @app.get("/models", tags=["models"], responses=_errors(422, 503))
    def list_models(request: Request, after: After = None, limit: Limit = 20) -> ModelList:
        """Models that predictions can go to, by name."""
        found = sorted(_gateway(request).registry.routes().items())
        later = [(name, route) for name, route in found if after is None or name > after]
        page = [
            ModelSummary(
                name=name, versions=sorted(route.classes, reverse=True), labels=route.labels,
                classes=list(route.classes[max(route.classes)]),
            )
            for name, route in later[:limit]
        ]  # fmt: skip
        return ModelList(data=page, has_more=len(later) > limit)

    @app.get("/models/{name}", tags=["models"], responses=_errors(404, 422, 503))
    def get_model(request: Request, name: Name) -> ModelView:
        """A model with all its live versions and their report cards."""
        registry = _gateway(request).registry
        versions = [VersionView.of(version) for version in registry.of_model(name)]
        return ModelView(name=name, labels=registry.labels(name), versions=versions)

    @app.get("/models/{name}/versions/{version}", tags=["models"], responses=_errors(404, 422, 503))
    def get_version(request: Request, name: Name, version: Number) -> VersionView:
        """One live version with its report card."""
        return VersionView.of(_gateway(request).registry.find(name, version))

    @app.get(
        "/models/{name}/versions/{version}/report", tags=["models"], response_class=HTMLResponse,
        responses=_errors(404, 422, 503),
    )  # fmt: skip
    def get_report(request: Request, name: Name, version: Number) -> HTMLResponse:
        """The report card as a page with plots, complete in itself."""
        found = _gateway(request).registry.find(name, version)
        return HTMLResponse(report_page(name, version, found.report, found.manifest))

    @app.get(
        "/models/{name}/versions/{version}/delta", tags=["models"], response_class=FileResponse,
        responses={200: {"content": {"application/octet-stream": {}}}, **_errors(404, 422, 503)},
    )  # fmt: skip
    def get_delta(request: Request, name: Name, version: Number) -> FileResponse:
        """What the fine-tune changed, an `.npz` for `python -m trainer.delta`, which applies it to the base."""
        gateway = _gateway(request)
        gateway.registry.find(name, version)
        path = gateway.settings.models / name / str(version) / "assets.extra" / "delta.npz"
        if not path.is_file():
            raise NotFound(f"{name}:{version} has no delta: it was not fine-tuned here", param="version")
        return FileResponse(path, filename=f"{name}-{version}.delta.npz", media_type="application/octet-stream")


def _add_health(app: FastAPI) -> None:
    @app.get("/healthz", tags=["health"])
    async def alive() -> dict[Literal["status"], Literal["ok"]]:
        """The gateway lives."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["health"], response_model=Ready, responses={503: {"model": Ready}})
    async def ready(request: Request) -> Response:
        """The store and the model server answer; what the workers do."""
        gateway = _gateway(request)
        try:
            workers = await asyncio.to_thread(gateway.jobs.worker_states)
            store = True
        except Exception:
            log.exception("the store does not answer")
            workers, store = {}, False
        ok = store and gateway.server_is_up
        words = {True: "ok", False: "unavailable"}
        body = Ready(
            status="ready" if ok else "not_ready", store=words[store], model_server=words[gateway.server_is_up],
            model_server_address=gateway.settings.target, workers=workers,
        )  # fmt: skip
        return JSONResponse(body.model_dump(), 200 if ok else 503)
