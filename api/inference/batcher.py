"""The predict path inside the gateway: which version answers, and one gRPC call for many requests."""

import asyncio
import random
import time
from collections import deque
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from api.inference.server_pool import Targets
from api.metrics import BATCH, IN_FLIGHT, QUEUE_S, VERSIONS, WAITING
from serving.client import Prediction
from serving.registry import STABLE, Registry, Route
from store.errors import ModelServerTimeout, Overloaded, UnknownModel

MAX_BATCH = 128  # images a call, unless a single request brings more
CALLS = 4  # in flight to a model server; a real one rejects what its threads cannot take
MAX_WAITING = 4096  # images of all requests


class Routes:
    """The registry's routes, held in memory and read anew when something is missing or has changed."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._routes: dict[str, Route] = {}
        self._revision = -1
        self._one_look = asyncio.Lock()
        self._next_look: asyncio.Task[None] | None = None

    async def refresh(self) -> None:
        """Read the registry if it has changed. Who asks while it is being read shares the next look with others."""
        if self._next_look is None:
            self._next_look = asyncio.create_task(self._look())
        await asyncio.shield(self._next_look)

    async def _look(self) -> None:
        async with self._one_look:
            self._next_look = None  # who asks from here on has to be told what is written later
            revision = await asyncio.to_thread(self._registry.revision)
            if revision != self._revision:
                self._routes, self._revision = await asyncio.to_thread(self._registry.routes), revision
                VERSIONS.clear()
                for model, route in self._routes.items():
                    VERSIONS.labels(model).set(len(route.classes))

    @property
    def all(self) -> dict[str, Route]:
        """Every model, by name."""
        return self._routes

    def knows(self, model: str, version: int) -> bool:
        """Tell whether this version is among those that predictions can go to."""
        return model in self._routes and version in self._routes[model].classes

    async def resolve(
        self, model: str, version: int | None, label: str | None, key: bytes | None = None
    ) -> tuple[int, tuple[str, ...]]:
        """The number and the classes of the version that a request means.

        Args:
            key: requests with the same one follow the same label, when neither version nor label is named.

        Raises:
            UnknownModel: there is no such model, version or label.
        """
        try:
            return self._look_up(model, version, label, key)
        except UnknownModel:
            await self.refresh()
            return self._look_up(model, version, label, key)

    def _look_up(
        self, model: str, version: int | None, label: str | None, key: bytes | None
    ) -> tuple[int, tuple[str, ...]]:
        route = self._routes.get(model)
        if route is None:
            raise UnknownModel(f"there is no model {model!r}", param="model")
        if version is None:
            label = label or _drawn(model, route, key)
            if label not in route.labels:
                raise UnknownModel(f"model {model!r} has no label {label!r}", param="label")
            version = route.labels[label].version
        if version not in route.classes:
            raise UnknownModel(f"model {model!r} has no version {version}", param="version")
        return version, route.classes[version]


def _drawn(model: str, route: Route, key: bytes | None) -> str:
    """The label that a request follows which names none: by weight, at random or by its key."""
    place = -1.0
    for label, target in route.labels.items():
        if target.weight:
            if place < 0:
                place = random.random() if key is None else _place(model.encode() + b"\n" + key)
            if place < target.weight:
                return label
            place -= target.weight
    return STABLE


def _place(key: bytes) -> float:
    """A number in [0, 1) that is always the same for a key."""
    return int.from_bytes(blake2b(key, digest_size=6).digest()) / (1 << 48)


@dataclass(eq=False, slots=True)
class _Waiting:
    images: np.ndarray
    answer: asyncio.Future[Prediction]
    since: float  # of time.perf_counter
    deadline: float  # on the loop's clock


_Key = tuple[str, int, str]  # model, version, and the kind of the images, which decides the signature


class MicroBatcher:
    """Coalesces concurrent requests for one version and signature into one call; a lone request goes at once.

    What waits of different versions takes turns. A request whose time is up is not sent any more.
    """

    def __init__(self, targets: Targets) -> None:
        self._targets = targets
        self._queues: dict[_Key, deque[_Waiting]] = {}  # none is empty; the first one's turn is next
        self._in_flight: dict[_Key, list[int]] = {}  # images of each call
        self._calls = 0
        self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()
        WAITING.set_function(lambda: self._waiting)
        IN_FLIGHT.set_function(lambda: self._calls)

    async def predict(self, model: str, version: int, images: np.ndarray, timeout_s: float) -> Prediction:
        """The answer for `images`: (n, 28, 28, 1) float32 in [0, 1] or (n, 784) uint8.

        Raises:
            Overloaded: too many images wait already.
            ModelServerError: what the model servers' trouble is.
            ModelServerTimeout: there was no answer in time.
        """
        loop = asyncio.get_running_loop()
        key = (model, version, images.dtype.char)
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

    def _has_its_share(self, key: _Key) -> bool:
        """Tell whether a version takes its part of the places already; a crowd for one must not keep out others."""
        if key not in self._queues:
            return len(self._queues) >= MAX_WAITING
        return sum(len(waiting.images) for waiting in self._queues[key]) >= MAX_WAITING // len(self._queues)

    def _send(self) -> None:
        """Begin calls for what waits, as far as calls in flight allow."""
        for key in list(self._queues):
            if self._calls >= CALLS * max(1, len(self._targets.up)):
                break
            if self._may_call(key):
                queue = self._queues.pop(key)
                batch = self._next_batch(queue)
                if queue:
                    self._queues[key] = queue  # behind the others
                if batch:
                    self._calls += 1
                    self._in_flight.setdefault(key, []).append(sum(len(waiting.images) for waiting in batch))
                    task = asyncio.create_task(self._call(key, batch))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)

    def _may_call(self, key: _Key) -> bool:
        """One call of a version for each server: the more wait for it, the better they share the next one.

        A second goes beside a full one, so that a large request does not hold up small ones.
        """
        sizes, servers = self._in_flight.get(key, []), max(1, len(self._targets.up))
        return len(sizes) < servers or (len(sizes) < 2 * servers and min(sizes) >= MAX_BATCH)

    def _next_batch(self, queue: deque[_Waiting]) -> list[_Waiting]:
        batch: list[_Waiting] = []
        size = 0
        while queue and (not batch or size + len(queue[0].images) <= MAX_BATCH):
            waiting = queue.popleft()
            self._waiting -= len(waiting.images)
            if not waiting.answer.done():  # its time may be up, or its client gone
                batch.append(waiting)
                size += len(waiting.images)
        return batch

    async def _call(self, key: _Key, batch: list[_Waiting]) -> None:
        images = np.concatenate([waiting.images for waiting in batch]) if len(batch) > 1 else batch[0].images
        now = time.perf_counter()
        BATCH.observe(len(images))
        for waiting in batch:
            QUEUE_S.observe(now - waiting.since)
        try:
            left = max(waiting.deadline for waiting in batch) - asyncio.get_running_loop().time()
            answer = await self._targets.predict(key[0], key[1], images, left)
            position = 0
            for waiting in batch:
                end = position + len(waiting.images)
                if not waiting.answer.done():
                    waiting.answer.set_result(
                        Prediction(answer.version, answer.logits[position:end], answer.probabilities[position:end])
                    )
                position = end
        except Exception as exc:
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(exc)
        finally:
            self._calls -= 1
            self._in_flight[key].remove(len(images))
            if not self._in_flight[key]:
                del self._in_flight[key]
            self._send()


def _expire(answer: asyncio.Future[Prediction], timeout_s: float) -> None:
    if not answer.done():
        answer.set_exception(ModelServerTimeout(f"no prediction within {timeout_s:g} s"))
