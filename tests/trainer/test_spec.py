"""The spec's bounds, and how its errors name their fields."""

import json
from typing import get_args

import pytest

from store.errors import InvalidSpec
from trainer.asked import check_dataset, parse_asked, parse_spec
from trainer.spec import ATTACK_NAMES, SEARCHED, Free, Ia3, Lora, Method, Search, described  # fmt: skip


def test_an_empty_spec_is_the_regularized_recipe() -> None:
    spec = described(parse_spec("{}"))
    assert {name: value for name, value in spec.items() if value not in (None, 0)} == {
        "method": "lora", "lora": {"rank": 4, "alpha": 8.0, "targets": ["conv2", "dense1", "dense2"]},
        "base": "lenet5", "head": "keep", "l2": 1e-4, "dropout": 0.2, "epochs": 20, "batch_size": 64,
        "learning_rate": 1e-3, "schedule": "cosine", "optimizer": "adam", "validation_split": 0.2,
        "polarity": "auto", "device": "auto",
        "min_steps": 20, "calibrate": True, "coverage": 0.95,
    }  # fmt: skip


def test_what_is_chosen_brings_its_defaults_and_what_is_off_becomes_null() -> None:
    given = {"method": "ia3", "optimizer": "sgd", "adversarial": {"epsilon": 0}, "augmentation": {"shift": 0}}
    spec = parse_spec(json.dumps(given))
    assert (spec.ia3, spec.lora, spec.momentum) == (Ia3(), None, 0.9)
    assert (spec.adversarial, spec.augmentation) == (None, None)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"adversarial": {}},
        {"early_stopping": {"patience": 2}},
        *({"method": method} for method in get_args(Method)),
        *({"adversarial": {"attack": attack}} for attack in ATTACK_NAMES),
        *({"optimizer": optimizer} for optimizer in ("adam", "adamw", "sgd")),
        {"augmentation": {"shift": 2, "rotate": 10, "scale": 0.1}, "mixup": 0.2, "label_smoothing": 0.1, "folds": 5},
    ],
)
def test_a_described_spec_reads_as_itself(given: dict[str, object]) -> None:
    spec = parse_spec(json.dumps(given))
    assert parse_spec(json.dumps(described(spec))) == spec


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({"l3": 1}, ["spec.l3"]),
        ({"l1": -1, "dropout": 1.0, "epochs": 0}, ["spec.l1", "spec.dropout", "spec.epochs"]),
        ({"epochs": "20"}, ["spec.epochs"]),
        ({"epochs": 2.5}, ["spec.epochs"]),
        ({"l2": True}, ["spec.l2"]),
        ({"method": "magic"}, ["spec.method"]),
        ({"lora": {"rank": 0}}, ["spec.lora.rank"]),
        ({"lora": {"targets": ["conv2", "conv9"]}}, ["spec.lora.targets.1"]),
        ({"lora": {"targets": []}}, ["spec.lora.targets"]),
        ({"lora": {"targets": ["conv2", "conv2"]}}, ["spec.lora.targets"]),
        ({"method": "head", "lora": {"rank": 2}}, ["spec.lora"]),
        ({"adversarial": {"attack": "fgsm", "epsilon": 2}}, ["spec.adversarial.epsilon"]),
        ({"adversarial": {"attack": "magic"}}, ["spec.adversarial.attack"]),
        ({"adversarial": 5}, ["spec.adversarial"]),
        ({"adversarial": {"attack": "free", "replays": 1}}, ["spec.adversarial.replays"]),
        ({"adversarial": {"attack": "free", "weight": 0.5}}, ["spec.adversarial.weight"]),
        ({"adversarial": {"attack": "fgsm", "steps": 3}}, ["spec.adversarial.steps"]),
        (
            {"adversarial": {"attack": "pgd", "steps": 0, "beta": 1}},
            ["spec.adversarial.steps", "spec.adversarial.beta"],
        ),
        ({"adversarial": {"attack": "vat", "norm": "linf", "epsilon": 2}}, ["spec.adversarial.epsilon"]),
        ({"adversarial": {"attack": "pgd", "norm": "l2"}}, ["spec.adversarial.norm"]),
        ({"method": "lora", "adapter": {"bottleneck": 4}}, ["spec.adapter"]),
        ({"method": "bias", "bias": {"targets": ["head"]}}, ["spec.bias.targets.0"]),
        ({"method": "ia3", "ia3": {"targets": []}}, ["spec.ia3.targets"]),
        ({"momentum": 0.5}, ["spec.momentum"]),
        ({"optimizer": "sgd", "weight_decay": 0.1}, ["spec.weight_decay"]),
        ({"label_smoothing": 1}, ["spec.label_smoothing"]),
        ({"folds": 1}, ["spec.folds"]),
        ({"search": {"trials": 0, "fold": 3}}, ["spec.search.trials", "spec.search.fold"]),
        ({"search": {"seconds": 0}}, ["spec.search.seconds"]),
        ({"search": None, "l2": "auto"}, ["spec.search"]),
        ({"method": "auto", "lora": {"rank": 2}}, ["spec.lora"]),
        ({"l2": "auto", "folds": 5}, ["spec.folds"]),
        ({"l2": "auto", "validation_split": 0.1}, ["spec.validation_split"]),
        ({"l2": "auto", "early_stopping": {}}, ["spec.early_stopping"]),
        ({"adversarial": {"attack": "vat", "epsilon": "auto"}}, ["spec.adversarial.epsilon"]),
        ({"batch_size": "auto"}, ["spec.batch_size"]),
        ({"class_weights": "balanced"}, ["spec.class_weights"]),
        ({"base": "no such/name"}, ["spec.base"]),
        ({"device": "tpu"}, ["spec.device"]),
    ],
)
def test_a_bad_spec_is_refused_with_the_path_of_every_field(given: object, fields: list[str]) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(json.dumps(given))
    assert sorted(detail["field"] for detail in caught.value.details) == sorted(fields)
    assert caught.value.param in fields


@pytest.mark.parametrize("field", SEARCHED)
def test_auto_stands_for_any_field_that_can_be_searched_and_the_others_stay(field: str) -> None:
    asked = parse_asked(json.dumps({field: "auto", "seed": 3}))
    assert asked.auto == {field}
    assert (asked.fixed.seed, asked.fixed.search) == (3, Search())
    shown = asked.described()
    assert shown[field] == "auto"
    assert parse_asked(json.dumps(shown)) == asked


def test_without_a_spec_everything_is_searched_and_with_search_alone_what_is_not_given() -> None:
    assert parse_asked(None).auto == set(SEARCHED)
    asked = parse_asked('{"search": {"trials": 4}, "method": "lora", "lora": {"rank": 2}}')
    assert asked.auto == set(SEARCHED) - {"method"}
    assert (asked.fixed.lora, asked.fixed.search) == (Lora(rank=2), Search(trials=4))
    assert parse_asked('{"l2": 0.1}').auto == frozenset()


def test_the_strength_of_an_attack_may_be_searched() -> None:
    asked = parse_asked('{"adversarial": {"attack": "free", "epsilon": "auto"}}')
    assert asked.auto == {"epsilon"}
    assert asked.described()["adversarial"] == {"attack": "free", "epsilon": "auto", "replays": 4}
    assert parse_asked(json.dumps(asked.described())) == asked
    assert asked.resolve({"epsilon": 0.3}).adversarial == Free(attack="free", epsilon=0.3)


def test_a_search_that_has_nothing_to_search_is_refused() -> None:
    given = described(parse_spec("{}")) | {"search": {}}
    with pytest.raises(InvalidSpec, match="every field that can be searched is given") as caught:
        parse_asked(json.dumps(given))
    assert caught.value.param == "spec.search"


def test_what_a_recipe_resolves_to_keeps_what_was_fixed_and_is_a_spec_again() -> None:
    asked = parse_asked('{"method": "auto", "l2": "auto", "dropout": 0.5}')
    spec = asked.resolve({"method": "full", "l2": 0.01, "dropout": 0.1, "epochs": 7}, folds=5, validation_split=0.0)
    assert (spec.method, spec.lora, spec.l2, spec.dropout, spec.epochs) == ("full", None, 0.01, 0.5, 20)
    assert parse_spec(json.dumps(described(spec))) == spec


@pytest.mark.parametrize(
    ("given", "classes", "held_out", "field"),
    [
        ({"validation_split": 0.1}, {"a": 9, "b": 3}, False, "spec.validation_split"),
        ({"validation_split": 0.3}, {"a": 9, "b": 9}, True, "spec.validation_split"),
        ({"folds": 5}, {"a": 9, "b": 4}, False, "spec.folds"),
        ({"search": {"folds": 5}}, {"a": 9, "b": 4}, False, "spec.search.folds"),
        ({"search": {"seconds": 1.5}}, {"a": 900, "b": 900}, False, "spec.search.seconds"),
        ({"validation_split": 0}, {"a": 9, "b": 9}, False, "spec.validation_split"),
        ({"folds": 5}, {"a": 9, "b": 9}, True, "spec.folds"),
    ],
)
def test_a_spec_that_the_data_do_not_allow_is_refused(
    given: dict[str, object], classes: dict[str, int], held_out: bool, field: str
) -> None:
    with pytest.raises(InvalidSpec) as caught:
        check_dataset(parse_asked(json.dumps(given)), classes, held_out=held_out)
    assert caught.value.param == field


def test_a_spec_that_the_data_allow_passes() -> None:
    for given in (None, "{}"):
        check_dataset(parse_asked(given), {"a": 2, "b": 2}, held_out=False)
        check_dataset(parse_asked(given), {"a": 1, "b": 1}, held_out=True)
    check_dataset(parse_asked('{"folds": 5}'), {"a": 5, "b": 1000}, held_out=False)
    check_dataset(parse_asked('{"folds": 5, "validation_split": 0}'), {"a": 5, "b": 5}, held_out=False)
    check_dataset(parse_asked('{"validation_split": 0}'), {"a": 5, "b": 5}, held_out=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"l1": NaN}', '{"l2": 1e999}'])
def test_what_is_no_json_object_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpec):
        parse_spec(text)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"drop_out": 0.1}, "spec.drop_out: unknown field; did you mean 'dropout'?"),
        ({"l2": "Auto"}, "spec.l2: must be a number, or 'auto', not 'Auto'"),
        ({"search": {"choose": {"weights": {"speed": 1}}}}, "spec.search.choose.weights.speed: must be"),
        ({"trials": 3}, "spec.trials: unknown field; did you mean 'search.trials'?"),
        ({"lora": {"rnak": 4}}, "spec.lora.rnak: unknown field; did you mean 'rank'?"),
        ({"adversarial": {"attack": "pgd", "step": 4}}, "spec.adversarial.step: unknown field; did you mean 'steps'?"),
        ({"epochs": "20"}, "spec.epochs: must be a whole number, or 'auto', not '20'"),
        ({"epochs": 0}, "spec.epochs: must be at least 1, not 0"),
        ({"label_smoothing": 1}, "spec.label_smoothing: must be less than 1, not 1"),
        ({"lora": 3}, "spec.lora: must be an object, not 3"),
        ({"device": "tpu"}, "spec.device: must be 'auto', 'cpu' or 'gpu', not 'tpu'"),
        ({"adversarial": {"attack": "magic"}}, "must be one of 'fgsm', 'pgd', 'trades', 'free', 'vat', not 'magic'"),
        ({"lora": {"targets": []}}, "spec.lora.targets: must have at least 1 item"),
        ({"base": "no such/name"}, "spec.base: must be a model's name, or name:version, not 'no such/name'"),
        ({"epochs": 0, "l3": 1, "l1": -1}, "(and 2 more)"),
    ],
)
def test_a_refusal_says_in_plain_words_what_would_be_right(given: object, message: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(json.dumps(given))
    assert message in caught.value.message
    told = caught.value.message + str(caught.value.details)
    assert "Input should" not in told
    assert "not permitted" not in told


@pytest.mark.parametrize("field", ["l1", "l2", "l2_sp", "dropout", "label_smoothing", "mixup"])
def test_null_is_no_strength_and_the_error_says_that_zero_is_off(field: str) -> None:
    with pytest.raises(InvalidSpec, match="not null; 0 switches it off"):
        parse_spec(json.dumps({field: None}))


@pytest.mark.parametrize(
    ("text", "param"),
    [('{"l2": 1, "l2": 0}', "spec.l2"), ('{"epochs": 3, "lora": {"rank": 2, "rank": 3}}', "spec.lora.rank")],
)
def test_a_key_given_twice_is_refused(text: str, param: str) -> None:
    with pytest.raises(InvalidSpec, match="given twice") as caught:
        parse_spec(text)
    assert caught.value.param == param
