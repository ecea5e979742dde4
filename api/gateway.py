"""State shared by the routes, and the watch over the model servers."""

import asyncio
import contextlib
import logging
from dataclasses import dataclass

from fastapi import Request

from api.inference.bodies import ImageDecoder
from api.inference.router import Router
from api.inference.server_pool import PooledServer, ServerPool
from api.inference.service import InferenceService
from api.metrics import SERVER_UP
from api.uploads import Uploads
from serving.publishing import PATIENCE_S, Probe, has_files, prove, reconcile
from serving.registry import BASE, Registry
from store.disk import Reserve
from store.errors import ModelServerError, TemperError
from store.health import Health, Notice
from store.records import DEFAULT_TENANT
from store.settings import Settings
from trainer.jobs.records import Jobs

log = logging.getLogger("temper.gateway")

LOOK_S, LOOK_FOR_LOST_S = 0.5, 0.1  # between looks at a model server that answers, and at one that does not
LOOK_TIMEOUT_S = 3.0  # after which a server that says nothing is taken for lost
PUBLISHING_S = PATIENCE_S + 60.0  # age of the oldest version that a server may have missed proving when it is lost


@dataclass
class Gateway:
    """State shared by the routes."""

    settings: Settings
    jobs: Jobs
    registry: Registry
    pool: ServerPool
    router: Router
    inference: InferenceService
    images: ImageDecoder
    uploads: Uploads
    health: Health
    reserve: Reserve
    streams: int = 0  # of events, that clients read

    async def look_after(self) -> None:
        """Keep the routes fresh and the model servers up to date, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_routes())
            for target in self.pool.all:
                tasks.create_task(self._watch(target))

    async def _keep_routes(self) -> None:
        reading, revision, live = Notice("reading the routes"), self.router.revision, self.router.live()
        while True:
            try:
                await self.router.refresh()
                reading.worked()
                if revision != self.router.revision:
                    revision, before, live = self.router.revision, live, self.router.live()
                    for target in self.pool.standbys if live != before else ():
                        target.fell_behind()  # no request would show that it lacks a version
            except Exception as exc:
                reading.failed(exc)
            await asyncio.sleep(LOOK_S)

    async def _watch(self, target: PooledServer) -> None:
        looking = Notice(f"looking after the model server {target.address}")
        while True:
            target.look.clear()
            behind, target.behind = target.behind, False  # what is noticed from here on is for the next look
            try:
                loaded = await asyncio.to_thread(target.control.available, BASE, LOOK_TIMEOUT_S)
                target.silent = target.slow = False
            except TemperError as exc:
                if target.up:
                    log.warning("model server %s: %s", target.address, exc.message)
                target.give_up()
            except Exception as exc:
                target.behind = True
                looking.failed(exc)
            else:
                try:
                    await asyncio.to_thread(self._update, target, behind or not loaded)
                    target.up, target.lost_at = True, None
                    looking.worked()
                except Exception as exc:
                    target.behind = True
                    looking.failed(exc)
            SERVER_UP.labels(target.address).set(target.up)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S if target.up else LOOK_FOR_LOST_S):
                    await target.look.wait()
                await asyncio.sleep(LOOK_FOR_LOST_S)  # however often it is asked for

    def _update(self, target: PooledServer, behind: bool) -> None:
        """Have a server load what the registry says, and prove what may have been published without it."""
        if not behind or not self.registry.wanted():
            return
        reconcile(self.settings, self.registry, [target.control])
        if target.lost_at is None:
            return
        for version in self.registry.live():
            model, number = version.model, version.version
            if version.created_at > target.lost_at - PUBLISHING_S and has_files(self.settings, model, number):
                try:
                    target.control.wait_until_available(model, number)
                    prove(target.control, model, number, Probe.load(self.settings.version(model, number)))
                except ModelServerError:
                    raise  # the server itself is away again
                except Exception as exc:  # one bad version must not keep the server from serving the others
                    log.error("%s:%d is not proven at %s: %s", model, number, target.address, exc)

    async def align(self) -> None:
        """Have all model servers serve what the registry says now; one that is away will when it comes back."""
        servers = [target.control for target in self.pool.all if not target.silent]
        try:
            await self.router.refresh()
            await asyncio.to_thread(reconcile, self.settings, self.registry, servers)
        except Exception as exc:  # the registry has changed; each server is told at its next look
            log.warning("model servers are not up to date yet: %s", exc)
            for target in self.pool.all:
                target.fell_behind()


def gateway_of(request: Request) -> Gateway:
    """Return the gateway that serves a request."""
    gateway: Gateway = request.scope["state"]["gateway"]
    return gateway


def tenant_of(request: Request) -> str:
    """Return the tenant on whose behalf a request is made."""
    tenant: str = request.scope["state"].get("tenant", DEFAULT_TENANT)
    return tenant
