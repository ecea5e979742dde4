"""The service under load, as open arrivals ask it: over pooled connections, from many greenlets."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import gevent
import numpy as np
import orjson
from geventhttpclient import HTTPClient
from geventhttpclient.response import HTTPConnectionClosed, HTTPParseError
from prometheus_client.parser import text_string_to_metric_families

from load.arrivals import CLOCK
from load.images import Query
from load.samples import Outcome
from load.settings import LoadSettings

IDLE_S = 3.0


class RequestFailed(Exception):
    """A request got no answer, or one that says that it failed; `code` is the one of the service's error."""

    def __init__(self, text: str, status: int = 0, code: str = "") -> None:
        super().__init__(text)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Answer:
    """The body of a successful answer, parsed."""

    model: str
    version: int
    labels: tuple[str, ...]


def headers(settings: LoadSettings) -> dict[str, str]:
    """What every request carries."""
    key = settings.api_key.get_secret_value()
    return {"X-API-Key": key} if key else {}


def leave_idle_connections(http: HTTPClient) -> None:
    """Have a client open a new connection rather than take one that was idle for `IDLE_S`.

    A server ends idle connections (uvicorn after 5 s). A request that is sent at that moment fails, which would be
    counted against the service.
    """
    pool = http._connection_pool
    get, put, idle_since = pool.get_socket, pool.return_socket, dict[int, float]()

    def get_socket() -> Any:
        while True:
            found = get()
            now = time.perf_counter()
            if now - idle_since.pop(id(found), now) < IDLE_S:
                return found
            pool.release_socket(found)

    def return_socket(sock: Any) -> None:
        idle_since[id(sock)] = time.perf_counter()
        put(sock)

    pool.get_socket, pool.return_socket = get_socket, return_socket  # type: ignore[method-assign]


class Target:
    """A gateway, or the address at which several of them answer."""

    def __init__(self, settings: LoadSettings, url: str) -> None:
        self.url, self._timeout_s = url, settings.timeout_s
        self._prefix = urlsplit(url).path.rstrip("/")
        self._http = HTTPClient.from_url(
            url,
            headers=headers(settings),
            concurrency=settings.cap + 8,  # the cap of the dispatcher comes first
            connection_timeout=settings.timeout_s,
            network_timeout=settings.timeout_s,
            ssl_options={"ca_certs": str(settings.ca)} if settings.ca else None,
        )
        leave_idle_connections(self._http)

    def close(self) -> None:
        """Close all idle connections."""
        self._http.close()

    def request(self, method: str, path: str, body: bytes = b"", content_type: str = "") -> bytes:
        """The body of a successful answer.

        Raises:
            RequestFailed: with its status and code, or what was wrong with the connection.
        """
        sent = {"Content-Type": content_type} if content_type else {}
        try:
            # Sockets time out by themselves. Breaking off a request from outside loses its place in the pool, so this
            # is only for an answer that comes byte by byte.
            with gevent.Timeout(2 * self._timeout_s):
                answer = self._http.request(method, self._prefix + path, body, sent)
                content = bytes(answer.read())
        except (gevent.Timeout, TimeoutError):
            raise RequestFailed(f"no answer within {self._timeout_s:g} s") from None
        except (OSError, HTTPConnectionClosed, HTTPParseError) as exc:
            raise RequestFailed(f"{type(exc).__name__}: {exc}") from exc
        if not 200 <= answer.status_code < 300:
            try:
                code = orjson.loads(content)["error"]["code"]
            except (ValueError, KeyError, TypeError):
                code = "without a code"
            raise RequestFailed(f"{answer.status_code} {code}", answer.status_code, code)
        return content

    def json(self, path: str) -> Any:
        """The parsed answer to a GET; raises as `request`."""
        return orjson.loads(self.request("GET", path))

    def predict(self, query: Query) -> Answer:
        """Ask for predictions.

        Raises:
            RequestFailed: also if the answer is not one of /predict, or has not a prediction for every image.
        """
        content = self.request("POST", query.path, query.body, query.content_type)
        try:
            found = orjson.loads(content)
            answer = Answer(found["model"], found["version"], tuple(one["label"] for one in found["predictions"]))
        except (ValueError, KeyError, TypeError) as exc:
            raise RequestFailed("the answer is not one of POST /predict") from exc
        if query.labels and len(answer.labels) != len(query.labels):
            raise RequestFailed(f"{len(answer.labels)} predictions for {len(query.labels)} images")
        return answer

    def server_times(self) -> dict[str, tuple[float, float]] | None:
        """Count and sum of the histograms that say where time goes; None if /metrics cannot be read.

        Raises:
            RequestFailed: for another reason than a missing key or scope.
        """
        try:
            text = self.request("GET", "/metrics").decode()
        except RequestFailed as exc:
            if exc.status in (401, 403):
                return None
            raise
        found: dict[str, list[float]] = {name: [0.0, 0.0] for name in SERVER_TIMES}
        for family in text_string_to_metric_families(text):
            if family.name in found:
                for sample in family.samples:
                    if sample.labels.get("route", "/predict") == "/predict":
                        if sample.name.endswith("_count"):
                            found[family.name][0] += sample.value
                        elif sample.name.endswith("_sum"):
                            found[family.name][1] += sample.value
        return {name: (count, total) for name, (count, total) in found.items()}


SERVER_TIMES = ("temper_request_seconds", "temper_queue_seconds", "temper_batch_images", "temper_call_seconds")


class ModelServerTarget:
    """A model server, asked over gRPC from greenlets. `classes` are the names in the order of its outputs."""

    def __init__(self, settings: LoadSettings, model: str, version: int, classes: Sequence[str]) -> None:
        import grpc.experimental.gevent

        grpc.experimental.gevent.init_gevent()  # else a call blocks the whole process; before any channel exists
        from serving.client import ModelServer

        self._server, self._timeout_s = ModelServer(settings.model_server), settings.timeout_s
        self._model, self._version, self._classes = model, version, tuple(classes)

    def predict(self, images: np.ndarray) -> Answer:
        """Ask about images (n, 28, 28) uint8.

        Raises:
            RequestFailed: the server failed.
        """
        from store.errors import TemperError

        try:
            found = self._server.predict(
                self._model, self._version, images.reshape(len(images), -1), timeout_s=self._timeout_s
            )
        except TemperError as exc:
            raise RequestFailed(str(exc)) from exc
        labels = tuple(self._classes[best] for best in found.probabilities.argmax(axis=1).tolist())
        return Answer(self._model, found.version, labels)


def timed(query: Query, due: float, ask: Callable[[], Answer], is_predict: bool = True) -> Outcome:
    """Ask, and record what happened to a request that was due at this `time.perf_counter`."""
    started = time.perf_counter()
    error, version, right = "", 0, 0
    try:
        answer = ask()
        version = answer.version
        right = sum(found == label for found, label in zip(answer.labels, query.labels, strict=False))
    except RequestFailed as exc:
        error = str(exc)
    ended = time.perf_counter()
    return Outcome(
        name=query.name, due_s=CLOCK.epoch_s(due), lag_s=started - due, latency_s=ended - due, error=error,
        model=query.model, kind=query.kind, version=version, wanted=query.version, images=len(query.labels),
        right=right, is_predict=is_predict,
    )  # fmt: skip
