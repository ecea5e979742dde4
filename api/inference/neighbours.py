"""The training images that a version sees as most like another image."""

import asyncio
import functools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np

from api.inference.router import Servable
from api.inference.server_pool import ServerPool
from serving.client import Predictor
from serving.registry import Registry
from store.errors import TemperError
from store.objects import objects_of
from store.settings import Settings
from trainer.jobs.datasets import Dataset

HIDDEN = "serving_hidden"
NEAREST = 6
MOST = 4000  # training images that are looked at
BATCH = 500  # of a call
KEPT = 4  # versions whose training images stay in memory, at most 5 MB each


@dataclass(frozen=True)
class _Learned:
    dataset: Dataset
    hidden: np.ndarray  # (n, 84) float32: what the version's last layer sees of each image


class Neighbours:
    """Finds the nearest training images in the feature space of a version, the input of its last layer."""

    def __init__(self, settings: Settings, registry: Registry, pool: ServerPool) -> None:
        self._settings, self._registry, self._pool = settings, registry, pool
        self._learned: OrderedDict[Servable, _Learned] = OrderedDict()  # the one that was used last at the end
        self._lock = asyncio.Lock()  # reading a data set takes a while, and is done once

    async def nearest(self, servable: Servable, hidden: np.ndarray, timeout_s: float) -> list[dict[str, Any]] | str:
        """The nearest images, nearest first: `label`, `name`, `distance` and `image`, (28, 28) uint8.

        Args:
            hidden: (84,) float32 of the image in question.

        Returns:
            Why there are none, if there are none.
        """
        try:
            async with self._lock:
                known = self._learned.get(servable) or await self._read(servable, timeout_s)
                self._learned[servable] = known
                self._learned.move_to_end(servable)
                while len(self._learned) > KEPT:
                    self._learned.popitem(last=False)
        except FileNotFoundError:
            return "its data set is not kept any more"
        except _NotFineTuned:
            return "it was not fine-tuned"
        distances = np.linalg.norm(known.hidden - hidden, axis=1)
        data = known.dataset
        return [
            {
                "label": data.classes[data.labels[number]], "name": str(data.names[number]),
                "distance": float(distances[number]), "image": data.images[number],
            }
            for number in np.argsort(distances, kind="stable")[:NEAREST].tolist()
        ]  # fmt: skip

    async def _read(self, servable: Servable, timeout_s: float) -> _Learned:
        data = await asyncio.to_thread(self._dataset, servable)
        flat = data.images.reshape(len(data.images), -1)
        found = []
        for start in range(0, len(flat), BATCH):
            call = functools.partial(_see, servable, flat[start : start + BATCH])
            found.append(await self._pool.ask(*servable, call, timeout_s))
        return _Learned(data, np.concatenate(found))

    def _dataset(self, servable: Servable) -> Dataset:
        """The images that a version was trained on, `MOST` of them at random if there are more."""
        card = self._registry.find(*servable).manifest.dataset
        if card is None:
            raise _NotFineTuned
        try:
            data = Dataset.load(objects_of(self._settings).fetch(self._settings.datasets / card.file))
        except TemperError as exc:
            raise FileNotFoundError(card.file) from exc
        if len(data.images) <= MOST:
            return data
        chosen = np.sort(np.random.default_rng(0).choice(len(data.images), MOST, replace=False))
        names = tuple(data.names[number] for number in chosen.tolist())
        return Dataset(data.images[chosen], data.labels[chosen], data.classes, names)


async def _see(servable: Servable, images: np.ndarray, predictor: Predictor, left_s: float) -> np.ndarray:
    """What the last layer sees of images (n, 784) uint8: (n, 84) float32."""
    return (await predictor.run(*servable, HIDDEN, left_s, image=images))["hidden"]


class _NotFineTuned(Exception):
    """A version has no data set."""
