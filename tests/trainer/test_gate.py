"""The gate: conditions, what is compared with what, and versions that do not get their label."""

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from store.errors import GateFailed, InvalidDataset, InvalidSpec
from store.records import Condition, DatasetCard, ReportCard, Score
from tests.conftest import Place
from trainer import report
from trainer.asked import check_dataset, parse_asked
from trainer.fit import Split
from trainer.gate import Comparison, Relabelled, fixed_conditions, not_worse, same_classes
from trainer.jobs.datasets import Dataset
from trainer.jobs.records import Job
from trainer.spec import Gate
from trainer.worker import candidate
from trainer.worker.held_out import Predictions, digests

GOOD = {"epochs": 8, "method": "full", "learning_rate": 0.01, "folds": 3, "validation_split": 0}
CARD = ReportCard.model_validate({
    "validation": {
        "images": 20, "accuracy": 0.8, "accuracy_interval": [0.6, 0.9],
        "classification_report": {"classes": {
            "a": {"recall": 0.9, "support": 10}, "b": {"recall": 0.7, "support": 10}, "c": {"recall": 0, "support": 0},
        }},
    },
    "generalization_gap": {"accuracy": 0.1}, "calibration": {"expected_calibration_error": 0.05},
    "robustness": {"attack": "pgd", "epsilon": 0.1, "accuracy": 0.3}, "forgetting": {"lost": 0.02},
})  # fmt: skip


def uploaded(place: Place, images: np.ndarray, labels: np.ndarray, classes: str = "0123456789") -> DatasetCard:
    """What `place` trains on from now on."""
    dataset = Dataset(images, labels.astype(np.int32), tuple(classes))
    place.dataset = dataset.described()
    dataset.save(place.settings.datasets / f"{place.dataset.id}.npz")
    return place.dataset


def ran(place: Place, spec: dict[str, Any] | None = None, **how: Any) -> Job:
    return place.run(place.claimed(GOOD | (spec or {}), **how))


def gate_of(job: Job) -> dict[str, Any]:
    assert job.gate is not None
    return job.gate


def condition(job: Job, name: str) -> dict[str, Any]:
    found: dict[str, Any] = next(one for one in gate_of(job)["conditions"] if one["condition"] == name)
    return found


@pytest.mark.parametrize(
    ("field", "passes", "fails"),
    [
        ("accuracy", 0.8, 0.81),
        ("robust_accuracy", 0.3, 0.31),
        ("calibration_error", 0.05, 0.04),
        ("generalization_gap", 0.1, 0.09),
        ("forgetting", 0.02, 0.01),
        ("class_recall", {"a": 0.9, "b": 0.7}, {"a": 0.9, "b": 0.71}),
    ],
)
def test_each_condition_passes_at_its_limit_and_fails_beyond(field: str, passes: Any, fails: Any) -> None:
    for limit, passed in ((passes, True), (fails, False)):
        (found,) = fixed_conditions(Gate.model_validate({field: limit}), CARD)
        assert (found.condition, found.passed) == (field, passed)
        assert found.value is not None
        assert found.message


@pytest.mark.parametrize("field", ["accuracy", "robust_accuracy", "calibration_error", "generalization_gap",
                                   "forgetting", "class_recall"])  # fmt: skip
def test_a_condition_that_cannot_be_measured_fails_and_says_so(field: str) -> None:
    (found,) = fixed_conditions(Gate.model_validate({field: 0.5}), ReportCard())
    assert (found.passed, found.value) == (False, None)
    assert "cannot be" in found.message


def test_a_floor_for_every_class_names_those_below_it_and_those_without_images() -> None:
    (found,) = fixed_conditions(Gate(class_recall=0.8), CARD)
    assert (found.passed, found.limit, found.value) == (False, 0.8, 0.7)
    assert found.message == (
        "the recall of 'b' is 70%, less than 80%; the recall of 'c' cannot be measured: no image of it is held out"
    )


def test_without_conditions_there_are_none() -> None:
    assert list(fixed_conditions(Gate(), CARD)) == []


def pairs(both: int, won: int, lost: int, neither: int, **more: Any) -> Condition:
    right = np.array([True] * (both + won) + [False] * (lost + neither))
    before = np.array([True] * both + [False] * won + [True] * lost + [False] * neither)
    given: dict[str, Any] = {
        "earlier": np.ones(len(right), bool), "taught": np.zeros(len(right), bool), "left_out": 0,
        "relabelled": Relabelled(),
        "own": Score(images=10, accuracy=0.1, accuracy_interval=(0.02, 0.4)),
        "own_before": Score(images=20, accuracy=0.95, accuracy_interval=(0.76, 0.99)),
    }  # fmt: skip
    return not_worse(Comparison("m:1", right, before, **(given | more)))


def test_a_difference_counts_only_if_it_is_no_chance() -> None:
    """McNemar's test: 3 of 3 pairs that differ have p = 0.083, 4 of 4 have 0.046."""
    three, four, better = pairs(90, 0, 3, 7), pairs(90, 0, 4, 6), pairs(90, 4, 0, 6)
    assert (three.passed, four.passed, better.passed) == (True, False, True)
    assert three.value == pytest.approx(-0.03)
    assert four.interval is not None
    assert better.interval is not None
    assert four.interval == pytest.approx((-0.09837, -0.00153), abs=1e-5)  # Tango
    assert four.interval[1] < 0 < better.interval[0]
    assert (
        "90% of 100 held-out images are right, and 94% with m:1: clearly worse (by -9.8 to -0.2 points)" in four.message
    )
    assert (three.doubt, four.doubt, better.doubt) == (True, False, False)
    assert "worse, which may be chance" in three.message
    assert not pairs(90, 2, 3, 5).doubt


def test_versions_that_never_differ_may_differ_on_other_images() -> None:
    found = pairs(40, 0, 0, 3)
    assert (found.passed, found.doubt, found.value) == (True, False, 0.0)
    assert found.interval == pytest.approx((-0.082, 0.082), abs=1e-3)


def test_the_images_of_the_version_before_are_also_compared_apart() -> None:
    """Of other data with other labels: each version is right on its own images alone."""
    earlier = np.array([False] * 30 + [True] * 31)
    found = pairs(0, 30, 31, 0, earlier=earlier)
    assert (found.passed, found.value) == (False, -1.0)
    assert "0% of 31 images that were held out for m:1 are right, and 100% with m:1: clearly worse" in found.message
    assert pairs(0, 30, 31, 0).passed


def test_what_a_version_has_learned_counts_against_it_and_not_for_it() -> None:
    taught = np.array([False] * 15 + [True] * 20)
    found = pairs(15, 0, 20, 0, taught=taught, earlier=taught)
    assert (found.passed, found.value) == (False, -1.0)
    assert "0% of 20 images that were held out for m:1, some of which it has learned, are right" in found.message
    won = pairs(10, 25, 0, 0, taught=np.arange(35) >= 10)
    assert (won.passed, won.value) == (True, 0.0)
    assert "of 10 held-out images" in won.message


def test_images_that_are_strange_to_the_version_before_are_a_doubt() -> None:
    known = Score(images=100, accuracy=0.95, accuracy_interval=(0.89, 0.98))
    earlier = np.arange(60) < 30
    found = pairs(30, 25, 0, 5, earlier=earlier, own_before=known)
    assert (found.passed, found.doubt) == (True, True)
    assert "m:1 gets 0% of the 30 that are new to it right, and 95% of its own" in found.message
    assert not pairs(60, 0, 0, 0, earlier=earlier, own_before=known).doubt
    few = pairs(60, 0, 0, 0, earlier=np.arange(60) < 9, own_before=known)
    assert few.doubt
    assert "of those that were held out for m:1 there are only 9" in few.message


def test_a_version_of_the_same_images_under_other_classes_cannot_be_compared() -> None:
    found = pairs(60, 0, 0, 0, relabelled=Relabelled(60, 12, ("4", "9")))
    assert not found.passed
    assert "12 of the 60 images that both were given are of another class than before, most of those of '4', '9'" in (
        found.message
    )
    few = pairs(60, 0, 0, 0, relabelled=Relabelled(60, 6))
    assert (few.passed, few.doubt) == (True, True)
    assert "6 of the 60 images" in few.message


def test_with_too_few_common_images_each_is_compared_on_its_own() -> None:
    found = pairs(5, 0, 4, 0)
    assert not found.passed
    assert found.interval is not None
    assert found.interval[0] < -0.85 < found.interval[1] < 0
    assert "10% of 10 held-out images are right, and 95% of the 20 that were held out for m:1" in found.message
    alike = pairs(5, 0, 4, 0, own=Score(images=10, accuracy=0.9, accuracy_interval=(0.6, 0.98)))
    assert (alike.passed, alike.doubt) == (True, True)
    unknown = pairs(5, 0, 4, 0, own_before=None)
    assert (unknown.passed, unknown.doubt) == (True, True)
    assert unknown.message == "nothing was compared with m:1: too few can be compared one by one: 9"


def test_other_classes_are_named() -> None:
    assert same_classes(("a", "b"), "m:1", ("a", "b")).passed
    found = same_classes(("a", "c"), "m:1", ("a", "b"))
    assert not found.passed
    assert "it adds 'c' and it lacks 'b'" in found.message


def test_a_floor_for_a_class_that_the_data_lacks_is_refused() -> None:
    asked = parse_asked('{"gate": {"class_recall": {"a": 0.5, "x": 0.5}}}')
    with pytest.raises(InvalidSpec, match="names 'x'") as refused:
        check_dataset(asked, {"a": 9, "b": 9}, held_out=False)
    assert refused.value.param == "spec.gate.class_recall"
    models = Gate(class_recall={"x": 0.5})
    with pytest.raises(InvalidSpec, match="the model's gate has a limit for 'x'"):
        check_dataset(parse_asked("{}"), {"a": 9, "b": 9}, held_out=False, models_gate=models)
    own = parse_asked('{"gate": {}}')
    check_dataset(own, {"a": 9, "b": 9}, held_out=False, models_gate=models)


def test_the_same_data_again_takes_the_label(place: Place) -> None:
    for number in (1, 2):
        job = ran(place)
        assert (job.status, job.version, gate_of(job)["passed"]) == ("succeeded", number, True)
        assert place.registry.labels("m")["stable"].version == number
    assert gate_of(job)["compared_with"] == 1
    worse = condition(job, "not_worse")
    assert (worse["value"], worse["passed"]) == (0.0, True)
    assert "of 100 held-out images" in worse["message"]
    card = place.registry.find("m").report
    assert card.gate is not None
    assert card.gate.dump() == job.gate
    last = place.jobs.events(job.id)[-1]
    assert (last.type, last.data["gate"]) == ("status", job.gate)


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True], ids=["the same images", "other images"])
@pytest.mark.parametrize(
    "spec",
    [
        pytest.param({}, id="folds"),
        pytest.param({"folds": None, "validation_split": 0.2}, id="split", marks=pytest.mark.exhaustive),
    ],
)
def test_wrongly_labelled_data_does_not_take_stable(
    place: Place, digits: tuple[np.ndarray, np.ndarray], fresh: bool, spec: dict[str, Any]
) -> None:
    assert gate_of(ran(place, spec))["passed"]
    images, labels = digits[0][200:400] if fresh else digits[0][:100], digits[1][200:400] if fresh else digits[1][:100]
    uploaded(place, images, np.random.default_rng(3).permutation(labels))
    job = ran(place, spec)
    assert (job.status, job.version) == ("succeeded", 2)
    assert gate_of(job)["passed"] is False
    assert gate_of(job)["compared_with"] == 1
    worse = condition(job, "not_worse")
    assert worse["value"] < -0.15 if fresh else "are of another class than before" in worse["message"]
    assert place.registry.labels("m")["stable"].version == 1
    assert place.registry.find("m", 2).live
    assert "labelled" not in job.progress.publishing


def test_more_data_is_compared_without_the_images_that_stable_was_trained_on(
    place: Place, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    split = {"folds": None, "validation_split": 0.2}
    ran(place, split)
    old = Predictions.load(place.settings.version("m", 1))
    assert len(old.images) == 20
    trained = set(digests(digits[0][:100])) - set(old.images)
    uploaded(place, digits[0][:300], digits[1][:300])
    job = ran(place, split)
    new = Predictions.load(place.settings.version("m", 2))
    left_out = sum(image in trained for image in new.images)
    assert left_out > 0
    assert f"{left_out} are left out because one of them has learned them" in condition(job, "not_worse")["message"]
    assert f"of {len(new.images) - left_out} held-out images" in condition(job, "not_worse")["message"]


@pytest.mark.exhaustive
def test_networks_are_asked_for_some_of_many_images(
    place: Place, digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidate, "MOST", 30)
    monkeypatch.setattr(candidate, "MOST_BEFORE", 20)
    ran(place)
    uploaded(place, digits[0][200:300], digits[1][200:300])
    assert "of 50 held-out images" in condition(ran(place), "not_worse")["message"]


@pytest.mark.exhaustive
def test_what_stables_base_was_trained_on_is_left_out(place: Place, digits: tuple[np.ndarray, np.ndarray]) -> None:
    ran(place)
    uploaded(place, digits[0][100:200], digits[1][100:200])
    ran(place, {"base": "m:1"}, base="m:1")
    uploaded(place, digits[0][:200], digits[1][:200])
    job = ran(place)
    assert gate_of(job)["compared_with"] == 2
    assert "of 100 held-out images" in condition(job, "not_worse")["message"]
    assert "100 are left out because one of them has learned them" in condition(job, "not_worse")["message"]


@pytest.mark.exhaustive
def test_what_its_own_base_was_trained_on_is_left_out_too(place: Place, digits: tuple[np.ndarray, np.ndarray]) -> None:
    ran(place)
    uploaded(place, digits[0][100:200], digits[1][100:200])
    job = ran(place, {"base": "m:1"}, base="m:1")
    assert "of 100 held-out images" in condition(job, "not_worse")["message"]  # of the new ones alone


@pytest.mark.exhaustive
def test_what_the_base_has_held_out_is_not_what_it_has_learned(
    place: Place, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    split = {"folds": None, "validation_split": 0.2}
    ran(place, split)
    job = ran(place, {**split, "base": "m:1"}, base="m:1")
    assert "of 20 held-out images" in condition(job, "not_worse")["message"]
    assert not any("already learned" in text for text in place.registry.find("m", 2).report.warnings)
    uploaded(place, digits[0][:100] - (digits[0][:100] > 200), digits[1][:100])
    job = ran(place, {"base": "m:1"}, base="m:1")
    (warning,) = (text for text in place.registry.find("m", 3).report.warnings if "already learned" in text)
    assert warning.startswith("80 of the 100 held-out images, or near copies, were already learned by m:1")
    assert "80 are left out because one of them has learned them" in condition(job, "not_worse")["message"]


@pytest.mark.exhaustive
def test_an_image_and_its_near_copies_count_once(place: Place, digits: tuple[np.ndarray, np.ndarray]) -> None:
    images = digits[0][:60]
    uploaded(place, np.concatenate([images, images, images - (images > 200)]), np.tile(digits[1][:60], 3))
    ran(place)
    assert "of 60 held-out images" in condition(ran(place), "not_worse")["message"]


@pytest.mark.exhaustive
def test_near_copies_are_the_same_picture_to_versions_with_folds(
    place: Place, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    """Asked about copies, the network that is served would recognize what it has learned."""
    ran(place)
    images = digits[0][:100]
    uploaded(place, images - (images > 200), digits[1][:100])
    job = ran(place)
    assert abs(condition(job, "not_worse")["value"]) < 0.05
    assert " of 100 held-out images" in condition(job, "not_worse")["message"]


@pytest.mark.exhaustive
def test_near_copies_of_what_stable_was_trained_on_are_left_out(
    place: Place, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    ran(place, {"folds": None, "validation_split": 0.2})
    old = Predictions.load(place.settings.version("m", 1))
    images = digits[0][:100]
    uploaded(place, images - (images > 200), digits[1][:100])
    job = ran(place)
    assert f"of {len(old.images)} held-out images" in condition(job, "not_worse")["message"]


@pytest.mark.exhaustive
def test_other_images_with_shifted_labels_do_not_take_stable(
    place: Place, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    split = {"epochs": 15, "folds": None, "validation_split": 0.2}
    ran(place, split)
    uploaded(place, digits[0][200:350], (digits[1][200:350] + 3) % 10)
    job = ran(place, split)
    assert "of 20 images that were held out for m:1" in condition(job, "not_worse")["message"]
    assert not gate_of(job)["passed"]
    uploaded(place, digits[0][:100], (digits[1][:100] + 3) % 10)
    job = ran(place, split)
    assert "100 of the 100 images that both were given are of another class" in condition(job, "not_worse")["message"]
    assert not gate_of(job)["passed"]


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0, 8], ids=["the same images", "noisy ones"])
def test_two_classes_that_are_swapped_do_not_take_stable(
    place: Place, digits: tuple[np.ndarray, np.ndarray], noise: int
) -> None:
    images, labels = digits[0][:200], digits[1][:200]
    uploaded(place, images, labels)
    ran(place)
    added = np.random.default_rng(0).integers(0, noise + 1, images.shape)
    swapped = np.where(labels == 4, 9, np.where(labels == 9, 4, labels))
    uploaded(place, np.clip(images.astype(int) + added, 0, 255).astype(np.uint8), swapped)
    job = ran(place)
    moved = int(np.isin(labels, (4, 9)).sum())
    assert (
        f"{moved} of the 200 images that both were given are of another class than before, most of those of '4', '9'"
        in (condition(job, "not_worse")["message"])
    )
    assert place.registry.labels("m")["stable"].version == 1


@pytest.mark.slow
def test_corrected_labels_take_stable_with_a_doubt_and_spoilt_ones_do_not(
    place: Place, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    images, labels = digits[0][:200], digits[1][:200]
    spoilt = labels.copy()
    spoilt[:20] = (spoilt[:20] + 1) % 10
    uploaded(place, images, spoilt)
    ran(place)
    uploaded(place, images, labels)
    job = ran(place)
    assert gate_of(job)["passed"]
    assert condition(job, "not_worse")["value"] > 0
    assert condition(job, "not_worse")["doubt"]
    assert "20 of the 200 images" in condition(job, "not_worse")["message"]
    uploaded(place, images, spoilt)
    assert not gate_of(ran(place))["passed"]


@pytest.mark.exhaustive
@pytest.mark.parametrize("by", ["the base", "the upload"])
def test_having_learned_the_images_of_stable_does_not_excuse_wrong_labels(
    place: Place, digits: tuple[np.ndarray, np.ndarray], by: str
) -> None:
    split = {"epochs": 15, "folds": None, "validation_split": 0.2}
    ran(place, split)
    images, labels = digits[0][200:450], (digits[1][200:450] + 1) % 10
    if by == "the base":
        uploaded(place, images[:100], labels[:100])
        job = ran(place, {**split, "base": "m:1"}, base="m:1")
    else:
        uploaded(place, np.concatenate([digits[0][:100], images]), np.concatenate([digits[1][:100], labels]))
        job = ran(place, {**split, "seed": 2})
    assert not gate_of(job)["passed"], condition(job, "not_worse")
    assert place.registry.labels("m")["stable"].version == 1


def test_copies_of_training_images_do_not_pass_a_gate(place: Place, digits: tuple[np.ndarray, np.ndarray]) -> None:
    """What is learned by heart is recognized again, whatever its label."""
    images, labels = digits[0][:100], np.random.default_rng(3).permutation(digits[1][:100])
    copies = images - (images > 200)
    spec = {"epochs": 40, "folds": None, "validation_split": 0.2, "gate": {"accuracy": 0.6}}

    def with_validation(images_: np.ndarray, labels_: np.ndarray) -> Job:
        uploaded(place, images, labels)
        apart = Dataset(images_, labels_.astype(np.int32), tuple("0123456789"))
        card = apart.described()
        apart.save(place.settings.datasets / f"{card.id}.npz")
        place.dataset = place.dataset.model_copy(update={"validation": card})
        return ran(place, spec)

    mixed = with_validation(np.concatenate([copies, digits[0][200:220]]), np.append(labels, digits[1][200:220]))
    assert not gate_of(mixed)["passed"]
    card = place.registry.find("m", 1).report
    assert card.validation is not None
    assert card.validation.images == 20
    assert any("100 of the images to measure on are near copies" in text for text in card.warnings)
    with pytest.raises(InvalidDataset, match="all 100 validation images are near copies"):
        with_validation(copies, labels)


@pytest.mark.slow
def test_a_version_of_dark_images_does_not_take_stable_from_one_of_light_ones(
    place: Place, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    """It is good on its own images, and not on those that apps send."""
    ran(place)
    uploaded(place, 255 - digits[0][200:300], digits[1][200:300])
    place.dataset = place.dataset.model_copy(update={"polarity": "dark_on_light"})
    job = ran(place)
    worse = condition(job, "not_worse")
    assert "of 100 images that were held out for m:1 are right" in worse["message"]
    assert worse["value"] < -0.5
    card = place.registry.find("m", 2).report
    assert card.validation is not None
    assert card.validation.accuracy > 0.7


@pytest.mark.exhaustive
def test_other_classes_do_not_take_the_label_by_themselves(place: Place, digits: tuple[np.ndarray, np.ndarray]) -> None:
    ran(place)
    few = digits[1][:200] < 5
    uploaded(place, digits[0][:200][few], digits[1][:200][few], "01234")
    job = ran(place)
    assert not gate_of(job)["passed"]
    assert [one["condition"] for one in gate_of(job)["conditions"]] == ["same_classes"]
    assert "it lacks '5', '6', '7', '8', '9'" in condition(job, "same_classes")["message"]
    assert place.registry.labels("m")["stable"].version == 1
    job = ran(place, {"gate": {"same_classes": False}})
    assert gate_of(job)["passed"]
    assert "other classes" in condition(job, "not_worse")["message"]
    assert place.registry.labels("m")["stable"].version == 3


def test_a_first_version_that_fails_leaves_the_model_without_stable(place: Place) -> None:
    job = ran(place, {"epochs": 1, "gate": {"accuracy": 1.0}})
    assert (job.status, job.version) == ("succeeded", 1)
    assert place.registry.labels("m") == {}
    assert place.registry.stable("m") is None
    assert place.servers[0].predict("m", 1, np.zeros((1, 784), np.uint8)).version == 1
    job = ran(place)
    assert (gate_of(job)["compared_with"], gate_of(job)["passed"]) == (None, True)
    assert place.registry.labels("m")["stable"].version == 2


@pytest.mark.slow
def test_the_models_gate_holds_unless_the_spec_has_one(place: Place) -> None:
    ran(place)
    place.registry.set_gate("m", Gate(calibration_error=0.0).model_dump())
    assert not gate_of(ran(place))["passed"]
    assert place.registry.labels("m")["stable"].version == 1
    assert gate_of(ran(place, {"gate": {"accuracy": 0.1}}))["passed"]
    place.registry.set_gate("m", None)
    assert gate_of(ran(place))["passed"]
    assert place.registry.labels("m")["stable"].version == 4


def test_what_is_usually_measured_later_is_measured_for_the_gate(
    place: Place, digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    attack, attacked = report.withstood_pgd, []

    def withstood(model: report.Model, split: Split, epsilon: float, steps: int) -> Iterator[np.ndarray]:
        attacked.append((len(split.labels), steps))
        return attack(model, split, epsilon, steps)

    monkeypatch.setattr(report, "withstood_pgd", withstood)
    uploaded(place, digits[0][:200], digits[1][:200])
    job = ran(place, {"folds": None, "validation_split": 0.5, "gate": {"robust_accuracy": 0.0, "forgetting": 1.0}})
    card = place.registry.find("m").report.dump()
    assert condition(job, "forgetting")["value"] == card["forgetting"]["lost"]
    assert condition(job, "robust_accuracy")["value"] == card["robustness"]["accuracy"]
    images = card["validation"]["images"]
    assert images > report.GLANCE_IMAGES
    assert attacked == [(images, report.QUICK_STEPS)]


@pytest.mark.slow
def test_a_preview_that_misses_a_limit_is_not_published(place: Place) -> None:
    search = {"search": {"trials": 2}, "epochs": 2, "method": "head"}
    job = place.run(place.claimed(search | {"gate": {"accuracy": 1.0}}))
    assert (job.status, job.preview_version, job.version) == ("succeeded", None, 1)
    assert place.registry.labels("m") == {}
    job = place.run(place.claimed(search, model="n"))
    assert (job.preview_version, job.version, gate_of(job)["compared_with"]) == (1, 2, None)
    assert place.registry.labels("n")["stable"].version == 2


@pytest.mark.slow
def test_it_is_judged_again_if_stable_moves_meanwhile(
    place: Place, digits: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = place.dataset, uploaded(place, digits[0][:100], np.random.default_rng(3).permutation(digits[1][:100]))
    ran(place)
    place.dataset = good
    ran(place, {"gate": {"not_worse": False}})
    place.registry.put_label("m", "stable", 1)
    go_live, judged = place.registry.go_live, []

    def moves(*args: Any, **how: Any) -> None:
        judged.append(how["report"].gate.compared_with)
        if len(judged) == 1:
            place.registry.put_label("m", "stable", 2)
        go_live(*args, **how)

    monkeypatch.setattr(place.registry, "go_live", moves)
    place.dataset = bad
    job = ran(place)
    assert judged == [1, 2]
    assert (gate_of(job)["compared_with"], gate_of(job)["passed"]) == (2, False)
    assert place.registry.labels("m")["stable"].version == 2


def test_a_stable_version_whose_files_are_damaged_is_no_reason_to_pass(place: Place) -> None:
    ran(place)
    (place.settings.version("m", 1) / "assets.extra/held_out.npz").write_bytes(b"no zip")
    job = ran(place)
    assert not gate_of(job)["passed"]
    assert "missing or damaged" in condition(job, "not_worse")["message"]


def test_an_override_gives_the_label_and_is_recorded_for_good(place: Place) -> None:
    ran(place)
    job = ran(place, {"gate": {"calibration_error": 0.0}})
    with pytest.raises(GateFailed, match=r"the gate of m:2 has failed: the calibration error is .* more than 0%"):
        place.registry.put_label("m", "stable", 2)
    place.registry.put_label("m", "stable", 2, override=True)
    assert place.registry.labels("m")["stable"].version == 2
    before = place.registry.find("m", 2).report
    place.registry.set_report("m", 2, ReportCard.model_validate(before.dump() | {"gate": job.gate, "device": "later"}))
    card = place.registry.find("m", 2).report
    assert card.device == "later"
    assert card.gate is not None
    assert not card.gate.passed
    assert [one.label for one in card.gate.overrides] == ["stable"]


def test_a_checkpoint_is_judged_like_any_version(place: Place) -> None:
    spec = parse_asked(json.dumps(GOOD | {"checkpoints": 2, "folds": None, "validation_split": 0.3})).described()

    def publishes(checkpoint: dict[str, Any] | None) -> Job:
        place.jobs.create(
            model="m", base="lenet5:1", spec=spec, resolved_spec=spec, dataset=place.dataset, checkpoint=checkpoint
        )
        job = place.jobs.claim("w")
        assert job is not None
        return place.run(job)

    source = publishes(None)
    done = publishes({"job": source.id, "epoch": 4})
    assert (done.version, gate_of(done)["compared_with"]) == (2, 1)
    images = len(Predictions.load(place.settings.version("m", 2)).images)
    assert images > 20
    assert f"of {images} held-out images" in condition(done, "not_worse")["message"]
