"""`python -m load.bench_gate`: what the gate adds to a publication, with 1,000 images held out.

A warm service publishes versions of one model, by turns without conditions, with the same held-out images as `stable`,
and with others. The last is the most work: `stable` and the new version each classify the images of the other.
"""

import sys
from collections import defaultdict
from statistics import median
from typing import Any

import click
import httpx
import numpy as np

from demo import service
from load.bench_served import answer, digits, packed, show, wait

TRAINED_ON, HELD_OUT = 200, 1000
GOAL_S = 0.2
OFF = '{"not_worse": false, "same_classes": false}'
SPEC = '{{"method": "head", "epochs": 1, "gate": {}}}'
KINDS = {"without conditions": (OFF, False), "the same images": ("null", False), "other images": ("null", True)}


@click.command()
@click.option("--rounds", default=5, show_default=True, help="Publications of each kind.")
def main(rounds: int) -> None:
    """Measure the time from a version that is proven and warm to one that is live, and what the gate takes of it."""
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    with service() as api:
        publish(api, "null", 0)  # compiles
        seed = 0
        for _ in range(rounds):
            for kind, (gate, fresh) in KINDS.items():
                seed += fresh
                found[kind].append(publish(api, gate, seed))
    least = median(one["live"] + one["exporting"] for one in found["without conditions"])
    rows = []
    for kind, each in found.items():
        exporting, live, own = (median(one[name] for one in each) for name in ("exporting", "live", "gate"))
        more = exporting + live - least
        rows.append([kind, *(f"{1000 * s:.0f} ms" for s in (exporting, live, own, more)), f"<= {1000 * GOAL_S:.0f} ms"])
    header = ["", "exporting", "warm to live", "gate itself", "more than without", "goal"]
    show(f"publications, {HELD_OUT:,} images held out; medians of {rounds}", header, rows)


def publish(api: httpx.Client, gate: str, seed: int) -> dict[str, float]:
    """Seconds of the parts of a publication. A new seed gives images that no version has seen."""
    files = {}
    for name, count in (("data", TRAINED_ON), ("validation", HELD_OUT)):
        images, labels = digits(count, seed)
        images[:, 0] = np.random.default_rng(seed).integers(0, 30, images[:, 0].shape)  # there are only 1,797 others
        files[name] = ("digits.npz", packed(images, labels))
    job: Any = answer(api.post("/finetune", files=files, data={"model": "gated", "spec": SPEC.format(gate)}))
    job = wait(api, job["id"], "finished_at")
    if job["status"] != "succeeded":
        sys.exit(f"the job {job['status']}: {job['error']}")
    card = answer(api.get(f"/models/gated/versions/{job['version']}"))["report"]
    return {
        "exporting": card["cost"]["seconds"]["exporting"],
        "live": job["finished_at"] - job["progress"]["publishing"]["warmed"], "gate": job["gate"]["seconds"],
    }  # fmt: skip


if __name__ == "__main__":
    main()
