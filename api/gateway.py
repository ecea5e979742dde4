"""State shared by the routes, and the watch over the model servers."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import sqlalchemy as sa
from fastapi import Request

from api.courier import Courier
from api.http.keys import KeyRing
from api.inference.bodies import ImageDecoder
from api.inference.explanations import Explanations
from api.inference.router import Router
from api.inference.server_pool import PooledServer, ServerPool
from api.inference.service import InferenceService
from api.metrics import SERVER_UP
from api.store_metrics import StoreMetrics
from api.uploads import Uploads
from serving.mirror import remove_others
from serving.publishing import PATIENCE_S, Probe, files_of, has_files, prove, reconcile
from serving.registry import BASE, Registry, stored_name
from store.changes import listen
from store.disk import Reserve, is_full
from store.errors import ModelServerError, TemperError
from store.health import Health, Notice
from store.keys import Key
from store.objects import objects_of
from store.records import DEFAULT_TENANT
from store.settings import Settings
from store.webhooks import Webhooks
from trainer.jobs.answers import Answers
from trainer.jobs.estimates import Estimates
from trainer.jobs.feedback import Feedback
from trainer.jobs.library import Library
from trainer.jobs.records import Job, Jobs

log = logging.getLogger("temper.gateway")
T = TypeVar("T")

LOOK_S, LOOK_FOR_LOST_S = 0.5, 0.1  # between looks at a model server that answers, and at one that does not
LOOK_TIMEOUT_S = 3.0  # after which a server that says nothing is taken for lost
TIDY_S, CACHED_S = 600.0, 3600.0  # between looks at the disk, and the age at which data sets in the bucket go
PUBLISHING_S = PATIENCE_S + 60.0  # age of the oldest version that a server may have missed proving when it is lost


@dataclass
class Gateway:
    """State shared by the routes."""

    settings: Settings
    engine: sa.Engine
    jobs: Jobs
    registry: Registry
    pool: ServerPool
    router: Router
    inference: InferenceService
    explanations: Explanations
    images: ImageDecoder
    uploads: Uploads
    health: Health
    reserve: Reserve
    keys: KeyRing
    webhooks: Webhooks
    courier: Courier
    estimates: Estimates
    library: Library
    answers: Answers
    store_metrics: StoreMetrics
    feedback: Feedback
    streams: int = 0  # of events, that clients read

    async def look_after(self) -> None:
        """Keep routes and keys fresh and the model servers up to date, and deliver webhooks, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            changed = {"registry": asyncio.Event(), "keys": asyncio.Event()}
            tasks.create_task(listen(self.engine, changed))
            tasks.create_task(self.courier.run())
            tasks.create_task(_keep_fresh(self._refreshes_routes(), "reading the routes", changed["registry"]))
            tasks.create_task(_keep_fresh(self.keys.refresh, "reading the keys", changed["keys"]))
            if self.settings.objects:
                tasks.create_task(self._keep_tidy())
            for target in self.pool.all:
                tasks.create_task(self._watch(target))

    async def _keep_tidy(self) -> None:
        """Delete what this machine has fetched or shared and others have deleted, or can fetch, again and again."""
        tidying, objects = Notice("deleting what is in the object store"), objects_of(self.settings)
        while True:
            try:
                await asyncio.to_thread(remove_others, self.settings, self.registry)
                await asyncio.to_thread(objects.drop_cached, self.settings.datasets, CACHED_S)
                await asyncio.to_thread(objects.sweep)
                tidying.worked()
            except Exception as exc:
                tidying.failed(exc)
            await asyncio.sleep(TIDY_S)

    def _refreshes_routes(self) -> Callable[[], Awaitable[None]]:
        """What reads the routes, and tells the standbys of what they lack: no request would show it."""
        revision, live = self.router.revision, self.router.live()

        async def refresh() -> None:
            nonlocal revision, live
            await self.router.refresh()
            if revision != self.router.revision:
                revision, before, live = self.router.revision, live, self.router.live()
                for target in self.pool.standbys if live != before else ():
                    target.fell_behind()

        return refresh

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
        since = self.registry.clock() - (time.monotonic() - target.lost_at) - PUBLISHING_S
        for version in self.registry.live():
            model, number = version.model, version.version
            if version.created_at > since and has_files(self.settings, model, number):
                try:
                    target.control.wait_until_available(model, number)
                    prove(target.control, model, number, Probe.load(files_of(self.settings, model, number)))
                except ModelServerError:
                    raise  # the server itself is away again
                except Exception as exc:  # one bad version must not keep the server from serving the others
                    log.error("%s:%d is not proven at %s: %s", model, number, target.address, exc)

    async def record_deletion(self, delete: Callable[[], T]) -> T:
        """Call what records a deletion, with the reserve's space if the disk is full."""
        try:
            return await asyncio.to_thread(delete)
        except Exception as exc:
            if not is_full(exc):
                raise
        self.reserve.release()  # a deletion has to be recorded before its files go
        return await asyncio.to_thread(delete)

    async def job(self, job_id: str, tenant: str) -> Job:
        """A job of a tenant, whose version the routes know by now: the client may ask for it next.

        Raises:
            UnknownJob: no job has this id, or it is another tenant's.
        """
        job = await asyncio.to_thread(self.jobs.get, job_id, tenant=tenant)
        if job.version is not None and not self.router.knows(job.model, job.version):
            await self.router.refresh()
        return job

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


async def _keep_fresh(refresh: Callable[[], Awaitable[None]], task: str, changed: asyncio.Event) -> None:
    """Read something from the store when it has changed, and in any case twice a second."""
    reading = Notice(task)
    while True:
        changed.clear()  # what happens from here on is for the next look
        try:
            await refresh()
            reading.worked()
        except Exception as exc:
            reading.failed(exc)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S):
                await changed.wait()


def gateway_of(request: Request) -> Gateway:
    """Return the gateway that serves a request."""
    gateway: Gateway = request.scope["state"]["gateway"]
    return gateway


def tenant_of(request: Request) -> str:
    """Return the tenant on whose behalf a request is made."""
    tenant: str = request.scope["state"].get("tenant", DEFAULT_TENANT)
    return tenant


def key_of(request: Request) -> Key | None:
    """Return the key that let a request in; None where keys are not required."""
    key: Key | None = request.scope["state"].get("key")
    return key


def stored(request: Request, model: str) -> str:
    """Return the stored name of what a request calls a model."""
    return stored_name(tenant_of(request), model)
