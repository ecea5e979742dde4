"""`python -m load.bench_truth`: what three load generators say of a gateway that freezes for two seconds.

Locust's `constant_throughput` waits for its answers, the dispatcher of the load kit does not, and neither does an
independent open-loop generator (asyncio, in a process of its own). All three run at the same time against the
same gateway, with the same rate; the two open ones follow the same schedule, so that no difference is chance.
"""

import sys

import gevent.monkey

if __name__ == "__main__" and "--open-loop-at" not in sys.argv:  # which is asyncio's
    gevent.monkey.patch_all()  # before anything imports ssl or opens a socket

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

import click
import numpy as np

from load.confidence import percentile

SEED = 0
USERS = 10  # that wait for their answers
START_S = 3.0  # until all three are ready
FREEZE_AT, TIMEOUT_S = 0.4, 30.0  # share of the run after which the gateway freezes
SHARES = (0.5, 0.95, 0.99)
TOLERANCE = 0.05


@click.command()
@click.option("--url", help="A service; without one, one of its own is started.")
@click.option("--pid", type=int, help="Process to freeze: the gateway at --url.")
@click.option("--rate", default=100.0, show_default=True, help="Requests a second of each generator.")
@click.option("--seconds", default=8.0, show_default=True, help="Duration of the run.")
@click.option("--freeze", default=2.0, show_default=True, help="Seconds that the gateway is frozen.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@click.option("--open-loop-at", type=float, hidden=True)
def main(url: str | None, pid: int | None, rate: float, seconds: float, freeze: float, as_json: bool,
         open_loop_at: float | None) -> None:  # fmt: skip
    """Freeze a gateway under load, and print the percentiles that each generator measures."""
    if open_loop_at and url:
        print(json.dumps(asyncio.run(open_loop(url, rate, seconds, open_loop_at))))
        return
    with contextlib.ExitStack() as stack:
        if url is None or pid is None:
            url, pid = own_service(stack)
        found = measure(url, pid, rate, seconds, freeze)
    figures = {name: [percentile(values, share) for share in SHARES] for name, values in found.items()}
    if as_json:
        print(json.dumps({"figures_ms": figures, "requests": {name: len(values) for name, values in found.items()}}))
        return
    print(f"a gateway that is frozen for {freeze:g} s, {rate:g} requests/s of each generator for {seconds:g} s")
    print(f"  {'':<34}  requests   p50 ms   p95 ms   p99 ms")
    for name, values in found.items():
        cells = "".join(f"  {value:>7,.0f}" for value in figures[name])
        print(f"  {name:<34}  {len(values):>8,}{cells}")
    ratio = figures[OURS][2] / figures[OTHER][2]
    print(f"p99 of ours over the independent one: {ratio:.3f} (goal {1 - TOLERANCE:.2f} to {1 + TOLERANCE:.2f})")


CLOSED, OURS, OTHER = "Locust, constant_throughput", "open arrivals of the load kit", "independent open-loop generator"


def own_service(stack: contextlib.ExitStack) -> tuple[str, int]:
    """A service, and the process id of its gateway."""
    from load.rivals.servers import temper

    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
    server = stack.enter_context(temper("temper", folder / "home"))
    (pid,) = (each.pid for each in server.processes() if each.cmdline()[1:3] == ["-m", "api"])
    return server.url, pid


def measure(url: str, pid: int, rate: float, seconds: float, freeze_s: float) -> dict[str, list[float]]:
    """Latencies in ms of every request, by generator."""
    from locust import FastHttpUser, constant_throughput, task
    from locust.env import Environment

    from load.images import Labelled
    from load.kit import Kit
    from load.settings import read_settings

    class Waiting(FastHttpUser):
        """Sends the next request when it has the answer, and its time has come."""

        wait_time = constant_throughput(rate / USERS)

        @task
        def predict(self) -> None:
            """Ask about a blank image."""
            self.client.post("/predict?model=lenet5", data=bytes(784), headers=BYTES)

    images = {"clean": Labelled(np.zeros((1, 28, 28), np.uint8), ["0"])}
    settings = read_settings({"kinds": "clean", "forms": "bytes", "timeout_s": TIMEOUT_S, "seed": SEED})
    kit = Kit(settings, url, images)
    environment = Environment(user_classes=[Waiting], host=url)
    closed: list[float] = []
    environment.events.request.add_listener(lambda response_time, **_: closed.append(response_time))
    runner = environment.create_local_runner()

    def send(due: float) -> None:
        kit.recorder.add(kit.predict(due))

    at = time.time() + START_S
    command = [sys.executable, "-m", __spec__.name, "--url", url, "--rate", str(rate), "--seconds", str(seconds)]
    other = subprocess.Popen([*command, "--open-loop-at", str(at)], stdout=subprocess.PIPE, text=True)
    time.sleep(max(0.0, at - time.time()))
    kit.dispatcher.set(send, rate)
    runner.start(USERS, spawn_rate=USERS)
    time.sleep(FREEZE_AT * seconds)
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(freeze_s)
    finally:
        os.kill(pid, signal.SIGCONT)
    time.sleep(max(0.0, at + seconds - time.time()))
    kit.end()
    runner.quit()
    samples = kit.recorder.samples()
    if samples.failed.any() or len(samples.dropped_s):
        raise click.ClickException(f"failed requests: {samples.errors()}, {len(samples.dropped_s)} dropped")
    theirs, _ = other.communicate()
    if other.returncode:
        raise click.ClickException("the independent generator failed")
    return {CLOSED: closed, OURS: (1000 * samples.rows["latency_s"]).tolist(), OTHER: json.loads(theirs)}


BYTES = {"Content-Type": "application/octet-stream"}


async def open_loop(url: str, rate: float, seconds: float, at: float) -> list[float]:
    """Send on a schedule that begins `at`, in seconds since the epoch. Latencies in ms from when each was due.

    Requests and answers are written and read by hand: httpx falls behind when 200 of them are open.
    """
    random = np.random.default_rng([SEED, 0])
    due, schedule = 0.0, []
    while due < seconds:
        due += random.exponential(1 / rate)
        random.random()  # with which the load kit chooses a source
        schedule.append(due)
    schedule.pop()
    where = urlsplit(url)
    head = f"POST /predict?model=lenet5 HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: 784\r\n"
    request = f"{head}Content-Type: {BYTES['Content-Type']}\r\n\r\n".encode() + bytes(784)
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    loop = asyncio.get_running_loop()
    began = loop.time() + at - time.time()

    async def send(due: float) -> float:
        reader, writer = idle.pop() if idle else await asyncio.open_connection(where.hostname, where.port)
        writer.write(request)
        status, *headers = (await reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
        if " 200 " not in f"{status} ":
            raise click.ClickException(status)
        (length,) = (int(line.partition(":")[2]) for line in headers if line.startswith("content-length:"))
        await reader.readexactly(length)
        idle.append((reader, writer))
        return 1000 * (loop.time() - due)

    tasks: list[asyncio.Task[float]] = []
    for offset in schedule:
        await asyncio.sleep(began + offset - loop.time())
        tasks.append(asyncio.create_task(send(began + offset)))
    return list(await asyncio.gather(*tasks))


if __name__ == "__main__":
    main()
