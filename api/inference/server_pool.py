"""The model servers as one: spread calls, and ask another server when one fails or does not answer."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

import numpy as np

from serving.client import ModelServer, Prediction, Predictor
from store.errors import ModelServerError, ModelServerUnavailable, Overloaded, TemperError, UnknownModel
from store.records import public_name
from store.settings import ClientTLS

log = logging.getLogger("temper.gateway")
T = TypeVar("T")

HEDGE_S = 0.3  # after which another server is asked as well; several times what the largest batch takes
HEDGE_LEAST_S, HEDGE_SHARE = 0.02, 1 / 3  # a call that has less time than that asks another after a third of it


@dataclass(eq=False)
class PooledServer:
    """One model server, and what the gateway knows of it."""

    predictor: Predictor
    control: ModelServer
    calls: set[asyncio.Task[Any]] = field(default_factory=set)  # under way
    up: bool = False  # it answers, and has been told what to serve
    silent: bool = False  # it did not answer when it was last looked at
    slow: bool = False  # another one, asked later, has answered first; it has not answered since
    passed_over_at: float = 0.0  # on the loop's clock: when another server last had to take its place
    lost_at: float | None = None  # time.monotonic() when it was given up; None once it is up to date again
    behind: bool = True  # it may not serve what the registry says
    look: asyncio.Event = field(default_factory=asyncio.Event)  # set to have it looked at soon

    @property
    def address(self) -> str:
        """host:port or unix:/path."""
        return self.control.target

    def fell_behind(self) -> None:
        """Mark the server as out of date."""
        self.behind = True
        self.look.set()

    def went_away(self) -> None:
        """Mark the server as unreachable."""
        self.up, self.behind = False, True
        self.passed_over_at = asyncio.get_running_loop().time()
        self.look.set()

    def was_overtaken(self) -> None:
        """Ask others first until the server has answered again."""
        self.slow = True
        self.passed_over_at = asyncio.get_running_loop().time()
        self.look.set()

    def give_up(self) -> None:
        """Stop asking a server that does not answer; its pending calls go to another one, if there is one."""
        if self.lost_at is None:
            self.lost_at = time.monotonic()
        self.up, self.behind, self.silent = False, True, True
        self.passed_over_at = asyncio.get_running_loop().time()
        for call in self.calls:
            call.cancel()


class ServerPool:
    """All model servers; their channels are open inside of `async with`.

    Args:
        has_files: tells whether the files of a version are there, as far as that can be known at once.
        tls: for servers at a `host:port`.
        has_standby: ask one server only, as long as it is well; the others stand by.
    """

    def __init__(
        self, addresses: Sequence[str], has_files: Callable[[str, int], bool], tls: ClientTLS | None = None,
        has_standby: bool = False,
    ) -> None:  # fmt: skip
        self._addresses = addresses
        self._tls = tls
        self._has_standby = has_standby
        self._has_files = has_files
        self._missing: set[tuple[str, int]] = set()  # versions whose loss has been logged
        self._stack = contextlib.AsyncExitStack()
        self.all: list[PooledServer] = []

    async def __aenter__(self) -> Self:
        for address in self._addresses:
            predictor = await self._stack.enter_async_context(Predictor(address, self._tls))
            self.all.append(PooledServer(predictor, self._stack.enter_context(ModelServer(address, self._tls))))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def up(self) -> list[PooledServer]:
        """Servers that answer and have been told what to serve."""
        return [target for target in self.all if target.up]

    @property
    def standbys(self) -> list[PooledServer]:
        """Servers that are not asked as long as another one is well."""
        return sorted(self.all, key=self._rank)[1:] if self._has_standby else []

    @property
    def shares(self) -> int:
        """Servers that calls are divided among now, at least 1."""
        return 1 if self._has_standby else max(1, len(self.up))

    async def predict(
        self, model: str, version: int, images: np.ndarray, timeout_s: float, hurry_s: float | None = None
    ) -> Prediction:
        """Have one server predict, as in `ask`.

        Args:
            images: as in `serving.client.predict_request`.
        """

        def call(predictor: Predictor, left_s: float) -> Coroutine[Any, Any, Prediction]:
            return predictor.predict(model, version, images, left_s)

        return await self.ask(model, version, call, timeout_s, hurry_s)

    async def ask(
        self, model: str, version: int, call: Callable[[Predictor, float], Coroutine[Any, Any, T]], timeout_s: float,
        hurry_s: float | None = None, *, hedge: bool = True,
    ) -> T:  # fmt: skip
        """Ask one server about a version; another if it is away, overloaded or has not loaded the version.

        A server that is up is also asked when the first one has not answered within `HEDGE_S`: it may be frozen. The
        first answer counts.

        Args:
            call: asks a server, within so many seconds.
            hedge: whether to ask another server as well; not for what takes longer than a prediction by itself.
            hurry_s: the shortest time that anyone waits for the answer, if that is less than `timeout_s`.

        Raises:
            ModelServerUnavailable: no server answers, or none has loaded the version yet.
            ModelServerError: the files of the version are missing, or what the last server said.
            ModelServerTimeout: the time is up.
            Overloaded: every server refused the call.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        hedge_s = min(HEDGE_S, max(HEDGE_LEAST_S, HEDGE_SHARE * (timeout_s if hurry_s is None else hurry_s)))
        untried = [target for target in self.all if not target.silent]
        if not untried:
            raise ModelServerUnavailable(f"no model server answers ({', '.join(t.address for t in self.all)})")
        asked: dict[asyncio.Task[T], PooledServer] = {}
        try:
            while True:
                if untried:
                    target = min(untried, key=self._rank)
                    untried.remove(target)
                    left_s = deadline - loop.time()
                    task = asyncio.create_task(call(target.predictor, left_s))
                    target.calls.add(task)
                    asked[task] = target
                wait_s = hedge_s if hedge and any(other.up for other in untried) else None
                done, _ = await asyncio.wait(asked, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    target = asked.pop(task)
                    target.calls.discard(task)
                    failure = self._failure(target, task, model, version)
                    if failure is None:
                        target.slow = False
                        for other in asked.values():
                            other.was_overtaken()
                        return task.result()
                    if not asked and not untried:
                        raise failure
        finally:
            for task, target in asked.items():
                target.calls.discard(task)
                if not task.cancel() and not task.cancelled():
                    task.exception()  # or asyncio logs that nobody has seen it

    def _rank(self, target: PooledServer) -> tuple[bool, bool, float]:
        """The server with the least is asked first. One that stood by stays in place when the other comes back."""
        return not target.up, target.slow, target.passed_over_at if self._has_standby else len(target.calls)

    def _failure(self, target: PooledServer, call: asyncio.Task[Any], model: str, version: int) -> TemperError | None:
        """Why a call that is over brought no answer, if another server may be asked; None if it brought one.

        Raises:
            TemperError: no other server would answer otherwise.
        """
        if call.cancelled():  # the server was given up
            return ModelServerUnavailable(f"the model server at {target.address} does not answer")
        exc = call.exception()
        if isinstance(exc, ModelServerUnavailable):
            target.went_away()
            return exc
        if isinstance(exc, UnknownModel):  # the registry knows it
            if not self._has_files(model, version):
                raise self._files_missing(model, version) from exc
            target.fell_behind()
            failure = ModelServerUnavailable(
                f"the model server at {target.address} has not loaded {public_name(model)}:{version} yet"
            )
            failure.__cause__ = exc
            return failure
        if exc is None or isinstance(exc, Overloaded):
            return exc
        raise exc

    def _files_missing(self, model: str, version: int) -> ModelServerError:
        text = "the files of %s:%d are missing; restore them or delete the version"
        if (model, version) not in self._missing:
            self._missing.add((model, version))
            log.error(text, model, version)
        return ModelServerError(text % (public_name(model), version))
