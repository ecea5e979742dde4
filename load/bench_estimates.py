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

from demo import service
from load.bench_served import PATIENCE_S, answer, digits, packed

WITHIN = 0.2  # goal, of structures that have run before
POLL_S = 0.1
SIZES = (200, 300, 400, 600)  # images; the first ones teach
STRUCTURES: dict[str, dict[str, Any] | None] = {
    "lora": {},
    "full, augmented": {"method": "full", "augmentation": {"shift": 2, "rotate": 10}},
    "full, fgsm": {"method": "full", "adversarial": {"attack": "fgsm", "epsilon": 0.1}},
    "without a spec": None,
}


@click.command()
@click.option("--only", type=click.Choice(list(STRUCTURES)), multiple=True, help="Only structures of these names.")
def main(only: tuple[str, ...]) -> None:
    """Print estimates, durations and their ratios, and the same of memory, as they are measured."""
    print(f"estimates from constants (*), and from jobs of this service; the goal of these is {1 - WITHIN:g} to "
          f"{1 + WITHIN:g}")  # fmt: skip
    print(f"  {'':<16}  images  estimated s  took s  ratio    peak MiB  ratio", flush=True)
    with service() as api:
        for name, spec in STRUCTURES.items():
            for number, images in enumerate(SIZES if not only or name in only else ()):
                found, seconds, peak = run(api, images, number, spec)
                mark = " " if found["jobs"] else "*"
                print(
                    f"  {name:<16}  {images:>6}  {found['seconds']:>11.1f}  {seconds:>6.1f}"
                    f"  {found['seconds'] / seconds:>5.2f} {mark}  {peak / 2**20:>8.0f}"
                    f"  {found['memory_bytes'] / peak:>5.2f}",
                    flush=True,
                )


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
