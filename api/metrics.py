"""The gateway's metrics for Prometheus.

Every series costs memory and time at each scrape, so labels that clients or fine-tunes can multiply are bounded:
`MAX_SERIES` models or versions have series of their own, and the rest share the one of `OTHERS`.
"""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
MAX_SERIES = 100
OTHERS = "_others"  # not the name of any model
COLLECTORS = CollectorRegistry()

REQUESTS = Counter(
    "temper_requests_total", "Requests by route, model, version and status.", ["route", "model", "version", "status"],
    registry=COLLECTORS,
)  # fmt: skip
LATENCY = Histogram(
    "temper_request_seconds", "Time from a request's head to the end of its response.", ["route", "model", "version"],
    buckets=SECONDS, registry=COLLECTORS,
)  # fmt: skip
REJECTIONS = Counter("temper_rejections_total", "Requests refused, by reason.", ["reason"], registry=COLLECTORS)
BATCH = Histogram(
    "temper_batch_images", "Images in a call to a model server.", buckets=(1, 2, 4, 8, 16, 32, 64, 128),
    registry=COLLECTORS,
)  # fmt: skip
QUEUE_S = Histogram(
    "temper_queue_seconds", "Time that a prediction waits for its call.", buckets=SECONDS, registry=COLLECTORS
)
CALL_S = Histogram(
    "temper_call_seconds", "Time that a model server takes for a call.", buckets=SECONDS, registry=COLLECTORS
)
IN_FLIGHT = Gauge("temper_calls_in_flight", "Calls to model servers under way.", registry=COLLECTORS)
WAITING = Gauge("temper_images_waiting", "Images that wait for a call.", registry=COLLECTORS)
SERVER_UP = Gauge("temper_model_server_up", "Whether the model server answers.", ["target"], registry=COLLECTORS)
WEBHOOKS = Counter(
    "temper_webhook_attempts_total", "Attempts to deliver a webhook, by outcome.", ["outcome"], registry=COLLECTORS
)
VERSIONS = Gauge("temper_versions_served", "Live versions.", ["model"], registry=COLLECTORS)


class RequestSeries:
    """The series of `REQUESTS` and `LATENCY`, for a bounded number of versions."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, str, str, int], tuple[Counter, Histogram]] = {}
        self._versions: set[tuple[str, str]] = set()  # those with series of their own

    def of(self, route: str, model: str, version: str, status: int) -> tuple[Counter, Histogram]:
        """The two series of a request. `model` and `version` are empty for one that no version answered."""
        key = (route, model, version, status)
        found = self._series.get(key)
        return found if found is not None else self._add(key)

    def _add(self, key: tuple[str, str, str, int]) -> tuple[Counter, Histogram]:
        route, model, version, status = key
        if model and model != OTHERS and (model, version) not in self._versions:
            if len(self._versions) >= MAX_SERIES:
                return self.of(route, OTHERS, "", status)
            self._versions.add((model, version))
        found = REQUESTS.labels(route, model, version, status), LATENCY.labels(route, model, version)
        self._series[key] = found
        return found

    def retain(self, is_live: Callable[[str, int], bool]) -> None:
        """Drop the series of versions that are gone, which makes room for others."""
        for model, version in [each for each in self._versions if not is_live(each[0], int(each[1]))]:
            self._versions.discard((model, version))
            for key in [key for key in self._series if key[1:3] == (model, version)]:
                del self._series[key]
            for metric in (REQUESTS, LATENCY):
                metric.remove_by_labels({"model": model, "version": version})


REQUEST_SERIES = RequestSeries()


def show_versions(counts: Mapping[str, int]) -> None:
    """Set `VERSIONS` from the number of live versions of every model."""
    VERSIONS.clear()
    shown = sorted(counts)[:MAX_SERIES]
    for model in shown:
        VERSIONS.labels(model).set(counts[model])
    if len(counts) > len(shown):
        VERSIONS.labels(OTHERS).set(sum(counts.values()) - sum(counts[model] for model in shown))
