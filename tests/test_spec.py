"""The spec's bounds, and how its errors name their fields."""

import json

import pytest

from serving.errors import InvalidSpec
from trainer.spec import described, parse_spec


def test_no_spec_is_the_regularized_recipe() -> None:
    spec = described(parse_spec(None))
    assert spec == {
        "method": "lora", "lora": {"rank": 4, "alpha": 8.0, "targets": ["conv2", "dense1", "dense2"]},
        "base": "lenet5", "l1": 0.0, "l2": 1e-4, "dropout": 0.2, "adversarial": None, "epochs": 20, "batch_size": 64,
        "learning_rate": 1e-3, "validation_split": 0.2, "early_stopping": None, "polarity": "auto", "device": "auto",
        "seed": 0,
    }  # fmt: skip


@pytest.mark.parametrize("given", [{}, {"method": "head"}, {"adversarial": {}}, {"early_stopping": {"patience": 2}}])
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
        ({"base": "no such/name"}, ["spec.base"]),
        ({"device": "tpu"}, ["spec.device"]),
    ],
)
def test_a_bad_spec_is_refused_with_the_path_of_every_field(given: object, fields: list[str]) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(json.dumps(given))
    assert sorted(detail["field"] for detail in caught.value.details) == sorted(fields)
    assert caught.value.param in fields


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"l1": NaN}', '{"l2": 1e999}'])
def test_what_is_no_json_object_of_numbers_is_refused(text: str) -> None:
    with pytest.raises(InvalidSpec):
        parse_spec(text)
