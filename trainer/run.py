"""One job from data to a live version: adapt, fit, evaluate, export, publish."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from serving.client import ModelServer
from serving.errors import DeviceUnavailable, Diverged, InvalidDataset
from serving.publishing import alone, publish, withdraw
from serving.registry import Registry
from serving.settings import Settings
from trainer import evaluate
from trainer.datasets import Dataset
from trainer.export import export, load_params
from trainer.jobs import Job, Jobs
from trainer.lenet import HEAD, initial
from trainer.program import Coefficients, Program, Structure, program
from trainer.spec import Spec, described

BASE = "lenet5"  # the pretrained model
PROBE_IMAGES = 16
REPORT_EPSILON = 0.1  # of the report's attack where the spec trains against none


@dataclass
class Split:
    """Training and validation images, light on dark, on the device."""

    images: Any  # (n, 28, 28, 1) float32
    labels: np.ndarray  # (n,) int32


@dataclass
class Run:
    """A job under way: what it writes to its record."""

    job: Job
    jobs: Jobs
    seconds: dict[str, float] = field(default_factory=dict)  # by stage

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What happens inside counts as this stage."""
        self.jobs.update(self.job, stage=name)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 3)


def run_job(job: Job, *, settings: Settings, jobs: Jobs, registry: Registry, server: ModelServer) -> None:
    """Run a claimed job to its success.

    Raises:
        TemperError: why it failed; nothing of it is served or left on disk.
        NotMine: it was cancelled or given to another worker.
    """
    staged = settings.staging / job.id
    clear_leavings(job, settings=settings, registry=registry, server=server)
    live = [version for version in registry.of_job(job.id) if version.live]
    if live:  # a worker died between making it live and saying so
        jobs.finish(job, "succeeded", version=live[0].version, report_status="quick")
        return
    run = Run(job, jobs)
    try:
        with run.stage("validating"):
            spec = Spec.model_validate_json(json.dumps(job.spec))
            device = _device(spec.device)
            dataset = Dataset.load(settings.datasets / f"{job.dataset['id']}.npz")
            polarity = job.dataset["polarity"] if spec.polarity == "auto" else spec.polarity
            with tf.device(device):
                train, validation, probe = _split(dataset, spec, invert=polarity == "dark_on_light")
            base = load_params(settings.models / job.base.replace(":", "/"))
            base_classes = registry.find(*_name_and_version(job.base)).manifest["classes"]
            start = _with_head(
                base, same=tuple(base_classes) == dataset.classes, classes=dataset.classes, seed=spec.seed
            )
        with tf.device(device):
            fitted = program(_structure(spec, dataset.classes, device))
            fitted.load(start, spec.seed, lora_scale=spec.lora.alpha / spec.lora.rank if spec.lora else 0.0)
            with run.stage("training"):
                history = _fit(fitted, train, validation, spec, run)
            with run.stage("evaluating"):
                report = _report(fitted, train, validation, dataset.classes, spec)
        with run.stage("exporting"):
            params = {name: np.asarray(value) for name, value in fitted.params().items()}
            manifest = {
                "classes": list(dataset.classes), "polarity": polarity, "base": job.base, "base_sha256": digest(base),
                "sha256": digest(params), "spec": described(spec), "dataset": job.dataset, "job": job.id,
            }  # fmt: skip
            export(staged, params, invert=polarity == "dark_on_light", manifest=manifest)
        report |= {"history": history, "device": device.removeprefix("/"), "seconds": run.seconds}
        with run.stage("publishing"):
            version = publish(
                settings, registry, server,
                staged=staged, model=job.model, job_id=job.id, manifest=manifest, report=report,
                probe=probe, expected=_logits(fitted, _light_on_dark(probe, polarity == "dark_on_light")),
                may_go_live=lambda: jobs.update(job, stage="publishing"),
            )  # fmt: skip
        registry.set_report(job.model, version, report)
        jobs.finish(job, "succeeded", version=version, report_status="quick")
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def clear_leavings(job: Job, *, settings: Settings, registry: Registry, server: ModelServer) -> None:
    """Remove what an earlier attempt at a job may have left half-done."""
    shutil.rmtree(settings.staging / job.id, ignore_errors=True)
    for version in registry.of_job(job.id):
        if not version.live:
            withdraw(settings, registry, server, version.model, version.version)


def digest(params: dict[str, np.ndarray]) -> str:
    """SHA-256 of parameters, by name."""
    result = sha256()
    for name in sorted(params):
        result.update(name.encode())
        result.update(np.ascontiguousarray(params[name], "<f4").tobytes())
    return result.hexdigest()


def _name_and_version(base: str) -> tuple[str, int]:
    name, _, version = base.partition(":")
    return name, int(version)


def _device(wanted: str) -> str:
    gpus = tf.config.list_logical_devices("GPU")
    if wanted == "gpu" and not gpus:
        raise DeviceUnavailable("the spec asks for a GPU, and TensorFlow sees none", param="spec.device")
    return "/GPU:0" if gpus and wanted != "cpu" else "/CPU:0"


def _light_on_dark(images: np.ndarray, invert: bool) -> np.ndarray:
    return 1.0 - images if invert else images


def _split(dataset: Dataset, spec: Spec, *, invert: bool) -> tuple[Split, Split, np.ndarray]:
    """Training and validation parts with the same share of every class, and a probe as a client would send it."""
    rng = np.random.default_rng(spec.seed)
    chosen = np.zeros(len(dataset.labels), bool)
    for label in range(len(dataset.classes)):
        members = rng.permutation(np.flatnonzero(dataset.labels == label))
        if len(members) < 2:
            raise InvalidDataset(f"class {dataset.classes[label]!r} has fewer than two images", param="data")
        chosen[members[: max(1, round(spec.validation_split * len(members)))]] = True
    images = (dataset.images / np.float32(255))[..., None]
    parts = []
    for part in (~chosen, chosen):
        ready = _light_on_dark(images[part], invert)
        parts.append(Split(tf.constant(ready), dataset.labels[part]))
    return parts[0], parts[1], images[chosen][:PROBE_IMAGES]


def _with_head(
    base: dict[str, np.ndarray], *, same: bool, classes: tuple[str, ...], seed: int
) -> dict[str, np.ndarray]:
    """The base's parameters; with a new head unless the classes are the base's."""
    if same:
        return base
    fresh = initial(len(classes), seed)
    return base | {name: value for name, value in fresh.items() if name.startswith(f"{HEAD}/")}


def _structure(spec: Spec, classes: tuple[str, ...], device: str) -> Structure:
    return Structure(
        method=spec.method,
        classes=len(classes),
        targets=tuple(sorted(spec.lora.targets)) if spec.lora else (),
        rank=spec.lora.rank if spec.lora else 0,
        attack=spec.adversarial.attack if spec.adversarial else None,
        device=device,
    )


def _fit(fitted: Program, train: Split, validation: Split, spec: Spec, run: Run) -> list[dict[str, float]]:
    """Train; the history holds a record an epoch. With early stopping the best weights are left in place."""
    n = len(train.labels)
    # A small set still takes twenty steps an epoch: with fewer, a default job would end before it has learned anything.
    batch_size = min(spec.batch_size, max(8, n // 20))
    steps = -(-n // batch_size)
    attack = spec.adversarial
    coefficients = Coefficients(
        total_steps=spec.epochs * steps, batch_size=batch_size, learning_rate=spec.learning_rate, seed=spec.seed,
        l1=spec.l1, l2=spec.l2, dropout=spec.dropout, epsilon=attack.epsilon if attack else 0.0,
        adversarial_weight=attack.weight if attack else 0.0,
    )  # fmt: skip
    labels = tf.constant(train.labels)
    rng = np.random.default_rng(spec.seed)
    history: list[dict[str, float]] = []
    best, best_loss, since = fitted.snapshot(), np.inf, 0
    for epoch in range(spec.epochs):
        order = tf.constant(rng.permutation(n).astype(np.int32))
        terms = fitted.epoch(train.images, labels, order, epoch * steps, coefficients)
        logits = _logits(fitted, validation.images)
        record = {
            "epoch": epoch + 1, **terms, "validation_accuracy": evaluate.accuracy(logits, validation.labels),
            "validation_cross_entropy": evaluate.cross_entropy(logits, validation.labels),
        }  # fmt: skip
        wrong = [name for name, value in record.items() if not np.isfinite(value)]
        if wrong:
            raise Diverged(f"{', '.join(wrong)} is no longer finite in epoch {epoch + 1}; lower the learning rate")
        history.append(record)
        run.jobs.update(run.job, progress={**record, "epochs": spec.epochs})
        if spec.early_stopping:
            loss = record["validation_cross_entropy"]
            if loss < best_loss - spec.early_stopping.min_delta:
                best, best_loss, since = fitted.snapshot(), loss, 0
            else:
                since += 1
            if since >= spec.early_stopping.patience:
                break
    if spec.early_stopping:
        fitted.restore(best)
    return history


def _logits(fitted: Program, images: Any) -> np.ndarray:
    return evaluate.in_batches(lambda part: fitted.logits(tf.convert_to_tensor(part)), images)


def _report(fitted: Program, train: Split, validation: Split, classes: tuple[str, ...], spec: Spec) -> dict[str, Any]:
    """The quick report, all of it on images that the job has held out but for the `train` part."""
    epsilon = spec.adversarial.epsilon if spec.adversarial else REPORT_EPSILON
    attack: Callable[..., Any] = lambda x, y: fitted.logits(  # noqa: E731
        fitted.fgsm(x, tf.constant(y), tf.constant(epsilon, tf.float32))
    )
    logits = _logits(fitted, validation.images)
    on_train = evaluate.score(_logits(fitted, train.images), train.labels)
    on_validation = evaluate.score(logits, validation.labels)
    attacked = evaluate.in_batches(attack, validation.images, validation.labels)
    return {
        "train": on_train,
        "validation": on_validation | evaluate.classification(logits, validation.labels, classes),
        "generalization_gap": {
            "accuracy": on_train["accuracy"] - on_validation["accuracy"],
            "cross_entropy": on_validation["cross_entropy"] - on_train["cross_entropy"],
        },
        "robustness": {
            "attack": "fgsm", "epsilon": epsilon, "accuracy": evaluate.accuracy(attacked, validation.labels)
        },
        "parameters": {
            "trained": int(sum(value.size for value in fitted.snapshot().values())),
            "total": int(sum(np.size(value) for value in fitted.params().values())),
        },
    }  # fmt: skip


def publish_base(settings: Settings, registry: Registry, server: ModelServer) -> None:
    """Publish the pretrained LeNet-5 as version 1 of `lenet5`, unless it is there.

    Raises:
        ModelServerUnavailable: nothing was done.
    """
    with alone(settings, "base"):
        if registry.has_live(BASE):
            return
        server.states(BASE)  # is it there at all? A number that is given is not given again
        for version in registry.of_job(BASE):
            withdraw(settings, registry, server, BASE, version.version)
        params, card = pretrained()
        classes = [str(digit) for digit in range(10)]
        manifest = {"classes": classes, "polarity": "light_on_dark", "base": None, "sha256": digest(params), **card}
        fitted = program(Structure("full", len(classes)))
        fitted.load(params, 0, 0.0)
        probe = np.random.default_rng(0).random((PROBE_IMAGES, 28, 28, 1), np.float32)
        staged = settings.staging / BASE
        shutil.rmtree(staged, ignore_errors=True)
        export(staged, params, invert=False, manifest=manifest)
        publish(
            settings, registry, server, staged=staged, model=BASE, job_id=BASE, manifest=manifest, report=card,
            probe=probe, expected=_logits(fitted, probe),
        )  # fmt: skip


def pretrained() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Parameters of the pretrained LeNet-5, and its card: where they come from."""
    folder = Path(__file__).parent / "base"
    with np.load(folder / "lenet5.npz") as arrays:
        return dict(arrays), json.loads((folder / "lenet5.json").read_text(encoding="utf-8"))
