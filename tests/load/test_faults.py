"""Each objective breaks when a real service is made slow, wrong or failing, and no other does."""

import itertools
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import gevent
import httpx
import pytest

from load.images import Labelled, adversarial, digits, noisy
from load.kit import Kit, Watch
from load.objectives import Objective, judge
from load.samples import Samples
from load.settings import read_settings
from load.target import RequestFailed, Target
from tests.conftest import Service

RATE, SECONDS = 80.0, 2.5
SLOW_S = 3.5


class Between(ThreadingHTTPServer):
    """Passes requests on to a service, and spoils the answers to predictions."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, url: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault, self.numbers = "", itertools.count()
        self.behind = httpx.Client(base_url=url, timeout=30, limits=httpx.Limits(max_connections=None))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Between

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.pass_on("")

    def do_POST(self) -> None:
        self.pass_on(self.server.fault)

    def pass_on(self, fault: str) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        kept = {name: value for name, value in self.headers.items() if name.lower() in ("content-type", "x-api-key")}
        answer = self.server.behind.request(self.command, self.path, content=body, headers=kept)
        status, content = answer.status_code, answer.content
        is_chosen = next(self.server.numbers) % 10 == 0
        if fault == "slow" and is_chosen:
            time.sleep(SLOW_S)
        elif fault == "failing" and is_chosen:
            status, content = 503, json.dumps({"error": {"code": "overloaded"}}).encode()
        elif fault == "closing" and is_chosen:
            self.close_connection = True
            return
        elif fault in ("wrong", "stale", "garbled"):
            found = answer.json()
            if fault == "wrong":
                found["predictions"][0]["label"] = "another"
            elif fault == "stale" and is_chosen:
                found["version"] += 1
            elif fault == "garbled" and is_chosen:
                del found["predictions"]
            content = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def between(service: Service) -> Iterator[Between]:
    server = Between(service.url)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
    server.behind.close()


@pytest.fixture(scope="module")
def images() -> dict[str, Labelled]:
    every = digits()
    clean = Labelled(every.images[:200], every.labels[:200])
    return {"clean": clean, "noisy": noisy(clean, 0.2, 0)}


LIMITS = {
    "p95_ms": 2500, "p99_ms": 3000, "requests": 100, "accuracy": 0.8, "noisy_accuracy": 0.4, "kinds": "clean=1,noisy=1",
    "error_share": 0.01, "timeout_s": 10,
}  # fmt: skip


def measured(url: str, images: dict[str, Labelled], **given: Any) -> tuple[Samples, dict[str, Objective]]:
    settings = read_settings(LIMITS | given)
    kit = Kit(settings, url, images)
    watch = Watch(kit.target, settings.model_names)
    kit.dispatcher.set(lambda due: kit.recorder.add(kit.predict(due)), RATE)
    gevent.sleep(SECONDS)
    kit.end()
    watch.end()
    kit.target.close()
    samples = kit.recorder.samples()
    return samples, {one.name: one for one in judge(samples, watch.views, settings)}


@pytest.mark.parametrize(
    ("fault", "missed"),
    [
        ("", set()),
        ("slow", {"p95", "p99"}),
        ("wrong", {"accuracy, clean", "accuracy, noisy"}),
        ("failing", {"errors"}),
        ("closing", {"errors"}),
        ("garbled", {"errors"}),
        ("stale", {"version skew"}),
    ],
)
def test_a_fault_of_the_service_breaks_its_objective(
    between: Between, images: dict[str, Labelled], fault: str, missed: set[str]
) -> None:
    between.fault = fault
    samples, objectives = measured(between.url, images)
    assert {name for name, one in objectives.items() if not one.is_kept} == missed, (objectives, samples.errors())
    assert set(samples.predictions.text("name")) == {f"POST /predict {form}" for form in ("json", "png", "bytes")}


@pytest.mark.slow
def test_too_few_requests_break_the_objective_for_their_number(service: Service, images: dict[str, Labelled]) -> None:
    _, objectives = measured(service.url, images, requests=100_000)
    assert {name for name, one in objectives.items() if not one.is_kept} == {"requests"}


@pytest.mark.slow
def test_a_version_that_had_to_answer_and_did_not_is_skew(between: Between, images: dict[str, Labelled]) -> None:
    between.fault = "stale"
    _, objectives = measured(between.url, images, version=1)
    assert not objectives["version skew"].is_kept


def test_the_servers_own_times_fit_into_those_that_the_generator_saw(
    service: Service, images: dict[str, Labelled]
) -> None:
    from load.scenarios import Call, single_stream

    settings = read_settings(LIMITS | {"duration_s": 0.5, "kinds": "clean=1"})
    run = single_stream(Call(settings, service.url, images, lambda _: None))
    times = run.server_ms()
    assert times is not None
    assert all(times[name] > 0 for name in ("queue", "model", "gateway", "network"))
    latency_ms = 1000 * run.samples.rows["latency_s"].mean()
    assert sum(times[name] for name in ("queue", "model", "gateway", "network")) == pytest.approx(latency_ms, rel=0.05)
    assert times["batch_images"] == 1
    assert times["model"] > times["queue"]  # nobody else asks
    assert run.objectives[0].name == "p90 with 99% confidence"
    assert len(run.samples.rows) >= 44


def test_an_unknown_model_is_an_error_with_its_code(service: Service) -> None:
    target = Target(read_settings(), service.url)
    with pytest.raises(RequestFailed, match="404 unknown_model") as caught:
        Watch(target, ["no-such-model"])
    assert (caught.value.status, caught.value.code) == (404, "unknown_model")
    target.close()


@pytest.mark.slow
def test_adversarial_images_stay_within_epsilon_and_fool_the_base(
    service: Service, images: dict[str, Labelled]
) -> None:
    made = adversarial(images["clean"], 0.1)
    change = abs(made.images.astype(int) - images["clean"].images).max()
    assert 0 < change <= 0.1 * 255
    _, objectives = measured(
        service.url, {"adversarial": made}, kinds="adversarial=1", accuracy=None, noisy_accuracy=None,
        adversarial_accuracy=0.5,
    )  # fmt: skip
    assert {name for name, one in objectives.items() if not one.is_kept} == {"accuracy, adversarial"}


def test_adversarial_images_of_unknown_classes_are_refused(images: dict[str, Labelled]) -> None:
    with pytest.raises(ValueError, match="does not know the class 'cat'"):
        adversarial(Labelled(images["clean"].images[:1], ["cat"]), 0.1)
