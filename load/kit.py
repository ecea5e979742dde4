"""What a process that sends load is made of, and what the process that judges it watches meanwhile."""

import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import gevent
import gevent.event
import numpy as np

from load.arrivals import CLOCK, Dispatcher, watch_cpu
from load.images import Labelled, Query, Traffic, query
from load.samples import Outcome, Recorder
from load.settings import LoadSettings
from load.target import ModelServerTarget, RequestFailed, Target, timed

STABLE = "stable"
WATCH_S = 0.5  # between looks at the labels


class Kit:
    """The parts of one process.

    Args:
        images: by kind; none in a process that only judges.
        number: of the process, so that each has arrivals of its own.
    """

    def __init__(self, settings: LoadSettings, url: str, images: dict[str, Labelled], number: int = 0) -> None:
        self.settings, self.images, self._number = settings, images, number
        self.target = Target(settings, url)
        self._traffic = Traffic(settings, images, number) if images else None
        self._model_server: ModelServerTarget | None = None
        self.begin()

    def begin(self) -> None:
        """Forget what was measured, and schedule arrivals from the start of the seed."""
        self.recorder = Recorder()
        self.dispatcher = Dispatcher(self.recorder, self.settings.cap, [self.settings.seed, self._number])
        self._cpu = watch_cpu(self.recorder) if self.images else None

    def end(self) -> None:
        """Stop sending, and wait until every request has its answer or has failed."""
        self.dispatcher.stop(2 * self.settings.timeout_s + 1)
        if self._cpu:
            self._cpu.kill()

    def predict(self, due: float) -> Outcome:
        """Ask about the next image of the traffic; it was due at this `time.perf_counter`."""
        assert self._traffic
        return self.ask(self._traffic.next(), due)

    def ask(self, asked: Query, due: float | None = None) -> Outcome:
        """Send a query that was due then, or is now."""
        return timed(asked, time.perf_counter() if due is None else due, lambda: self.target.predict(asked))

    def ask_model_server(self, due: float) -> Outcome:
        """Ask the model server about the next clean image, over gRPC."""
        server = self._model_server
        assert server, "connect_model_server comes first"
        kind, labelled = next(iter(self.images.items()))
        at = int(due * 1e6) % len(labelled.labels)
        asked = Query("gRPC Predict", "", "", b"", self.settings.model_names[0], kind, (labelled.labels[at],))
        return timed(asked, due, lambda: server.predict(labelled.images[at : at + 1]), is_predict=False)

    def connect_model_server(self) -> None:
        """Prepare `ask_model_server`, before the load, as it takes a while.

        Raises:
            RequestFailed: the gateway does not tell the version and the classes.
        """
        model = self.settings.model_names[0]
        view = self.target.json(f"/models/{model}")
        version = self.settings.version or view["labels"].get(STABLE) or view["versions"][0]["version"]
        summary = next(each for each in self._models() if each["name"] == model)
        self._model_server = ModelServerTarget(self.settings, model, version, summary["classes"])

    def _models(self) -> Iterable[dict[str, Any]]:
        after, more = "", True
        while more:
            page = self.target.json(f"/models?limit=100{after and f'&after={after}'}")
            yield from page["data"]
            more = page["has_more"]
            after = page["data"][-1]["name"] if page["data"] else ""

    def batch(self, size: int, start: int) -> Query:
        """A query of raw bytes with so many images of the first kind, from the number `start` on, again if too few."""
        kind, labelled = next(iter(self.images.items()))
        chosen = np.arange(start, start + size) % len(labelled.labels)
        labels = [labelled.labels[number] for number in chosen]
        model = self.settings.model_names[0]
        return query(model, "bytes", kind, labelled.images[chosen], labels, self.settings.version or 0)


@dataclass(frozen=True)
class LabelView:
    """The versions that the labels of each model stood for, at some time between asking and the answer."""

    asked_s: float  # seconds since the epoch
    answered_s: float
    versions: dict[str, frozenset[int]]


def follow_labels(target: Target, models: Iterable[str]) -> dict[str, frozenset[int]]:
    """The versions that requests naming neither version nor label may get: `stable`'s, and those with a weight.

    Raises:
        RequestFailed: a model does not exist, or the service does not answer.
    """
    found = {}
    for model in models:
        view = target.json(f"/models/{model}")
        followed = {view["labels"][name] for name in (STABLE, *view["weights"]) if name in view["labels"]}
        found[model] = frozenset(followed or (one["version"] for one in view["versions"]))
    return found


@dataclass
class Watch:
    """Looks at the labels while the load runs, and at the server's own times before and after it.

    Raises:
        RequestFailed: at the start, if a model does not exist or the service does not answer.
    """

    target: Target
    models: list[str]
    views: list[LabelView] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._look()
        self._before = self._server_times()
        self._ended = gevent.event.Event()
        self._greenlet = gevent.spawn(self._run)

    def _look(self) -> None:
        asked = CLOCK.epoch_s(time.perf_counter())
        versions = follow_labels(self.target, self.models)
        self.views.append(LabelView(asked, CLOCK.epoch_s(time.perf_counter()), versions))

    def _run(self) -> None:
        while not self._ended.wait(WATCH_S):
            with contextlib.suppress(RequestFailed):  # the next look tells
                self._look()

    def _server_times(self) -> dict[str, tuple[float, float]] | None:
        try:
            found = self.target.server_times()
        except RequestFailed as exc:
            self.notes.append(f"where the time went in the server is unknown: /metrics: {exc}")
            return None
        if found is None:
            self.notes.append("where the time went in the server is unknown: /metrics needs a key with scope admin")
        return found

    def end(self) -> dict[str, tuple[float, float]] | None:
        """Look a last time. Returns count and sum that each histogram of the server grew by, if they can be read."""
        self._ended.set()
        self._greenlet.join()
        try:
            self._look()
        except RequestFailed as exc:
            self.notes.append(f"the labels could not be read at the end: {exc}")
        if self._before is None:
            return None
        after = self._server_times()
        if after is None:
            return None
        grown = {
            name: (after[name][0] - count, after[name][1] - total) for name, (count, total) in self._before.items()
        }
        if any(count < 0 for count, _ in grown.values()):
            self.notes.append("where the time went in the server is unknown: the gateway was started anew meanwhile")
            return None
        return grown
