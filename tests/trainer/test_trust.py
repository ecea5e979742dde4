"""What a sceptic asks: copies, wrong labels, prediction sets, images of another kind, and the unregularized twin."""

import dataclasses
import io
import json
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from serving.publishing import Probe, prove
from store.errors import PublishFailed
from tests.conftest import Place
from trainer import evaluate, inspection
from trainer.abstention import Detector, beyond, coverage_interval, described_sets, distance_limits, set_threshold
from trainer.asked import parse_asked
from trainer.folds import stratified, stratified_folds
from trainer.jobs.datasets import Dataset
from trainer.jobs.duplicates import near_copies
from trainer.jobs.records import Job
from trainer.spec import Spec, regularizes, unregularized

Digits = tuple[np.ndarray, np.ndarray]
QUICK: dict[str, Any] = {"method": "full", "epochs": 3, "learning_rate": 0.01}


def jpeg(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return np.asarray(Image.open(file))


def job_on(
    place: Place, images: np.ndarray, labels: np.ndarray, spec: dict[str, Any], validation: Dataset | None = None
) -> Job:
    dataset = Dataset(
        images, labels.astype(np.int32), tuple("0123456789"), tuple(f"{n}.png" for n in range(len(images)))
    )
    card = dataset.described()
    dataset.save(place.settings.datasets / card.file)
    if validation:
        apart = validation.described()
        validation.save(place.settings.datasets / apart.file)
        card = card.model_copy(update={"validation": apart})
    place.jobs.create(model="m", base="lenet5:1", spec=parse_asked(json.dumps(spec)).described(), dataset=card)
    job = place.jobs.claim("w")
    assert job is not None
    return place.run(job)


def report(place: Place, job: Job) -> dict[str, Any]:
    return place.registry.find("m", job.version).report.dump()


def test_reencoded_brightened_and_noisy_images_are_near_copies_and_different_ones_are_not(digits: Digits) -> None:
    images = digits[0][:200]
    noise = np.random.default_rng(0).normal(0, 3, (5, 28, 28))
    copies = [
        *map(jpeg, images[:5]),
        *np.clip(images[5:10] * 0.8 + 20, 0, 255).astype(np.uint8),
        *np.clip(images[10:15] + noise, 0, 255).astype(np.uint8),
    ]
    groups = near_copies(np.concatenate([images, np.stack(copies)]))
    assert len(set(groups[:200].tolist())) == 200
    assert groups[200:].tolist() == list(range(15))


def test_more_images_than_can_be_compared_are_grouped_if_they_are_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.jobs.duplicates.MOST", 3)
    images = np.random.default_rng(0).integers(0, 255, (5, 28, 28)).astype(np.uint8)
    assert near_copies(images[[4, 0, 4, 1, 2, 0]]).tolist() == [0, 1, 0, 2, 3, 1]


def test_near_copies_are_held_out_together_and_without_copies_nothing_changes() -> None:
    labels, groups = np.repeat(np.arange(4), 25), np.repeat(np.arange(20), 5)
    for held_out in (*stratified_folds(labels, 0, 5, groups), stratified(labels, 0, lambda n: n // 5, groups)):
        assert {int(held_out[groups == group].sum()) for group in range(20)} == {0, 5}
        assert np.bincount(labels[held_out]).tolist() == [5] * 4
    alone = np.arange(100)
    for one, other in zip(stratified_folds(labels, 3, 5), stratified_folds(labels, 3, 5, alone), strict=True):
        assert (one == other).all()
    assert (stratified(labels, 3, lambda n: 7) == stratified(labels, 3, lambda n: 7, alone)).all()


def test_a_group_of_several_classes_is_held_out_as_one_and_a_class_of_one_group_is_split() -> None:
    labels, groups = np.repeat(np.arange(2), 10), np.arange(20)
    groups[[0, 10]] = 0
    for held_out in stratified_folds(labels, 0, 5, groups):
        assert held_out[0] == held_out[10]
    groups = np.where(labels == 1, 99, np.arange(20))
    assert [int(labels[held_out].sum()) for held_out in stratified_folds(labels, 0, 5, groups)] == [2] * 5


@pytest.mark.exhaustive
def test_images_with_random_labels_do_not_score_by_their_copies(place: Place, digits: Digits) -> None:
    """Each image five times, with a label that says nothing: what a copy gives away would be 100%."""
    images, rng = np.repeat(digits[0][:40], 5, axis=0), np.random.default_rng(0)
    labels = np.repeat(rng.permutation(np.arange(40) % 10), 5)
    done = job_on(place, images, labels, {**QUICK, "epochs": 20, "folds": 4, "validation_split": 0})
    card = report(place, done)
    assert card["train"]["accuracy"] > 0.9
    assert card["validation"]["accuracy"] < 0.4
    assert card["inspection"]["copies"]["groups"] == 40
    assert card["inspection"]["copies"]["listed"][0][0]["file"] == "0.png"


def test_validation_images_that_are_copies_of_training_images_are_named(place: Place, digits: Digits) -> None:
    images, labels = digits[0][:100], digits[1][:100]
    apart = np.stack([*digits[0][100:110], jpeg(images[7])])
    validation = Dataset(apart, np.append(digits[1][100:110], labels[7]).astype(np.int32), tuple("0123456789"))
    card = report(place, job_on(place, images, labels, QUICK, validation))
    (leak,) = card["inspection"]["leaks"]["listed"]
    assert (leak["index"], leak["part"], leak["copy_of"]["file"]) == (10, "validation", "7.png")
    assert any("near copies of images that were trained on" in text for text in card["warnings"])


def synthetic(n: int, classes: int, accuracy: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Logits and labels of a calibrated classifier."""
    logits = rng.normal(0, 1, (n, classes))
    logits[np.arange(n), rng.integers(0, classes, n)] += 2 + 6 * accuracy
    chances = np.exp(evaluate.log_softmax(logits))
    labels = (rng.random(n)[:, None] > chances.cumsum(axis=1)).sum(axis=1)
    return logits.astype(np.float32), labels.astype(np.int32)


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_prediction_sets_have_the_right_class_as_often_as_they_promise(coverage: float) -> None:
    rng = np.random.default_rng(0)
    logits, labels = synthetic(4000, 10, 0.5, rng)
    covered = []
    for _ in range(200):
        some = rng.permutation(4000)
        threshold = set_threshold(logits[some[:100]], labels[some[:100]], coverage)
        covered.append(described_sets(logits[some[100:]], labels[some[100:]], threshold)["covered"])
    assert coverage - 0.005 < np.mean(covered) < coverage + 0.015
    low, high = coverage_interval(100, coverage)
    assert 0.9 < np.mean([low <= one <= high for one in covered]) < 0.99


def test_too_few_images_leave_no_class_out_of_a_set() -> None:
    logits, labels = synthetic(10, 10, 0.5, np.random.default_rng(0))
    assert set_threshold(logits, labels, 0.95) == 0
    assert coverage_interval(10, 0.95) == (1.0, 1.0)
    assert described_sets(logits, labels, 0.0)["mean_size"] == 10


def test_wrong_labels_are_found_and_right_ones_left_alone() -> None:
    rng = np.random.default_rng(1)
    logits, truth = synthetic(1000, 10, 0.8, rng)
    assert inspection.doubted([logits], truth).share < 0.02
    labels, wrong = truth.copy(), rng.random(1000) < 0.1
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    found = inspection.doubted([logits], labels)
    named = found.wrong > inspection.WRONG
    assert found.share == pytest.approx(0.1, abs=0.03)
    assert wrong[named].mean() > 0.8
    assert named[wrong].mean() > 0.7
    listed = inspection.label_errors(found, labels, tuple("abcdefghij"), lambda index: {"index": index})["listed"]
    assert [one["probability"] for one in listed] == sorted((one["probability"] for one in listed), reverse=True)
    right = sum("abcdefghij"[truth[one["index"]]] == one["suggested"] for one in listed)
    assert right > 0.6 * len(listed)


def test_nothing_is_said_of_the_labels_of_a_handful_of_images() -> None:
    logits, labels = synthetic(10, 3, 0.9, np.random.default_rng(0))
    found = inspection.doubted([logits], (labels + 1) % 3)
    assert not found.wrong.any()
    assert found.unknown == "fewer than 20 images"


def test_images_of_one_class_or_mostly_of_one_can_be_judged() -> None:
    rng = np.random.default_rng(0)
    for labels in (np.full(40, 7), np.repeat([7, 1, 2], [196, 10, 10])):
        logits = 8 * np.eye(10)[labels] + rng.normal(size=(len(labels), 10))
        found = inspection.doubted([logits.astype(np.float32)], labels.astype(np.int32))
        assert (found.unknown, found.wrong.max() < inspection.WRONG) == ("", True)


def test_networks_that_have_learned_nothing_do_not_call_labels_right() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 500).astype(np.int32)
    found = inspection.doubted([rng.normal(size=(500, 10)).astype(np.float32)], labels)
    card = inspection.label_errors(found, labels, tuple("abcdefghij"), lambda index: {"index": index})
    assert (card["checked"], card["images"]) == (0, 0)
    assert inspection.warnings(
        {"label_errors": card, "leaks": {"listed": []}, "copies": {"of_several_classes": 0}}
    ) == ["labels could not be checked: the networks have learned too little to tell"]


def test_a_report_names_wrong_labels_and_other_kinds_of_images_with_their_files(place: Place, digits: Digits) -> None:
    images, labels = digits[0][:300].copy(), digits[1][:300].copy()
    labels[:20] = (labels[:20] + np.random.default_rng(1).integers(1, 10, 20)) % 10
    images[20:22] = np.random.default_rng(0).integers(0, 255, (2, 28, 28))
    spec = {"epochs": 20, "folds": 3, "validation_split": 0}
    card = report(place, job_on(place, images, labels, spec))
    errors = card["inspection"]["label_errors"]
    files = {one["file"] for one in errors["listed"]}
    assert len(files & {f"{n}.png" for n in range(20)}) >= 12
    assert errors["images"] <= 22
    assert any("labels may be wrong" in text for text in card["warnings"])
    assert {"20.png", "21.png"} <= {one["file"] for one in card["inspection"]["strangers"]["listed"]}
    assert (
        card["inspection"]["misclassified"][0]["probability"] >= card["inspection"]["misclassified"][-1]["probability"]
    )


def test_what_is_served_measures_the_distance_that_the_trainer_measured(place: Place) -> None:
    done = place.run(place.claimed(QUICK))
    assert done.version is not None
    folder = place.settings.version("m", done.version)
    probe = Probe.load(folder)
    assert probe.distances is not None
    assert probe.distances.min() < 0.1 < 1 < probe.distances.max()
    prove(place.servers[0], "m", done.version, probe)
    with pytest.raises(PublishFailed, match="in a distance"):
        prove(place.servers[0], "m", done.version, dataclasses.replace(probe, distances=1.02 * probe.distances))
    rule = place.registry.find("m", done.version).manifest.abstention
    assert rule is not None
    assert place.registry.routes()["m"].abstention[done.version] == rule
    assert (rule.coverage, place.registry.routes()["lenet5"].abstention) == (0.95, {})


def test_images_of_another_kind_are_farther_than_the_limit(digits: Digits) -> None:
    from trainer.worker.pretrained import pretrained

    images = (digits[0][:400] / np.float32(255))[..., None]
    params, _ = pretrained()
    detector = Detector.of(params, tf.constant(images[:200]))
    held_out = detector.distances(params, tf.constant(images[200:]))
    limits, false_alarms = distance_limits(held_out)
    assert beyond(held_out, limits).mean() <= false_alarms <= 0.02
    noise = np.random.default_rng(0).random((50, 28, 28, 1)).astype(np.float32)
    assert beyond(detector.distances(params, tf.constant(noise)), limits).all()
    blank = np.zeros((1, 28, 28, 1), np.float32)
    assert beyond(detector.distances(params, tf.constant(blank)), limits)[0]
    assert (detector.distances(params, tf.constant(images[:200])) < 0.3 * np.array(limits)).all()


def test_no_temperature_is_judged_by_the_images_that_it_was_chosen_on() -> None:
    logits, labels = synthetic(2000, 10, 0.5, np.random.default_rng(0))
    error = evaluate.calibration(evaluate.cross_fitted(3 * logits, labels), labels)["expected_calibration_error"]
    assert error < 0.05 < evaluate.calibration(3 * logits, labels)["expected_calibration_error"]
    assert evaluate.cross_fitted(logits[:1], labels[:1]).shape == (1, 10)


@pytest.mark.slow
def test_a_twin_is_trained_without_any_regularizer_and_compared_image_by_image(place: Place) -> None:
    spec = {**QUICK, "twin": True, "dropout": 0.3, "l2": 1e-3, "folds": 2, "validation_split": 0}
    done = place.run(place.claimed(spec))
    card = report(place, done)
    twin = card["twin"]
    for name, figure in (
        ("accuracy", card["validation"]["accuracy"]),
        ("generalization_gap", card["generalization_gap"]["accuracy"]),
    ):
        difference = twin["differences"][name]
        assert twin[name] + difference["value"] == pytest.approx(figure)
        assert difference["interval"][0] <= difference["value"] <= difference["interval"][1]
    assert twin["train_accuracy"] - twin["accuracy"] == pytest.approx(twin["generalization_gap"])
    assert "robust_accuracy" in twin["differences"]
    same = report(place, place.run(place.claimed({**spec, "dropout": 0, "l2": 0})))
    assert "twin" not in same
    assert "its unregularized twin is the same network" in same["warnings"]
    plain = place.run(place.claimed({**spec, "twin": False}))
    assert "twin" not in report(place, plain)
    manifests = [place.registry.find("m", job.version).manifest.sha256 for job in (done, plain)]
    assert manifests[0] == manifests[1]  # the twin leaves no trace in what is served


def test_the_twin_of_a_spec_has_nothing_that_regularizes() -> None:
    given = {
        "l1": 1e-3, "l2": 1e-3, "l2_sp": 0.1, "dropout": 0.5, "label_smoothing": 0.1, "mixup": 0.2, "ema": 0.9,
        "augmentation": {"shift": 2}, "adversarial": {"attack": "fgsm"}, "early_stopping": {}, "optimizer": "adamw",
    }  # fmt: skip
    spec = Spec.model_validate_json(json.dumps(given))
    twin = unregularized(spec)
    kept = {"method", "lora", "epochs", "batch_size", "learning_rate", "schedule", "optimizer", "seed", "twin"}
    assert all(getattr(twin, name) == getattr(spec, name) for name in kept)
    off = {name: getattr(twin, name) for name in (*given, "weight_decay") if name != "optimizer"}
    assert not any(off.values())
    assert regularizes(spec)
    assert not regularizes(twin.model_copy(update={"calibrate": True}))


def test_null_calibrates_as_the_default_does() -> None:
    assert Spec.model_validate_json('{"calibrate": null}').calibrate is True
    assert Spec().calibrate is True


def test_no_fold_is_empty_and_data_of_few_originals_can_be_fine_tuned(place: Place, digits: Digits) -> None:
    labels, groups = np.repeat(np.arange(2), 10), np.repeat(np.arange(4), 5)
    folds = list(stratified_folds(labels, 0, 5, groups))
    assert sorted(int(fold.sum()) for fold in folds) == [10, 10]
    assert (np.sum(folds, axis=0) == 1).all()
    originals = [int(index) for label in range(10) for index in np.flatnonzero(digits[1] == label)[:2]]
    shades = [np.clip(digits[0][originals] * share, 0, 255).astype(np.uint8) for share in (1, 0.9, 0.8, 0.7)]
    images, labels = np.concatenate(shades), np.tile(digits[1][originals], 4)
    assert job_on(place, images, labels, {**QUICK, "folds": 5, "validation_split": 0}).status == "succeeded"


def test_data_that_hardly_varies_is_published(place: Place, digits: Digits) -> None:
    """Printed symbols: rounding must not decide whether the served distances are those of the trainer."""
    noise = np.random.default_rng(0).integers(0, 2, (100, 28, 28))
    images = np.clip(np.repeat(digits[0][:10], 10, axis=0) + noise, 0, 255).astype(np.uint8)
    labels = np.repeat(np.arange(10), 10)
    for data in (images, np.repeat(digits[0][:10], 10, axis=0)):
        assert job_on(place, data, labels, {**QUICK, "folds": 2, "validation_split": 0}).status == "succeeded"


def test_the_rate_of_false_alarms_is_what_new_images_can_be_expected_to_meet() -> None:
    rng = np.random.default_rng(0)
    for n, expected in ((1000, 0.02), (20, 2 / 21)):
        rates = []
        for _ in range(300):
            limits, promised = distance_limits(rng.random((n, 2)))
            rates.append(beyond(rng.random((500, 2)), limits).mean())
        assert promised == pytest.approx(expected, abs=1e-3)
        assert np.mean(rates) <= promised + 0.002


def test_a_few_images_that_are_all_right_hardly_move_the_temperature_and_many_decide_it() -> None:
    rng = np.random.default_rng(0)
    logits, labels = synthetic(4000, 10, 0.5, rng)
    sure = np.eye(10, dtype=np.float32)[labels[:40]] * 8
    assert 0.5 < evaluate.serving_temperature(sure, labels[:40]) < 1.1
    for scale in (0.5, 3.0):
        assert evaluate.serving_temperature(scale * logits, labels) == pytest.approx(scale, rel=0.1)


def test_a_coverage_that_too_few_images_can_promise_is_warned_of(place: Place) -> None:
    card = report(place, place.run(place.claimed({**QUICK, "coverage": 0.99})))
    assert card["abstention"]["mean_size"] == 10
    assert any("a coverage of 0.99 needs 99 held-out images; with 20" in text for text in card["warnings"])
