"""The gateway as an ASGI application."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.types import ASGIApp

from api import __version__
from api.gateway import Gateway
from api.http import errors
from api.http.fast_path import FastPath
from api.http.limits import BodyLimit
from api.http.tracing import Tracing
from api.inference.batcher import MicroBatcher
from api.inference.router import Router
from api.inference.server_pool import ServerPool
from api.routes import health, jobs, models, open_inference, predict, tensorflow_rest
from api.uploads import Uploads
from serving.registry import Registry
from store.disk import Reserve
from store.engine import connect
from store.health import Health
from store.memory import settle
from store.settings import Settings
from trainer.jobs.records import Jobs


def create_app(settings: Settings) -> ASGIApp:
    """The gateway as an ASGI application."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Gateway]]:
        settings.make_home()
        reserve = Reserve(settings.home)
        reserve.release()  # SQLite may need it to open its files on a full disk
        engine = await asyncio.to_thread(connect, settings.store_url)
        reserve.keep()
        registry, jobs = Registry(engine), Jobs(engine)
        async with ServerPool(settings.server_addresses) as pool, Uploads(settings, jobs) as uploads:
            router, batcher = Router(registry), MicroBatcher(pool)
            health = Health(engine, settings.home)
            gateway = Gateway(settings, jobs, registry, pool, router, batcher, uploads, health, reserve)
            looking = asyncio.create_task(gateway.look_after())
            settle()
            yield {"gateway": gateway}
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
    errors.install(app)
    for face in (predict, tensorflow_rest, open_inference):
        face.add(app)
    for routes in (jobs, models, health):
        app.include_router(routes.router)
    limited = BodyLimit(FastPath(app), uploads=settings.max_upload_bytes, predictions=settings.max_predict_bytes)
    return Tracing(limited)
