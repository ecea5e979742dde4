"""`python -m load.bench_estimates`: what `dry_run` says a fine-tune takes, beside what it takes.

A service of its own fine-tunes scikit-learn's digits. Each structure is tried on a few images first, which is estimated
from constants and teaches the service; then on others, which are estimated from the jobs before.
"""

import json
import secrets
import time
from typing import Any

import click
import httpx

from demo import answer, service
from load.bench_served import PATIENCE_S, digits, packed, show

WITHIN = 0.2  # goal, of structures that have run before
POLL_S = 0.1
SIZES = (200, 400, 1000)  # images; the first ones teach
STRUCTURES: dict[str, dict[str, Any] | None] = {
    "lora": {},
    "full, augmented": {"method": "full", "augmentation": {"shift": 2, "rotate": 10}},
    "full, fgsm": {"method": "full", "adversarial": {"attack": "fgsm", "epsilon": 0.1}},
    "without a spec": None,
}


@click.command()
@click.option("--only", help="Only the structure of this name.")
def main(only: str | None) -> None:
    """Print estimates, durations and their ratios, and the same of memory."""
    rows = []
    with service() as api:
        for name, spec in STRUCTURES.items():
            for number, images in enumerate(SIZES if only in (None, name) else ()):
                found, seconds, peak = run(api, images, number, spec)
                ratio = found["seconds"] / seconds
                goal = f"{1 - WITHIN:g} to {1 + WITHIN:g}" if found["jobs"] else ""
                memory = found["memory_bytes"] / peak
                rows.append((
                    name, str(images), f"{found['seconds']:.1f}", f"{seconds:.1f}", f"{ratio:.2f}", goal,
                    f"{peak / 2**20:.0f}", f"{memory:.2f}",
                ))  # fmt: skip
    columns = ("", "images", "estimated s", "took s", "ratio", "goal", "peak MiB", "ratio")
    show("estimates, the first of a structure from constants", columns, rows)


def run(api: httpx.Client, images: int, seed: int, spec: Any) -> tuple[dict[str, Any], float, int]:
    """The estimate of a fine-tune, the seconds that it takes, and the worker's peak of memory in bytes."""
    files = {"data": ("digits.npz", packed(*digits(images, seed)))}
    model = f"estimated-{secrets.token_hex(4)}"  # a new one each time, as the first version of a model has a preview
    fields = {"model": model} | ({"spec": json.dumps(spec)} if spec is not None else {})
    dry = answer(api.post("/finetune", files=files, data={**fields, "dry_run": "true"}))
    job = answer(api.post("/finetune", files=files, data=fields))
    began = time.perf_counter()
    while job["finished_at"] is None:
        if time.perf_counter() - began > 10 * PATIENCE_S:
            raise click.ClickException(f"job {job['id']} does not end")
        time.sleep(POLL_S)
        job = answer(api.get(f"/finetune/{job['id']}"))
    if job["status"] != "succeeded":
        raise click.ClickException(f"the job {job['status']}: {job['error']}")
    version = answer(api.get(f"/models/{model}/versions/{job['version']}"))
    peak: int = version["report"]["cost"]["peak_memory_bytes"]
    return dry["estimate"], job["finished_at"] - job["started_at"], peak


if __name__ == "__main__":
    main()
