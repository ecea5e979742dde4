"""The model servers as one: spread calls by load, and retry on another server when one fails."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from serving.client import ModelServer, Prediction, Predictor
from store.errors import ModelServerError, ModelServerUnavailable, Overloaded, UnknownModel
from store.records import public_name

log = logging.getLogger("temper.gateway")


@dataclass(eq=False)
class PooledServer:
    """One model server, and what the gateway knows of it."""

    predictor: Predictor
    control: ModelServer
    calls: set[asyncio.Task[Prediction]] = field(default_factory=set)  # under way
    up: bool = False  # it answers, and has been told what to serve
    silent: bool = False  # it did not answer when it was last looked at
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
        self.look.set()

    def give_up(self) -> None:
        """Stop asking a server that does not answer; its pending calls go to another one, if there is one."""
        if self.lost_at is None:
            self.lost_at = time.monotonic()
        self.up, self.behind, self.silent = False, True, True
        for call in self.calls:
            call.cancel()


class ServerPool:
    """All model servers; their channels are open inside of `async with`.

    Args:
        has_files: tells whether a version of a model is on disk.
        ca: certificates that sign those of the model servers, which then use TLS.
    """

    def __init__(self, addresses: Sequence[str], has_files: Callable[[str, int], bool], ca: Path | None = None) -> None:
        self._addresses = addresses
        self._ca = ca
        self._has_files = has_files
        self._missing: set[tuple[str, int]] = set()  # versions whose loss has been logged
        self._stack = contextlib.AsyncExitStack()
        self.all: list[PooledServer] = []

    async def __aenter__(self) -> Self:
        for address in self._addresses:
            predictor = await self._stack.enter_async_context(Predictor(address, self._ca))
            self.all.append(PooledServer(predictor, self._stack.enter_context(ModelServer(address, self._ca))))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    @property
    def up(self) -> list[PooledServer]:
        """Servers that answer and have been told what to serve."""
        return [target for target in self.all if target.up]

    async def predict(self, model: str, version: int, images: np.ndarray, timeout_s: float) -> Prediction:
        """Ask the server with the fewest calls; another if it is away, overloaded or has not loaded the version.

        Raises:
            ModelServerUnavailable: no server answers, or none has loaded the version yet.
            ModelServerError: the files of the version are missing, or what the last server said.
            Overloaded: every server refused the call.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        untried = [target for target in self.all if not target.silent]
        if not untried:
            raise ModelServerUnavailable(f"no model server answers ({', '.join(t.address for t in self.all)})")
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
                if not self._has_files(model, version):
                    raise self._files_missing(model, version) from exc
                target.fell_behind()
                if not untried:
                    text = f"{target.address} has not loaded {public_name(model)}:{version} yet"
                    raise ModelServerUnavailable(f"the model server at {text}") from exc
            except Overloaded:
                if not untried:
                    raise
            finally:
                target.calls.discard(call)

    def _files_missing(self, model: str, version: int) -> ModelServerError:
        text = "the files of %s:%d are missing; restore them or delete the version"
        if (model, version) not in self._missing:
            self._missing.add((model, version))
            log.error(text, model, version)
        return ModelServerError(text % (public_name(model), version))
