"""The gateway's routes. Each parses, calls and answers."""

import asyncio
import contextlib
import logging
import secrets
import shutil
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI, File, Form, Path, Query, Request, Response, UploadFile
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import __version__
from api import errors as http_errors
from api.examples import IMAGE_EXAMPLE, SPEC_EXAMPLE
from api.instances import parse_instances
from api.predicting import MicroBatcher, Routes
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
from serving.client import ModelServer, Predictor
from serving.errors import (
    InvalidImage,
    InvalidRequest,
    InvalidSpec,
    Overloaded,
    TemperError,
    TooLarge,
    UnknownModel,
    UnsupportedMediaType,
)
from serving.publishing import reconcile
from serving.registry import Registry
from serving.settings import Settings
from serving.store import connect
from trainer.jobs import Jobs
from trainer.spec import MODEL_NAME, described, parse_spec
from trainer.uploads import prepare_upload

log = logging.getLogger("temper.gateway")

BASE = "lenet5"
LOOK_S = 0.5  # between looks at the model server and the registry
DECODERS, MAX_UPLOADS = 2, 32  # uploads that are decoded, and that may be under way, at a time
IMAGE_PIXELS = 1 << 22  # of an image to predict on: its decoding shares the gateway's memory

After = Annotated[str | None, Query(max_length=100, description="The last item of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Most items of the page.")]
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
    decoders: asyncio.Semaphore
    uploads: int = 0  # being received or decoded
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
        _sweep(settings)
        engine = await asyncio.to_thread(connect, settings.store_url)
        registry = Registry(engine)
        async with Predictor(settings.target) as predictor:
            with ModelServer(settings.target) as server:
                batcher = MicroBatcher(predictor, settings.predict_timeout_s)
                decoders = asyncio.Semaphore(DECODERS)
                gateway = Gateway(settings, Jobs(engine), registry, server, Routes(registry), batcher, decoders)
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


class BodyLimit:
    """Refuses a body as soon as it is known to be larger than its path allows."""

    def __init__(self, app: ASGIApp, limits: dict[str, int]) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its body counted."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        limit = self._limits.get(scope["path"], 1 << 16)
        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > limit:
            refusal = http_errors.response(TooLarge(f"the body is larger than {limit} bytes"))
            refusal.headers["connection"] = "close"
            return await refusal(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise TooLarge(f"the body is larger than {limit} bytes")
            return message

        async def refused(message: Message) -> None:  # whatever the route has made of the error
            if received <= limit:
                await send(message)
            elif message["type"] == "http.response.start":
                await http_errors.response(TooLarge(f"the body is larger than {limit} bytes"))(scope, receive, send)

        return await self._app(scope, counted, refused)


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
        spec: Annotated[
            str | None,
            Form(description="How to train, as JSON (schema `Spec`); regularized by default.", examples=[SPEC_EXAMPLE]),
        ] = None,
    ) -> JobView:
        """Upload labelled images and queue a fine-tune on them."""
        gateway = _gateway(request)
        if model == BASE:
            raise InvalidRequest(f"{BASE!r} is the base model; choose another name", param="model")
        extra = sorted(set(await request.form()) - {"data", "model", "spec"})
        if extra:
            raise InvalidRequest(f"unknown form fields: {', '.join(extra)}", param=extra[0])
        parsed = parse_spec(spec)
        base = await asyncio.to_thread(_resolve_base, gateway, parsed.base)
        if gateway.uploads >= MAX_UPLOADS:
            raise Overloaded(f"{MAX_UPLOADS} uploads are being read already")
        gateway.uploads += 1
        try:
            async with gateway.decoders:
                dataset = await _store_dataset(gateway.settings, data)
        finally:
            gateway.uploads -= 1
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


def _resolve_base(gateway: Gateway, base: str) -> str:
    """`name:version` of a live version to start from."""
    name, _, number = base.partition(":")
    if base == BASE and not gateway.registry.has_live(BASE):
        return f"{BASE}:1"  # the worker publishes it before it claims any job
    try:
        return f"{name}:{gateway.registry.find(name, int(number) if number else None).version}"
    except UnknownModel as exc:
        reason = {"field": "spec.base", "reason": exc.message}
        raise InvalidSpec(f"spec.base: {exc.message}", param="spec.base", details=[reason]) from exc


async def _store_dataset(settings: Settings, upload: UploadFile) -> dict[str, Any]:
    """Prepare an upload in a process of its own and keep the result; what the job record says of it."""
    name = secrets.token_hex(8)
    raw, prepared = settings.staging / f"{name}.upload", settings.staging / f"{name}.npz"

    def keep() -> None:
        with raw.open("wb") as file:
            shutil.copyfileobj(upload.file, file)

    try:
        await asyncio.to_thread(keep)
        dataset = await prepare_upload(raw, prepared, settings)
        prepared.rename(settings.datasets / f"{dataset['id']}.npz")
    finally:
        raw.unlink(missing_ok=True)
        prepared.unlink(missing_ok=True)
    return {"filename": upload.filename or "", **dataset}


def _sweep(settings: Settings) -> None:
    """Remove what uploads have left behind whose gateway was killed."""
    for pattern in ("*.upload", "*.npz"):
        for path in settings.staging.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > settings.decode_seconds:
                    path.unlink()


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
    def get_model(request: Request, name: Annotated[ModelName, Path()]) -> ModelView:
        """A model with all its live versions and their report cards."""
        registry = _gateway(request).registry
        versions = [VersionView.of(version) for version in registry.of_model(name)]
        return ModelView(name=name, labels=registry.labels(name), versions=versions)


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
