"""The predict path inside the gateway: which version answers, and one gRPC call for many requests."""

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from serving.client import Predictor
from serving.errors import InvalidInstances, ModelServerTimeout, Overloaded, UnknownModel
from serving.registry import STABLE, Registry, Route

MAX_BATCH = 128  # images a call, unless a single request brings more
IN_FLIGHT = 2  # calls of one version
MAX_WAITING = 4096  # images of all requests

SHAPES = ((28, 28), (28, 28, 1), (784,))


def images_of(instances: list[Any], scale: float) -> np.ndarray:
    """JSON instances as (n, 28, 28, 1) float32 in [0, 1]; their values go from 0 to `scale`.

    Raises:
        InvalidInstances: with the index and the reason of every instance that is none.
    """
    images = np.empty((len(instances), 28, 28, 1), np.float32)
    wrong = []
    for index, instance in enumerate(instances):
        try:
            array = np.array(instance)
        except (ValueError, OverflowError):
            wrong.append({"index": index, "reason": "its rows differ in length"})
            continue
        if array.dtype.kind not in "iuf":
            wrong.append({"index": index, "reason": "holds something that is not a number"})
        elif array.shape not in SHAPES:
            wrong.append({"index": index, "reason": f"has shape {array.shape}, not (28, 28), (28, 28, 1) or (784,)"})
        elif not (array.min() >= 0 and array.max() <= scale):  # also where a comparison with NaN is false
            hint = '; for 0 to 255 say "range": "byte"' if scale == 1 else ""
            wrong.append({"index": index, "reason": f"has values that are not from 0 to {scale:g}{hint}"})
        else:
            images[index] = array.reshape(28, 28, 1) / scale
    if wrong:
        first = f"instance {wrong[0]['index']} {wrong[0]['reason']}"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InvalidInstances(first + more, param="instances", details=wrong)
    return images


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
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(exc)
        finally:
            self._in_flight[key] -= 1
            self._send(key)
