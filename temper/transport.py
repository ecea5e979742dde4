"""How requests are made: verbs are written once as generators, and one driver takes their steps blocking, one async.

A verb yields steps (send this, wait, do that) and is sent what comes of each; a failure to reach the service is thrown
into it. It decides everything else itself: what to ask again, what an answer means. Whatever it yields besides steps is
what its caller iterates over.
"""

import asyncio
import contextlib
import functools
import json
import os
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar, overload
from urllib.parse import quote

import httpx

from temper.errors import NotFound, NotTemper, TemperError, Unreachable, from_answer
from temper.records import Record

P = ParamSpec("P")
T = TypeVar("T")
R = TypeVar("R", bound=Record)

DEFAULT_URL = "http://127.0.0.1:8080"
CONNECT_S = 10.0


@dataclass(frozen=True)
class Request:
    """A request as data.

    Attributes:
        params: of the query; those that are None are left out.
        repeatable: asking twice does no harm, so a failed attempt is repeated.
        accepted: statuses that are answers besides 2xx.
        timeout_s: for the answer, where it takes longer than usual.
    """

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)
    json: Any = None
    content: bytes | None = None
    data: Mapping[str, str] | None = None
    files: Mapping[str, Any] | None = None
    repeatable: bool = False
    accepted: tuple[int, ...] = ()
    timeout_s: float | None = None


@dataclass(frozen=True)
class Answer:
    """What the service has answered; the body is empty if it is read in chunks."""

    url: str
    request: Request
    status: int
    reason: str
    headers: Mapping[str, str]
    body: bytes = b""

    def check(self) -> None:
        """Raise the error that this is, if it is one."""
        if "x-request-id" not in self.headers:  # which every answer of a gateway has
            raise self.foreign()
        if not 200 <= self.status < 300 and self.status not in self.request.accepted:
            try:
                error = from_answer(self.status, json.loads(self.body)["error"], self.headers.get("retry-after"))
            except (ValueError, TypeError, KeyError) as exc:
                raise self.foreign() from exc
            raise error

    def read(self, kind: type[R]) -> R:
        """The record in the body."""
        try:
            return kind.read(json.loads(self.body))
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise self.foreign() from exc

    def page(self, kind: type[R]) -> tuple[list[R], bool]:
        """The records of a page, and whether there are more."""
        try:
            body = json.loads(self.body)
            return [kind.read(one) for one in body["data"]], bool(body["has_more"])
        except (ValueError, TypeError, KeyError, AttributeError) as exc:
            raise self.foreign() from exc

    def foreign(self) -> NotTemper:
        """The error that this is not what Temper answers."""
        asked = f"{self.request.method} {self.request.path} returned {self.status} {self.reason}"
        return NotTemper(f"{self.url} is not a Temper service: {asked}", code="not_temper", status=self.status)


class Step:
    """What a driver does for a verb."""


@dataclass(frozen=True)
class Send(Step):
    """Make a request; the outcome is an `Answer`."""

    request: Request


@dataclass(frozen=True)
class Open(Step):
    """Make a request whose body is read in chunks; the outcome is an `Answer`, with its body if it is no success."""

    request: Request


@dataclass(frozen=True)
class Chunk(Step):
    """Read on in what was opened last; the outcome is `bytes`, none at the end."""


@dataclass(frozen=True)
class Pause(Step):
    """Wait."""

    seconds: float


@dataclass(frozen=True)
class Work(Step):
    """Do something that blocks; the outcome is what the function returns."""

    function: Callable[[], Any]


Steps = Generator[Step, Any, T]  # of a verb that returns a T
Listing = Generator[Step | T, Any, None]  # of a verb that yields Ts besides


def at(*parts: str | int) -> str:
    """A path of these parts, quoted."""
    for part in parts:
        if part in ("", ".", ".."):
            raise NotFound(f"{part!r} is not a name", code="not_found")
    return "".join(f"/{quote(str(part), safe='')}" for part in parts)


class Driver:
    """What both drivers share: where the service is, and who asks."""

    def __init__(
        self, url: str | None = None, *, api_key: str | None = None, timeout_s: float = 60.0, retries: int = 3
    ) -> None:
        """Connects at the first request.

        Args:
            url: of the service; `TEMPER_URL` or http://127.0.0.1:8080 if not given.
            api_key: sent with every request; `TEMPER_API_KEY` if not given.
            timeout_s: longest silence of the service before it counts as gone.
            retries: attempts after the first one, of requests that can be repeated without harm.

        Raises:
            ValueError: the URL or the key cannot be used.
        """
        self.url = (url or os.environ.get("TEMPER_URL") or DEFAULT_URL).rstrip("/")
        self.timeout_s = timeout_s
        self.retries = retries
        try:
            parsed = httpx.URL(self.url)
        except httpx.InvalidURL as exc:
            raise ValueError(f"{self.url}: {exc}") from exc
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"{self.url}: a URL such as {DEFAULT_URL} is needed")
        key = api_key or os.environ.get("TEMPER_API_KEY")
        if key and not (key.isascii() and key.isprintable()):
            raise ValueError("the API key has characters that cannot be sent")
        self._options: dict[str, Any] = {
            "base_url": self.url,
            "headers": {"Authorization": f"Bearer {key}"} if key else {},
            "timeout": httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_S)),
        }

    def _arguments(self, request: Request) -> dict[str, Any]:
        """A request as httpx takes it."""
        arguments: dict[str, Any] = {
            "method": request.method, "url": request.path, "headers": request.headers, "json": request.json,
            "params": {name: value for name, value in request.params.items() if value is not None},
            "content": request.content, "data": request.data, "files": request.files,
        }  # fmt: skip
        if request.timeout_s is not None:
            longest = max(self.timeout_s, request.timeout_s)
            arguments["timeout"] = httpx.Timeout(longest, connect=min(self.timeout_s, CONNECT_S))
        return arguments

    def _answer(self, request: Request, response: httpx.Response, body: bytes = b"") -> Answer:
        return Answer(self.url, request, response.status_code, response.reason_phrase, response.headers, body)

    def _unreachable(self, failure: httpx.HTTPError) -> Unreachable:
        error = Unreachable(
            f"no answer from {self.url}: {failure or type(failure).__name__} (is `temper serve` running?)",
            code="unreachable",
        )
        error.__cause__ = failure
        return error


class SyncDriver(Driver):
    """Takes the steps of a verb one after another, blocking."""

    @functools.cached_property
    def _http(self) -> httpx.Client:
        return httpx.Client(**self._options)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def take(self, steps: Generator[Any, Any, T]) -> Generator[Any, None, T]:
        """Take the steps, yield what is none, and return what the verb returns."""
        outcome: Any = None
        failure: TemperError | None = None
        chunks: Generator[bytes, None, None] | Any = iter(())
        with contextlib.closing(steps), contextlib.ExitStack() as opened:
            while True:
                try:
                    step = steps.throw(failure) if failure else steps.send(outcome)
                except StopIteration as end:
                    result: T = end.value
                    return result
                outcome = failure = None
                try:
                    match step:
                        case Send(request):
                            response = self._http.request(**self._arguments(request))
                            outcome = self._answer(request, response, response.content)
                        case Open(request):
                            opened.close()
                            response = opened.enter_context(self._http.stream(**self._arguments(request)))
                            outcome = self._answer(request, response, b"" if response.is_success else response.read())
                            chunks = response.iter_bytes()
                        case Chunk():
                            outcome = next(chunks, b"")
                        case Pause(seconds):
                            time.sleep(seconds)
                        case Work(function):
                            outcome = function()
                        case found:
                            yield found
                except httpx.HTTPError as exc:
                    failure = self._unreachable(exc)


class AsyncDriver(Driver):
    """Takes the steps of a verb one after another in asyncio."""

    @functools.cached_property
    def _http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(**self._options)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def take(self, steps: Generator[Any, Any, Any]) -> AsyncGenerator[Any, None]:
        """Take the steps and yield what is none."""
        outcome: Any = None
        failure: TemperError | None = None
        chunks: AsyncGenerator[bytes, None] | Any = None
        with contextlib.closing(steps):
            async with contextlib.AsyncExitStack() as opened:
                while True:
                    try:
                        step = steps.throw(failure) if failure else steps.send(outcome)
                    except StopIteration:
                        return
                    outcome = failure = None
                    try:
                        match step:
                            case Send(request):
                                response = await self._http.request(**self._arguments(request))
                                outcome = self._answer(request, response, response.content)
                            case Open(request):
                                await opened.aclose()
                                response = await opened.enter_async_context(
                                    self._http.stream(**self._arguments(request))
                                )
                                outcome = self._answer(
                                    request, response, b"" if response.is_success else await response.aread()
                                )
                                chunks = response.aiter_bytes()
                            case Chunk():
                                outcome = await anext(chunks, b"")
                            case Pause(seconds):
                                await asyncio.sleep(seconds)
                            case Work(function):
                                outcome = await asyncio.to_thread(function)
                            case found:
                                yield found
                    except httpx.HTTPError as exc:
                        failure = self._unreachable(exc)


def _found(steps: Steps[T]) -> Listing[T]:
    """A verb that returns its outcome as one that yields it."""
    yield (yield from steps)


async def _only(items: AsyncGenerator[T, None]) -> T:
    [found] = [item async for item in items]
    return found


class Verb(Generic[P, T]):
    """A verb with one outcome: `Client` returns it, `AsyncClient` a coroutine of it."""

    def __init__(self, steps: Callable[Concatenate[Any, P], Steps[T]]) -> None:
        self._steps = steps

    @overload
    def __get__(self, driver: None, owner: type) -> Callable[Concatenate[Any, P], Steps[T]]: ...
    @overload
    def __get__(self, driver: SyncDriver, owner: type) -> Callable[P, T]: ...
    @overload
    def __get__(self, driver: AsyncDriver, owner: type) -> Callable[P, Coroutine[Any, Any, T]]: ...

    def __get__(self, driver: Driver | None, owner: type) -> Any:
        """The verb of a client, blocking or async as the client is."""
        steps = self._steps

        def act(*args: P.args, **kwargs: P.kwargs) -> Any:
            taken = _found(steps(driver, *args, **kwargs))
            if isinstance(driver, SyncDriver):
                [found] = driver.take(taken)
                return found
            assert isinstance(driver, AsyncDriver)
            return _only(driver.take(taken))

        return steps if driver is None else _bound(act, steps, driver)


class Lister(Generic[P, T]):
    """A verb with many outcomes: `Client` returns an iterator, `AsyncClient` an asynchronous one."""

    def __init__(self, steps: Callable[Concatenate[Any, P], Listing[T]]) -> None:
        self._steps = steps

    @overload
    def __get__(self, driver: None, owner: type) -> Callable[Concatenate[Any, P], Listing[T]]: ...
    @overload
    def __get__(self, driver: SyncDriver, owner: type) -> Callable[P, Generator[T, None, None]]: ...
    @overload
    def __get__(self, driver: AsyncDriver, owner: type) -> Callable[P, AsyncGenerator[T, None]]: ...

    def __get__(self, driver: Driver | None, owner: type) -> Any:
        """The verb of a client, blocking or async as the client is."""
        steps = self._steps

        def act(*args: P.args, **kwargs: P.kwargs) -> Any:
            assert isinstance(driver, SyncDriver | AsyncDriver)
            return driver.take(steps(driver, *args, **kwargs))

        return steps if driver is None else _bound(act, steps, driver)


def _bound(act: Callable[..., Any], steps: Callable[..., Any], driver: Driver) -> Callable[..., Any]:
    """`act` with the name, the documentation and the parameters of a method."""
    functools.update_wrapper(act, steps)
    act.__wrapped__ = functools.partial(steps, driver)  # type: ignore[attr-defined]
    return act
