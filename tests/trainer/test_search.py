"""The automatic search: what it tries, how it chooses, and what becomes of its choice."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import trainer.search
from store.errors import Diverged, InvalidSpec, SearchFailed
from tests.conftest import Place
from trainer import evaluate, objectives
from trainer.asked import Asked, check_dataset, parse_asked, parse_spec
from trainer.export import load_params
from trainer.fit import Fitted, Split, fit
from trainer.folds import stratified_folds
from trainer.jobs.datasets import Dataset
from trainer.jobs.records import LeaseLost
from trainer.lenet import adapters
from trainer.recipes import LORA, OFF, RECIPES, STRENGTHS, augmentation_kind, candidates, preview_recipe
from trainer.search import NO_TIME, Clock, Found, Predicted, Problem, makespan, rungs, search, shortened
from trainer.spec import Choose, Spec, described
from trainer.trials import Rung, Score, Trial, among, by_one_standard_error, losses, sentence
from trainer.worker.complete_report import complete_report
from trainer.worker.pretrained import pretrained
from trainer.worker.run_job import Run

QUICK = {"search": {"trials": 4, "folds": 3, "preview": False}, "epochs": 3}


@pytest.fixture(scope="session")
def problem(digits: tuple[np.ndarray, np.ndarray]) -> Callable[[int, bool], Problem]:
    """Digits, so many of each class, as the base's classes or as others."""

    def make(each: int, same_classes: bool = True) -> Problem:
        chosen = np.concatenate([np.flatnonzero(digits[1] == label)[:each] for label in range(10)])
        images = (digits[0][chosen] / np.float32(255))[..., None]
        split = Split(tf.constant(images), digits[1][chosen].astype(np.int32))
        return Problem(split, pretrained()[0], 10, same_classes)

    return make


def asked(**given: Any) -> Asked:
    return parse_asked(json.dumps(given))


@pytest.mark.exhaustive
def test_a_search_that_is_sent_back_as_a_spec_gives_the_same_weights_and_report(place: Place) -> None:
    place.run(job := place.claimed(QUICK))
    done = place.jobs.get(job.id)
    first = place.registry.find("m")
    assert done.resolved_spec is not None
    assert done.resolved_spec["calibrate"] is True
    assert (done.spec["method"], done.resolved_spec["epochs"], done.resolved_spec["search"]) == ("auto", 3, None)
    assert (done.spec["base"], done.resolved_spec["base"]) == ("lenet5", "lenet5:1")  # the base may get other versions
    measured = first.report.dump()
    assert measured["cross_validation"]["cross_entropy"] == measured["validation"]["cross_entropy"]
    assert first.manifest.resolved_spec == done.resolved_spec
    again = place.claimed(done.resolved_spec)
    place.run(again)
    second = place.registry.find("m", 2)
    assert second.manifest.sha256 == first.manifest.sha256
    assert second.report.validation == first.report.validation
    assert second.report.robustness == first.report.robustness


def test_the_same_data_and_seed_give_the_same_choice_and_trials(place: Place) -> None:
    for model in ("one", "two"):
        place.run(place.claimed(QUICK, model=model))
    one, two = (place.registry.find(model) for model in ("one", "two"))
    assert one.manifest.sha256 == two.manifest.sha256
    assert one.report.search is not None
    assert two.report.search is not None
    scores = [
        [(score.cross_entropy, score.accuracy) for trial in found.trials for score in trial.scores]
        for found in (one.report.search, two.report.search)
    ]
    assert scores[0] == scores[1]


def test_the_report_rests_on_predictions_for_every_image_by_networks_that_had_not_seen_it(place: Place) -> None:
    place.run(job := place.claimed(QUICK))
    for _ in complete_report(place.jobs.get(job.id), settings=place.settings, jobs=place.jobs, registry=place.registry):
        pass
    card = place.registry.find("m").report
    assert card.validation is not None
    assert card.cross_validation is not None
    assert card.train is not None
    assert (card.validation.images, card.train.images) == (100, 100)
    assert (
        card.validation.accuracy
        == card.cross_validation.accuracy
        == pytest.approx(np.mean(card.cross_validation.folds), abs=0.02)
    )
    assert card.robustness is not None
    assert card.robustness.curve is not None
    labels = Dataset.load(place.settings.datasets / f"{place.dataset.id}.npz").labels
    assert card.robustness.images == next(stratified_folds(labels, 0, 3)).sum()


def test_progress_and_report_tell_of_every_trial_and_why_it_was_dropped(place: Place) -> None:
    place.run(job := place.claimed(QUICK))
    events = place.jobs.events(job.id)
    trials = [event.data for event in events if event.type == "trial"]
    assert [record["tried"] for record in trials if record["round"] == 1] == [1, 2, 3, 4]
    assert all(record["best"]["cross_entropy"] > 0 for record in trials)
    assert all(record["recipe"] and record["cross_entropy"] >= record["best"]["cross_entropy"] for record in trials)
    told = {number for record in trials for number in record["dropped"]}
    stages = [event.data["stage"] for event in events if event.type == "status"]
    assert stages.index("searching") == stages.index("training") - 1
    found = place.registry.find("m").report.search
    assert found is not None
    assert [trial.trial for trial in found.trials] == [1, 2, 3, 4]
    assert [trial.trial for trial in found.trials if trial.dropped is None] == [found.chosen]
    assert told <= {trial.trial for trial in found.trials if trial.dropped}
    assert "Chose `" in found.sentence


@pytest.mark.slow
def test_uploaded_validation_images_are_what_the_report_rests_on_and_the_search_does_not_see_them(
    place: Place, digits: tuple[np.ndarray, np.ndarray]
) -> None:
    others = Dataset(digits[0][100:150], digits[1][100:150].astype(np.int32), tuple("0123456789"))
    others.save(place.settings.datasets / f"{others.described().id}.npz")
    alone = place.claimed(QUICK)
    place.run(alone)
    place.dataset = place.dataset.model_copy(update={"validation": others.described()})
    place.run(beside := place.claimed(QUICK))
    resolved = [place.jobs.get(job.id).resolved_spec or {} for job in (alone, beside)]
    differ = {name for name in resolved[0] if resolved[0][name] != resolved[1][name]}
    assert differ == {"folds"}
    validation = place.registry.find("m", 2).report.validation
    assert validation is not None
    assert validation.images == 50


def test_a_cancelled_search_ends_at_its_next_run(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    job, tried = place.claimed(QUICK), list[Any]()

    def cancel(self: Run, record: dict[str, Any]) -> None:
        tried.append(record)
        place.jobs.cancel(job.id)

    monkeypatch.setattr(Run, "trial", cancel)
    with pytest.raises(LeaseLost):
        place.run(job)
    assert 1 <= len(tried) < 4
    assert list(place.registry.wanted()) == ["lenet5"]


@pytest.mark.slow
def test_a_model_without_a_version_gets_a_preview_that_the_choice_replaces(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def counting_fit(spec: Spec, start: Any, train: Split, *rest: Any, **more: Any) -> Fitted:
        seen.append(len(train.labels))
        return fit(spec, start, train, *rest, **more)

    monkeypatch.setattr("trainer.worker.run_job.fit", counting_fit)
    monkeypatch.setattr("trainer.worker.run_job.PREVIEWED", 50)
    spec = {"epochs": 12, "search": {"trials": 2, "folds": 2}}
    first = place.run(place.claimed(spec))
    assert seen[0] == 50  # of 80
    assert (first.preview_version, first.version) == (1, 2)
    happened = [event.type for event in place.jobs.events(first.id)]
    assert happened.index("preview") < happened.index("trial")
    preview, final = (place.registry.find("m", number) for number in (1, 2))
    assert preview.manifest.trained_with["epochs"] < final.manifest.trained_with["epochs"] == 12  # as the spec fixes
    assert (preview.manifest.preview, final.manifest.preview) == (True, False)
    assert any("preview" in text for text in preview.report.warnings)
    assert place.registry.find("m").version == 2
    second = place.run(place.claimed(spec))
    assert (second.preview_version, second.version) == (None, 3)


def test_a_preview_sees_no_more_images_however_many_there_are() -> None:
    for same_classes in (True, False):
        seen = [images * preview_recipe(same_classes, images)["epochs"] for images in (100, 300, 1000, 3000, 6000)]
        assert seen == sorted(seen)
        assert seen[-1] == 6000
        assert preview_recipe(same_classes, 60_000)["epochs"] == 1  # of some of them


@pytest.mark.slow
def test_a_worker_that_died_after_the_preview_goes_on_without_a_second_one(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = place.claimed({**QUICK, "search": {"trials": 2, "folds": 2}})

    def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.worker.run_job.search", die)
        with pytest.raises(KeyboardInterrupt):
            place.run(job)
    assert place.registry.find("m").manifest.preview
    done = place.run(job)
    assert (done.status, done.preview_version, done.version) == ("succeeded", 1, 2)


def test_too_few_images_of_a_class_get_the_fixed_recipe_and_a_warning(place: Place) -> None:
    few = place.claimed({"search": {"preview": False}, "epochs": 1})
    images = Dataset.load(place.settings.datasets / f"{place.dataset.id}.npz")
    chosen = np.concatenate([np.flatnonzero(images.labels == label)[:2] for label in range(10)])
    small = Dataset(images.images[chosen], images.labels[chosen], images.classes)
    small.save(place.settings.datasets / f"{place.dataset.id}.npz")
    done = place.run(few)
    assert done.status == "succeeded"
    assert (done.resolved_spec or {})["method"] == "lora"
    assert any("nothing was searched" in text for text in place.registry.find("m").report.warnings)


def test_of_the_strengths_of_an_attack_the_greatest_is_chosen_that_costs_nothing(
    problem: Callable[..., Problem],
) -> None:
    given = asked(method="head", epochs=20, adversarial={"attack": "fgsm", "epsilon": "auto"}, search={"folds": 3})
    found = search(given, problem(10))
    strengths = [trial for trial in found.trials if trial.origin == "variant"]
    assert [trial.spec.adversarial and trial.spec.adversarial.epsilon for trial in strengths] == [
        epsilon for epsilon in STRENGTHS if epsilon != 0.1
    ]  # which was tried before
    chosen = next(trial for trial in strengths if trial.number == found.chosen)
    assert found.spec.adversarial == chosen.spec.adversarial
    best = min(trial.scores[-1].cross_entropy for trial in strengths)
    stronger = [trial for trial in strengths if trial.number > chosen.number]
    assert all(trial.scores[-1].cross_entropy > best for trial in stronger)


def test_a_trial_that_diverges_ends_alone(problem: Callable[..., Problem]) -> None:
    hot = {"method": "full", **OFF, "head": "new", "learning_rate": 1.0, "schedule": "constant", "l2": 0, "dropout": 0}
    found = search(asked(search={"trials": 5, "folds": 2}, epochs=6), problem(5), earlier=[hot])
    ended = next(trial for trial in found.trials if trial.origin == "earlier")
    assert "lower the learning rate" in ended.dropped
    assert found.chosen != ended.number


def test_a_search_whose_every_trial_diverges_fails_with_the_reason(problem: Callable[..., Problem]) -> None:
    given = asked(method="full", learning_rate=1.0, schedule="constant", epochs=6, search={"trials": 2, "folds": 2})
    with pytest.raises(SearchFailed, match="the loss is"):
        search(given, problem(5))


def test_candidates_are_distinct_and_leave_alone_what_is_fixed() -> None:
    given = asked(search={"trials": 30}, l2=0.5, augmentation=None, seed=7)
    found = list(candidates(given, same_classes=False, images=300, earlier=[{**LORA, "epochs": 11}]))
    assert len({spec.model_dump_json() for _, spec in found}) == len(found) == 30
    assert all((spec.l2, spec.augmentation, spec.seed) == (0.5, None, 7) for _, spec in found)
    assert [spec.epochs for origin, spec in found if origin == "earlier"] == [11]
    few = list(candidates(asked(**{**RECIPES[0], "epochs": "auto"}), same_classes=True, images=300))
    assert len(few) < 16  # there are only so many values
    assert [spec.epochs for _, spec in candidates(asked(search={"trials": 4}), same_classes=False, images=80)] == [
        120
    ] * 4


@pytest.mark.parametrize(("trials", "folds"), [(1, 2), (2, 3), (16, 5), (100, 10)])
def test_every_round_has_fewer_trials_with_more_work(trials: int, folds: int) -> None:
    found = rungs(trials, folds, 300)
    assert all(rung.keep is None or rung.keep >= 1 for rung in found)
    assert [rung.share for rung in found] == sorted(rung.share for rung in found)
    assert found[-1].folds == folds
    assert [rung.keep for rung in found] == [{1: 1, 2: 1, 16: 3, 100: 3}[trials], None]


def test_confidence_alone_does_not_decide_between_trials() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 200)
    logits = rng.normal(size=(200, 4)) + 3 * np.eye(4)[labels]
    assert losses(7 * logits, labels).mean() == pytest.approx(losses(logits, labels).mean(), rel=0.01)
    assert losses(logits, labels).mean() < losses(rng.normal(size=(200, 4)), labels).mean()


def test_of_equals_the_cheapest_is_chosen_and_of_others_the_best() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=300)

    def trial(number: int, epochs: int, mean: float, spread: float = 0.5) -> Trial:
        values = mean + spread * (noise if number == 1 else rng.normal(size=300))
        score = Score(Rung(1.0, 5, 1), epochs, values, values < 1)
        return Trial(number, parse_spec(json.dumps({"method": "full", "epochs": epochs})), "recipe", [score])

    dear = trial(1, 60, 0.300)
    assert by_one_standard_error([dear, trial(2, 30, 0.305)]).number == 2
    assert by_one_standard_error([dear, trial(2, 30, 0.600)]).number == 1
    assert by_one_standard_error([dear]).number == 1


def test_the_clock_keeps_the_time_that_training_the_choice_will_take() -> None:
    spec = parse_spec('{"method": "full", "epochs": 60}')
    clock = Clock(100.0, runs=5.0)
    clock.note(spec, epochs=10, seconds=1.2)
    clock.note(spec, epochs=10, seconds=0.8)
    assert not clock.is_up(spec)
    assert clock.affordable(spec) == 60
    long = spec.model_copy(update={"epochs": 1000})
    assert clock.is_up(long)
    assert clock.affordable(long) == pytest.approx(180, abs=2)  # 99.5 s at 0.55 for an epoch in five runs
    assert not Clock(None, runs=5.0).is_up(long)
    late = Clock(100.0, runs=5.0, spent_s=50.0)
    late.note(spec, epochs=10, seconds=1.0)
    assert late.affordable(long) == pytest.approx(90, abs=2)


def test_the_makespan_is_that_of_whoever_is_free_taking_the_next() -> None:
    assert makespan([1.0, 0.5, 0.5, 0.5], 1) == 2.5
    assert makespan([1.0, 0.5, 0.5, 0.5], 2) == 1.5
    assert makespan([1.0, 0.5, 0.5, 0.5], 8) == 1.0


def test_the_sentence_says_what_was_left_out_and_what_it_would_have_cost() -> None:
    rng = np.random.default_rng(0)

    def trial(number: int, mean: float, **given: Any) -> Trial:
        values = mean + 0.1 * rng.random(300)
        spec = parse_spec(json.dumps({"method": "full", **given}))
        right = np.arange(300) < 300 * (1 - mean / 2)
        return Trial(number, spec, "recipe", [Score(Rung(0.2, 5, 1), 12, values, right)])

    plain, moved = trial(1, 0.2), trial(2, 0.6, augmentation={"shift": 2})
    assert "Augmentation was left out: with it, accuracy was 20.0 points lower" in sentence(
        plain.spec, plain, [plain, moved]
    )
    better = trial(3, 0.1, augmentation={"shift": 2})
    assert "Without augmentation, accuracy was 5.0 points lower" in sentence(
        better.spec, better, [plain, moved, better]
    )
    other = Trial(4, parse_spec("{}"), "recipe", plain.scores)
    assert "With `lora`, there was no clear difference" in sentence(plain.spec, plain, [plain, other])


def test_the_pareto_front_is_what_no_other_beats() -> None:
    points = [
        {"a": 0.9, "b": 0.1},
        {"a": 0.8, "b": 0.5},
        {"a": 0.8, "b": 0.4},
        {"a": 0.1, "b": 0.5},
        {"a": 0.9, "b": 0.1},
    ]
    assert objectives.front(points) == [0, 1, 4]
    assert objectives.front(points[:1]) == [0]


def standing(*reached: tuple[float, float]) -> list[Trial]:
    rng = np.random.default_rng(0)
    found = []
    for number, (accuracy, robust) in enumerate(reached, start=1):
        values = rng.normal(0.1 * number, 0.01, 100)
        points = {"accuracy": accuracy, "robust_accuracy": robust}
        score = Score(Rung(1.0, 5), 60, values, values < 1, objectives=points)
        found.append(Trial(number, parse_spec('{"method": "full"}'), "recipe", [score]))
    return found


def test_within_limits_no_recipe_is_chosen_that_another_beats_in_every_objective() -> None:
    trials = standing((0.8, 0.4), (0.9, 0.5), (0.1, 0.1))
    choice = among(trials, Choose(limits=("robust_accuracy >= 0.25",)), ("accuracy", "robust_accuracy"))
    assert choice.trial.number == 2


@pytest.mark.parametrize(
    ("choose", "number"),
    [
        ({}, 2),
        ({"weights": {"accuracy": 10, "robust_accuracy": 1}}, 1),
        ({"limits": ["robust_accuracy >= 0.25"]}, 2),
        ({"limits": ["robust_accuracy >= 0.25"], "weights": {"robust_accuracy": 1}}, 3),
        ({"limits": ["robust_accuracy >= 0.9"]}, 3),
    ],
    ids=str,
)
def test_weights_and_limits_choose_among_several_objectives(choose: dict[str, Any], number: int) -> None:
    trials = standing((0.9, 0.1), (0.85, 0.5), (0.4, 0.6), (0.3, 0.3))
    choice = among(trials, Choose.model_validate_json(json.dumps(choose)), ("accuracy", "robust_accuracy"))
    assert choice.trial.number == number
    assert [trial.number for trial in choice.front] == [1, 2, 3]
    assert bool(choice.warnings) == ("0.9" in str(choose))
    assert choice.beside(trials[3]) == "another is as good in every objective, and better in one"


@pytest.mark.exhaustive
def test_a_search_for_robustness_and_sparsity_tries_what_serves_them(problem: Callable[..., Problem]) -> None:
    bounds = {
        "trials": 1, "folds": 2, "objective": ["accuracy", "robust_accuracy", "sparsity", "calibration"],
        "choose": {"weights": {"robust_accuracy": 1}},
    }  # fmt: skip
    given = asked(search=bounds, method="full", epochs=60)
    assert given.described()["adversarial"] == "auto"
    found = search(given, problem(25))
    tried = [trial for trial in found.trials if trial.origin == "variant"]
    assert {trial.spec.adversarial.epsilon for trial in tried if trial.spec.adversarial} == {0.05, 0.1}
    assert sum(trial.spec.l1 > 0 for trial in tried) == 3
    scored = [trial.scores[-1].objectives for trial in found.trials if trial.scores[-1].objectives]
    assert max(point["sparsity"] for point in scored) > 0.1
    assert max(point["robust_accuracy"] for point in scored) > min(point["robust_accuracy"] for point in scored)
    assert found.spec.adversarial
    chosen = next(trial for trial in found.trials if trial.number == found.chosen)
    assert chosen.scores[-1].objectives["robust_accuracy"] == max(point["robust_accuracy"] for point in scored)
    assert found.chosen in found.front
    assert "Pareto front" in found.sentence


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"search": {"objective": []}}, "search.objective"),
        ({"search": {"objective": ["speed"]}}, "search.objective.0"),
        ({"search": {"objective": ["accuracy", "accuracy"]}}, "names 'accuracy' twice"),
        ({"search": {"objective": ["sparsity"]}}, "must contain 'accuracy'"),
        ({"search": {"choose": {"weights": {"accuracy": 1}}}}, "is for several objectives"),
        ({"search": {"objective": ["accuracy", "sparsity"], "choose": {}}}, "is empty"),
        (
            {"search": {"objective": ["accuracy", "sparsity"], "choose": {"limits": ["calibration >= 0.5"]}}},
            "'calibration', which is not in `objective`",
        ),
        (
            {"search": {"objective": ["accuracy", "sparsity"], "choose": {"limits": ["sparsity > 0.5"]}}},
            "search.choose.limits.0",
        ),
        ({"search": {"objective": ["accuracy", "robust_accuracy"], "epsilon": 0}}, "search.epsilon"),
        ({"search": {"epsilon": 0.3}}, "search.epsilon: is that of 'robust_accuracy', which is not in `objective`"),
        ({"adversarial": "auto"}, "search.objective"),
        ({"adversarial": "auto", "search": {"objective": 3}}, "search.objective"),
    ],
    ids=str,
)  # fmt: skip
def test_objectives_that_make_no_sense_are_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_asked(json.dumps(given))
    assert message in str(caught.value.body())


def test_the_temperature_is_that_by_which_confidence_is_wrong() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4000, 5)) * 2
    chances = np.exp(evaluate.log_softmax(logits))
    labels = (chances.cumsum(1) < rng.random((4000, 1))).sum(1).clip(0, 4)
    assert evaluate.temperature(3 * logits, labels) == pytest.approx(3, rel=0.1)
    assert evaluate.temperature(logits / 3, labels) == pytest.approx(1 / 3, rel=0.1)
    right = np.eye(5)[labels[:100]]
    confident = np.exp(evaluate.log_softmax(right / evaluate.temperature(right, labels[:100]))).max(1)
    assert 0.97 < confident.min() < 0.999  # not without end, though all are right


@pytest.mark.slow
def test_a_calibrated_version_names_the_same_classes_with_honest_probabilities(place: Place) -> None:
    spec = {"method": "full", "epochs": 5, "label_smoothing": 0.3, "folds": 3, "validation_split": 0}
    for flag in (False, True):
        place.run(place.claimed({**spec, "calibrate": flag}))
    plain, calibrated = (place.registry.find("m", number) for number in (1, 2))
    one, other = (version.report.dump()["calibration"] for version in (plain, calibrated))
    assert one["temperature"] == 1.0
    assert other["temperature"] < 0.9
    assert other["expected_calibration_error"] < one["expected_calibration_error"]
    assert plain.report.dump()["validation"]["accuracy"] == calibrated.report.dump()["validation"]["accuracy"]
    before, after = (load_params(place.settings.version(one.model, one.version)) for one in (plain, calibrated))
    np.testing.assert_allclose(after["head/bias"], before["head/bias"] / other["temperature"], rtol=1e-5)
    np.testing.assert_array_equal(after["dense2/kernel"], before["dense2/kernel"])


@pytest.mark.exhaustive
def test_variants_that_would_take_the_time_of_the_training_are_left_out(
    problem: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("search", "fit"):  # so that other processes on this machine cost no time
        monkeypatch.setattr(f"trainer.{module}.time", SimpleNamespace(perf_counter=time.process_time))
    bounds = {"trials": 2, "folds": 3, "seconds": 25.0, "objective": ["accuracy", "robust_accuracy"]}
    found = search(asked(search=bounds), problem(10))
    chosen = next(trial for trial in found.trials if trial.number == found.chosen)
    assert found.spec.epochs >= chosen.scores[-1].epochs
    left_out = [trial for trial in found.trials if trial.origin == "variant" and not trial.scores]
    assert left_out
    assert {trial.dropped for trial in left_out} == {NO_TIME}
    assert any(f"no time for {len(left_out)} of {len(found.trials)} recipes" in text for text in found.warnings)


@pytest.fixture
def diverging(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Spec], bool]], None]:
    """Make the runs diverge whose specs meet a condition."""

    def begin(wild: Callable[[Spec], bool]) -> None:
        def training(spec: Spec, *rest: Any) -> Any:
            if wild(spec):
                raise Diverged("the loss is not finite")
            return begun(spec, *rest)

        begun = trainer.search.training
        monkeypatch.setattr("trainer.search.training", training)

    return begin


def test_a_finalist_that_diverges_in_the_longer_run_is_not_chosen(
    problem: Callable[..., Problem], diverging: Callable[[Callable[[Spec], bool]], None]
) -> None:
    diverging(lambda spec: spec.epochs > 4 and spec.method == "full")
    found = search(asked(epochs=40, search={"trials": 4, "folds": 2}), problem(10))
    assert found.spec.method == "lora"
    assert "the loss is not finite" in {trial.dropped for trial in found.trials}
    diverging(lambda spec: spec.epochs > 4)
    with pytest.raises(SearchFailed, match="the loss is not finite"):
        search(asked(epochs=40, search={"trials": 4, "folds": 2}), problem(10))


@pytest.mark.slow
@pytest.mark.parametrize("hopeless", [1.0, 1e9])
def test_augmentation_of_every_kind_and_the_classifier_of_the_base_have_a_place_in_the_last_round(
    problem: Callable[..., Problem], hopeless: float
) -> None:
    def weak(spec: Spec) -> bool:
        return spec.epochs <= 4 and (spec.augmentation is not None or spec.head == "keep")

    def predicted(rounds: Any, spec: Spec, rung: Rung, fold: int, check: Any) -> Predicted:
        found = real(rounds, spec, rung, fold, check)
        return found._replace(logits=np.zeros_like(found.logits)) if weak(shortened(spec, rung)) else found

    real = trainer.search._Rounds._predicted
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.search._Rounds._predicted", predicted)
        patch.setattr("trainer.search.FINALISTS", 1)
        patch.setattr("trainer.search.HOPELESS", hopeless)
        found = search(asked(method="full", epochs=40, search={"folds": 2}), problem(10))
    last = [trial.spec for trial in found.trials if trial.finished]
    assert sum(spec.augmentation is None and spec.head == "new" for spec in last) == 1
    assert any(spec.head == "keep" for spec in last)
    kinds = {augmentation_kind(spec) for spec in last}
    if hopeless > 1:
        assert kinds == {"none", "small", "large", "mirrored"}
    else:
        assert len(kinds) == 2


def test_a_cheap_recipe_does_not_win_because_the_best_one_had_no_time(
    problem: Callable[..., Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    def predicted(rounds: Any, spec: Spec, *rest: Any) -> Predicted:
        found = real(rounds, spec, *rest)
        return found._replace(logits=np.zeros_like(found.logits)) if spec.method == "lora" else found

    def is_up(_: Clock, best: Spec, meanwhile: Spec | None = None) -> bool:
        return meanwhile is not None and meanwhile.method == "full" and meanwhile.epochs > 4  # in the last round

    real = trainer.search._Rounds._predicted
    monkeypatch.setattr("trainer.search._Rounds._predicted", predicted)
    monkeypatch.setattr(Clock, "is_up", is_up)
    monkeypatch.setattr("trainer.search.HOPELESS", math.inf)
    found = search(asked(epochs=60, search={"trials": 2, "folds": 2, "seconds": 1000.0}), problem(10))
    assert [trial.spec.method for trial in found.trials] == ["lora", "full"]
    assert found.spec.method == "full"
    assert {len(trial.scores) for trial in found.trials} == {1}


@pytest.mark.exhaustive
def test_epochs_that_overfit_are_taken_back(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = {"method": "full", "checkpoints": 1, "search": {"trials": 4, "folds": 3, "preview": False}}
    monkeypatch.setattr("trainer.search.OVERFITTED", -math.inf)  # as if any figures showed that, equal ones too
    place.run(job := place.claimed(spec))
    resolved, version = place.jobs.get(job.id).resolved_spec, place.registry.find("m")
    assert resolved is not None
    assert resolved == version.manifest.resolved_spec
    assert version.report.search is not None
    (chosen,) = (trial for trial in version.report.search.trials if trial.trial == version.report.search.chosen)
    assert resolved["epochs"] == chosen.scores[-1].epochs < chosen.settings["epochs"]
    assert f"so it was trained for {resolved['epochs']}." in version.report.search.sentence
    kept = (place.settings.kept / job.id).rglob("*.npz")  # none of the epochs that were taken back
    assert sorted(path.name for path in kept) == [f"{network}-{resolved['epochs']}.npz" for network in range(4)]
    place.run(place.claimed(resolved))
    assert place.registry.find("m", 2).manifest.sha256 == version.manifest.sha256


def test_only_a_clear_loss_of_held_out_accuracy_takes_epochs_back() -> None:
    labels = np.zeros(400, np.int32)

    def logits(right: int) -> np.ndarray:
        return np.stack([np.arange(400) < right, np.full(400, 0.5)], axis=1).astype(np.float32)

    found = Found(parse_spec(json.dumps({"epochs": 60})), short=(15, np.arange(400) < 240))
    assert found.confirmed(logits(238), labels) is found
    assert found.confirmed(logits(260), labels) is found
    assert found.confirmed(logits(200), labels).spec.epochs == 15


def test_a_variant_that_diverges_is_said_to(
    problem: Callable[..., Problem], diverging: Callable[[Callable[[Spec], bool]], None]
) -> None:
    diverging(lambda spec: spec.adversarial is not None)
    bounds = {"trials": 2, "folds": 2, "objective": ["accuracy", "robust_accuracy"]}
    found = search(asked(epochs=4, search=bounds), problem(10))
    assert {trial.dropped for trial in found.trials if trial.origin == "variant"} == {"the loss is not finite"}
    assert found.warnings == []


def test_an_earlier_recipe_that_does_not_suit_the_base_is_one_trial_that_failed(
    problem: Callable[..., Problem],
) -> None:
    few = problem(10)
    other = replace(few, base={**few.base, **adapters(8, seed=0)})
    earlier = [{**LORA, "method": "adapter", "lora": None, "adapter": {"bottleneck": 16}}]
    found = search(asked(epochs=4, search={"trials": 2, "folds": 2}), other, earlier=earlier)
    assert found.chosen == 2
    assert "already has adapters of 8" in found.trials[0].dropped


def test_an_attack_that_is_known_tells_how_long_it_takes_with_another_method() -> None:
    attacked = {"adversarial": {"attack": "pgd"}}
    lora, full = (parse_spec(json.dumps({"method": method, **attacked})) for method in ("lora", "full"))
    clock = Clock(30.0, runs=1.0)
    clock.note(lora, 10, 1.0)
    assert not clock.is_up(full.model_copy(update={"epochs": 100}))  # 10 s, as far as is known


def test_epochs_that_the_spec_fixes_are_kept_beyond_the_time_with_a_warning(problem: Callable[..., Problem]) -> None:
    found = search(asked(epochs=300, method="full", search={"trials": 2, "folds": 2, "seconds": 1.5}), problem(20))
    assert found.spec.epochs == 300
    assert any("search.seconds was too short" in text for text in found.warnings)


def test_a_recipe_that_led_in_the_first_round_is_said_to_have() -> None:
    specs = [parse_spec(json.dumps(given)) for given in ({"method": "full", "head": "new"}, {})]
    trials = [Trial(number, spec, "recipe") for number, spec in enumerate(specs, 1)]
    for rung, sizes in ((Rung(1 / 16, 2, 2), (0.5, 0.1)), (Rung(1 / 4, 2), (0.1, 0.4))):
        for trial, size in zip(trials, sizes, strict=True):
            trial.scores.append(Score(rung, 5, np.full(100, size), np.full(100, size < 0.3)))
    assert "With `lora`, the loss was lower in the first round." in sentence(specs[0], trials[0], trials)


@pytest.mark.parametrize("uploaded", [True, False])
def test_early_stopping_needs_images_that_training_does_not_see(uploaded: bool) -> None:
    spec = asked(validation_split=0, early_stopping={}, **({} if uploaded else {"folds": 2}))
    if uploaded:
        check_dataset(spec, {"a": 9, "b": 9}, held_out=True)
        return
    with pytest.raises(InvalidSpec, match="early_stopping"):
        check_dataset(spec, {"a": 9, "b": 9}, held_out=False)


def test_classes_that_the_base_does_not_have_get_a_new_classifier_in_words_too(problem: Callable[..., Problem]) -> None:
    found = search(asked(l2="auto", epochs=4, search={"trials": 2, "folds": 2}), problem(10, same_classes=False))
    assert found.spec.head == "new"
    assert "from a new classifier" in found.sentence


@pytest.mark.parametrize("each", [2, 3, 4])
def test_two_classes_of_a_few_images_are_enough(problem: Callable[..., Problem], each: int) -> None:
    whole = problem(each).data
    few = Problem(whole.take(np.flatnonzero(whole.labels < 2)), pretrained()[0], 2, same_classes=False)
    found = search(asked(search={"trials": 2}), few)
    assert found.spec.epochs <= 1000
    assert bool(found.warnings) == (each < 3)


@pytest.mark.parametrize(("each", "uploaded"), [(2, False), (4, False), (4, True)])
def test_a_resolved_spec_is_accepted_with_the_same_data(
    problem: Callable[..., Problem], each: int, uploaded: bool
) -> None:
    found = search(asked(search={"trials": 1}), problem(each), uploaded=uploaded)
    check_dataset(asked(**described(found.spec)), dict.fromkeys("0123456789", each), held_out=uploaded)


def test_without_time_for_a_longer_run_what_the_first_round_found_is_trained_for_as_long_at_least(
    problem: Callable[..., Problem],
) -> None:
    found = search(asked(search={"trials": 6, "seconds": 1.5}), problem(20))
    chosen = next(trial for trial in found.trials if trial.number == found.chosen)
    assert found.spec.epochs >= chosen.scores[-1].epochs
    assert f"classifier, {found.spec.epochs} epoch" in found.sentence
    assert bool(found.warnings) == (found.spec.epochs < chosen.spec.epochs)
