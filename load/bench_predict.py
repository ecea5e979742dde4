"""`python -m load.bench_predict`: predictions over HTTP, beside alternatives that take turns in the same run.

`wrk`, on the same cores, sends one 28x28 image per request. The alternatives are a plain FastAPI app, LitServe (if
installed) and, with TEMPER_TFS_BINARY, a real TensorFlow Serving's REST API and Temper in front of another one. All
serve the SavedModel that Temper published. `--sets`, `--many` and `--publish` measure the embedded server instead.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import click
import httpx
import numpy as np

from load.bench_served import answer, digits, packed, show, wait
from load.figures import note
from load.rivals.servers import Server, start, temper
from serving.registry import BASE, Registry
from store.engine import connect
from store.processes import end_with_parent
from store.records import Manifest, ReportCard
from store.settings import Settings

CONNECTIONS = (1, 16, 64)
IMAGES = 64  # different ones, sent in turn
WARM_S = 1
IDLE_S, IDLE_CORES = 2.0, 0.1  # a server that uses more of a core while idle is paused during the others' turns
V1 = f"/v1/models/{BASE}:predict"
SIDES = {  # server, path, form of the bodies
    "temper": ("temper", "/predict", "json"),
    "temper-bytes": ("temper", f"/predict?model={BASE}", "bytes"),
    "temper-v1": ("temper", V1, "v1"),
    "plain": ("plain", "/predict", "json"),
    "litserve": ("litserve", "/predict", "json"),
    "tfs": ("tfs", V1, "v1"),
    "temper-tfs": ("temper-tfs", "/predict", "json"),
    "temper-tfs-bytes": ("temper-tfs", f"/predict?model={BASE}", "bytes"),
    "temper-tfs-v1": ("temper-tfs", V1, "v1"),
}
GOALS: list[tuple[str, str, str, tuple[int, ...], str]] = [  # ours, theirs, figure, connections, goal for ours / theirs
    ("temper", "litserve", "req/s", (16, 64), ">= 5x"),
    ("temper", "plain", "req/s", (16, 64), ">= 4x"),
    ("temper", "plain", "p50", (1,), "< 1x"),
    ("temper-tfs", "tfs", "req/s", (16, 64), ">= 1.2x"),
    ("temper-tfs-v1", "tfs", "req/s", (16, 64), ">= 1.2x"),
    ("temper-tfs-bytes", "tfs", "req/s", (16, 64), ">= 1.6x"),
    ("temper-tfs", "tfs", "p99", (16, 64), "<= 1x"),
    ("temper-tfs-v1", "tfs", "p99", (16, 64), "<= 1x"),
    ("temper-tfs", "tfs", "p50", (1,), "<= 2x"),
]
MEMORY = {"api": ("gateway", "< 80 MB"), "serving": ("model server", "< 700 MB")}
LUA = """
-- Cycles through the bodies args[2]/0, args[2]/1, ...; args[1] is their Content-Type, args[3] an API key, if any.
local requests, at = {}, 0
function init(args)
  local headers = {["Content-Type"] = args[1]}
  if args[3] then headers["Authorization"] = "Bearer " .. args[3] end
  local file = io.open(args[2] .. "/0", "rb")
  while file do
    requests[#requests + 1] = wrk.format("POST", nil, headers, file:read("*a"))
    file:close()
    file = io.open(args[2] .. "/" .. #requests, "rb")
  end
end
function request()
  at = at % #requests + 1
  return requests[at]
end
function done(summary, latency)
  local e = summary.errors
  io.write(string.format('{"requests": %d, "failed": %d, "req/s": %.3f, "p50": %.3f, "p99": %.3f}\\n',
    summary.requests, e.connect + e.read + e.write + e.timeout + e.status,
    summary.requests / summary.duration * 1e6, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""
Figures = dict[str, float]  # requests, failed, req/s, p50 and p99 in ms


@click.command()
@click.option("--rounds", default=5, help="Rounds, in each of which every side has a turn.", show_default=True)
@click.option("--seconds", default=4, help="Duration of one measurement.", show_default=True)
@click.option("--only", type=click.Choice(list(SIDES)), multiple=True, help="Measure these sides.  [default: all]")
@click.option("--sets", is_flag=True, help="Compare a version that answers sets and distances with the base instead.")
@click.option("--many", type=click.IntRange(1), help="Compare this many further models with a single one instead.")
@click.option("--publish", type=click.IntRange(1), help="Predict while this many fine-tunes are published instead.")
def main(rounds: int, seconds: int, only: tuple[str, ...], sets: bool, many: int | None, publish: int | None) -> None:
    """Measure predictions over HTTP, and print each figure beside its goal."""
    if not shutil.which("wrk"):
        raise click.ClickException("wrk is missing: apt-get install wrk")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # cleans up on the way out
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        (folder / "wrk.lua").write_text(LUA)
        if publish:
            failed = while_publishing(stack, folder, publish, seconds)
        elif sets:
            failed = with_sets(stack, folder, rounds, seconds)
        elif many:
            failed = with_many(stack, folder, many, rounds, seconds)
        else:
            failed = beside_others(stack, folder, only or tuple(SIDES), rounds, seconds)
    if failed:
        sys.exit(f"{failed:,} requests failed")


def beside_others(stack: contextlib.ExitStack, folder: Path, names: Sequence[str], rounds: int, seconds: int) -> int:
    """Compare all sides. Return the number of failed requests."""
    images, _ = digits(IMAGES, seed=0)
    forms = bodies(images)
    for form, contents in forms.items():
        write(folder / form, contents)
    servers = start(stack, folder, {SIDES[name][0] for name in names})
    sides = {
        name: Side(servers[server], path, folder / form)
        for name, (server, path, form) in SIDES.items()
        if name in names and server in servers
    }
    sides = agreeing(sides, forms)
    found, awake = measured(sides, list(servers.values()), rounds, seconds)
    for (name, c), figures in found.items():
        title = f"Predictions over {c} connection{'s' * (c > 1)}"
        note(title, name, [one["req/s"] for one in figures], "requests/s", is_alternative=not name.startswith("temper"))
    titles = ("req/s", "p50", "p99")
    rows = [
        [name, f"{c}", f"{speed:,.0f}", f"{p50:.2f} ms", f"{p99:.2f} ms", f"{total(found[name, c], 'failed')}"]
        for c in CONNECTIONS
        for name in sides
        for speed, p50, p99 in [[middle(found[name, c], title) for title in titles]]
    ]
    title = f"one image per request; medians of {rounds} x {seconds} s on {os.cpu_count()} cores shared with wrk"
    show(title, ["", "connections", *titles, "failed"], rows)
    rows = []
    for ours, theirs, figure, counts, goal in GOALS:
        if ours in sides and theirs in sides:
            pairs = [[middle(found[name, c], figure) for name in (ours, theirs)] for c in counts]
            rows += [
                [ours, theirs, figure, f"{c}", f"{a / b:.2f}x", goal] for c, (a, b) in zip(counts, pairs, strict=True)
            ]
    if rows:
        show("ratios", ["", "beside", "of", "connections", "ratio", "goal"], rows)
    rows = []
    for name, server in servers.items():
        share = f"{awake[name]:.1%}" if name in awake else "paused"
        rows.append([name, f"{server.private_mb():,.0f} MB", "", share])
        if name == "temper":
            rows += [
                [f"  {part}", f"{server.private_mb(which):,.0f} MB", goal, ""] for which, (part, goal) in MEMORY.items()
            ]
    show(
        "afterwards: private memory, and the largest share of a core used while idle",
        ["", "memory", "goal", "idle"],
        rows,
    )
    return total(chain(*found.values()), "failed")


def measured(
    sides: "dict[str, Side]", servers: Sequence[Server], rounds: int, seconds: int
) -> tuple[dict[tuple[str, int], list[Figures]], dict[str, float]]:
    """Figures of every side at each number of connections, and the cores that unpaused servers use while idle."""
    used = cpu_s(servers)
    time.sleep(IDLE_S)
    cores = {name: (now - used[name]) / IDLE_S for name, now in cpu_s(servers).items()}
    restless = [server for server in servers if cores[server.name] > IDLE_CORES]
    for server in restless:
        share = f"{cores[server.name]:.0%} of a core"
        click.echo(f"{server.name} uses {share} while idle; pausing it during the others' turns", err=True)
    found: dict[tuple[str, int], list[Figures]] = {(name, c): [] for name in sides for c in CONNECTIONS}
    awake: dict[str, list[float]] = {server.name: [] for server in servers if server not in restless}
    for number in range(rounds):
        click.echo(f"round {number + 1} of {rounds}", err=True)
        for c in CONNECTIONS:
            for name, side in reversed(sides.items()) if number % 2 else sides.items():
                for server in restless:
                    server.resume() if server is side.server else server.pause()
                side.asked(c, WARM_S)
                used = cpu_s(servers)
                found[name, c].append(side.asked(c, seconds))
                for other in (server for server in servers if server not in (side.server, *restless)):
                    awake[other.name].append((other.cpu_s() - used[other.name]) / seconds)
    for server in restless:
        server.resume()
    return found, {name: max(shares, default=0.0) for name, shares in awake.items()}


def cpu_s(servers: Sequence[Server]) -> dict[str, float]:
    """CPU seconds that servers have used."""
    return {server.name: server.cpu_s() for server in servers}


def agreeing(sides: "dict[str, Side]", forms: dict[str, list[bytes]]) -> "dict[str, Side]":
    """The sides, once all predict the same class for every image. Leaves out routes that do not exist."""
    expected: dict[str, list[int]] = {}
    for name, side in sides.items():
        answers = [side.ask(body) for body in forms[side.bodies.name]]
        if name.startswith("temper-") and answers[0].status_code in (404, 405, 415):
            click.echo(f"{name} is left out: its route answers {answers[0].status_code}", err=True)
            continue
        wrong = next((one for one in answers if one.status_code != 200), None)
        if wrong is not None:
            raise click.ClickException(f"{name} answers {wrong.status_code}: {wrong.text[:300]}")
        tops = [int(np.argmax(one.json()["predictions"][0]["probabilities"])) for one in answers]
        expected[name] = tops
        first, agreed = next(iter(expected.items()))
        if tops != agreed:
            raise click.ClickException(f"{name} predicts {tops} where {first} predicts {agreed}")
    return {name: sides[name] for name in expected}


def bodies(images: np.ndarray) -> dict[str, list[bytes]]:
    """Request bodies for (n, 28, 28) uint8 images, by form."""
    unit = np.round(images / 255, 4)
    return {
        "json": [packed_json(model=BASE, instances=[image.tolist()]) for image in unit],
        "v1": [packed_json(instances=[image[..., None].tolist()]) for image in unit],
        "bytes": [image.tobytes() for image in images],
    }


def packed_json(**content: Any) -> bytes:
    """JSON without spaces."""
    return json.dumps(content, separators=(",", ":")).encode()


def write(folder: Path, contents: Sequence[bytes]) -> None:
    """Write bodies to files for wrk."""
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number}").write_bytes(content)


def middle(rounds: Sequence[Figures], figure: str) -> float:
    """The median of a figure over rounds."""
    return median(one[figure] for one in rounds)


def total(rounds: Iterable[Figures], figure: str) -> int:
    """The sum of a figure over rounds."""
    return int(sum(one[figure] for one in rounds))


@dataclass(frozen=True)
class Side:
    """A server, a path on it, the folder of the bodies to send there, and an API key if it wants one."""

    server: Server
    path: str
    bodies: Path
    key: str = ""
    script: str = "wrk.lua"  # beside the folder

    @property
    def kind(self) -> str:
        """Content-Type of the bodies."""
        return "application/octet-stream" if self.bodies.name == "bytes" else "application/json"

    def ask(self, body: bytes) -> httpx.Response:
        """Send one request."""
        headers = {"Content-Type": self.kind} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        return httpx.post(self.server.url + self.path, content=body, headers=headers, timeout=30)

    def command(self, connections: int, seconds: int) -> list[str]:
        """The wrk command."""
        options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "--latency"]
        script = ["-s", str(self.bodies.parent / self.script)]
        key = [self.key] if self.key else []
        return ["wrk", *options, *script, self.server.url + self.path, "--", self.kind, str(self.bodies), *key]

    def asked(self, connections: int, seconds: int) -> Figures:
        """Measure for `seconds`."""
        return figures(subprocess.run(self.command(connections, seconds), check=True, capture_output=True).stdout)


def figures(printed: bytes) -> Figures:
    """Parse the last line that wrk printed."""
    found: Figures = json.loads(printed.splitlines()[-1])
    return found


def with_sets(stack: contextlib.ExitStack, folder: Path, rounds: int, seconds: int) -> int:
    """Compare a fine-tuned version with the base, which has neither sets nor distances. Return the failed requests."""
    contents = bodies(digits(IMAGES, seed=0)[0])["json"]
    write(folder / "base", contents)
    write(folder / "fine-tuned", [body.replace(BASE.encode(), b"busy") for body in contents])
    server = stack.enter_context(temper("temper", folder / "home"))
    with httpx.Client(base_url=server.url, timeout=60) as api:
        fine_tune(api, 0, each=100)
        server.wait(lambda: answer(api.get("/finetune"))["data"][0]["report_status"] == "complete")
    sides = {name: Side(server, "/predict", folder / name) for name in ("base", "fine-tuned")}
    if '"set"' not in (said := sides["fine-tuned"].ask((folder / "fine-tuned" / "0").read_bytes()).text):
        raise click.ClickException(f"the version answers no set: {said}")
    found, _ = measured(sides, [server], rounds, seconds)
    rows = []
    for c in CONNECTIONS:
        (speed, p50, p99), with_them = (
            [middle(found[name, c], figure) for figure in ("req/s", "p50", "p99")] for name in sides
        )
        ratios = [f"{b / a:.2f}x" for a, b in zip((speed, p50, p99), with_them, strict=True)]
        rows.append([f"{c}", f"{speed:,.0f}", f"{with_them[0]:,.0f}", *ratios])
    show(
        f"with sets and distances, beside the base; medians of {rounds} x {seconds} s",
        ["connections", "base, req/s", "fine-tuned, req/s", "ratio", "of p50", "of p99"],
        rows,
    )
    return total(chain(*found.values()), "failed")


def with_many(stack: contextlib.ExitStack, folder: Path, count: int, rounds: int, seconds: int) -> int:
    """Compare a service with `count` further models with one without. Return the number of failed requests."""
    images, _ = digits(count, seed=0)
    names = [f"copy-{number:04}" for number in range(count)]
    write(folder / "json", bodies(images[:IMAGES])["json"])
    turns = [
        body.replace(BASE.encode(), name.encode()) for name, body in zip(names, bodies(images)["json"], strict=True)
    ]
    write(folder / "turns", turns)
    one = stack.enter_context(temper("one", folder / "home"))
    copy_models(folder / "home" / "models" / BASE / "1", folder / "home-many", names)
    many = stack.enter_context(temper("many", folder / "home-many"))
    all_of_them = Side(many, "/predict", folder / "turns")
    many.wait(lambda: all(all_of_them.ask(body).is_success for body in turns))
    sides = {
        "one model": Side(one, "/predict", folder / "json"),
        f"{count} more": Side(many, "/predict", folder / "json"),
        f"{count} more, in turns": all_of_them,
    }
    found: dict[str, list[Figures]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, side in reversed(sides.items()) if number % 2 else sides.items():
            side.asked(1, WARM_S)
            found[name].append(side.asked(1, seconds))
    p50 = {name: middle(found[name], "p50") for name in sides}
    least = p50["one model"]
    rows = [["one model", f"{least:.2f} ms", "", ""]]
    rows += [[name, f"{p50[name]:.2f} ms", f"{p50[name] / least:.2f}x", "<= 1.2x"] for name in list(sides)[1:]]
    show(f"1 connection; medians of {rounds} x {seconds} s", ["", "p50", "ratio", "goal"], rows)
    memory = {server.name: server.private_mb("serving") for server in (one, many)}
    rows = [["with one", f"{memory['one']:,.0f} MB", ""], [f"with {count} more", f"{memory['many']:,.0f} MB", ""]]
    rows.append(["a further model", f"{(memory['many'] - memory['one']) / count:.2f} MB", "<= 4 MB"])
    show("private memory of the embedded model server", ["", "memory", "goal"], rows)
    return total(chain(*found.values()), "failed")


def copy_models(version: Path, home: Path, names: Sequence[str]) -> None:
    """Make a home whose registry has the version under each of these names."""
    settings = Settings(home=home, store=None)
    settings.make_home()
    manifest = Manifest.read(json.loads((version / "assets.extra" / "manifest.json").read_text(encoding="utf-8")))
    engine = connect(settings.store_url)
    registry = Registry(engine)
    for name in names:
        number = registry.reserve(name, None, manifest, ReportCard())
        shutil.copytree(version, settings.models / name / f"{number}")
        registry.go_live(name, number)
    engine.dispose()


def while_publishing(stack: contextlib.ExitStack, folder: Path, count: int, seconds: int) -> int:
    """Predict with a model while it gets `count` versions. Return the number of failed requests."""
    images, _ = digits(IMAGES, seed=0)
    write(folder / "json", [body.replace(BASE.encode(), b"busy") for body in bodies(images)["json"]])
    server = stack.enter_context(temper("temper", folder / "home"))
    api = stack.enter_context(httpx.Client(base_url=server.url, timeout=60))
    side = Side(server, "/predict", folder / "json")
    fine_tune(api, 0)
    side.asked(16, WARM_S)
    before = side.asked(16, seconds)
    asking = subprocess.Popen(side.command(16, 86_400), stdout=subprocess.PIPE, preexec_fn=end_with_parent)
    try:
        began = time.perf_counter()
        times = [fine_tune(api, number) for number in range(1, count + 1)]
        took = time.perf_counter() - began
        asking.send_signal(signal.SIGINT)  # wrk ends and prints its figures
        meanwhile = figures(asking.communicate(timeout=60)[0])
    finally:
        asking.kill()
        asking.wait()
    served = answer(api.post("/predict", content=(folder / "json" / "0").read_bytes()))["version"]
    rows = [
        [name, f"{one['requests']:,.0f}", f"{one['failed']:,.0f}", *(f"{one[p]:.1f} ms" for p in ("p50", "p99"))]
        for name, one in (("before", before), (f"{count} versions meanwhile", meanwhile))
    ]
    show("16 connections", ["", "requests", "failed (goal 0)", "p50", "p99"], rows)
    print(f"a fine-tune took {median(times):.2f} s of {took / count:.2f}; the last answer is from version {served}")
    if served != count + 1:
        raise click.ClickException(f"version {served} answers instead of {count + 1}")
    return int(before["failed"] + meanwhile["failed"])


def fine_tune(api: httpx.Client, seed: int, each: int = 4) -> float:
    """Seconds that one small fine-tune of `busy` takes from creation to end."""
    images, labels = digits(1000, seed=0)
    few = np.concatenate([np.flatnonzero(labels == label)[:each] for label in range(10)])
    spec = json.dumps({"method": "head", "epochs": 1, "seed": seed})
    upload = {"data": ("digits.npz", packed(images[few], labels[few]))}
    job = wait(
        api, answer(api.post("/finetune", files=upload, data={"model": "busy", "spec": spec}))["id"], "finished_at"
    )
    if job["status"] != "succeeded":
        raise click.ClickException(f"the job {job['status']}: {job['error']}")
    return float(job["finished_at"] - job["created_at"])


if __name__ == "__main__":
    main()
