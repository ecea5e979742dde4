"""`make torture SECONDS=600`: kill, freeze and stop real processes at random while clients fine-tune and predict.

A `temper serve` with a worker runs in a temporary home, and beside it a second gateway and a second worker that nobody
supervises, so that a worker can come back after it was taken for dead. When the time is up everything may settle, and
then nothing that was acknowledged may be missing, done twice or half there. The seed fixes what is done to whom; when
exactly it hits depends on the machine.
"""

import collections
import contextlib
import json
import os
import random
import secrets
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import httpx
import numpy as np

from demo import class_folders
from quality.digits import all_digits
from serving.publishing import Probe, check_files
from store.processes import end_with_parent, free_port

MODELS = ("a", "b", "c")
SPECS = (
    {"epochs": 2, "method": "head"},
    {"epochs": 20, "method": "full"},
    {"epochs": 4, "adversarial": {"attack": "fgsm", "epsilon": 0.1}},
    {"epochs": 1, "search": {"trials": 2, "preview": True}},
)
OPEN_JOBS = 6  # at most, at a time
SETTLE_S = 240.0  # how long everything may take to settle
FINISHED = ("succeeded", "failed", "cancelled")
# The kinds of processes by the module that they run, and how likely each is hit.
VICTIMS = {"trainer": 5, "api": 3, "serving": 2, "cli": 1}
NAMES = {"trainer": "a worker", "api": "a gateway", "serving": "the model server", "cli": "the supervisor"}
BLOWS = {"kill": 5, "freeze": 4, "freeze for long": 3, "terminate": 3, "kill all": 1}
PAUSES_S = {"freeze": (0.5, 5.0), "freeze for long": (12.0, 18.0)}  # a worker is taken for dead after 10
EXPECTED = {429, 502, 503, 504}  # of predictions while parts are away


@dataclass
class Service:
    """All processes of a home, started again whenever they end."""

    home: Path
    ports: tuple[int, int] = field(default_factory=lambda: (free_port(), free_port()))
    stopped: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("TEMPER_")}
        self._environment = {
            **clean, "TEMPER_HOME": str(self.home), "TEMPER_ATTACK_IMAGES": "16", "TEMPER_MODEL_SERVER": "embedded",
            "TEMPER_KEEP_VERSIONS": "4",
        }  # fmt: skip
        beside = {"TEMPER_MODEL_SERVER": f"unix:{self.home / 'run' / 'model_server.sock'}"}
        self._commands: list[tuple[list[str], dict[str, str]]] = [
            (["cli", "serve", "--port", str(self.ports[0])], {}),
            (["api"], {**beside, "TEMPER_PORT": str(self.ports[1])}),
            (["trainer"], beside),
        ]
        self._running: list[subprocess.Popen[bytes] | None] = [None] * len(self._commands)

    def keep_running(self) -> None:
        """Start what has ended; runs until `stopped`."""
        with (self.home / "log").open("ab") as log:
            while not self.stopped.is_set():
                for number, (command, more) in enumerate(self._commands):
                    process = self._running[number]
                    if process is None or process.poll() is not None:
                        self._running[number] = subprocess.Popen(
                            [sys.executable, "-m", *command], env={**self._environment, **more}, stdout=log, stderr=log,
                            preexec_fn=end_with_parent,
                        )  # fmt: skip
                self.stopped.wait(1.0)

    def processes(self) -> dict[int, str]:
        """The module that every process of this home runs, by its id."""
        found = {}
        ours = f"TEMPER_HOME={self.home}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal() and int(entry.name) != os.getpid():
                with contextlib.suppress(OSError):
                    if ours in (entry / "environ").read_bytes().split(b"\0"):
                        words = (entry / "cmdline").read_bytes().split(b"\0")
                        found[int(entry.name)] = words[2].decode() if words[1:2] == [b"-m"] else ""
        return found

    def signal(self, pid: int, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)

    def stop(self) -> None:
        """End everything, also what is frozen."""
        self.stopped.set()
        for number in (signal.SIGCONT, signal.SIGTERM):
            for pid in self.processes():
                self.signal(pid, number)
        patience = time.monotonic() + 20.0
        while (left := self.processes()) and time.monotonic() < patience:
            for process in self._running:
                if process is not None:
                    process.poll()
            time.sleep(0.1)
        for pid in left:
            self.signal(pid, signal.SIGKILL)
        for process in self._running:
            if process is not None:
                process.wait()


@dataclass
class Clients:
    """What is asked of the service, and what it has promised."""

    service: Service
    seed: int
    over: threading.Event = field(default_factory=threading.Event)
    acknowledged: dict[str, str] = field(default_factory=dict)  # models of jobs
    cancelled: set[str] = field(default_factory=set)  # whose cancellation was acknowledged, or may have been
    answers: collections.Counter[str] = field(default_factory=collections.Counter)  # to predictions
    wrong: list[str] = field(default_factory=list)
    status: dict[str, str] = field(default_factory=dict)  # of jobs, as last seen

    def __post_init__(self) -> None:
        self.chance = random.Random(f"clients {self.seed}")
        self._gateways = [httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) for port in self.service.ports]

    def ask(self, method: str, path: str, **more: Any) -> httpx.Response | None:
        """An answer of either gateway, or None if it died before it gave one."""
        with contextlib.suppress(httpx.TransportError):
            return random.choice(self._gateways).request(method, path, **more)
        return None

    def predict(self) -> None:
        """Predict all the time."""
        images, _ = all_digits()
        while not self.over.is_set():
            model, count = random.choice(("lenet5", *MODELS)), random.randint(1, 8)
            body = {"model": model, "range": "byte", "instances": images[:count].tolist()}
            answer = self.ask("POST", "/predict", json=body)
            kind = "no connection" if answer is None else str(answer.status_code)
            self.answers[kind] += 1
            if answer is None:
                self.over.wait(0.2)
            elif answer.status_code == 200:
                if len(answer.json()["predictions"]) != count:
                    self.wrong.append(f"{model}: another number of predictions than images")
            elif answer.status_code not in EXPECTED and not (answer.status_code == 404 and model != "lenet5"):
                self.wrong.append(f"{model}: {answer.status_code} {answer.text[:200]}")
            self.over.wait(0.02)

    def finetune(self) -> None:
        """Upload, cancel, delete and move labels."""
        images, labels = all_digits()
        uploads = [class_folders(images[at : at + 60], labels[at : at + 60]) for at in (0, 60, 120)]
        while not self.over.wait(self.chance.uniform(0.2, 1.0)):
            self.look()
            chosen = self.chance.random()
            waiting = [job_id for job_id in self.acknowledged if self.status.get(job_id) not in FINISHED]
            model = self.chance.choice(MODELS)
            if chosen < 0.75:
                if len(waiting) < OPEN_JOBS:
                    self.submit(self.chance.choice(uploads), model)
            elif chosen < 0.85:
                if waiting:
                    job_id = self.chance.choice(waiting)
                    self.cancelled.add(job_id)
                    self.ask("POST", f"/finetune/{job_id}/cancel")
            elif chosen < 0.95:
                number = self.chance.randint(1, 30)
                self.ask("PUT", f"/models/{model}/labels/canary", json={"version": number, "weight": 0.2})
                self.ask("DELETE", f"/models/{model}/versions/{self.chance.randint(1, 30)}")
            elif chosen < 0.97:
                self.ask("DELETE", f"/models/{model}")

    def submit(self, upload: bytes, model: str) -> None:
        label = "canary" if self.chance.random() < 0.2 else "stable"
        form = {"model": model, "label": label, "spec": json.dumps(self.chance.choice(SPECS))}
        answer = self.ask("POST", "/finetune", data=form, files={"data": ("data.zip", upload)})
        if answer is not None and answer.status_code == 202:
            self.acknowledged[answer.json()["id"]] = model
        elif answer is not None and answer.status_code not in EXPECTED:
            self.wrong.append(f"POST /finetune: {answer.status_code} {answer.text[:200]}")

    def look(self) -> None:
        """Ask how the jobs stand."""
        for job_id in self.acknowledged:
            if self.status.get(job_id) not in FINISHED:
                answer = self.ask("GET", f"/finetune/{job_id}")
                if answer is not None and answer.status_code == 404:
                    self.wrong.append(f"{job_id} was acknowledged and is unknown")
                elif answer is not None and answer.status_code == 200:
                    self.status[job_id] = answer.json()["status"]

    def open(self) -> int:
        return sum(self.status.get(job_id) not in FINISHED for job_id in self.acknowledged)


@dataclass
class Tormentor:
    """Hits processes at random."""

    service: Service
    chance: random.Random
    over: threading.Event
    blows: collections.Counter[str] = field(default_factory=collections.Counter)

    def run(self) -> None:
        while not self.over.wait(self.chance.uniform(0.5, 6.0)):
            (blow,) = self.chance.choices(list(BLOWS), list(BLOWS.values()))
            (module,) = self.chance.choices(list(VICTIMS), list(VICTIMS.values()))
            which, share = self.chance.random(), self.chance.random()
            there = self.service.processes()
            victims = sorted(pid for pid, found in there.items() if found == module)
            if blow == "kill all":
                self.blows[blow] += 1
                for pid in there:
                    self.service.signal(pid, signal.SIGKILL)
            elif victims:
                self.blows[f"{blow} {NAMES[module]}"] += 1
                self.hit(blow, victims[int(which * len(victims))], share)

    def hit(self, blow: str, pid: int, share: float) -> None:
        if blow in PAUSES_S:
            least, most = PAUSES_S[blow]
            self.service.signal(pid, signal.SIGSTOP)
            thaw = threading.Timer(least + share * (most - least), self.service.signal, (pid, signal.SIGCONT))
            thaw.daemon = True  # when it is over, everything is woken up at once
            thaw.start()
        else:
            self.service.signal(pid, signal.SIGKILL if blow == "kill" else signal.SIGTERM)


def settle(clients: Clients, tell: Callable[[str], None]) -> list[str]:
    """Wait until every job has finished and everything answers; returns what is still wrong."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        clients.look()
        wrong = [f"{job_id} is {status}" for job_id in clients.acknowledged
                 if (status := clients.status.get(job_id, "unseen")) not in FINISHED]  # fmt: skip
        if not wrong:
            wrong = unsettled(clients.service)
        if not wrong or time.monotonic() > deadline:
            return wrong
        tell(f"settling: {wrong[0]}")
        time.sleep(1.0)


def unsettled(service: Service) -> list[str]:
    """What is not in order yet: gateways that are not ready, and leftovers on disk."""
    wrong = []
    for port in service.ports:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=20)
            if answer.status_code != 200 or set(answer.json()["model_servers"].values()) != {"ok"}:
                wrong.append(f"/readyz: {answer.text}")
        except httpx.TransportError as exc:
            wrong.append(f"/readyz: {exc!r}")
    if wrong:
        return wrong
    with rows(service.home) as query:
        if not query("SELECT 1 FROM versions WHERE live AND model = 'lenet5'"):
            wrong.append("the base is not published")
        wrong += [f"{model}:{number} is neither live nor gone"
                  for model, number in query("SELECT model, version FROM versions WHERE NOT live")]  # fmt: skip
    wrong += [f"staging/{path.name} is left" for path in (service.home / "staging").glob("ftjob-*")]
    return wrong


@contextlib.contextmanager
def rows(home: Path) -> Iterator[Callable[[str], list[Any]]]:
    """Query the store."""
    with contextlib.closing(sqlite3.connect(f"file:{home / 'temper.db'}?mode=ro", uri=True, timeout=30)) as store:
        yield lambda query: store.execute(query).fetchall()


def check(clients: Clients) -> tuple[list[str], str]:
    """What is wrong after everything has settled, and a summary."""
    home, wrong = clients.service.home, []
    with rows(home) as query:
        jobs = {row[0]: row[1:] for row in query("SELECT id, status, version, preview_version, error FROM jobs")}
        told = query("SELECT job, seq, type, data FROM events ORDER BY job, seq")
        versions = query("SELECT model, version, job_id, manifest FROM versions WHERE live")
        labels = query("SELECT model, label, version FROM labels")
    wrong += [f"{job_id} was acknowledged and is lost" for job_id in clients.acknowledged if job_id not in jobs]
    made: collections.Counter[str] = collections.Counter()
    for model, number, job_id, manifest in versions:
        if model != "lenet5" and not json.loads(manifest)["preview"]:
            made[job_id] += 1
            if jobs[job_id][:2] != ("succeeded", number):
                wrong.append(f"{model}:{number} is live, and its job {job_id} {jobs[job_id]}")
    wrong += [f"{job_id} was done {count} times" for job_id, count in made.items() if count > 1]
    ended = collections.Counter(
        job_id for job_id, _, kind, data in told if kind == "status" and json.loads(data)["status"] in FINISHED
    )
    wrong += [f"{job_id} ended {ended[job_id]} times" for job_id in jobs if ended[job_id] != 1]
    numbers: dict[str, list[int]] = {}
    for job_id, seq, _, _ in told:
        numbers.setdefault(job_id, []).append(seq)
    wrong += [f"events of {name} have gaps" for name, seq in numbers.items() if seq != list(range(1, len(seq) + 1))]
    for job_id, (status, _, _, error) in jobs.items():
        if status == "failed" and json.loads(error)["code"] != "worker_lost":
            wrong.append(f"{job_id} failed: {error}")
        if status == "cancelled" and job_id in clients.acknowledged and job_id not in clients.cancelled:
            wrong.append(f"{job_id} was cancelled by nobody")
    live = {(model, number) for model, number, _, _ in versions}
    wrong += [f"{model}@{label} points to {number}" for model, label, number in labels if (model, number) not in live]
    on_disk = {(path.parent.name, int(path.name)) for path in (home / "models").glob("*/*")}
    wrong += [f"{model}/{number} is on disk and not live" for model, number in sorted(on_disk - live)]
    wrong += [problem for version in sorted(live) for problem in unlike(clients.service, *version)]
    states = collections.Counter(status for status, *_ in jobs.values())
    by_state = ", ".join(f"{count} {status}" for status, count in sorted(states.items()))
    return wrong, f"{len(clients.acknowledged)} jobs acknowledged; {by_state}; {len(live)} versions live"


def unlike(service: Service, model: str, number: int) -> list[str]:
    """How a version answers unlike it was trained to."""
    place, wrong = service.home / "models" / model / str(number), []
    try:
        check_files(place)
        probe = Probe.load(place)
        scores = np.exp(probe.logits - probe.logits.max(1, keepdims=True))
        for port in service.ports:
            answer = httpx.post(
                f"http://127.0.0.1:{port}/predict?model={model}&version={number}", content=probe.pixels.tobytes(),
                headers={"Content-Type": "application/octet-stream"}, timeout=30,
            )  # fmt: skip
            found = np.array([prediction["probabilities"] for prediction in answer.json()["predictions"]])
            if not np.allclose(found, scores / scores.sum(1, keepdims=True), atol=1e-3):
                wrong.append(f"{model}:{number} answers otherwise than it was trained to")
    except Exception as exc:
        wrong.append(f"{model}:{number}: {exc!r}")
    return wrong


@click.command()
@click.option("--seconds", default=600, show_default=True, help="How long to go on before everything may settle.")
@click.option("--seed", type=int, help="Of what is done to whom; printed, and chosen at random without it.")
def main(seconds: int, seed: int | None) -> None:
    """Kill, freeze and stop the processes of a service for a while; exits with 1 if anything is lost or done twice."""
    seed = secrets.randbelow(10**6) if seed is None else seed
    click.echo(f"torture for {seconds} s, seed {seed}")
    home = Path(tempfile.mkdtemp(prefix="torture-"))
    service = Service(home)
    clients = Clients(service, seed)
    tormentor = Tormentor(service, random.Random(f"blows {seed}"), clients.over)
    began = time.monotonic()

    def tell(what: str) -> None:
        click.echo(f"{time.monotonic() - began:5.0f} s  {what}")

    threads = [threading.Thread(target=act) for act in (clients.predict, clients.finetune, tormentor.run)]
    keeper = threading.Thread(target=service.keep_running)
    try:
        keeper.start()
        while wrong := unsettled(service):
            if time.monotonic() - began > SETTLE_S:
                sys.exit(f"the service does not start: {wrong[0]}")
            time.sleep(1.0)
        tell("the service is ready")
        started = time.monotonic()
        for thread in threads:
            thread.start()
        while (left := started + seconds - time.monotonic()) > 0:
            time.sleep(min(10.0, left))
            tell(
                f"{len(clients.acknowledged)} jobs, {clients.open()} open; {clients.answers['200']} predictions; "
                f"{sum(tormentor.blows.values())} blows"
            )
        clients.over.set()
        for thread in threads:
            thread.join()
        for pid in service.processes():
            service.signal(pid, signal.SIGCONT)
        wrong = settle(clients, tell)
        found, summary = check(clients)
        wrong = [*clients.wrong, *wrong, *found]
    finally:
        clients.over.set()
        service.stop()
        keeper.join()
    click.echo("\n".join(f"{count:6} x {blow}" for blow, count in sorted(tormentor.blows.items())))
    click.echo("predictions: " + ", ".join(f"{count} x {kind}" for kind, count in sorted(clients.answers.items())))
    click.echo(summary)
    if wrong:
        click.echo("\n".join(wrong))
        sys.exit(f"{len(wrong)} things are wrong; {home} has everything, and the log")
    shutil.rmtree(home)
    click.echo(f"nothing lost, nothing done twice, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
