"""Micro-batching: concurrent requests for one version share a gRPC call."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass

import numpy as np

from api.inference.router import Servable
from api.inference.server_pool import ServerPool
from api.metrics import BATCH, IN_FLIGHT, QUEUE_S, WAITING
from store.errors import ModelServerTimeout, Overloaded

MAX_BATCH = 128  # images in a call, unless a single request brings more
CALLS = 4  # in flight to each server that takes part; TensorFlow Serving rejects calls that its threads cannot take
MAX_WAITING = 4096  # images of all requests

Outputs = dict[str, np.ndarray]  # by name, each with one row an image


@dataclass(eq=False, slots=True)
class _Waiting:
    images: np.ndarray
    answer: asyncio.Future[Outputs]
    since: float  # of time.perf_counter
    deadline: float  # on the loop's clock
    is_queued: bool = True


_Key = tuple[Servable, str]  # and the data type of the images, which decides the signature


class MicroBatcher:
    """Joins concurrent requests for one servable and signature into one call. A lone request goes out at once.

    Servables take turns. A request whose time is up is not sent any more.
    """

    def __init__(self, pool: ServerPool) -> None:
        self._pool = pool
        self._queues: dict[_Key, deque[_Waiting]] = {}  # none is empty, and the first is next
        self._in_flight: dict[_Key, list[int]] = {}  # images of each call
        self._calls = 0
        self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()
        WAITING.set_function(lambda: self._waiting)
        IN_FLIGHT.set_function(lambda: self._calls)

    async def predict(self, servable: Servable, images: np.ndarray, timeout_s: float) -> Outputs:
        """The outputs for `images`: (n, 28, 28, 1) float32 in [0, 1], or (n, 784) uint8.

        Raises:
            Overloaded: too many images are waiting already.
            ModelServerError: the model servers failed.
            ModelServerTimeout: there was no answer in time.
        """
        loop = asyncio.get_running_loop()
        key = (servable, images.dtype.char)
        if self._waiting + len(images) > MAX_WAITING and self._has_its_share(key):
            raise Overloaded("too many predictions are waiting")
        waiting = _Waiting(images, loop.create_future(), time.perf_counter(), loop.time() + timeout_s)
        alarm = loop.call_at(waiting.deadline, _expire, waiting.answer, timeout_s)
        self._queues.setdefault(key, deque()).append(waiting)
        self._waiting += len(images)
        self._send()
        try:
            return await waiting.answer
        finally:
            alarm.cancel()
            if waiting.is_queued:  # it expired, or its client hung up
                self._give_up(key, waiting)

    def _give_up(self, key: _Key, waiting: _Waiting) -> None:
        """Free the place of a request that nobody waits for."""
        self._waiting -= len(waiting.images)
        queue = self._queues[key]
        queue.remove(waiting)
        if not queue:
            del self._queues[key]

    def _has_its_share(self, key: _Key) -> bool:
        """Tell whether a servable has its share of the places already: a crowd for one must not keep out others."""
        if key not in self._queues:
            return len(self._queues) >= MAX_WAITING
        return sum(len(waiting.images) for waiting in self._queues[key]) >= MAX_WAITING // len(self._queues)

    def _send(self) -> None:
        """Start calls for waiting requests, as far as the calls in flight allow."""
        for key in list(self._queues):
            if self._calls >= CALLS * self._pool.shares:
                break
            if self._may_call(key):
                queue = self._queues.pop(key)
                batch = self._next_batch(queue)
                if queue:
                    self._queues[key] = queue  # behind the others
                if batch:
                    size = sum(len(waiting.images) for waiting in batch)
                    self._calls += 1
                    self._in_flight.setdefault(key, []).append(size)
                    task = asyncio.create_task(self._call(key, batch, size))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    def _may_call(self, key: _Key) -> bool:
        """Allow one call of a servable per server that takes part: requests that wait for it share the next one.

        A second call may run beside a full one, so that a large request does not hold up small ones.
        """
        sizes, servers = self._in_flight.get(key, []), self._pool.shares
        return len(sizes) < servers or (len(sizes) < 2 * servers and min(sizes) >= MAX_BATCH)

    def _next_batch(self, queue: deque[_Waiting]) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        while queue and (not batch or size + len(queue[0].images) <= MAX_BATCH):
            waiting = queue.popleft()
            waiting.is_queued = False
            self._waiting -= len(waiting.images)
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
            servable = key[0]
            found = await self._pool.predict(
                servable.name, servable.version, images, timeout_s=max(deadlines), hurry_s=min(deadlines)
            )
            outputs = {"logits": found.logits, "probabilities": found.probabilities}
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


def _expire(answer: asyncio.Future[Outputs], timeout_s: float) -> None:
    if not answer.done():
        answer.set_exception(ModelServerTimeout(f"no prediction within {timeout_s:g} s"))
