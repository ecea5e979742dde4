"""`python -m load.bench_keys`: what API keys cost, and what one tenant's flood does to another.

Gateways of one service share its store and model server, one with keys on and two with keys off, and take turns. Two
processes of the same program differ by more than what keys cost, for as long as they live, so each round starts new
ones, and the two with keys off show what is left of that. `wrk` runs on the same cores.
"""

import asyncio
import contextlib
import itertools
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import click
from starlette.types import Receive, Scope, Send

from api.http.keys import Guard, KeyRing
from load.bench_predict import (
    IMAGES,
    LUA,
    WARM_S,
    Figures,
    Side,
    bodies,
    figures,
    middle,
    total,
    write,
)
from load.bench_served import digits, show
from load.rivals.servers import Server, running, temper
from serving.registry import BASE
from store.engine import connect
from store.keys import Keys
from store.memory import allocator_environment
from store.processes import end_with_parent, free_port
from store.settings import Settings

CALLS, REPEATS = 2_000, 100
CONNECTIONS = (1, 16)
FLOOD, PAUSE_MS, QUIET = 32, 10, 4  # connections of the flood; of the quiet tenant, and its pause between requests
RATE = 200  # requests a second of the flooding tenant's key, where it has a rate


@click.command()
@click.option("--rounds", default=10, help="Rounds, in each of which every side has a turn.", show_default=True)
@click.option("--seconds", default=2, help="Duration of one measurement.", show_default=True)
def main(rounds: int, seconds: int) -> None:
    """Measure keys on beside keys off, and a quiet tenant beside a flooding one."""
    if not shutil.which("wrk"):
        raise click.ClickException("wrk is missing: apt-get install wrk")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # cleans up on the way out
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        (folder / "wrk.lua").write_text(LUA)
        (folder / "paced.lua").write_text(f"{LUA}\nfunction delay() return {PAUSE_MS} end\n")
        images, _ = digits(IMAGES, seed=0)
        for form in ("json", "bytes"):
            write(folder / form, bodies(images)[form])
        keys = Keys(connect(f"sqlite:///{folder / 'guard.db'}"))
        rows = [[name, f"{cost:.2f} us", goal] for name, cost, goal in layer(keys)]
        show("cost of the layer in a request, without a network", ["", "time", "goal"], rows)
        stack.enter_context(temper("temper", folder / "home"))
        keys = Keys(connect(f"sqlite:///{folder / 'home' / 'temper.db'}"))
        failed = beside_each_other(keys, folder, rounds, seconds)
        failed += flooded(stack.enter_context(gateway(folder, "required", "flooded")), keys, folder, rounds, seconds)
    if failed:
        sys.exit(f"{failed:,} requests failed")


@contextlib.contextmanager
def gateway(folder: Path, keys: str, name: str) -> Iterator[Server]:
    """A further gateway of the service in this folder, with keys `required` or `off`."""
    home, port = folder / "home", free_port()
    environment = {
        "TEMPER_HOME": str(home), "TEMPER_PORT": str(port), "TEMPER_KEYS": keys,
        "TEMPER_MODEL_SERVER": f"unix:{home / 'run' / 'model_server.sock'}", **allocator_environment(),
    }  # fmt: skip
    with running(f"keys {name}", folder, [sys.executable, "-m", "api"], port, environment) as server:
        server.wait(lambda: server.get("/readyz").is_success)
        yield server


def layer(keys: Keys) -> list[tuple[str, float, str]]:
    """Microseconds that the layer adds to a call of an application that does nothing."""

    async def nothing(scope: Scope, receive: Receive, send: Send) -> None:
        pass

    async def measured() -> list[tuple[str, float, str]]:
        tokens = [keys.create(f"key {number}", rate=1e8 if number else None)[1] for number in range(100)]
        settings = Settings(keys="required")
        ring = KeyRing(keys, settings)
        await ring.refresh()
        guard, found = Guard(nothing, settings), []
        bare = await _microseconds(nothing, ring, "")
        for name, token, goal in (("a key", tokens[0], "<= 5 us"), ("a key that has a rate", tokens[1], "<= 5 us")):
            found.append((name, await _microseconds(guard, ring, token) - bare, goal))
        ring.required = False
        found.append(("keys off", await _microseconds(guard, ring, "") - bare, ""))
        return found

    return asyncio.run(measured())


async def _microseconds(app: Any, ring: KeyRing, token: str) -> float:
    """The least CPU time of a call, in repeated measurements."""
    headers = [
        (b"host", b"127.0.0.1:8080"), (b"user-agent", b"python-httpx/0.28.1"), (b"accept", b"*/*"),
        (b"accept-encoding", b"gzip, deflate"), (b"connection", b"keep-alive"),
        (b"content-type", b"application/octet-stream"), (b"content-length", b"784"),
        (b"authorization", b"Bearer " + token.encode()),
    ]  # fmt: skip
    state = {"gateway": SimpleNamespace(keys=ring)}
    best = float("inf")
    for _ in range(REPEATS):
        scope = {"type": "http", "method": "POST", "path": "/predict", "headers": headers, "state": state}
        began = time.process_time()
        for _ in range(CALLS):
            await app(scope, None, None)
        best = min(best, (time.process_time() - began) / CALLS)
    return 1e6 * best


def beside_each_other(keys: Keys, folder: Path, rounds: int, seconds: int) -> int:
    """Compare keys on and keys off. Return the number of failed requests."""
    token = keys.create("bench", scopes=["predict"])[1]
    names = {"off": ("off", ""), "on": ("required", token), "off again": ("off", "")}
    paths = {"bytes": f"/predict?model={BASE}", "json": "/predict"}
    found: dict[tuple[str, str, int], list[Figures]] = {}
    for number in range(rounds):
        click.echo(f"round {number + 1} of {rounds}", err=True)
        with contextlib.ExitStack() as stack:
            servers = {name: stack.enter_context(gateway(folder, mode, name)) for name, (mode, _) in names.items()}
            for form, c in itertools.product(paths, CONNECTIONS):
                for name in reversed(names) if number % 2 else names:
                    side = Side(servers[name], paths[form], folder / form, names[name][1])
                    answer = side.ask((side.bodies / "0").read_bytes())
                    if not answer.is_success:
                        raise click.ClickException(f"keys {name}, {form}: {answer.status_code} {answer.text}")
                    side.asked(c, WARM_S)
                    used, one = side.server.cpu_s(), side.asked(c, seconds)
                    one |= {"cpu": 1e6 * (side.server.cpu_s() - used) / max(1.0, one["requests"])}
                    found.setdefault((name, form, c), []).append(one)
    rows = []
    for form, c in itertools.product(paths, CONNECTIONS):
        for figure, unit, goal in (("req/s", "req/s", ">= 0.97x"), ("cpu", "us of CPU a request", "<= 1.03x")):
            off, on, again = (found[name, form, c] for name in names)
            values = [f"{middle(one, figure):,.0f}" for one in (off, on)]
            ratios = [f"{_ratio(one, off, figure):.3f}x" for one in (on, again)]
            rows.append([form, f"{c}", unit, *values, *ratios, goal])
    title = f"medians of {rounds} x {seconds} s, ratios within a round; CPU is the gateway's"
    show(title, ["", "connections", "of", "keys off", "keys on", "on/off", "off again/off", "goal of on/off"], rows)
    return sum(total(one, "failed") for one in found.values())


def _ratio(ones: list[Figures], others: list[Figures], figure: str) -> float:
    return median(one[figure] / other[figure] for one, other in zip(ones, others, strict=True))


def flooded(on: Server, keys: Keys, folder: Path, rounds: int, seconds: int) -> int:
    """Measure a quiet tenant alone and beside a flooding one. Return how many of its requests failed."""
    path = f"/predict?model={BASE}"
    quiet = Side(on, path, folder / "bytes", keys.create("quiet", "quiet")[1], "paced.lua")
    floods = {
        "alone": None,
        f"beside a flood of {FLOOD} connections": Side(on, path, folder / "bytes", keys.create("flood", "flood")[1]),
        f"likewise, with a rate of {RATE}/s": Side(
            on, path, folder / "bytes", keys.create("limited", "flood", rate=RATE)[1]
        ),
    }
    found: dict[str, list[Figures]] = {name: [] for name in floods}
    passed: dict[str, list[float]] = {name: [] for name in floods}
    for _ in range(rounds):
        for name, flood in floods.items():
            asking = None
            if flood is not None:
                asking = subprocess.Popen(
                    flood.command(FLOOD, 3600), stdout=subprocess.PIPE, preexec_fn=end_with_parent
                )
            quiet.asked(QUIET, WARM_S)
            found[name].append(quiet.asked(QUIET, 2 * seconds))
            if asking is not None:
                asking.send_signal(signal.SIGINT)  # wrk ends and prints its figures
                one = figures(asking.communicate(timeout=60)[0])
                passed[name].append(one["req/s"] * (1 - one["failed"] / max(1.0, one["requests"])))
    alone = middle(found["alone"], "p99")
    rows = []
    for name in floods:
        p50, p99 = (middle(found[name], figure) for figure in ("p50", "p99"))
        speed = f"{sum(passed[name]) / rounds:,.0f}" if passed[name] else ""
        rows.append([name, f"{p50:.2f} ms", f"{p99:.2f} ms", f"{p99 / alone:.2f}x", speed])
    title = f"a quiet tenant of {QUIET} connections with pauses of {PAUSE_MS} ms; goal for p99: <= 2x"
    show(title, ["", "p50", "p99", "ratio", "flood's answers/s"], rows)
    return sum(total(one, "failed") for one in found.values())


if __name__ == "__main__":
    main()
