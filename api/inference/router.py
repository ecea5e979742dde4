"""Which version of a model answers a request, and what the model server calls it."""

import asyncio
import random
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import NamedTuple

from api.metrics import REQUEST_SERIES, show_versions
from api.shared_read import SharedRead
from serving.registry import STABLE, Registry, Route
from store.errors import MalformedRequest, UnknownModel
from store.records import GREY_28, Abstention, InputForm, public_name

MAX_VERSION = 2**63 - 1


class Servable(NamedTuple):
    """What a model server knows a version as."""

    name: str
    version: int


@dataclass(frozen=True, slots=True)
class Target:
    """A version by its public name, and all that is needed to ask it."""

    model: str
    version: int
    servable: Servable
    classes: tuple[str, ...]  # in the order of the outputs
    input: InputForm
    abstention: Abstention | None = None


class Router:
    """The registry's routes in memory, by stored names.

    They are read again when the registry changes, or when a name is not found.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._routes: dict[str, Route] = {}
        self._targets: dict[Servable, Target] = {}  # of the versions that were asked
        self._revision = -1
        self._shared_read = SharedRead(self._read)

    @property
    def revision(self) -> int:
        """The registry's revision when it was last read."""
        return self._revision

    async def refresh(self) -> None:
        """Read the registry if it has changed."""
        await self._shared_read()

    async def _read(self) -> None:
        revision = await asyncio.to_thread(self._registry.revision)
        if revision != self._revision:
            self._routes, self._revision = await asyncio.to_thread(_routes, self._registry), revision
            self._targets = {}
            REQUEST_SERIES.retain(self.knows)
            show_versions({model: len(route.classes) for model, route in self._routes.items()})

    def live(self) -> set[Servable]:
        """All versions that predictions can go to."""
        return {Servable(model, version) for model, route in self._routes.items() for version in route.classes}

    def versions(self, model: str) -> list[int]:
        """Live versions of a model, newest first; none of a model that does not exist."""
        route = self._routes.get(model)
        return sorted(route.classes, reverse=True) if route else []

    def knows(self, model: str, version: int) -> bool:
        """Tell whether predictions can go to this version."""
        return model in self._routes and version in self._routes[model].classes

    async def resolve(
        self, model: str, version: int | None, label: str | None, sticky_key: bytes | None = None
    ) -> Target:
        """The version that a request means.

        Args:
            model: its stored name.
            sticky_key: requests with the same one follow the same label, if they name neither version nor label.

        Raises:
            UnknownModel: there is no such model, version or label.
        """
        try:
            return self._look_up(model, version, label, sticky_key)
        except UnknownModel:
            await self.refresh()
            return self._look_up(model, version, label, sticky_key)

    def _look_up(self, model: str, version: int | None, label: str | None, sticky_key: bytes | None) -> Target:
        route = self._routes.get(model)
        if route is None:
            raise UnknownModel(f"there is no model {public_name(model)!r}", param="model")
        if version is None:
            label = label or _draw(model, route, sticky_key)
            if label not in route.labels:
                instead = "name a version, or set the label on one"
                raise UnknownModel(f"model {public_name(model)!r} has no label {label!r}: {instead}", param="label")
            version = route.labels[label].version
        servable = Servable(model, version)
        found = self._targets.get(servable)
        if found is None:
            if version not in route.classes:
                raise UnknownModel(f"model {public_name(model)!r} has no version {version}", param="version")
            found = Target(
                public_name(model), version, servable, route.classes[version], GREY_28, route.abstention.get(version)
            )
            self._targets[servable] = found
        return found


def _routes(registry: Registry) -> dict[str, Route]:
    """All routes, with labels in the order of their names: a sticky key must not depend on the database's."""
    routes = registry.routes()
    return {model: replace(route, labels=dict(sorted(route.labels.items()))) for model, route in routes.items()}


def _draw(model: str, route: Route, sticky_key: bytes | None) -> str:
    """The label that a request without version and label follows: by weight, at random or by its key."""
    point = -1.0
    for label, target in route.labels.items():
        if target.weight:
            if point < 0:
                point = random.random() if sticky_key is None else _hash(model.encode() + b"\n" + sticky_key)
            if point < target.weight:
                return label
            point -= target.weight
    return STABLE


def _hash(key: bytes) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(blake2b(key, digest_size=6).digest()) / (1 << 48)


def parse_version(text: str | None) -> int | None:
    """The number of a version in a URL.

    Raises:
        MalformedRequest: it is not a number.
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
