"""The simulated queue."""

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from load.simulate import FIFO, TURNS, Queue, arrivals, jain


@pytest.mark.parametrize("policy", [TURNS, FIFO])
def test_one_worker_waits_as_queueing_theory_says(policy: str) -> None:
    """M/D/1 at half load: the mean wait is half a service time (Pollaczek and Khinchine)."""
    jobs = arrivals({"a": 0.25, "b": 0.25}, [1.0], 200_000.0, random.Random(3))
    done = Queue(1, policy).run(jobs)
    assert len(done) == len(jobs)
    assert np.mean([job.took_s - 1.0 for job in done]) == pytest.approx(0.5, rel=0.03)


def test_no_worker_idles_while_jobs_wait() -> None:
    done = Queue(3, TURNS).run([(0.0, "a", 1.0)] * 9)
    assert sorted(job.live_at for job in done) == [1.0] * 3 + [2.0] * 3 + [3.0] * 3


def test_tenants_take_turns_beside_one_that_asks_for_everything() -> None:
    jobs = [(0.0, "greedy", 10.0)] * 1000 + [(100.0 + number, f"t{number}", 10.0) for number in range(10)]
    waits = {}
    for policy in (TURNS, FIFO):
        waits[policy] = max(job.took_s for job in Queue(2, policy).run(jobs) if job.tenant != "greedy")
    assert waits[TURNS] < 120.0
    assert waits[FIFO] > 4000.0


def test_the_index_of_fairness_is_one_for_equal_shares_and_least_for_one_that_has_everything() -> None:
    assert jain([2.0, 2.0, 2.0]) == pytest.approx(1.0)
    assert jain([1.0, 0.0, 0.0, 0.0]) == pytest.approx(0.25)


def test_the_same_seed_prints_the_same_tables(tmp_path: Path) -> None:
    times = tmp_path / "times.json"
    times.write_text(json.dumps([1.5, 2.0, 20.0]))
    command = [sys.executable, "-m", "load.simulate", "--times", str(times), "--hours", "2", "--tenants", "10"]
    first, again = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert first == again
    assert first.startswith("3 measured jobs: mean 7.8 s, median 2.0 s, longest 20.0 s.")
    assert first.count("\n| 10 | 1 |") == 2
