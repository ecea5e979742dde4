"""Metrics of what gateways share: the store, its jobs and the workers, read when somebody scrapes."""

import threading
import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from store.health import Notice
from trainer.jobs.statistics import STAGES, Snapshot, Statistics

CACHED_S = 5.0  # how long a reading is shown to everyone who scrapes
PATIENCE_S = 2.0  # how long a scrape waits for a store that does not answer
STAGE_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200)
SHARED = " Every gateway of a store reports the same: aggregate with max, not with sum."


class StoreMetrics(Collector):
    """What the store says, at most `CACHED_S` old.

    The gauges are of the whole cluster: each gateway reads them from the shared store, so that all say the same. So
    does the histogram of stages increase alike everywhere, but it counts from the first scrape of a gateway on, as
    counters of a process do; take `rate` or `increase` first and the maximum over gateways then. The metrics in
    `api.metrics` are of one process, and are summed.

    A store that is away or hangs leaves only `temper_store_up`, 0, and the histogram, and fails no scrape.
    """

    def __init__(self, statistics: Statistics) -> None:
        self._statistics = statistics
        self._reading = Notice("reading the metrics of the store")
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._read_at = float("-inf")
        self._snapshot: Snapshot | None = None
        self._took_s = 0.0
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self._stages = Histogram(
            "temper_stage_seconds", "Time that finished jobs have spent in a stage, over all attempts." + SHARED,
            ["stage"], buckets=STAGE_SECONDS, registry=self.registry,
        )  # fmt: skip
        for stage in STAGES:
            self._stages.labels(stage)

    def describe(self) -> list[Metric]:
        """Nothing: to be registered must not read the store."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics, after reading the store unless that was done a moment ago."""
        found = self._current()
        yield GaugeMetricFamily("temper_store_up", "Whether this gateway can read the store.", value=found is not None)
        if found is None:
            return
        yield GaugeMetricFamily(
            "temper_store_read_seconds", "Time that reading these metrics from the store took.", value=self._took_s
        )
        yield _by("temper_jobs", "Jobs by status.", "status", found.jobs)
        yield _by("temper_workers", "Workers that send heartbeats, by state.", "state", found.workers)
        yield GaugeMetricFamily(
            "temper_queue_oldest_seconds", "Age of the queued job that was created first; 0 without one." + SHARED,
            value=found.oldest_queued_s,
        )  # fmt: skip

    def _current(self) -> Snapshot | None:
        """The last reading if it is fresh, or else a new one; None if there is none in time."""
        with self._lock:
            if time.monotonic() < self._read_at + CACHED_S:
                return self._snapshot
            if self._thread is None or not self._thread.is_alive():  # one that hangs is waited for, not added to
                self._thread = threading.Thread(target=self._read, name="store metrics", daemon=True)
                self._thread.start()
            thread = self._thread
        thread.join(PATIENCE_S)
        return None if thread.is_alive() else self._snapshot

    def _read(self) -> None:
        began = time.monotonic()
        try:
            found = self._statistics.snapshot()
        except Exception as exc:
            self._reading.failed(exc)
            self._snapshot = None
        else:
            self._reading.worked()
            for stages in found.stages:
                for stage, seconds in stages.items():
                    self._stages.labels(stage).observe(seconds)
            self._snapshot, self._took_s = found, time.monotonic() - began
        self._read_at = time.monotonic()


def _by(name: str, text: str, label: str, counts: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text + SHARED, labels=[label])
    for value, count in counts.items():
        family.add_metric([value], count)
    return family
