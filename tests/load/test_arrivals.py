import time

import gevent
import numpy as np
import pytest

from load.arrivals import CLOCK, Dispatcher, watch_cpu
from load.objectives import inspect_generator
from load.samples import Outcome, Recorder
from load.settings import read_settings


def record(recorder: Recorder, due: float, started: float) -> None:
    now = time.perf_counter()
    recorder.add(Outcome("r", CLOCK.epoch_s(due), started - due, now - due, is_predict=True))


def schedule(seed: int, rate: float = 500.0, seconds: float = 0.5) -> list[float]:
    """Offsets from the first arrival."""
    recorder, found = Recorder(), list[float]()
    dispatcher = Dispatcher(recorder, 1000, [seed])
    dispatcher.set(found.append, rate)
    gevent.sleep(seconds)
    dispatcher.stop(1)
    return [due - found[0] for due in found]


def test_the_same_seed_gives_the_same_schedule() -> None:
    one, again, other = schedule(1), schedule(1), schedule(2)
    count = min(len(one), len(again))
    assert count > 100
    np.testing.assert_allclose(one[:count], again[:count], atol=1e-9)
    assert one[1:20] != pytest.approx(other[1:20])


def test_gaps_are_exponential_with_the_mean_of_the_rate() -> None:
    gaps = np.diff(schedule(0, rate=2000, seconds=1.0))
    assert gaps.mean() == pytest.approx(1 / 2000, rel=0.1)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1)


def test_arrivals_do_not_wait_for_answers_and_latency_counts_from_when_they_were_due() -> None:
    recorder, is_frozen, thaw = Recorder(), True, gevent.event.Event()
    dispatcher = Dispatcher(recorder, 1000, [0])

    def send(due: float) -> None:
        started = time.perf_counter()
        if is_frozen:
            thaw.wait()
        record(recorder, due, started)

    dispatcher.set(send, 200)
    gevent.sleep(0.5)
    assert dispatcher.open_requests > 60  # nobody has got an answer
    is_frozen = False
    thaw.set()
    dispatcher.stop(1)
    samples = recorder.samples()
    latency = samples.rows["latency_s"]
    assert latency.max() > 0.45
    assert len(latency) == pytest.approx(100, rel=0.3)
    assert latency.mean() == pytest.approx(0.25, rel=0.3)  # evenly from 0 to the length of the stall


def test_what_the_cap_drops_is_counted() -> None:
    recorder, never = Recorder(), gevent.event.Event()
    dispatcher = Dispatcher(recorder, 5, [0])
    dispatcher.set(lambda due: never.wait(), 200)
    gevent.sleep(0.5)
    assert dispatcher.open_requests == 5
    dispatcher.stop(0)
    samples = recorder.samples()
    assert len(samples.dropped_s) == pytest.approx(95, rel=0.3)
    assert samples.errors() == {"not answered at the end": 5}


def test_sources_get_requests_in_proportion_to_their_rates() -> None:
    dispatcher = Dispatcher(Recorder(), 100, [0])
    a: list[float] = []
    b: list[float] = []
    dispatcher.add(a.append, 900)
    dispatcher.add(b.append, 100)
    gevent.sleep(0.5)
    dispatcher.add(a.append, -900)
    changed_at = time.perf_counter()
    time.sleep(0.1)  # nothing is sent meanwhile: it must catch up with the new rates
    gevent.sleep(0.2)
    dispatcher.stop(1)
    before = sum(due < changed_at for due in b)
    assert len(a) > 5 * before > 0
    assert max(a) < changed_at < max(b)


def test_a_request_that_the_generator_breaks_off_is_not_left_out() -> None:
    recorder = Recorder()
    dispatcher = Dispatcher(recorder, 10, [0])

    def broken(due: float) -> None:
        raise KeyError("no such image")

    dispatcher.set(broken, 100)
    gevent.sleep(0.2)
    dispatcher.stop(1)
    samples = recorder.samples()
    assert len(samples.rows) > 5
    assert samples.failed.all()
    assert list(samples.errors()) == ["in the generator: KeyError: 'no such image'"]


def test_a_generator_that_cannot_keep_up_says_so() -> None:
    recorder, settings = Recorder(), read_settings({"p99_ms": 100})
    dispatcher = Dispatcher(recorder, 1000, [0])

    def busy(due: float) -> None:
        started = time.perf_counter()
        while time.perf_counter() < started + 0.02:
            pass
        record(recorder, due, started)

    watcher = watch_cpu(recorder)
    dispatcher.set(busy, 100)  # twice what one core can do
    gevent.sleep(2.5)
    dispatcher.stop(0)
    watcher.kill()
    assert len(recorder.samples().cpu) > 0
    found = inspect_generator(recorder.samples(), settings)
    assert found.is_saturated
    assert found.lag_p99_ms > 0.2 * 100


def test_a_generator_that_takes_a_core_is_saturated_even_if_nothing_is_late() -> None:
    recorder = Recorder()
    recorder.add(Outcome("r", 0.0, 0.0, 0.001, is_predict=True))
    for second in range(10):
        recorder.tick(1, float(second), 0.95 if second >= 5 else 0.1)
        recorder.tick(2, float(second), 0.1)
    assert inspect_generator(recorder.samples(), read_settings()).is_saturated
    recorder.take()
    for second in range(10):
        recorder.tick(1, float(second), 0.95 if second % 2 else 0.1)
    assert not inspect_generator(recorder.samples(), read_settings()).is_saturated
