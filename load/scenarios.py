"""The scenarios: what is sent, when, and which figure decides.

Four are MLPerf-style (Reddi et al., MLPerf Inference Benchmark, 2020): the same rules for when queries are sent and how
many are needed for a verdict. They are not MLPerf results, because the official LoadGen is not used.
"""

import contextlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
import gevent.pool
import numpy as np

from load.confidence import is_shown, least_queries, most_over, percentile, upper_estimate
from load.images import Labelled, save_images
from load.kit import Kit, Watch
from load.objectives import Objective, at_least, at_most, error_share, inspect_generator, judge, skewed
from load.samples import Samples
from load.settings import LoadSettings, variables
from load.summary import Run, Step
from load.target import RequestFailed

USERS = 10  # at least so many Predictors share the rate
STREAM_IMAGES = 8  # in a query of MultiStream
OFFLINE_IMAGES, OFFLINE_OPEN = 256, 8  # in a query of Offline, and queries that are under way at a time
RESOLUTION = 1.05  # of the highest rate
GROWTH = 1.5  # from one rate to the next of find-max
WORKERS_READY_S = 60.0


class WorkersNotStarted(Exception):
    """The processes that should send did not start, or ended."""


@dataclass(frozen=True)
class Call:
    """What a scenario is called with."""

    settings: LoadSettings
    url: str
    images: dict[str, Labelled]
    say: Callable[[str], None]

    @contextlib.contextmanager
    def watched(self) -> Iterator[tuple[Kit, Watch]]:
        """The parts of this process, with the labels and the server's times being watched."""
        kit = Kit(self.settings, self.url, self.images)
        watch = Watch(kit.target, self.settings.model_names)
        try:
            yield kit, watch
        finally:
            kit.end()
            kit.target.close()

    def run(
        self, name: str, kit: Kit, watch: Watch, began_s: float, objectives: Callable[[Samples], list[Objective]],
        **others: Any,
    ) -> Run:  # fmt: skip
        """The outcome of a scenario that has sent everything."""
        ended_s = time.time()
        kit.end()
        grown, samples = watch.end(), kit.recorder.samples()
        return Run(name, self.settings, samples, began_s, ended_s, objectives(samples), grown, watch.notes, **others)


def mixed(call: Call) -> Run:
    """Open arrivals at --rate, beside users that fine-tune and operate."""
    return _with_users(call, "mixed", lambda set_factor: _pass(call.settings.duration_s))


def spike(call: Call) -> Run:
    """A third of the time at --rate, a sixth at --spike-factor times it, and the rest at --rate again."""
    duration, factor = call.settings.duration_s, call.settings.spike_factor

    def phases(set_factor: Callable[[float], None]) -> None:
        _pass(duration / 3)
        set_factor(factor)
        _pass(duration / 6)
        set_factor(1)
        _pass(duration / 2)

    run = _with_users(call, "spike", phases)
    over_s = run.began_s + duration / 2
    run.figures["recovery_s"] = recovery_s(run.samples, over_s, call.settings.p95_ms)
    return run


def soak(call: Call) -> Run:
    """Like mixed, for long; compares the last quarter with the first."""
    run = _with_users(call, "soak", lambda set_factor: _pass(call.settings.duration_s))
    quarter = (run.ended_s - run.began_s) / 4
    parts = ((run.began_s, run.began_s + quarter), (run.ended_s - quarter, run.ended_s))
    for name, (start, end) in zip(("first_quarter_p95_ms", "last_quarter_p95_ms"), parts, strict=True):
        latency_s = run.samples.predictions.between(start, end).rows["latency_s"]
        run.figures[name] = 1000 * percentile(latency_s, 0.95)
    return run


def recovery_s(samples: Samples, over_s: float, bound_ms: float) -> float:
    """Seconds from `over_s` until the last second whose 95th percentile was above the bound has passed."""
    rows = samples.predictions.rows
    second = np.floor(rows["due_s"] - over_s)
    late = [
        number for number in np.unique(second[second >= 0])
        if 1000 * percentile(rows["latency_s"][second == number], 0.95) > bound_ms
    ]  # fmt: skip
    return float(max(late) + 1) if late else 0.0


def single_stream(call: Call) -> Run:
    """One image a query, the next when the one before is answered: the 90th percentile, with 99% confidence."""
    return _stream(call, "single-stream", 1, 0.90, call.settings.p90_ms)


def multi_stream(call: Call) -> Run:
    """Eight images a query, the next when the one before is answered: the 99th percentile, with 99% confidence."""
    return _stream(call, "multi-stream", STREAM_IMAGES, 0.99, call.settings.p99_ms)


def _stream(call: Call, name: str, size: int, share: float, bound_ms: float) -> Run:
    with call.watched() as (kit, watch):
        began_s, until, sent = time.time(), time.perf_counter() + call.settings.duration_s, 0
        least = least_queries(0, share)
        while time.perf_counter() < until or sent < least:
            kit.recorder.add(kit.ask(kit.batch(size, sent * size)))
            sent += 1

        def objectives(samples: Samples) -> list[Objective]:
            latency_ms = np.where(samples.failed, math.inf, 1000 * samples.rows["latency_s"])
            estimate = upper_estimate(latency_ms, share)
            named = f"p{100 * share:.0f} with 99% confidence"
            return [at_most(named, estimate, bound_ms, "ms"), *_answers(samples, watch, call.settings)]

        return call.run(name, kit, watch, began_s, objectives)


def _answers(samples: Samples, watch: Watch, settings: LoadSettings) -> list[Objective]:
    return [
        at_most("errors", error_share(samples), settings.error_share, "share"),
        at_most("version skew", len(skewed(samples, watch.views, settings)), 0, "answers"),
    ]


def offline(call: Call) -> Run:
    """All images at once, as many as about fill --duration-s: images a second."""
    with call.watched() as (kit, watch):
        pool = gevent.pool.Pool(OFFLINE_OPEN)

        def send(number: int, due: float) -> None:
            kit.recorder.add(kit.ask(kit.batch(OFFLINE_IMAGES, number * OFFLINE_IMAGES), due))

        def send_all(queries: int) -> float:
            """Seconds until all of them, which are due now, are answered."""
            due = time.perf_counter()
            for number in range(queries):
                pool.spawn(send, number, due)
            pool.join()
            return time.perf_counter() - due

        call.say("offline: how many images fill the time?")
        send_all(OFFLINE_OPEN)  # warms up
        tried, tried_s = 2 * OFFLINE_OPEN, send_all(2 * OFFLINE_OPEN)
        queries = max(OFFLINE_OPEN, round(tried / tried_s * call.settings.duration_s))
        call.say(f"offline: {queries * OFFLINE_IMAGES:,} images")
        kit.end()
        kit.begin()
        began_s = time.time()
        took_s = send_all(queries)
        images_per_s = queries * OFFLINE_IMAGES / took_s
        return call.run(
            "offline", kit, watch, began_s, lambda samples: _answers(samples, watch, call.settings),
            figures={"images": queries * OFFLINE_IMAGES, "images_per_s": images_per_s}, is_closed=True,
        )  # fmt: skip


def server(call: Call) -> Run:
    """Open arrivals: the highest rate whose 99th percentile is within --p99-ms with 99% confidence, by bisection.

    Failed and dropped requests count as over the bound. Each rate is judged once, after all its queries: looking again
    and again until it passes would let it pass by chance.
    """
    bound_s = call.settings.p99_ms / 1000

    def judged(samples: Samples) -> tuple[bool, str]:
        rows = samples.rows
        over = int(((rows["latency_s"] > bound_s) | samples.failed).sum()) + len(samples.dropped_s)
        queries = len(rows) + len(samples.dropped_s)
        return is_shown(over, queries, 0.99), f"{over} of {queries} over the bound, at most {most_over(queries, 0.99)}"

    def search(probe: Callable[[float], bool], first: float, highest: float) -> None:
        if probe(first):
            low = high = first
            while low == high:
                if low >= highest:
                    return
                high = min(highest, 2 * low)
                low = high if probe(high) else low
        else:
            high, low = first, first / 2
            while not probe(low):
                high, low = low, low / 2
                if low < first / 16:
                    return
        while high / low > RESOLUTION:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if probe(middle) else (low, middle)

    return _search(call, "server", judged, search, least_queries(1, 0.99))


def find_max(call: Call) -> Run:
    """Open arrivals, half as many again in each step, until an objective is missed: the highest rate before that."""

    def judged(samples: Samples) -> tuple[bool, str]:
        wanted = [one for one in judge(samples, [], call.settings) if one.name in ("p95", "p99", "errors")]
        missed = [f"{one.name} {one.value:.4g}" for one in wanted if not one.is_kept]
        return not missed, ", ".join(missed)

    def search(probe: Callable[[float], bool], first: float, highest: float) -> None:
        rate = first
        while probe(rate) and rate < highest:
            rate = min(highest, GROWTH * rate)

    return _search(call, "find-max", judged, search, 0)


def _search(
    call: Call, name: str, judged: Callable[[Samples], tuple[bool, str]],
    search: Callable[[Callable[[float], bool], float, float], None], least: int,
) -> Run:  # fmt: skip
    """Try rates. The objective is that the highest one that passes is at least --rate."""
    steps: list[Step] = []
    with call.watched() as (kit, watch):
        began_s = time.time()

        def send(due: float) -> None:
            kit.recorder.add(kit.predict(due))

        def probe(rate: float) -> bool:
            start_s = time.time()
            kit.dispatcher.set(send, rate)
            gevent.sleep(max(call.settings.duration_s, least / rate))
            kit.dispatcher.stop(2 * call.settings.timeout_s + 1)  # the next rate begins without a backlog
            samples = kit.recorder.samples().between(start_s, time.time())
            passed, why = judged(samples)
            # A saturated generator makes latencies longer, so that a rate which passes all the same has passed.
            is_saturated = not passed and inspect_generator(samples, call.settings).is_saturated
            steps.append(Step.of(rate, passed, is_saturated, why, samples))
            call.say(f"{name}: {steps[-1].text}")
            return steps[-1].is_kept

        search(probe, min(call.settings.rate, call.settings.max_rate), call.settings.max_rate)
        best = max((step.rate for step in steps if step.is_kept), default=0.0)
        above = min((step for step in steps if step.rate > best), key=lambda step: step.rate, default=None)
        if above is None:
            watch.notes.append(f"the highest rate is at least {best:.4g}/s, which is as far as --max-rate goes")
        is_saturated = above is not None and above.is_saturated
        if is_saturated:
            watch.notes.append(f"the generator, not the service, ended the search at {best:.4g}/s")
        return call.run(
            name, kit, watch, began_s,
            lambda samples: [
                at_least("highest rate", best, call.settings.rate, "requests/s"),
                at_most("version skew", len(skewed(samples, watch.views, call.settings)), 0, "answers"),
            ],
            steps=steps, figures={"highest_rate_per_s": best},
            is_saturated=is_saturated and best < call.settings.rate,
        )  # fmt: skip


def _pass(seconds: float) -> None:
    gevent.sleep(seconds)


def _with_users(call: Call, name: str, phases: Callable[[Callable[[float], None]], None]) -> Run:
    """Run Locust's users, here or in --workers, through phases that may multiply the rate of the Predictors."""
    from locust.env import Environment

    from load import locustfile as users

    settings = call.settings
    predictors = max(USERS, settings.workers)
    settings = settings.model_copy(update={"rate_per_user": settings.rate / predictors})
    users.Predictor.fixed_count = 0
    users.GrpcPredictor.fixed_count = max(1, round(settings.grpc_rate / settings.rate_per_user))
    users.Finetuner.fixed_count, users.Operator.fixed_count = settings.finetuners, settings.operators
    others = [user for user, is_used in (
        (users.GrpcPredictor, settings.model_server and settings.grpc_rate), (users.Finetuner, settings.finetuners),
        (users.Operator, settings.operators),
    ) if is_used]  # fmt: skip
    fixed = sum(user.fixed_count for user in others)
    environment = Environment(user_classes=[users.Predictor, *others], host=call.url)
    with contextlib.ExitStack() as stack:
        if settings.workers:
            _start_workers(environment, stack, settings, call)
        else:
            environment.create_local_runner()
        environment.temper = session = users.Session(environment, settings, call.images)
        runner = environment.runner
        stack.callback(runner.quit)

        def set_factor(factor: float) -> None:
            runner.start(fixed + round(predictors * factor), spawn_rate=100)

        set_factor(1)
        interrupted = None
        try:
            phases(set_factor)
        except KeyboardInterrupt:
            interrupted = "the run was interrupted; this is what was measured until then"
        runner.stop()
        if session.run is None:
            raise RequestFailed("the service went away as the run began")
        session.run.notes += [interrupted] if interrupted else []
        session.run.scenario = name
        return session.run


def _start_workers(environment: Any, stack: contextlib.ExitStack, settings: LoadSettings, call: Call) -> None:
    """Start processes that send, and a master for them on loopback; they end with the stack.

    Raises:
        WorkersNotStarted: one of them ended, or they were not ready in time.
    """
    from store.processes import end_with_parent, free_port

    port = free_port()
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
    save_images(folder / "images.npz", call.images)
    runner = environment.create_master_runner("127.0.0.1", port)
    command = [
        sys.executable, "-m", "locust", "--worker", "--master-host", "127.0.0.1", "--master-port", str(port),
        "--loglevel", "WARNING", "-f", str(Path(__file__).with_name("locustfile.py")),
    ]  # fmt: skip
    told = {"TEMPER_LOAD_URL": call.url, "TEMPER_LOAD_PREPARED": str(folder / "images.npz")}
    processes = []
    for _ in range(settings.workers):
        process = subprocess.Popen(
            command, env=os.environ | variables(settings) | told, preexec_fn=end_with_parent, stdin=subprocess.DEVNULL
        )
        stack.callback(process.wait, 30)
        stack.callback(process.terminate)
        processes.append(process)
    until = time.monotonic() + WORKERS_READY_S
    while len(runner.clients.ready) < settings.workers:
        if any(process.poll() is not None for process in processes) or time.monotonic() > until:
            raise WorkersNotStarted(f"{settings.workers - len(runner.clients.ready)} workers did not start")
        gevent.sleep(0.05)


SCENARIOS: dict[str, Callable[[Call], Run]] = {
    "mixed": mixed, "single-stream": single_stream, "multi-stream": multi_stream, "server": server, "offline": offline,
    "spike": spike, "soak": soak, "find-max": find_max,
}  # fmt: skip
