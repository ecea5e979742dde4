"""The training images that a version sees as most like another image."""

import asyncio
import functools
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import sqlalchemy as sa

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
FRESH_S, GONE_S = 600.0, 30.0  # how long what was read, or that nothing is there, is believed
KEPT = 4  # versions whose training images stay in memory, at most 5 MB each


@dataclass(frozen=True)
class _Learned:
    dataset: Dataset
    hidden: np.ndarray  # (n, 84) float32: what the version's last layer sees of each image


class Neighbours:
    """Finds the nearest training images in the feature space of a version, the input of its last layer."""

    def __init__(self, settings: Settings, registry: Registry, pool: ServerPool) -> None:
        self._settings, self._registry, self._pool = settings, registry, pool
        # With the time at which it was read; the one that was used last is at the end.
        self._known: OrderedDict[Servable, tuple[_Learned | str, float]] = OrderedDict()
        self._reading: dict[Servable, asyncio.Lock] = {}  # reading a data set takes a while, and is done once

    async def nearest(self, servable: Servable, hidden: np.ndarray, timeout_s: float) -> list[dict[str, Any]] | str:
        """The nearest images, nearest first: `label`, `name`, `distance` and `image`, (28, 28) uint8.

        Args:
            hidden: (84,) float32 of the image in question.

        Returns:
            Why there are none, if there are none.
        """
        known = self._recent(servable)
        if known is None:
            async with self._reading.setdefault(servable, asyncio.Lock()):
                known = self._recent(servable) or await self._read(servable, timeout_s)
                self._known[servable] = known, time.monotonic()
                while len(self._known) > KEPT:
                    self._known.popitem(last=False)
            self._reading.pop(servable, None)
        if isinstance(known, str):
            return known
        distances = np.linalg.norm(known.hidden - hidden, axis=1)
        data = known.dataset
        return [
            {
                "label": data.classes[data.labels[number]], "name": str(data.names[number]),
                "distance": float(distances[number]), "image": data.images[number],
            }
            for number in np.argsort(distances, kind="stable")[:NEAREST].tolist()
        ]  # fmt: skip

    def _recent(self, servable: Servable) -> _Learned | str | None:
        """What is known of a version, unless it was read too long ago: its data set may have been deleted since."""
        known, read_at = self._known.get(servable, (None, 0.0))
        if known is None or time.monotonic() - read_at > (GONE_S if isinstance(known, str) else FRESH_S):
            return None
        self._known.move_to_end(servable)
        return known

    async def _read(self, servable: Servable, timeout_s: float) -> _Learned | str:
        """The training images of a version, or why there are none."""
        try:
            data = await asyncio.to_thread(self._dataset, servable)
            if data is None:
                return "it was not fine-tuned"
            flat, found = data.images.reshape(len(data.images), -1), []
            for start in range(0, len(flat), BATCH):
                call = functools.partial(_hidden, servable, flat[start : start + BATCH])
                found.append(await self._pool.ask(*servable, call, timeout_s, hedge=False))
        except FileNotFoundError:
            return "its data set is not kept any more"
        except (TemperError, OSError, sa.exc.SQLAlchemyError):
            return "its training images cannot be read now"
        return _Learned(data, np.concatenate(found))

    def _dataset(self, servable: Servable) -> Dataset | None:
        """The images that a version was trained on, `MOST` of them at random if there are more.

        Raises:
            FileNotFoundError: they are not kept.
        """
        card = self._registry.find(*servable).manifest.dataset
        if card is None:
            return None
        data = Dataset.load(objects_of(self._settings).fetch(self._settings.datasets / card.file))
        if len(data.images) <= MOST:
            return data
        chosen = np.sort(np.random.default_rng(0).choice(len(data.images), MOST, replace=False))
        names = tuple(data.names[number] for number in chosen.tolist())
        return Dataset(data.images[chosen], data.labels[chosen], data.classes, names)


async def _hidden(servable: Servable, images: np.ndarray, predictor: Predictor, left_s: float) -> np.ndarray:
    """Hidden activations (n, 84) float32 of images (n, 784) uint8."""
    return (await predictor.run(*servable, HIDDEN, left_s, image=images))["hidden"]
