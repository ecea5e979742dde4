"""`python -m load.bench_served`: seconds from an upload to the new version's first correct answer, beside plain Keras.

Temper: a warm, idle service gets 1,000 digits and fine-tunes for ten epochs with the default recipe. Keras: a script,
started cold, trains the same network on the same number of the same images and exports it.
"""

import io
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
import httpx
import numpy as np

from demo import service
from load.figures import note
from quality.digits import all_digits

ROUNDS = 5
IMAGES, EPOCHS = 1000, 10
TRAINED_ON = 800  # of these; the service holds the rest out
ASKED, RIGHT = 10, 8  # images in the first request, and how many must be classified correctly
GOAL, AIM_S = 5.0, 1.5
POLL_S, PATIENCE_S = 0.01, 300.0
SPEC = f'{{"method": "lora", "l2": 1e-4, "dropout": 0.2, "epochs": {EPOCHS}}}'
KERAS = f"""
import sys
import keras
import numpy as np

with np.load(sys.argv[1]) as data:
    images, labels = data["images"][:{TRAINED_ON}, ..., None] / np.float32(255), data["labels"][:{TRAINED_ON}]
layers = keras.layers
model = keras.Sequential([
    layers.Input((28, 28, 1)),
    layers.Conv2D(6, 5, padding="same", activation="relu"), layers.MaxPooling2D(),
    layers.Conv2D(16, 5, padding="same", activation="relu"), layers.MaxPooling2D(), layers.Flatten(),
    layers.Dense(120, activation="relu"), layers.Dropout(0.2),
    layers.Dense(84, activation="relu"), layers.Dropout(0.2),
    layers.Dense(10),
])
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(keras.optimizers.Adam(1e-3), loss)
model.fit(images, labels, batch_size=64, epochs={EPOCHS}, verbose=0)
model.export(sys.argv[2], verbose=False)
"""


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS, show_default=True, help="In which both take turns.")
def main(rounds: int) -> None:
    """Measure the seconds from an upload to the first correct answer, and print each figure beside its goal."""
    ours: list[dict[str, float]] = []
    theirs: list[float] = []
    with service() as api:
        fine_tune(api, 0)
        for number in range(1, rounds + 1):
            theirs.append(cold_keras(number))
            ours.append(fine_tune(api, number))
    title = f"From the upload of {IMAGES:,} images to the first answer"
    note(title, "Temper, warm", [one["total"] for one in ours], "s")
    note(title, "a Keras script, cold", theirs, "s", is_alternative=True)
    total, other = median(one["total"] for one in ours), median(theirs)
    verdict = [f"{other / total:.1f}x", f">= {GOAL:.0f}x"]
    rows = [["ours, warm", f"{total:.2f} s", *verdict], ["plain Keras, cold", f"{other:.2f} s", "", ""]]
    show(f"to served, {IMAGES:,} images, {EPOCHS} epochs; medians of {rounds}", ["", "time", "ratio", "goal"], rows)
    times = [(name, median(one[name] for one in ours)) for name in ours[0]]
    parts = [[name, f"{1000 * seconds:.0f} ms", f"{seconds / total:.0%}"] for name, seconds in times]
    show(f"where ours goes (aim {AIM_S} s)", ["", "time", "share"], parts)


def cold_keras(seed: int) -> float:
    """Seconds that a plain Keras script takes from start to end."""
    with tempfile.TemporaryDirectory() as folder:
        upload = Path(folder) / "digits.npz"
        upload.write_bytes(packed(*digits(IMAGES, seed)))
        command = [sys.executable, "-c", KERAS, str(upload), f"{folder}/served"]
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began


def fine_tune(api: httpx.Client, seed: int) -> dict[str, float]:
    """Seconds from the upload to the first correct answer, and their parts. A new seed gives images that no cache has.

    Returns when the report is complete and the worker idle again.
    """
    images, labels = digits(IMAGES, seed)
    upload = packed(images, labels)
    asked = {"model": "bench", "range": "byte", "instances": images[:ASKED].tolist()}
    began, began_at = time.perf_counter(), time.time()
    job = answer(api.post("/finetune", files={"data": ("digits.npz", upload)}, data={"model": "bench", "spec": SPEC}))
    posted = time.perf_counter()
    job = wait(api, job["id"], "finished_at")
    seen_at, seen = time.time(), time.perf_counter()
    if job["status"] != "succeeded":
        sys.exit(f"the job {job['status']}: {job['error']}")
    while right(answer(api.post("/predict", json=asked | {"version": job["version"]})), labels) < RIGHT:
        if time.perf_counter() - began > PATIENCE_S:
            sys.exit("the new version does not answer correctly")
    total = time.perf_counter() - began
    stages: dict[str, float] = answer(api.get(f"/models/bench/versions/{job['version']}"))["report"]["cost"]["seconds"]
    complete(api, job["id"])
    worked = job["finished_at"] - job["started_at"]
    return {
        "POST answered": posted - began,
        "  until the job exists (upload, decoding)": job["created_at"] - began_at,
        "queued": job["started_at"] - job["created_at"],
        **stages,
        "worker, between the stages": worked - sum(stages.values()),
        "until a poll sees it": seen_at - job["finished_at"],
        "POST /predict": total - (seen - began),
        "total": total,
    }


def answer(response: httpx.Response) -> Any:
    """Return the JSON of a successful response; end the benchmark otherwise."""
    if not response.is_success:
        sys.exit(f"{response.request.method} {response.request.url.path}: {response.status_code} {response.text}")
    return response.json()


def complete(api: httpx.Client, id: str) -> None:
    """Wait until the report is complete, after which the worker is idle again."""
    while answer(api.get(f"/finetune/{id}"))["report_status"] != "complete":
        time.sleep(POLL_S)


def wait(api: httpx.Client, id: str, field: str) -> Any:
    """Poll the job until `field` is set."""
    began = time.monotonic()
    while (job := answer(api.get(f"/finetune/{id}")))[field] is None:
        if time.monotonic() - began > PATIENCE_S:
            sys.exit(f"job {id} has no {field}")
        time.sleep(POLL_S)
    return job


def right(found: Any, labels: np.ndarray) -> int:
    """Number of correct predictions."""
    return sum(one["label"] == str(label) for one, label in zip(found["predictions"], labels, strict=False))


def digits(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's handwritten digits, (count, 28, 28) uint8, and their labels; repeated if `count` exceeds them."""
    images, labels = all_digits()
    order = np.resize(np.random.default_rng(seed).permutation(len(labels)), count)
    return images[order], labels[order]


def packed(images: np.ndarray, labels: np.ndarray) -> bytes:
    """Encode as an `.npz`."""
    content = io.BytesIO()
    np.savez(content, images=images, labels=labels)
    return content.getvalue()


def show(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table with its first column left-aligned and the others right-aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    print(f"\n{title}")
    for first, *others in (header, *rows):
        cells = [f"{text:>{width}}" for text, width in zip(others, widths[1:], strict=True)]
        print(f"  {first:<{widths[0]}}  " + "  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
