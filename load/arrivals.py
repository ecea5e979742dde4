"""Open arrivals: requests start when they are due, whether or not earlier ones were answered.

A user that waits for its answer before it sends the next request sends fewer of them while the server stalls, and its
percentiles leave out those that would have waited (coordinated omission). Real traffic comes from people who know
nothing of each other, so it does not wait. Latency counts from when a request was due.
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import gevent
import gevent.event
import gevent.pool
import numpy as np

from load.samples import Outcome, Recorder

Send = Callable[[float], None]  # sends one request that was due at this time.perf_counter


class Clock:
    """Translates `time.perf_counter`, which measures, into seconds since the epoch, which several machines share."""

    def __init__(self) -> None:
        self._offset_s = time.time() - time.perf_counter()

    def epoch_s(self, counter_s: float) -> float:
        """Seconds since the epoch of a reading of `time.perf_counter`."""
        return counter_s + self._offset_s


CLOCK = Clock()


class Dispatcher:
    """Starts requests of several sources, each a Poisson process with its own rate.

    Together they are one Poisson process of the sum of the rates, whose arrivals belong to a source in proportion to
    its rate. Such a process has no memory, so after a change of rates the next gap is drawn anew. The same seed, rates
    and times of change give the same schedule.

    Args:
        cap: most requests that are open at a time. An arrival beyond it is dropped and counted.
    """

    def __init__(self, recorder: Recorder, cap: int, seed: Sequence[int]) -> None:
        self._recorder = recorder
        self._pool = gevent.pool.Pool(cap)
        self._random = np.random.default_rng(seed)
        self._rates: dict[Send, float] = {}
        self._changed, self._changed_at = gevent.event.Event(), 0.0
        self._greenlet: gevent.Greenlet | None = None

    @property
    def open_requests(self) -> int:
        """Requests that were sent and are not finished."""
        return len(self._pool)

    def add(self, source: Send, rate: float) -> None:
        """Add to the rate of a source, in arrivals a second; negative to take away."""
        self.set(source, self._rates.get(source, 0.0) + rate)

    def set(self, source: Send, rate: float) -> None:
        """Set the rate of a source, in arrivals a second."""
        if rate > 1e-9:
            self._rates[source] = rate
        else:
            self._rates.pop(source, None)
        self._changed_at = time.perf_counter()
        self._changed.set()
        if self._rates and not self._greenlet:
            self._greenlet = gevent.spawn(self._run)

    def stop(self, timeout_s: float) -> None:
        """Start no more requests, and wait for the open ones: without them a stall at the end would not show.

        Those that are still open when the time is up count as failed.
        """
        if self._greenlet:
            self._greenlet.kill()
            self._greenlet = None
        self._rates.clear()
        self._pool.join(timeout=timeout_s)
        self._pool.kill()

    def _run(self) -> None:
        due = time.perf_counter()
        while True:
            self._changed.clear()
            if not self._rates:
                self._changed.wait()
                due = self._changed_at
                continue
            sources, rates = list(self._rates), np.array(list(self._rates.values()))
            shares = rates.cumsum() / rates.sum()
            mean_s = 1 / rates.sum()
            while True:
                due += self._random.exponential(mean_s)
                chosen = sources[int(shares.searchsorted(self._random.random(), side="right"))]
                wait_s = due - time.perf_counter()
                if wait_s <= 0:
                    gevent.sleep(0)  # requests must go out while the dispatcher catches up
                else:
                    self._changed.wait(wait_s)
                if self._changed.is_set() and due > self._changed_at:
                    due = self._changed_at
                    break
                if self._pool.full():
                    self._recorder.drop(CLOCK.epoch_s(due))
                else:
                    self._pool.spawn(self._send, chosen, due)

    def _send(self, source: Send, due: float) -> None:
        """Send; a request that the generator itself breaks off counts as failed, and is not left out."""
        try:
            source(due)
        except (Exception, gevent.GreenletExit) as exc:
            is_late = isinstance(exc, gevent.GreenletExit)
            error = "not answered at the end" if is_late else f"in the generator: {type(exc).__name__}: {exc}"
            latency_s = time.perf_counter() - due
            self._recorder.add(Outcome("GENERATOR", CLOCK.epoch_s(due), 0.0, latency_s, error, is_predict=True))


def watch_cpu(recorder: Recorder) -> Any:
    """A greenlet that records each second what share of a core this process uses."""

    def run() -> None:
        at, used = time.perf_counter(), time.process_time()
        while True:
            gevent.sleep(1.0)
            now, now_used = time.perf_counter(), time.process_time()
            recorder.tick(os.getpid(), CLOCK.epoch_s(now), (now_used - used) / (now - at))
            at, used = now, now_used

    return gevent.spawn(run)
