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
from api.http.fast_path import Shortcut
from api.http.limits import BodyLimit
from api.http.tracing import Tracing
from api.inference.batcher import MicroBatcher, Routes
from api.inference.server_pool import Targets
from api.routes import health, models, predict, tensorflow_rest
from api.routes import jobs as finetune
from api.routes import open_inference as inference_protocol
from api.uploads import Uploads, sweep
from serving.registry import Registry
from store.engine import connect
from store.memory import settle
from store.settings import Settings
from trainer.jobs.records import Jobs


def create_app(settings: Settings) -> ASGIApp:
    """The gateway as an ASGI application."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Gateway]]:
        settings.make_home()
        sweep(settings)
        engine = await asyncio.to_thread(connect, settings.store_url)
        registry = Registry(engine)
        async with Targets(settings.targets) as targets, Uploads(settings) as uploads:
            routes, batcher = Routes(registry), MicroBatcher(targets)
            gateway = Gateway(settings, Jobs(engine), registry, targets, routes, batcher, uploads)
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
    for face in (predict, tensorflow_rest, inference_protocol, finetune, models, health):
        face.add(app)
    limited = BodyLimit(Shortcut(app), uploads=settings.max_upload_bytes, predictions=settings.max_predict_bytes)
    return Tracing(limited)
