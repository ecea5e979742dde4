"""The model servers as one: calls are spread by load, and go to another server where one fails."""

import asyncio
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from serving.client import ModelServer, Prediction, Predictor
from store.errors import ModelServerUnavailable, Overloaded, UnknownModel


@dataclass(eq=False)
class PooledServer:
    """One model server, and what the gateway knows of it."""

    predictor: Predictor
    control: ModelServer
    calls: set[asyncio.Task[Prediction]] = field(default_factory=set)  # under way
    up: bool = False  # it answers, and has been told what to serve
    behind: bool = True  # it may not serve what the registry says
    look: asyncio.Event = field(default_factory=asyncio.Event)  # set to have it looked at soon

    @property
    def address(self) -> str:
        """host:port."""
        return self.control.target

    def fell_behind(self) -> None:
        """It lacks what the registry names."""
        self.behind = True
        self.look.set()

    def went_away(self) -> None:
        """It cannot be reached."""
        self.up, self.behind = False, True
        self.look.set()

    def give_up(self) -> None:
        """It does not answer when it is looked at: what it was asked is asked of another, if there is one."""
        self.up, self.behind = False, True
        for call in self.calls:
            call.cancel()


class ServerPool:
    """All model servers; their channels are open inside of `async with`."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses
        self._stack = contextlib.AsyncExitStack()
        self.all: list[PooledServer] = []

    async def __aenter__(self) -> Self:
        for address in self._addresses:
            predictor = await self._stack.enter_async_context(Predictor(address))
            self.all.append(PooledServer(predictor, self._stack.enter_context(ModelServer(address))))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def up(self) -> list[PooledServer]:
        """Those that answered when they were last looked at."""
        return [target for target in self.all if target.up]

    async def predict(self, model: str, version: int, images: np.ndarray, timeout_s: float) -> Prediction:
        """Ask the server with the least in flight; another one if it is away, overloaded or has not loaded the version.

        Raises:
            ModelServerError: none of them answers; what the last one said.
            Overloaded: the same.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        untried = list(self.all)
        while True:
            target = min(untried, key=lambda target: (not target.up, len(target.calls)))
            untried.remove(target)
            call = asyncio.ensure_future(target.predictor.predict(model, version, images, deadline - loop.time()))
            target.calls.add(call)
            try:
                return await call
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():  # not the call alone
                    raise
                if not untried:
                    raise ModelServerUnavailable(f"the model server at {target.address} does not answer") from None
            except ModelServerUnavailable:
                target.went_away()
                if not untried:
                    raise
            except UnknownModel as exc:  # the registry knows it
                target.fell_behind()
                if not untried:
                    text = f"{target.address} has not loaded {model}:{version} yet"
                    raise ModelServerUnavailable(f"the model server at {text}") from exc
            except Overloaded:
                if not untried:
                    raise
            finally:
                target.calls.discard(call)
