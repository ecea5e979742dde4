"""What the routes share, and the watch over the model servers."""

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from fastapi import Request

from api.inference.batcher import MicroBatcher
from api.inference.router import Router
from api.inference.server_pool import PooledServer, ServerPool
from api.metrics import SERVER_UP
from api.uploads import Uploads
from serving.publishing import reconcile
from serving.registry import BASE, Registry
from store.disk import Reserve
from store.errors import TemperError
from store.health import Health, Notice
from store.settings import Settings
from trainer.jobs.records import Jobs

log = logging.getLogger("temper.gateway")

LOOK_S, LOOK_FOR_LOST_S = 0.5, 0.1  # between looks at a model server that answers, and at one that does not
LOOK_TIMEOUT_S = 3.0  # after which a server that says nothing is taken for lost


@dataclass
class Gateway:
    """What the routes share."""

    settings: Settings
    jobs: Jobs
    registry: Registry
    pool: ServerPool
    router: Router
    batcher: MicroBatcher
    uploads: Uploads
    health: Health
    reserve: Reserve

    async def look_after(self) -> None:
        """Keep the routes fresh, and every model server at what the registry says whenever it comes back."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_routes())
            for target in self.pool.all:
                tasks.create_task(self._watch(target))

    async def _keep_routes(self) -> None:
        reading = Notice("reading the routes")
        while True:
            try:
                await self.router.refresh()
                reading.worked()
            except Exception as exc:
                reading.failed(exc)
            await asyncio.sleep(LOOK_S)

    async def _watch(self, target: PooledServer) -> None:
        looking = Notice(f"looking after the model server {target.address}")
        while True:
            target.look.clear()
            try:
                await asyncio.to_thread(self._look_at, target)
                looking.worked()
            except TemperError as exc:
                if target.up:
                    log.warning("model server %s: %s", target.address, exc.message)
                target.give_up()
            except Exception as exc:
                target.behind = True
                looking.failed(exc)
            SERVER_UP.labels(target.address).set(target.up)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if target.up else LOOK_FOR_LOST_S):
                    await target.look.wait()
                await asyncio.sleep(LOOK_FOR_LOST_S)  # however often it is asked for

    def _look_at(self, target: PooledServer) -> None:
        behind, target.behind = target.behind, False  # what is noticed from here on is for the next look
        if (not target.control.available(BASE, LOOK_TIMEOUT_S) or behind) and self.registry.wanted():
            reconcile(self.settings, self.registry, [target.control])
        target.up = True

    async def align(self) -> None:
        """Have all model servers serve what the registry says now; one that is away will when it comes back."""
        await self.router.refresh()
        servers = [target.control for target in self.pool.all]
        with contextlib.suppress(TemperError):
            await asyncio.to_thread(reconcile, self.settings, self.registry, servers)


def gateway_of(request: Request) -> Gateway:
    """The gateway that a request has come to."""
    gateway: Gateway = request.scope["state"]["gateway"]
    return gateway
