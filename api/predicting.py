"""The predict path inside the gateway: which version answers, and one gRPC call for many requests."""

import asyncio
from collections import deque
from dataclasses import dataclass

import numpy as np

from serving.client import Predictor
from serving.errors import ModelServerTimeout, ModelServerUnavailable, Overloaded, UnknownModel
from serving.registry import STABLE, Registry, Route

MAX_BATCH = 128  # images a call, unless a single request brings more
IN_FLIGHT = 2  # calls of one version
MAX_WAITING = 4096  # images of all requests


class Routes:
    """The registry's routes, held in memory and read anew when something is missing and every half second."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._routes: dict[str, Route] = {}

    async def refresh(self) -> None:
        """Read the registry; every caller gets one that began after it asked."""
        self._routes = await asyncio.to_thread(self._registry.routes)

    def knows(self, model: str, version: int) -> bool:
        """Tell whether this version is among those that predictions can go to."""
        return model in self._routes and version in self._routes[model].classes

    async def resolve(self, model: str, version: int | None, label: str | None) -> tuple[int, tuple[str, ...]]:
        """The number and the classes of the version that a request means.

        Raises:
            UnknownModel: there is no such model, version or label.
        """
        try:
            return self._look_up(model, version, label)
        except UnknownModel:
            await self.refresh()
            return self._look_up(model, version, label)

    def _look_up(self, model: str, version: int | None, label: str | None) -> tuple[int, tuple[str, ...]]:
        route = self._routes.get(model)
        if route is None:
            raise UnknownModel(f"there is no model {model!r}", param="model")
        if version is None:
            version = route.labels.get(label or STABLE)
            if version is None:
                raise UnknownModel(f"model {model!r} has no label {label!r}", param="label")
        if version not in route.classes:
            raise UnknownModel(f"model {model!r} has no version {version}", param="version")
        return version, route.classes[version]


@dataclass(eq=False)
class _Waiting:
    images: np.ndarray
    answer: asyncio.Future[np.ndarray]


class MicroBatcher:
    """Coalesces concurrent requests for one version into one call; a lone request goes at once."""

    def __init__(self, predictor: Predictor, timeout_s: float) -> None:
        self._predictor = predictor
        self._timeout_s = timeout_s
        self._queues: dict[tuple[str, int], deque[_Waiting]] = {}
        self._in_flight: dict[tuple[str, int], int] = {}
        self._waiting = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def predict(self, model: str, version: int, images: np.ndarray) -> np.ndarray:
        """Probabilities (n, classes) for `images` (n, 28, 28, 1).

        Raises:
            Overloaded: too many images wait already.
            ModelServerError: what the model server's trouble is.
        """
        if self._waiting and self._waiting + len(images) > MAX_WAITING:
            raise Overloaded("too many predictions are waiting")
        key = (model, version)
        waiting = _Waiting(images, asyncio.get_running_loop().create_future())
        self._queues.setdefault(key, deque()).append(waiting)
        self._waiting += len(images)
        self._send(key)
        try:
            async with asyncio.timeout(self._timeout_s):
                return await waiting.answer
        except TimeoutError as exc:
            raise ModelServerTimeout(f"no prediction within {self._timeout_s:g} s") from exc

    def _send(self, key: tuple[str, int]) -> None:
        """Begin calls for what waits, as far as calls in flight allow."""
        queue = self._queues[key]
        while queue and self._in_flight.get(key, 0) < IN_FLIGHT:
            batch = [queue.popleft()]
            size = len(batch[0].images)
            while queue and size + len(queue[0].images) <= MAX_BATCH:
                batch.append(queue.popleft())
                size += len(batch[-1].images)
            self._waiting -= size
            batch = [waiting for waiting in batch if not waiting.answer.done()]
            if batch:
                self._in_flight[key] = self._in_flight.get(key, 0) + 1
                task = asyncio.create_task(self._call(key, batch))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        if not queue and not self._in_flight.get(key):
            del self._queues[key]
            self._in_flight.pop(key, None)

    async def _call(self, key: tuple[str, int], batch: list[_Waiting]) -> None:
        images = np.concatenate([waiting.images for waiting in batch]) if len(batch) > 1 else batch[0].images
        try:
            answer = await self._predictor.predict(*key, images, timeout_s=self._timeout_s)
            position = 0
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_result(answer.probabilities[position : position + len(waiting.images)])
                position += len(waiting.images)
        except Exception as exc:
            error: Exception = exc
            if isinstance(exc, UnknownModel):  # the registry knows it: the server has not loaded it yet
                error = ModelServerUnavailable(f"the model server has not loaded {key[0]}:{key[1]} yet")
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
        finally:
            self._in_flight[key] -= 1
            self._send(key)
