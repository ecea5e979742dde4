"""Which version of a model answers a request."""

import asyncio
import random
from hashlib import blake2b

from api.metrics import VERSIONS
from serving.registry import STABLE, Registry, Route
from store.errors import MalformedRequest, UnknownModel

MAX_VERSION = 2**63 - 1


class Router:
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


def parse_version(text: str | None) -> int | None:
    """The number of a version in a URL.

    Raises:
        MalformedRequest: it is no number.
        UnknownModel: no version can have that number.
    """
    if text is None:
        return None
    shown = repr(text if len(text) <= 24 else f"{text[:20]}...")
    if not (text.isascii() and text.isdecimal()):
        raise MalformedRequest(f"version {shown} is not a number", param="version")
    if len(text) > len(str(MAX_VERSION)) or int(text) > MAX_VERSION:
        raise UnknownModel(f"there is no version {shown}", param="version")
    return int(text)


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
