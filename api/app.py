"""The gateway as an ASGI application: wiring only."""

import asyncio
import contextlib
import functools
import itertools
from collections.abc import AsyncIterator

from fastapi import FastAPI, Security
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

from api import __version__
from api.courier import Courier, Destinations
from api.gateway import Gateway
from api.http import errors
from api.http.fast_path import fast_path
from api.http.keys import Guard, KeyRing
from api.http.limits import BodyLimit
from api.http.openapi import add_webhooks
from api.http.openapi import errors as documented
from api.http.pages import PageHeaders
from api.http.tracing import Tracing
from api.inference.batcher import MicroBatcher
from api.inference.bodies import ImageDecoder
from api.inference.explanations import Explanations
from api.inference.neighbours import Neighbours
from api.inference.router import Router
from api.inference.server_pool import ServerPool
from api.inference.service import InferenceService
from api.routes import (
    checkpoints,
    datasets,
    events,
    feedback,
    health,
    jobs,
    models,
    open_inference,
    openai,
    page,
    predict,
    tensorflow_rest,
    webhooks,
)
from api.store_metrics import StoreMetrics
from api.uploads import Uploads
from serving.publishing import has_files
from serving.registry import Registry
from store.disk import Reserve
from store.engine import connect
from store.health import Health
from store.keys import Keys
from store.memory import settle
from store.settings import Settings
from store.webhooks import Webhooks
from trainer.jobs.answers import Answers
from trainer.jobs.estimates import Estimates
from trainer.jobs.feedback import Feedback
from trainer.jobs.library import Library
from trainer.jobs.records import Jobs
from trainer.jobs.statistics import Statistics


def create_app(settings: Settings) -> ASGIApp:
    """The gateway as an ASGI application."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Gateway]]:
        settings.make_home()
        reserve = Reserve(settings.home)
        reserve.release()  # SQLite may need it to open its files on a full disk
        engine = await asyncio.to_thread(connect, settings.store_url)
        reserve.keep()
        registry, job_records = Registry(engine), Jobs(engine)
        async with (
            ServerPool(
                settings.server_addresses,
                functools.partial(has_files, settings),
                settings.model_server_tls,
                has_standby=settings.has_standby,
            ) as pool,
            Uploads(settings, job_records) as uploads,
        ):
            router = Router(registry)
            inference = InferenceService(router, MicroBatcher(pool), settings.predict_timeout_s)
            explanations = Explanations(pool, Neighbours(settings, registry, pool))
            decoder, health_watch = ImageDecoder(settings), Health(engine, settings.home)
            keys = KeyRing(Keys(engine), settings)
            await keys.refresh()  # before the first request: whether keys are required is in the store
            owed = Webhooks(engine)
            courier = Courier(owed, Destinations(private=settings.webhook_private, http=settings.webhook_http))
            gateway = Gateway(
                settings, engine, job_records, registry, pool, router, inference, explanations, decoder, uploads,
                health_watch, reserve, keys, owed, courier, Estimates(job_records), Library(engine), Answers(engine),
                StoreMetrics(Statistics(engine)), Feedback(engine, settings.feedback),
            )  # fmt: skip
            looking = asyncio.create_task(gateway.look_after())
            settle()
            yield {"gateway": gateway}
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking
        engine.dispose()

    app = FastAPIOffline(  # its documentation page loads nothing from other hosts
        title="Temper",
        version=__version__,
        description="Fine-tune a LeNet-5 on few images without overfitting, and predict with the result.",
        lifespan=lifespan,
        separate_input_output_schemas=False,
        redirect_slashes=False,
        redoc_url=None,
        # Its own, which would miss the fast path and log the messages of exceptions; `Tracing` makes our spans.
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
        responses=documented(401, 403),
        dependencies=[Security(HTTPBearer(auto_error=False, description="An API key, where keys are required."))],
    )  # the dependency documents what `Guard` does
    add_webhooks(app)
    page.files()  # read and compressed before the first visitor comes
    errors.install(app)
    app.add_middleware(PageHeaders)
    predicting = (predict.router, tensorflow_rest.router, open_inference.router)
    managing = (
        jobs.router, events.router, checkpoints.router, datasets.router, models.router, feedback.router,
        webhooks.router, openai.router,
    )  # fmt: skip
    for router in (*predicting, *managing, health.router, page.router):
        app.include_router(router)
    fast = fast_path(app, itertools.chain.from_iterable(router.routes for router in predicting))
    limited = BodyLimit(fast, uploads=settings.max_upload_bytes, predictions=settings.max_predict_bytes)
    return Tracing(Guard(limited, settings))
