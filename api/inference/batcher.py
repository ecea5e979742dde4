"""Micro-batching: concurrent requests for one version share a gRPC call."""

import asyncio
import time
from collections import Counter, deque
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np

from api.inference.router import Servable
from api.inference.server_pool import ServerPool
from api.metrics import BATCH, CALL_S, IN_FLIGHT, QUEUE_S, WAITING
from store import traces
from store.errors import ModelServerTimeout, Overloaded
from store.records import DEFAULT_TENANT

MAX_BATCH = 128  # images in a call, unless a single request brings more
CALLS = 4  # in flight to each server that takes part; TensorFlow Serving rejects calls that its threads cannot take
MAX_WAITING = 4096  # images of all requests

NOTHING: AbstractContextManager[Any] = nullcontext()

Outputs = dict[str, np.ndarray]  # by name, each with one row an image


@dataclass(eq=False, slots=True)
class _Waiting:
    images: np.ndarray
    answer: asyncio.Future[Outputs]
    since: float  # of time.perf_counter
    deadline: float  # on the loop's clock
    is_queued: bool = True
    trace: str | None = None  # of its request


_Key = tuple[str, Servable, str]  # tenant, and the data type of the images, which decides the signature


class MicroBatcher:
    """Joins a tenant's concurrent requests for one servable and signature into a call. A lone one goes out at once.

    Tenants take turns, and so do the servables of each. A request whose time is up is not sent any more.
    """

    def __init__(self, pool: ServerPool) -> None:
        self._pool = pool
        self._queues: dict[_Key, deque[_Waiting]] = {}  # none is empty, and the first is next
        self._in_flight: dict[_Key, list[int]] = {}  # images of each call
        self._calls = 0
        self._waiting = 0
        self._waiting_of: Counter[str] = Counter()  # images, by tenant
        self._turn, self._turns = 0, dict[str, int]()  # and the last one of each tenant
        self._tasks: set[asyncio.Task[None]] = set()
        WAITING.set_function(lambda: self._waiting)
        IN_FLIGHT.set_function(lambda: self._calls)

    async def predict(
        self, servable: Servable, images: np.ndarray, timeout_s: float, tenant: str = DEFAULT_TENANT
    ) -> Outputs:
        """The outputs for `images`: (n, 28, 28, 1) float32 in [0, 1], or (n, 784) uint8.

        Raises:
            Overloaded: too many images are waiting already.
            ModelServerError: the model servers failed.
            ModelServerTimeout: there was no answer in time.
        """
        loop = asyncio.get_running_loop()
        key = (tenant, servable, images.dtype.char)
        if self._waiting + len(images) > MAX_WAITING and self._has_its_share(key, len(images)):
            raise Overloaded("too many predictions are waiting")
        waiting = _Waiting(images, loop.create_future(), time.perf_counter(), loop.time() + timeout_s)
        if traces.on():
            waiting.trace = traces.current()
        alarm = loop.call_at(waiting.deadline, _expire, waiting.answer, timeout_s)
        self._queues.setdefault(key, deque()).append(waiting)
        self._count(tenant, len(images))
        self._send()
        try:
            return await waiting.answer
        finally:
            alarm.cancel()
            if waiting.is_queued:  # it expired, or its client hung up
                self._give_up(key, waiting)

    def _give_up(self, key: _Key, waiting: _Waiting) -> None:
        """Free the place of a request that nobody waits for."""
        self._count(key[0], -len(waiting.images))
        queue = self._queues[key]
        queue.remove(waiting)
        if not queue:
            del self._queues[key]

    def _count(self, tenant: str, images: int) -> None:
        """Add to the number of images that wait."""
        self._waiting += images
        self._waiting_of[tenant] += images
        if not self._waiting_of[tenant]:
            del self._waiting_of[tenant]

    def _has_its_share(self, key: _Key, images: int) -> bool:
        """Tell whether a tenant, and the servable within it, would have more than their share of all places.

        A crowd for one must not keep out others.
        """
        tenant = key[0]
        share = MAX_WAITING // len(self._waiting_of.keys() | {tenant})
        if self._waiting_of[tenant] + images <= share:
            return False
        queues = sum(other[0] == tenant for other in self._queues)
        if key not in self._queues:
            return queues >= share
        return sum(len(waiting.images) for waiting in self._queues[key]) >= share // queues

    def _send(self) -> None:
        """Start calls for waiting requests, as far as the calls in flight allow."""
        for key in self._in_turn():
            if self._calls >= CALLS * self._pool.shares:
                break
            if self._may_call(key):
                queue = self._queues.pop(key)
                batch = self._next_batch(key[0], queue)
                if queue:
                    self._queues[key] = queue  # behind the others
                self._turn += 1
                self._turns[key[0]] = self._turn
                if batch:
                    size = sum(len(waiting.images) for waiting in batch)
                    self._calls += 1
                    self._in_flight.setdefault(key, []).append(size)
                    task = asyncio.create_task(self._call(key, batch, size))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    def _in_turn(self) -> list[_Key]:
        """The queues, those of the tenant whose last turn is longest ago first."""
        if len(self._waiting_of) < 2:
            return list(self._queues)
        return sorted(self._queues, key=lambda key: self._turns.get(key[0], 0))

    def _may_call(self, key: _Key) -> bool:
        """Allow one call of a servable per server that takes part: requests that wait for it share the next one.

        A second call may run beside a full one, so that a large request does not hold up small ones.
        """
        sizes, servers = self._in_flight.get(key, []), self._pool.shares
        return len(sizes) < servers or (len(sizes) < 2 * servers and min(sizes) >= MAX_BATCH)

    def _next_batch(self, tenant: str, queue: deque[_Waiting]) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        while queue and (not batch or size + len(queue[0].images) <= MAX_BATCH):
            waiting = queue.popleft()
            waiting.is_queued = False
            self._count(tenant, -len(waiting.images))
            if not waiting.answer.done():  # it may have expired, or its client hung up
                batch.append(waiting)
                size += len(waiting.images)
        return batch

    async def _call(self, key: _Key, batch: list[_Waiting], size: int) -> None:
        try:
            images = np.concatenate([waiting.images for waiting in batch]) if len(batch) > 1 else batch[0].images
            now = time.perf_counter()
            BATCH.observe(size)
            for waiting in batch:
                QUEUE_S.observe(now - waiting.since)
            deadlines = [waiting.deadline - asyncio.get_running_loop().time() for waiting in batch]
            servable = key[1]
            with _batch_span(batch, size, now):
                found = await self._pool.predict(
                    servable.name, servable.version, images, timeout_s=max(deadlines), hurry_s=min(deadlines)
                )
            CALL_S.observe(time.perf_counter() - now)
            outputs = {"logits": found.logits, "probabilities": found.probabilities}
            if found.distances is not None:
                outputs["distance"] = found.distances
            position = 0
            for waiting in batch:
                end = position + len(waiting.images)
                if not waiting.answer.done():
                    waiting.answer.set_result({name: rows[position:end] for name, rows in outputs.items()})
                position = end
        except Exception as exc:
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(exc)
        finally:
            self._calls -= 1
            self._in_flight[key].remove(size)
            if not self._in_flight[key]:
                del self._in_flight[key]
            self._send()


def _batch_span(batch: list[_Waiting], size: int, now: float) -> AbstractContextManager[Any]:
    """A span of a call, in the trace of its first request and linked to all, and one of each request's wait for it."""
    if not traces.on():
        return NOTHING
    for waiting in batch:
        if waiting.trace:
            traces.past("queue", waiting.trace, now - waiting.since)
    traced = [waiting.trace for waiting in batch if waiting.trace]
    attributes = {"temper.requests": len(batch), "temper.images": size}
    return traces.span("batch", parent=traced[0], links=traced, attributes=attributes) if traced else NOTHING


def _expire(answer: asyncio.Future[Outputs], timeout_s: float) -> None:
    if not answer.done():
        answer.set_exception(ModelServerTimeout(f"no prediction within {timeout_s:g} s"))
