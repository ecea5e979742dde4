"""`python -m load.bench_train`: images a second in training, beside plain Keras and PyTorch in the same run.

All sides train LeNet-5 with batches of 64 on the same images, taking turns. PyTorch takes part if it is installed.
"""

import atexit
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import click
import numpy as np

from load.bench_served import digits, show
from load.figures import note
from serving.quiet import import_tensorflow

import_tensorflow()

import tensorflow as tf  # noqa: E402

from trainer.fit import Split, Training, begin, coefficients  # noqa: E402
from trainer.spec import Spec  # noqa: E402
from trainer.worker.pretrained import pretrained  # noqa: E402

ROUNDS = 5
IMAGES, FEW = 5120, 2048  # FEW for attacks
BATCH, DROPOUT = 64, 0.2
EPOCHS, JOB_EPOCHS = 2, 10  # for whole networks, and for methods that compute their features once per job
TARGETS = {"targets": ["dense1", "dense2"]}
Side = Callable[[], float]  # trains, and returns images per second

METHODS: dict[str, dict[str, Any]] = {
    "ours, head": {"method": "head"},
    "ours, lora": {"method": "lora", "lora": TARGETS},
    "ours, bias": {"method": "bias", "bias": TARGETS},
}
ATTACKS: dict[str, tuple[dict[str, Any] | None, float]] = {  # and the longest allowed step, relative to a clean one
    "clean": (None, 1.0),
    "fgsm alone": ({"attack": "fgsm", "weight": 1.0}, 3.0),
    "fgsm, half clean": ({"attack": "fgsm", "weight": 0.5}, 3.5),
    "pgd, 10 steps": ({"attack": "pgd", "weight": 1.0, "steps": 10}, 12.0),
    "free, a replay of 4": ({"attack": "free", "replays": 4}, 1.5),
}


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=ROUNDS, show_default=True, help="In which all take turns.")
def main(rounds: int) -> None:
    """Measure training speed, and print each ratio beside its goal."""
    images, labels = digits(IMAGES, seed=0)
    x, y = images[..., None] / np.float32(255), labels.astype(np.int32)
    whole: dict[str, Side] = {
        "keras fit": keras(x, y),
        "ours, full": ours(x, y, EPOCHS, method="full", l2=0.0),
        "ours, full, l2": ours(x, y, EPOCHS, method="full"),
    }
    try:
        whole["pytorch"] = pytorch(x, y)
    except ImportError as exc:
        print(f"PyTorch is left out: {exc}")
    speeds = measured(whole | {name: ours(x, y, JOB_EPOCHS, **fields) for name, fields in METHODS.items()}, rounds)
    for name in sorted(speeds, key=lambda name: name in ("keras fit", "pytorch")):
        alternative = name in ("keras fit", "pytorch")
        note("Training in batches of 64", name, speeds[name], "images/s", is_alternative=alternative)
    speed = {name: median(found) for name, found in speeds.items()}
    comparisons = [(one, "keras fit", 1.8) for one in ("ours, full", "ours, full, l2")]
    comparisons += [(one, "pytorch", 0.8) for one in ("ours, full", "ours, full, l2") if "pytorch" in speed]
    comparisons += [(one, "keras fit", 8.0) for one in METHODS]
    rows = [
        [one, f"{speed[one]:,.0f}", other, f"{speed[other]:,.0f}", f"{speed[one] / speed[other]:.2f}x", f">= {goal}x"]
        for one, other, goal in comparisons
    ]
    title = f"training, batches of {BATCH}, images a second; medians of {rounds}"
    show(title, ["", "images/s", "beside", "images/s", "ratio", "goal"], rows)

    attacked = {name: ours(x[:FEW], y[:FEW], 1, method="full", dropout=0.0, l2=0.0, adversarial=attack)
                for name, (attack, _) in ATTACKS.items()}  # fmt: skip
    pace = {name: BATCH / median(found) for name, found in measured(attacked, rounds).items()}
    rows = [
        [
            name,
            f"{1000 * seconds:.2f}",
            f"{seconds / pace['clean']:.2f}x",
            f"<= {ATTACKS[name][1]}x" if ATTACKS[name][0] else "",
        ]
        for name, seconds in pace.items()
    ]
    show("attacks, milliseconds an update", ["", "ms", "of clean", "goal"], rows)


def measured(sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Images per second of every side in each round, in which all take turns; one more round before warms up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in reversed(sides) if number % 2 else sides:
            speed = sides[name]()
            if number:
                found[name].append(speed)
    return found


def ours(x: np.ndarray, y: np.ndarray, epochs: int, **fields: Any) -> Side:
    """The training part of a job: load weights, compute frozen layers once, run every epoch. Replayed images count."""
    spec = Spec.model_validate({"epochs": epochs, "batch_size": BATCH, "dropout": DROPOUT, **fields}, strict=False)
    params, _ = pretrained()
    start = begin(spec, params, classes=10, same_classes=True)
    images = Split(tf.constant(x), y)
    trained_on = epochs * len(y) * coefficients(spec, len(y)).replays

    def train() -> float:
        began = time.perf_counter()
        run = Training(spec, start, images, classes=10)
        for _ in range(epochs):
            run.epoch()
        return trained_on / (time.perf_counter() - began)

    return train


def keras(x: np.ndarray, y: np.ndarray) -> Side:
    """The same network with Keras's own `fit`, in a process where TensorFlow divides operations among all cores."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=_keras, args=(there, x, y), daemon=True)
    child.start()
    atexit.register(child.terminate)

    def train() -> float:
        here.send(None)
        speed: float = here.recv()
        return speed

    return train


def _keras(pipe: Connection, x: np.ndarray, y: np.ndarray) -> None:
    """Train whenever asked to; answers with images per second."""
    tf.config.threading.set_intra_op_parallelism_threads(os.cpu_count() or 1)
    layers = tf.keras.layers
    model = tf.keras.Sequential([
        layers.Input((28, 28, 1)),
        layers.Conv2D(6, 5, padding="same", activation="relu"), layers.MaxPooling2D(),
        layers.Conv2D(16, 5, padding="same", activation="relu"), layers.MaxPooling2D(), layers.Flatten(),
        layers.Dense(120, activation="relu"), layers.Dropout(DROPOUT),
        layers.Dense(84, activation="relu"), layers.Dropout(DROPOUT),
        layers.Dense(10),
    ])  # fmt: skip
    loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf.keras.optimizers.Adam(1e-3), loss)

    while pipe.recv() is None:
        began = time.perf_counter()
        model.fit(x, y, batch_size=BATCH, epochs=EPOCHS, shuffle=True, verbose=0)
        pipe.send(EPOCHS * len(y) / (time.perf_counter() - began))


def pytorch(x: np.ndarray, y: np.ndarray) -> Side:
    """The same network in PyTorch, as fast as it gets on a CPU without compiling.

    Raises:
        ImportError: it is not installed.
    """
    torch: Any = importlib.import_module("torch")
    torch.set_num_threads(os.cpu_count() or 1)
    nn = torch.nn
    model = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(784, 120), nn.ReLU(), nn.Dropout(DROPOUT),
        nn.Linear(120, 84), nn.ReLU(), nn.Dropout(DROPOUT),
        nn.Linear(84, 10),
    ).to(memory_format=torch.channels_last)  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).to(memory_format=torch.channels_last)
    labels = torch.from_numpy(y.astype(np.int64))

    def train() -> float:
        began = time.perf_counter()
        for _ in range(EPOCHS):
            order = torch.randperm(len(y))
            for at in range(0, len(y), BATCH):
                batch = order[at : at + BATCH]
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
                optimizer.step()
        return float(EPOCHS * len(y) / (time.perf_counter() - began))

    return train


if __name__ == "__main__":
    main()
