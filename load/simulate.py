"""`python -m load.simulate`: how long fine-tunes wait as tenants and workers grow, by simulating the queue.

Jobs take as long as finished jobs of a real service took (`--url`, or else a service of its own that runs a few), each
drawn at random from these. Tenants send jobs at random times (Poisson). Whose turn it is when a worker is free is
decided by the function that also tells a client its place in the queue (`trainer.jobs.records.next_tenant`), and for
comparison by first come, first served. Nothing is added for the network or the store.
"""

import heapq
import io
import json
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import click
import httpx
import numpy as np

from trainer.jobs.records import next_tenant

TURNS, FIFO = "turns", "first come"
TENANTS = (1, 10, 100, 1_000)
HOUR_S = 3600.0
QUICK = {"method": "lora", "epochs": 10}
GREEDY = 50  # times as many jobs as each of the others
SHOWN = (5, 20)  # jobs of each kind that a service of its own runs: searched and quick


@dataclass(frozen=True)
class Waited:
    """A job of the simulation. Times are seconds."""

    tenant: str
    arrived_at: float
    live_at: float

    @property
    def took_s(self) -> float:
        """From the queue to live."""
        return self.live_at - self.arrived_at


@dataclass
class Queue:
    """Workers and a queue, event by event."""

    workers: int
    policy: str
    waiting: dict[str, deque[tuple[float, float]]] = field(default_factory=dict)  # tenant: arrival and duration
    running: Counter[str] = field(default_factory=Counter)
    last_turn: dict[str, float] = field(default_factory=dict)
    busy: list[tuple[float, float, str]] = field(default_factory=list)  # heap: end, arrival, tenant

    def run(self, arrivals: Sequence[tuple[float, str, float]]) -> list[Waited]:
        """Serve jobs in the order of their arrival, each with tenant and duration; return them all."""
        done: list[Waited] = []
        for at, tenant, took_s in arrivals:
            while self.busy and self.busy[0][0] <= at:
                self._finish(done)
            self.waiting.setdefault(tenant, deque()).append((at, took_s))
            self._start(at)
        while self.busy:
            self._finish(done)
        return done

    def _finish(self, done: list[Waited]) -> None:
        end, arrived, tenant = heapq.heappop(self.busy)
        self.running[tenant] -= 1
        done.append(Waited(tenant, arrived, end))
        self._start(end)

    def _start(self, now: float) -> None:
        while self.waiting and len(self.busy) < self.workers:
            heads = {tenant: (jobs[0][0], tenant) for tenant, jobs in self.waiting.items()}
            tenant = min(heads, key=heads.__getitem__) if self.policy == FIFO else next_tenant(
                heads, self.running, self.last_turn
            )  # fmt: skip
            arrived, took_s = self.waiting[tenant].popleft()
            if not self.waiting[tenant]:
                del self.waiting[tenant]
            self.running[tenant] += 1
            self.last_turn[tenant] = now
            heapq.heappush(self.busy, (now + took_s, arrived, tenant))


def arrivals(
    rates: dict[str, float], durations: Sequence[float], seconds: float, rng: random.Random
) -> list[tuple[float, str, float]]:
    """Jobs of Poisson processes with these rates (1/s): time, tenant and duration, in the order of time."""
    found = []
    for tenant, rate in rates.items():
        at = rng.expovariate(rate)
        while at < seconds:
            found.append((at, tenant, rng.choice(durations)))
            at += rng.expovariate(rate)
    return sorted(found)


def jain(shares: Sequence[float]) -> float:
    """Jain's index of fairness: 1 if all shares are equal, 1/n if one has everything (Jain, Chiu and Hawe, 1984)."""
    return sum(shares) ** 2 / (len(shares) * sum(share**2 for share in shares)) if any(shares) else 1.0


def finished_s(api: httpx.Client) -> list[float]:
    """How long the finished jobs of a service ran, without their wait, the latest 1,000."""
    found: list[float] = []
    query: dict[str, str | int] = {"status": "succeeded", "limit": 100}
    while len(found) < 1_000:
        page = api.get("/finetune", params=query).raise_for_status().json()
        found += [job["finished_at"] - job["started_at"] for job in page["data"] if job["started_at"]]
        if not page["has_more"]:
            break
        query["after"] = page["data"][-1]["id"]
    return found


def measured_s() -> list[float]:
    """How long jobs take here: a service of its own runs some searches and some quick ones, one at a time."""
    try:
        from demo import service
        from quality.digits import all_digits
    except ImportError:
        raise click.UsageError("--url or --times: whose jobs? (Outside a checkout there is no own service.)") from None

    images, labels = all_digits()
    order = np.random.default_rng(0).permutation(len(labels))[:300]
    packed = io.BytesIO()
    np.savez(packed, images=images[order], labels=labels[order])
    with service() as api:
        for number in range(sum(SHOWN)):
            spec = {} if number < SHOWN[0] else {"spec": json.dumps(QUICK)}
            form = {"model": f"simulated-{number % 3}", **spec}
            job = api.post("/finetune", data=form, files={"data": packed.getvalue()}).raise_for_status().json()
            while job["finished_at"] is None:
                time.sleep(0.1)
                job = api.get(f"/finetune/{job['id']}").json()
            print(f"\rmeasured {number + 1} of {sum(SHOWN)} jobs", end="", file=sys.stderr)
        print(file=sys.stderr)
        return finished_s(api)


@click.command()
@click.option("--url", help="Take the times of this service's finished jobs.  [default: measure a service of its own]")
@click.option("--api-key", envvar="TEMPER_API_KEY", help="For --url.")
@click.option(
    "--times",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Read the times from this file if it is there, and write them otherwise.",
)
@click.option(
    "--load",
    type=click.FloatRange(0.01, 0.99),
    default=0.8,
    show_default=True,
    help="Share of the workers' time that is asked for.",
)
@click.option("--hours", type=click.FloatRange(0.1), default=8.0, show_default=True, help="Simulated.")
@click.option("--tenants", "counts", type=click.IntRange(1), multiple=True, default=TENANTS, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
def main(
    url: str | None, api_key: str | None, times: Path | None, load: float, hours: float, counts: Sequence[int],
    seed: int,
) -> None:  # fmt: skip
    """Print how long jobs take from the queue to live as tenants and workers grow, and how fair that is."""
    durations = _times(url, api_key, times)
    mean_s = sum(durations) / len(durations)
    print(
        f"{len(durations)} measured jobs: mean {mean_s:.1f} s, median {median(durations):.1f} s, "
        f"longest {max(durations):.1f} s. {hours:g} simulated hours, {load:.0%} load, seed {seed}.\n"
    )
    print("| tenants | workers | jobs | p50 | p95 | p95, first come |\n|---|---|---|---|---|---|")
    for row in growing(durations, counts, load, hours * HOUR_S, seed):
        print(row, flush=True)
    print(
        f"\nOne tenant sends {GREEDY} times as many jobs as each of the others, more than there is time for:\n\n"
        "| tenants | workers | p95 of the others | first come | fairness | first come |\n|---|---|---|---|---|---|"
    )
    for row in greedy(durations, [count for count in counts if count > 1], hours * HOUR_S, seed):
        print(row, flush=True)


def _times(url: str | None, api_key: str | None, times: Path | None) -> list[float]:
    if times is not None and times.is_file():
        found: list[float] = json.loads(times.read_text())
    elif url:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            with httpx.Client(base_url=url, headers=headers, timeout=60) as api:
                found = finished_s(api)
        except httpx.HTTPError as exc:
            raise click.ClickException(f"--url {url}: {exc}") from exc
    else:
        found = measured_s()
    if not found:
        raise click.ClickException("no job has succeeded there, so nothing is known of how long one takes")
    if times is not None:
        times.write_text(json.dumps([round(took_s, 3) for took_s in found]) + "\n")
    return found


def growing(durations: Sequence[float], counts: Sequence[int], load: float, seconds: float, seed: int) -> Iterator[str]:
    """Rows of a table: the same load on a worker, with more and more tenants and workers."""
    mean_s = sum(durations) / len(durations)
    for count in counts:
        workers = max(1, count // 10)
        rates = {f"t{number}": load * workers / mean_s / count for number in range(count)}
        jobs = arrivals(rates, durations, seconds, random.Random(seed))
        ours, theirs = (sorted(job.took_s for job in Queue(workers, policy).run(jobs)) for policy in (TURNS, FIFO))
        half, most, first_come = np.quantile(ours, 0.5), np.quantile(ours, 0.95), np.quantile(theirs, 0.95)
        yield f"| {count:,} | {workers:,} | {len(jobs):,} | {half:.1f} s | {most:.1f} s | {first_come:.1f} s |"


def greedy(durations: Sequence[float], counts: Sequence[int], seconds: float, seed: int) -> Iterator[str]:
    """Rows of a table: the others use half of the workers' time, and one tenant asks for more than the rest of it."""
    mean_s = sum(durations) / len(durations)
    for count in counts:
        workers = max(1, count // 10)
        each = 0.5 * workers / mean_s / (count - 1)
        rates = {"greedy": max(GREEDY * each, 0.7 * workers / mean_s)} | {f"t{n}": each for n in range(1, count)}
        jobs = arrivals(rates, durations, seconds, random.Random(seed))
        cells = []
        for policy in (TURNS, FIFO):
            done = Queue(workers, policy).run(jobs)
            others = sorted(job.took_s for job in done if job.tenant != "greedy")
            slowdowns = {tenant: list[float]() for tenant in rates}
            for job in done:
                slowdowns[job.tenant].append(job.took_s)
            cells.append((np.quantile(others, 0.95), jain([1 / median(all_) for all_ in slowdowns.values() if all_])))
        (ours_s, fair), (theirs_s, unfair) = cells
        yield f"| {count:,} | {workers:,} | {ours_s:.1f} s | {theirs_s:.1f} s | {fair:.2f} | {unfair:.2f} |"


if __name__ == "__main__":
    main()
