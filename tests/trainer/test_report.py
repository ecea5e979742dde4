"""The report card: its formulas, and that all of it follows from the exported SavedModel."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

from tests.conftest import Place
from trainer import delta, evaluate, report
from trainer.asked import parse_spec
from trainer.export import digest, export, load_params
from trainer.fit import Fitted, Split
from trainer.folds import stratified
from trainer.jobs.records import Job
from trainer.lenet import HEAD
from trainer.methods import Method
from trainer.network import Network
from trainer.spec import Spec
from trainer.synthetic_digits import synthetic_digits
from trainer.worker.complete_report import complete_report
from trainer.worker.pretrained import pretrained


def test_calibration_is_the_mean_distance_of_confidence_and_accuracy() -> None:
    confidence = np.array([0.95, 0.95, 0.85, 0.55])
    logits = np.log(np.stack([confidence, 1 - confidence], axis=1))
    found = evaluate.calibration(logits, np.array([0, 1, 0, 0]))
    assert found["expected_calibration_error"] == pytest.approx((2 * 0.45 + 0.15 + 0.45) / 4)
    last = found["bins"][-1]
    assert (last["images"], last["confidence"], last["accuracy"]) == (2, pytest.approx(0.95), 0.5)
    assert sum(part["images"] for part in found["bins"]) == 4
    assert "accuracy" not in found["bins"][0]  # of an empty bin there is nothing to say


def test_the_interval_of_an_accuracy_is_wilsons() -> None:
    logits = np.eye(2)[[0] * 9 + [1]]
    low, high = evaluate.score(logits, np.zeros(10, int))["accuracy_interval"]
    assert (low, high) == (pytest.approx(0.596, abs=1e-3), pytest.approx(0.982, abs=1e-3))


def test_sparsity_counts_exact_zeros_of_kernels_only() -> None:
    params = {"a/kernel": np.array([0.0, 1e-30, 1.0, 2.0]), "a/bias": np.zeros(9), "b/kernel": np.zeros(4)}
    assert evaluate.sparsity(params) == {"zeros": 5 / 8, "by_layer": {"a": 0.25, "b": 1.0}}


def test_the_drawn_digits_are_digits_to_the_base_and_the_same_each_time() -> None:
    images, labels = synthetic_digits(200, seed=3)
    assert evaluate.accuracy(Network(pretrained()[0]).logits(images), labels) > 0.95
    np.testing.assert_array_equal(images, synthetic_digits(200, seed=3)[0])
    assert (images.min(), images.max() <= 1) == (0, True)


def validation_of(place: Place, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The images that a default job of `place` holds out, as a client would send them."""
    with np.load(place.settings.datasets / f"{place.dataset.id}.npz") as arrays:
        images, labels = arrays["images"], arrays["labels"]
    chosen = stratified(labels, seed, lambda n: max(1, round(0.2 * n)))
    return images[chosen, ..., None] / np.float32(255), labels[chosen]


def complete(place: Place, job: Job) -> dict[str, Any]:
    for _ in complete_report(job, settings=place.settings, jobs=place.jobs, registry=place.registry):
        assert place.registry.find("m").report.forgetting is None
    found: dict[str, Any] = place.registry.find("m").report.dump()
    return found


@pytest.mark.slow
def test_every_number_can_be_recomputed_from_the_saved_model(place: Place) -> None:
    job = place.run(place.claimed({"method": "full", "l1": 1e-4, "epochs": 5, "adversarial": {"epsilon": 0.05}}))
    assert (job.status, job.report_status) == ("succeeded", "quick")
    card = complete(place, job)
    assert place.jobs.get(job.id).report_status == "complete"
    directory = place.settings.models / "m" / str(job.version)
    signature = tf.saved_model.load(str(directory)).signatures["serving_default"]
    images, labels = validation_of(place)

    def served(x: Any) -> np.ndarray:
        logits: np.ndarray = signature(image=tf.constant(x))["logits"].numpy()
        return logits

    logits, params = served(images), load_params(directory)
    names = tuple(place.registry.find("m").manifest.classes)
    expected = evaluate.score(logits, labels) | evaluate.classification(logits, labels, names)
    assert card["validation"]["accuracy"] == expected["accuracy"]
    assert card["validation"]["accuracy_interval"] == expected["accuracy_interval"]
    assert card["validation"]["confusion_matrix"] == expected["confusion_matrix"]
    assert card["validation"]["classification_report"] == expected["classification_report"]
    assert card["validation"]["cross_entropy"] == pytest.approx(expected["cross_entropy"], rel=1e-4)
    uncalibrated = logits * np.float32(card["calibration"]["temperature"])  # each half of the images judges the other
    calibration = evaluate.calibration(evaluate.cross_fitted(uncalibrated, labels), labels)[
        "expected_calibration_error"
    ]
    assert card["calibration"]["expected_calibration_error"] == pytest.approx(calibration, abs=1e-4)
    assert card["sparsity"]["zeros"] == evaluate.sparsity(params)["zeros"] > 0
    with np.load(place.settings.datasets / f"{place.dataset.id}.npz") as arrays:
        every, all_labels = arrays["images"][..., None] / np.float32(255), arrays["labels"]
    rest = ~stratified(all_labels, 0, lambda n: max(1, round(0.2 * n)))
    on_train = evaluate.score(served(every[rest]), all_labels[rest])
    gap = on_train["accuracy"] - expected["accuracy"]
    assert card["generalization_gap"]["accuracy"] == pytest.approx(gap)
    split = Split(tf.constant(images), labels)
    attacked = evaluate.accuracy(report.fgsm(Network(params), split, 0.05), labels)
    assert card["robustness"]["accuracy_under_fgsm"] == attacked
    again = list(report.robustness(lambda: Network(params), split, 0.05))[-1]
    assert again is not None
    assert card["robustness"]["curve"] == again["curve"]
    at_epsilon = next(point for point in again["curve"] if point["epsilon"] == 0.05)
    assert (card["robustness"]["attack"], card["robustness"]["accuracy"]) == ("pgd", at_epsilon["pgd"])
    drawn, digits = synthetic_digits(500, 0)
    assert card["forgetting"]["accuracy"] == evaluate.accuracy(served(drawn), digits)
    assert card["parameters"]["total"] == sum(value.size for value in params.values())
    assert set(card["cost"]["seconds"]) == {"validating", "training", "evaluating", "exporting", "publishing"}
    assert card["cost"]["images_per_second"] > 0
    assert card["cost"]["peak_memory_bytes"] > 1e8


def test_attacks_find_the_same_way_through_the_saved_model(place: Place) -> None:
    """A graph with a kink at black pixels would hide two thirds of the gradient."""
    job = place.run(place.claimed({"method": "full", "epochs": 3}))
    directory = place.settings.models / "m" / str(job.version)
    model = tf.saved_model.load(str(directory))
    signature = model.signatures["serving_default"]
    images, labels = validation_of(place)
    x = tf.constant(images)
    with tf.GradientTape() as tape:
        tape.watch(x)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, signature(image=x)["logits"])
    attacked = tf.clip_by_value(x + 0.1 * tf.sign(tape.gradient(losses, x)), 0.0, 1.0)
    found = evaluate.accuracy(signature(image=attacked)["logits"].numpy(), labels)
    assert found == place.registry.find("m").report.dump()["robustness"]["accuracy_under_fgsm"]


def test_a_version_that_is_worse_than_its_base_or_than_guessing_says_so() -> None:
    split, classes = Split(None, np.array([0, 0, 0, 1], np.int32)), ("a", "b")
    assert report._warnings(0.8, 0.8, split, classes) == []
    assert report._warnings(0.8, None, split, classes) == []
    (worse,) = report._warnings(0.8, 0.9, split, classes)
    assert "80.0%" in worse
    (guessing,) = report._warnings(0.75, 0.9, split, classes)
    assert "most frequent" in guessing
    (missing,) = report._warnings(0.8, 0.8, split, ("a", "b", "c"))
    assert "'c'" in missing
    (missing,) = report._warnings(0.8, 0.8, split, tuple("abcdefgh"))
    assert "'g' and 1 more" in missing


def test_a_network_that_withstands_fgsm_and_not_pgd_says_so() -> None:
    trained = parse_spec('{"adversarial": {"attack": "fgsm"}}')
    fitted = Fitted({}, {}, Method("head"), 0.0)

    def said(spec: Spec, pgd: float, fgsm: float) -> list[str]:
        figures = {"attack": "pgd", "epsilon": 0.1, "accuracy": pgd, "accuracy_under_fgsm": fgsm}
        return report._attack_warnings(spec, figures, fitted)

    (warning,) = said(trained, 0.03, 0.68)
    assert "68.0% under FGSM but 3.0% under PGD" in warning
    assert said(trained, 0.5, 0.68) == []
    assert said(parse_spec("{}"), 0.03, 0.68) == []  # nobody asked for robustness
    fitted.overfitted_epoch = 7
    assert "from epoch 7 on" in said(trained, 0.5, 0.6)[0]
    fitted.ended_by = "catastrophic_overfitting"  # which the report shows already
    assert said(trained, 0.5, 0.6) == []


def test_the_curve_falls_and_the_worst_case_is_below_every_attack(place: Place) -> None:
    job = place.run(place.claimed({"epochs": 2}))
    curve = complete(place, job)["robustness"]["curve"]
    assert [point["epsilon"] for point in curve] == [0, 0.05, 0.1, 0.2]
    assert all(point["worst"] <= min(point["fgsm"], point["pgd"], point["square"]) for point in curve)
    assert [point["worst"] for point in curve] == sorted((point["worst"] for point in curve), reverse=True)


def test_forgetting_of_another_task_asks_the_bases_classifier(place: Place) -> None:
    base, _ = pretrained()
    drawn, digits = synthetic_digits(100, 0)
    sample = Split(tf.constant(drawn), digits)
    fresh = base | {f"{HEAD}/kernel": np.zeros((84, 3), np.float32), f"{HEAD}/bias": np.zeros(3, np.float32)}
    same = report.forgetting(fresh, base, sample, same_classes=False)
    assert same["lost"] == 0  # nothing below the classifier has changed
    broken = fresh | {"dense2/kernel": -base["dense2/kernel"]}
    assert report.forgetting(broken, base, sample, same_classes=False)["lost"] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "head", "bias", "lora", "adapter", "ia3"])
def test_the_delta_applied_to_the_base_is_the_version(place: Place, method: str, tmp_path: Path) -> None:
    job = place.run(place.claimed({"method": method, "epochs": 1}))
    version = place.settings.models / "m" / str(job.version)
    out = tmp_path / "applied"
    base, stored = str(place.settings.models / "lenet5/1"), version / delta.DELTA
    applied = CliRunner().invoke(delta.main, [base, str(stored), str(out)])
    assert applied.exit_code == 0, applied.output
    images, _ = validation_of(place)
    scores = [Network(load_params(folder)).logits(images) for folder in (version, out)]
    np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
    card = place.registry.find("m").report.dump()["parameters"]
    size_bytes = stored.stat().st_size
    assert card["delta_bytes"] == size_bytes
    assert card["trained"] * 4 < size_bytes < card["trained"] * 4 + 20_000
    if method == "lora":
        command: list[str | Path] = [sys.executable, "-m", "trainer.delta", version, stored, tmp_path / "no"]
        refused = subprocess.run(command, capture_output=True, text=True)
        assert refused.returncode == 1
        assert "belongs to another base" in refused.stderr
        assert json.loads((out / "assets.extra/manifest.json").read_text())["job"] == job.id


def test_a_delta_that_cannot_be_applied_is_refused_in_one_line(tmp_path: Path) -> None:
    params, _ = pretrained()
    base, taken = tmp_path / "base", tmp_path / "taken"
    export(base, params, invert=False, manifest={})
    taken.mkdir()
    good, text, single, other, truncated = (
        tmp_path / name for name in ("good.npz", "a.txt", "a.npy", "other.npz", "truncated.npz")
    )
    manifest = {"base": "lenet5:1", "base_sha256": digest(params), "polarity": "light_on_dark", "spec": {}}
    delta.write(good, {"head/bias": params["head/bias"]}, lora_scale=0.0, manifest=manifest)
    text.write_text("not an archive")
    np.save(single, np.zeros(3))
    np.savez(other, x=np.zeros(3))
    truncated.write_bytes(good.read_bytes()[:400])
    out = tmp_path / "out"
    cases = [(base, file, out, "is not a delta") for file in (text, single, other, truncated)]
    cases += [(base, good, taken, "exists already"), (taken, good, out, "not the directory of a model's version")]
    for first, file, target, reason in cases:
        result = CliRunner().invoke(delta.main, [str(first), str(file), str(target)])
        assert result.exit_code == 1
        assert reason in result.output, result.output
        assert len(result.output.splitlines()) == 1
        assert not out.exists()
