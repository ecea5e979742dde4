"""Users of Temper for Locust: `locust -f load/locustfile.py`, with its web page, headless or distributed.

Settings are `TEMPER_LOAD_*` variables, see `load/settings.py`. A `Predictor` or `GrpcPredictor` does not send requests
itself: it adds `rate_per_user` arrivals a second to the dispatcher of its process, which starts each when it is due. So
the number of users sets the rate, and Locust's workers share the rate as they share the users.
"""

import contextlib
import io
import json
import secrets
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # Locust runs this file by its path, and looks for modules beside it
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gevent
import gevent.event
import locust.stats
import numpy as np
from locust import HttpUser, User, between, constant, events, task
from locust.runners import MasterRunner, WorkerRunner

from load.images import Labelled, choose_images, query
from load.kit import Kit, Watch
from load.objectives import judge
from load.samples import Outcome
from load.settings import LoadSettings, make_folder, read_settings
from load.summary import AWAY, Run, present
from load.target import RequestFailed, headers

PREFIX, LABEL = "load-", "load"  # of the models that users publish, and the label that they move; they touch no others
JOB_TIMEOUT_S = 300.0
STOP, DONE = "temper_load_stop", "temper_load_done"  # messages between Locust's master and workers
IMAGES: dict[str, Labelled] = {}
if not __package__:  # while they are made, no worker could answer its master, so they are there before it connects
    try:
        IMAGES, _missing = choose_images(read_settings())
    except ValueError as exc:
        sys.exit(f"Error: {exc}")
    for _kind, _why in _missing.items():
        print(f"no {_kind} images: {_why}", file=sys.stderr)
FINISHED = ("succeeded", "failed", "cancelled")
SPEC = '{"epochs": 5, "gate": {"not_worse": false}}'


def exact(response_time_ms: float) -> float:
    """Keep four digits of a time in Locust's statistics, which otherwise keep two: 1,849 ms would be 1,800."""
    return float(f"{response_time_ms:.4g}")


locust.stats.bucket_response_time = exact  # the place that Locust's documentation names for this


class Open(User):
    """A share of the open arrivals."""

    abstract = True
    wait_time = constant(1)

    def on_start(self) -> None:
        """Raise the rate."""
        self.environment.temper.add_users(type(self), 1)

    def on_stop(self) -> None:
        """Lower the rate."""
        self.environment.temper.add_users(type(self), -1)

    @task
    def stay(self) -> None:
        """Do nothing: the dispatcher sends."""


class Predictor(Open):
    """Apps that ask about one image at a time, as JSON, PNG or raw bytes, of one model or several."""

    weight = 10


class GrpcPredictor(Open):
    """An app that asks the model server itself, over gRPC."""


class ApiUser(HttpUser):
    """Someone who waits for each answer before the next request."""

    abstract = True
    wait_time = between(1, 3)

    def on_start(self) -> None:
        """Send the key and trust the certificates."""
        self.kit: Kit = self.environment.temper.kit
        self.client.headers.update(headers(self.kit.settings))
        if self.kit.settings.ca:
            self.client.verify = str(self.kit.settings.ca)

    def expect(self, model: str, version: int, images: np.ndarray, labels: list[str], chosen: str) -> None:
        """Predict with `chosen`, such as `version=2`: another version counts as skew, another class as an error."""
        asked = query(model, "bytes", "", images, labels)
        asked = replace(asked, name="POST /predict checked", path=f"{asked.path}&{chosen}", version=version)
        outcome = replace(self.kit.ask(asked), is_predict=False)
        if not outcome.error and outcome.right < len(labels):
            outcome = replace(outcome, error="the new version predicts another class")
        self.environment.temper.record(outcome)


class Finetuner(ApiUser):
    """A team: uploads a hundred labelled images, follows the events of the job and checks the new version."""

    def on_start(self) -> None:
        """Make a data set of horizontal and vertical stripes."""
        super().on_start()
        rng = np.random.default_rng(self.kit.settings.seed)
        names = np.arange(100) % 2
        stripes = np.zeros((100, 28, 28), np.uint8)
        stripes[names == 0, 8:20:4, 4:24] = 255
        stripes[names == 1, 4:24, 8:20:4] = 255
        self.images = np.clip(stripes + rng.normal(0, 30, stripes.shape), 0, 255).astype(np.uint8)
        packed = io.BytesIO()
        np.savez(packed, images=self.images, labels=np.array(["rows", "columns"])[names])
        self.upload = packed.getvalue()
        self.model, self.job = f"{PREFIX}{secrets.token_hex(4)}", ""

    def on_stop(self) -> None:
        """Remove what was published. The job may end before it is cancelled, or nothing may be published yet."""
        if self.job:
            self.answered("POST", f"/finetune/{self.job}/cancel", "/finetune/{id}/cancel", {409})
        self.answered("DELETE", f"/models/{self.model}", "/models/{model}", {404})

    def answered(self, method: str, path: str, name: str, also: set[int]) -> None:
        """Send a request that may also be answered with one of these statuses."""
        with self.client.request(method, path, name=name, catch_response=True) as answer:
            if answer.status_code in also:
                answer.success()

    @task
    def finetune(self) -> None:
        """Upload, follow, predict with the new version."""
        began, began_s = time.perf_counter(), time.time()
        files, form = {"data": ("stripes.npz", self.upload)}, {"model": self.model, "spec": SPEC}
        answer = self.client.post("/finetune", files=files, data=form)
        if not answer.ok:
            return
        self.job = answer.json()["id"]
        error, job = "", {}
        try:
            self.follow(f"/finetune/{self.job}/events", began + JOB_TIMEOUT_S)
            job = self.client.get(f"/finetune/{self.job}", name="/finetune/{id}").json()
            if job["status"] != "succeeded":
                error = f"the job has {job['status']}: {job['error']}"
        except (OSError, ValueError, KeyError) as exc:
            error = f"following the job failed: {type(exc).__name__}: {exc}"
        self.job = ""
        self.environment.temper.record(Outcome("JOB fine-tune", began_s, 0.0, time.perf_counter() - began, error))
        if not error:
            self.expect(self.model, job["version"], self.images[:2], ["rows", "columns"], f"version={job['version']}")

    def follow(self, path: str, until: float) -> None:
        """Read the stream of the job's events until one says that it has finished.

        Raises:
            OSError: the stream ends before that, or the time is up.
        """
        accepted = {"Accept": "text/event-stream"}
        with self.client.get(path, headers=accepted, stream=True, name="/finetune/{id}/events",
                             catch_response=True) as stream, contextlib.closing(stream):  # fmt: skip
            for line in stream.iter_lines(chunk_size=1):  # larger chunks would be waited for
                if line.startswith(b"data:") and json.loads(line[5:])["data"].get("status") in FINISHED:
                    return
                if time.perf_counter() > until:
                    raise TimeoutError(f"the job did not end within {JOB_TIMEOUT_S:g} s")
        raise OSError("the stream of events ended before the job did")


class Operator(ApiUser):
    """Someone on duty: lists, moves a label and rolls back, and reads the metrics."""

    @task(3)
    def look(self) -> None:
        """List models, jobs and data sets."""
        for path in ("/models", "/finetune", "/datasets"):
            self.client.get(f"{path}?limit=20", name=path)

    @task(2)
    def metrics(self) -> None:
        """Read the metrics, if the key may."""
        with self.client.get("/metrics", catch_response=True) as answer:
            if answer.status_code in (401, 403):
                answer.success()

    @task(2)
    def roll_back(self) -> None:
        """Move a label of a Finetuner's model to the newest version and back, and check each time who answers."""
        answer = self.client.get("/models?limit=100", name="/models")
        for model in answer.json()["data"] if answer.ok else []:
            if model["name"].startswith(PREFIX) and len(model["versions"]) > 1:
                for version in model["versions"][:2]:
                    self.move(model["name"], version)
                return

    def move(self, model: str, version: int) -> None:
        """Move the label, and expect the version once the tolerance is over."""
        path = f"/models/{model}/labels/{LABEL}"
        with self.client.put(path, json={"version": version}, name="/models/{model}/labels/{label}",
                             catch_response=True) as answer:  # fmt: skip
            if answer.status_code == 404:  # its Finetuner has stopped and removed it
                answer.success()
                return
        if answer.ok:
            gevent.sleep(self.kit.settings.skew_s)
            self.expect(model, version, np.zeros((1, 28, 28), np.uint8), [], f"label={LABEL}")


class Session:
    """Load from one process of Locust, or the judgement of what its workers measured."""

    def __init__(self, environment: Any, settings: LoadSettings, images: dict[str, Labelled]) -> None:
        self.environment, self.settings = environment, settings
        self.kit: Kit | None = None
        self.run: Run | None = None
        self._images = images
        self._watch: Watch | None = None
        self._began_s = 0.0
        self._unfinished: set[str] = set()  # workers that have not sent all that they measured
        self._all_sent = gevent.event.Event()
        runner, on = environment.runner, environment.events
        self._is_master, self._is_worker = isinstance(runner, MasterRunner), isinstance(runner, WorkerRunner)
        if self._is_master:
            runner.register_message(DONE, self._worker_is_done)
            on.worker_report.add_listener(lambda data, **_: self._merge(data.get(DONE)))
        if self._is_worker:
            runner.register_message(STOP, self._finish_as_worker, concurrent=True)
            on.report_to_master.add_listener(self._report)
        on.test_start.add_listener(lambda **_: self._start())
        on.test_stopping.add_listener(lambda **_: self._finish())
        on.request.add_listener(self._on_request)
        on.user_error.add_listener(self._on_user_error)

    def add_users(self, kind: type[User], users: int) -> None:
        """Raise the rate by what so many users stand for."""
        if self.kit:
            source = self._send_grpc if kind is GrpcPredictor else self._send
            self.kit.dispatcher.add(source, users * self.settings.rate_per_user)

    def record(self, outcome: Outcome) -> None:
        """Record what happened to a request, also in Locust's statistics, which its web page shows."""
        assert self.kit
        self.kit.recorder.add(outcome)
        method, _, name = outcome.name.partition(" ")
        self.environment.events.request.fire(
            request_type=method, name=name, response_time=1000 * outcome.latency_s, response_length=0,
            exception=RequestFailed(outcome.error) if outcome.error else None, context={"is_recorded": True},
        )  # fmt: skip

    def _send(self, due: float) -> None:
        assert self.kit
        self.record(self.kit.predict(due))

    def _send_grpc(self, due: float) -> None:
        assert self.kit
        self.record(self.kit.ask_model_server(due))

    def _on_request(self, request_type: str, name: str, response_time: float, exception: Any, context: Any,
                    start_time: float = 0.0, **_: Any) -> None:  # fmt: skip
        """Record a request of a user that waits for its answers."""
        if self.kit and not context.get("is_recorded"):
            error = f"{type(exception).__name__}: {exception}" if exception else ""
            self.kit.recorder.add(Outcome(f"{request_type} {name}", start_time, 0.0, response_time / 1000, error))

    def _on_user_error(self, user_instance: Any, exception: Exception, **_: Any) -> None:
        """Record that a user could not go on, which Locust only logs."""
        if self.kit:
            user = getattr(user_instance, "user", user_instance)  # it may be a set of tasks
            error = f"{type(exception).__name__}: {exception}"
            self.kit.recorder.add(Outcome(f"USER {type(user).__name__}", time.time(), 0.0, 0.0, error))

    def _start(self) -> None:
        runner = self.environment.runner
        self.run, self._began_s = None, time.time()
        if self.kit:
            self.kit.begin()
        else:
            number = max(0, runner.worker_index) if self._is_worker else 0
            images = {} if self._is_master else self._images
            self.kit = Kit(self.settings, self.environment.host or self.settings.url, images, number)
            if images and self.settings.model_server:
                self.kit.connect_model_server()
        if not self._is_worker:
            try:
                self._watch = Watch(self.kit.target, self.settings.model_names)
            except RequestFailed as exc:
                self._watch = None
                print(f"Error: {self.kit.target.url}: {exc}", file=sys.stderr)
                self.environment.process_exit_code = AWAY
                gevent.spawn(runner.quit)

    def _finish(self) -> None:
        """Wait for the answers to open requests, and for what the workers measured."""
        if not self.kit or self.run or not self._watch:
            return
        ended_s, runner = time.time(), self.environment.runner
        if self._is_master:
            self._unfinished = {client.id for client in runner.clients.all}
            self._all_sent.clear()
            runner.send_message(STOP)
            if self._unfinished and not self._all_sent.wait(2 * self.settings.timeout_s + 10):
                self._watch.notes.append(f"{len(self._unfinished)} workers did not send all that they measured")
        self.kit.end()
        grown, samples = self._watch.end(), self.kit.recorder.samples()
        objectives = judge(samples, self._watch.views, self.settings)
        self.run = Run("mixed", self.settings, samples, self._began_s, ended_s, objectives, grown, self._watch.notes)

    def _report(self, data: dict[str, Any], **_: Any) -> None:
        if self.kit:
            data[DONE] = self.kit.recorder.take()

    def _finish_as_worker(self, environment: Any, **_: Any) -> None:
        if self.kit:
            self.kit.end()
            environment.runner.send_message(DONE, self.kit.recorder.take())

    def _worker_is_done(self, msg: Any, **_: Any) -> None:
        self._merge(msg.data)
        self._unfinished.discard(msg.node_id)
        if not self._unfinished:
            self._all_sent.set()

    def _merge(self, message: Any) -> None:
        if self.kit and message:
            self.kit.recorder.merge(message)


@events.init.add_listener
def prepare(environment: Any, **_: Any) -> None:
    """Set up a process that the `locust` command started."""
    settings = read_settings()
    if not isinstance(environment.runner, WorkerRunner):
        try:
            make_folder(settings.out)
        except ValueError as exc:
            sys.exit(f"Error: {exc}")
    unused = {user for user, is_used in (
        (GrpcPredictor, settings.model_server), (Finetuner, settings.finetuners), (Operator, settings.operators)
    ) if not is_used}  # fmt: skip
    environment.user_classes[:] = [user for user in environment.user_classes if user not in unused]
    environment.temper = Session(environment, settings, IMAGES)


@events.quitting.add_listener
def conclude(environment: Any, **_: Any) -> None:
    """Print and write the summary; the objectives decide the exit code."""
    run = environment.temper.run
    if run:
        environment.process_exit_code = present(run)
