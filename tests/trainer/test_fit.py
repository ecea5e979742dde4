"""Training by a spec: what is chosen, what ends it, what it says of itself."""

import json
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from store.errors import Diverged, InvalidSpec
from trainer import fit as fitting
from trainer.asked import parse_spec
from trainer.evaluate import accuracy
from trainer.fit import Fitted, Split, begin, class_weights, fit, schedule, structure
from trainer.folds import stratified, stratified_folds
from trainer.lenet import Arrays
from trainer.network import Network
from trainer.spec import kept_epochs
from trainer.train_step import TrainStep
from trainer.worker.pretrained import pretrained

Digits = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def base() -> Arrays:
    return pretrained()[0]


def part(digits: Digits, first: int, last: int) -> Split:
    images, labels = digits
    return Split(tf.constant(images[first:last, ..., None] / np.float32(255)), labels[first:last].astype(np.int32))


def run(spec: dict[str, Any], base: Arrays, digits: Digits, same_classes: bool = True) -> Fitted:
    parsed = parse_spec(json.dumps(spec))
    start = begin(parsed, base, classes=10, same_classes=same_classes)
    return fit(parsed, start, part(digits, 0, 100), part(digits, 1000, 1100), classes=10)


METHODS = [{"method": method} for method in ("full", "head", "bias", "lora", "adapter", "ia3")]
ATTACKS = [{"adversarial": {"attack": attack, "epsilon": 0.03}} for attack in ("fgsm", "pgd", "trades", "free", "vat")]


@pytest.mark.parametrize(
    "spec",
    [*METHODS, ATTACKS[0], *(pytest.param(one, marks=pytest.mark.exhaustive) for one in ATTACKS[1:])],
    ids=str,
)
@pytest.mark.slow
def test_every_method_and_attack_learns_digits_with_a_new_head(
    spec: dict[str, Any], base: Arrays, digits: Digits
) -> None:
    fitted = run({**spec, "epochs": 12}, base, digits, same_classes=False)
    test = part(digits, 1200, 1500)
    assert accuracy(fitted.network.logits(test.images), test.labels) > 0.75


def test_frozen_layers_are_computed_once_where_nothing_disturbs_the_input(base: Arrays) -> None:
    def entry(**spec: Any) -> str:
        parsed = parse_spec(json.dumps(spec))
        return structure(parsed, begin(parsed, base, classes=10, same_classes=True), 10, 100, "/CPU:0").entry

    assert entry(method="head", dropout=0) == "head"
    assert entry(method="head") == "dense2"  # which takes in what dropout leaves of dense1
    assert entry(method="lora") == "conv2"
    assert entry(method="lora", lora={"targets": ["dense1", "dense2"]}) == "dense1"
    assert entry(method="bias", bias={"targets": ["dense2"]}) == "dense2"
    assert entry(method="full") == "conv1"
    disturbances: list[dict[str, Any]] = [{"mixup": 0.1}, {"augmentation": {"shift": 1}}, {"adversarial": {}}]
    assert {entry(method="head", **disturbance) for disturbance in disturbances} == {"conv1"}


def test_training_from_the_features_is_training_from_the_images(
    base: Arrays, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"method": "lora", "lora": {"targets": ["dense1"]}, "epochs": 3}
    quick = run(spec, base, digits)
    monkeypatch.setattr(fitting, "first_trained", lambda names: "conv1")
    slow = run(spec, base, digits)
    for name, value in slow.params.items():
        np.testing.assert_allclose(quick.params[name], value, atol=1e-4)


def test_the_data_are_shuffled_anew_every_epoch_and_cut_into_batches_after(
    base: Arrays, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cutting first would give the same batches every epoch."""
    orders: list[np.ndarray] = []
    original = TrainStep.epoch

    def spy(self: TrainStep, features: Any, labels: Any, order: Any, *rest: Any) -> Any:
        orders.append(order.numpy())
        return original(self, features, labels, order, *rest)

    monkeypatch.setattr(TrainStep, "epoch", spy)
    run({"method": "head", "epochs": 3}, base, digits)
    batches = [{frozenset(order[at : at + 8].tolist()) for at in range(0, 100, 8)} for order in orders]
    assert all(sorted(order.tolist()) == list(range(100)) for order in orders)
    assert not batches[0] & batches[1]
    assert not batches[1] & batches[2]


def test_epsilon_grows_over_the_first_three_tenths_of_the_steps() -> None:
    reach = schedule(parse_spec("{}"), 1000)[:, 1]
    assert reach[0] == 0
    assert reach[150] == pytest.approx(0.5)
    assert (reach[300:] == 1).all()


def test_mixup_draws_its_shares_from_a_beta_distribution() -> None:
    assert (schedule(parse_spec("{}"), 100)[:, 2] == 1).all()
    shares = schedule(parse_spec('{"mixup": 0.5}'), 20_000)[:, 2]
    assert shares.mean() == pytest.approx(0.5, abs=0.01)
    assert shares.var() == pytest.approx(1 / 8, abs=0.003)  # of Beta(a, a): 1 / (4 (2a + 1))


def test_class_weights_make_every_class_count_the_same() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = class_weights(labels, 3)
    np.testing.assert_allclose([weights[k] * (labels == k).sum() for k in range(3)], 10 / 3, rtol=1e-6)
    assert weights[labels].mean() == pytest.approx(1)


def test_class_weights_help_the_rare_class(base: Arrays, digits: Digits) -> None:
    images, labels = digits
    rare = np.flatnonzero(labels[:900] == 8)
    keep = np.setdiff1d(np.arange(900), rare[3:])
    split = Split(tf.constant(images[keep, ..., None] / np.float32(255)), labels[keep].astype(np.int32))
    test = part(digits, 1000, 1797)
    found = []
    for wanted in (None, "auto"):
        spec = parse_spec(json.dumps({"method": "head", "epochs": 5, "class_weights": wanted}))
        flat = base | {"head/kernel": 0 * base["head/kernel"], "head/bias": 0 * base["head/bias"]}
        fitted = fit(spec, begin(spec, flat, classes=10, same_classes=True), split, test, classes=10)
        right = fitted.network.logits(test.images).argmax(1) == test.labels
        found.append(right[test.labels == 8].mean())
    assert found[1] > found[0]


def test_the_split_takes_its_share_of_every_class_and_folds_hold_each_image_out_once() -> None:
    labels = np.repeat([0, 1, 2], [50, 20, 2])
    chosen = stratified(labels, 0, lambda n: max(1, round(0.2 * n)))
    assert [chosen[labels == k].sum() for k in range(3)] == [10, 4, 1]
    folds = np.stack(list(stratified_folds(labels, 0, 5)))
    assert (folds.sum(0) == 1).all()
    assert [fold[labels == 0].sum() for fold in folds] == [10] * 5


def test_with_an_attack_the_weights_of_the_best_epoch_under_attack_are_kept(base: Arrays, digits: Digits) -> None:
    fitted = run({"adversarial": {"attack": "pgd", "epsilon": 0.05, "steps": 3}, "epochs": 5}, base, digits)
    scores = [record["validation_accuracy_under_pgd"] for record in fitted.history]
    assert scores[fitted.kept_epoch - 1] == max(scores)
    logits = fitted.network.logits(part(digits, 1000, 1100).images)
    kept = fitted.history[fitted.kept_epoch - 1]
    assert accuracy(logits, part(digits, 1000, 1100).labels) == pytest.approx(kept["validation_accuracy"])


def test_early_stopping_with_an_attack_ends_when_nothing_gets_better(base: Arrays, digits: Digits) -> None:
    spec = {"adversarial": {"attack": "fgsm"}, "early_stopping": {"patience": 2, "min_delta": 0.05}, "epochs": 50}
    fitted = run({**spec, "method": "head"}, base, digits)
    assert fitted.ended_by == "early_stopping"
    assert len(fitted.history) < 50


def test_a_training_that_stops_early_keeps_its_last_epoch_as_a_checkpoint(base: Arrays, digits: Digits) -> None:
    parsed = parse_spec('{"epochs": 50, "checkpoints": 5, "early_stopping": {"patience": 2, "min_delta": 0.5}}')
    start = begin(parsed, base, classes=10, same_classes=True)
    kept: list[Fitted] = []
    fitted = fit(parsed, start, part(digits, 0, 100), part(digits, 1000, 1100), classes=10, keep=kept.append)
    last = len(fitted.history)
    assert fitted.ended_by == "early_stopping"
    assert [one.kept_epoch for one in kept] == [*range(10, last, 10), last]
    logits = kept[-1].network.logits(part(digits, 1000, 1100).images)
    figures = fitted.history[-1]["validation_accuracy"]  # of that epoch, not of the best one
    assert accuracy(logits, part(digits, 1000, 1100).labels) == pytest.approx(figures)


@pytest.mark.parametrize(
    ("epochs", "checkpoints", "kept"),
    [(20, 0, set()), (20, 1, {20}), (20, 4, {5, 10, 15, 20}), (7, 3, {3, 5, 7}), (2, 10, {1, 2}), (1, 1, {1})],
)
def test_checkpoints_are_spaced_evenly_and_the_last_epoch_is_one(epochs: int, checkpoints: int, kept: set[int]) -> None:
    assert kept_epochs(parse_spec(f'{{"epochs": {epochs}, "checkpoints": {checkpoints}}}')) == kept


def test_early_stopping_compares_with_the_last_improvement_that_counted(base: Arrays, digits: Digits) -> None:
    """As `keras.callbacks.EarlyStopping` does: scores that creep up by less than `min_delta` add up."""
    losses = [1.0, 0.95, 0.89, 0.84, 0.78, 0.74, 0.73, 0.72, 0.71]
    spec = parse_spec('{"early_stopping": {"patience": 2, "min_delta": 0.1}}')
    start = begin(spec, base, classes=10, same_classes=True)
    model = TrainStep(structure(spec, start, 10, 100, "/CPU:0"))
    selection = fitting.Selection(spec, model, part(digits, 1000, 1100))

    class KerasModel:  # what the callback needs of a Keras model
        stop_training = False

        def get_weights(self) -> list[Any]:
            return []

    keras = tf.keras.callbacks.EarlyStopping("loss", patience=2, min_delta=0.1, mode="min")
    keras.set_model(keras_model := KerasModel())
    keras.on_train_begin()
    ended: list[int] = []
    for epoch, loss in enumerate(losses, start=1):
        record = {"epoch": epoch, "validation_cross_entropy": loss}
        if selection.judge(record, Network(start.params), warm=True) == "early_stopping":
            ended.append(epoch)
        keras.on_epoch_end(epoch, {"loss": loss})
        if keras_model.stop_training:
            break
    assert ended == [epoch] == [7]


def under(monkeypatch: pytest.MonkeyPatch, labels: np.ndarray, *, robust: list[float], fast: float) -> None:
    """Let the attacks leave these shares of the images, PGD one after the other."""
    shares = iter(robust)

    def margins(share: float) -> np.ndarray:
        return np.where(np.arange(len(labels)) < share * len(labels), -1.0, 1.0)

    monkeypatch.setattr(Network, "apgd", lambda *_: (None, tf.constant(margins(next(shares)))))
    scores = np.eye(10, dtype=np.float32)[labels] * -margins(fast)[:, None]
    monkeypatch.setattr(Network, "fgsm", lambda *_: tf.constant(scores))


def test_an_overfitted_attack_ends_training_and_is_rolled_back(
    base: Arrays, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe sees what FGSM does not: PGD accuracy falls to nothing while FGSM accuracy stays."""
    under(monkeypatch, digits[1][1000:1100], robust=[0.9, 0.8, 0.85, 0.8, 0.2, 0.2], fast=0.9)
    fitted = run({"adversarial": {"attack": "fgsm", "weight": 1}, "epochs": 6}, base, digits)
    assert (fitted.ended_by, fitted.overfitted_epoch) == ("catastrophic_overfitting", 5)
    assert fitted.kept_epoch == 1
    assert len(fitted.history) == 5


def test_a_run_that_never_withstood_pgd_is_flagged_and_not_ended(
    base: Arrays, digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {"adversarial": {"attack": "fgsm"}, "epochs": 6}
    under(monkeypatch, digits[1][1000:1100], robust=[0.6, 0.1, 0.04, 0.03, 0.03, 0.03], fast=0.7)  # warm from 2 on
    fitted = run(spec, base, digits)
    assert (fitted.ended_by, fitted.overfitted_epoch) == ("epochs", 3)
    under(monkeypatch, digits[1][1000:1100], robust=[0.0, 0.0, 0.04, 0.3, 0.3, 0.3], fast=0.7)
    assert run(spec, base, digits).overfitted_epoch is None


def test_the_receipt_gives_every_term_its_value_and_share(base: Arrays, digits: Digits) -> None:
    spec = {"method": "full", "l1": 1e-5, "l2": 1e-3, "l2_sp": 1e-3, "adversarial": {}, "epochs": 3}
    fitted = run(spec, base, digits)
    terms = {"data_loss", "adversarial_loss", "l1", "l2", "l2_sp"}
    for record, history in zip(fitted.gradient_shares, fitted.history, strict=True):
        assert set(record) == {"epoch", *terms}
        assert sum(record[name]["share"] for name in terms) == pytest.approx(1)
        assert all(record[name]["value"] == history[name] for name in terms)


def warned(base: Arrays, digits: Digits, **spec: Any) -> set[tuple[str, str]]:
    fitted = run(spec, base, digits)
    found = fitting.warnings(fitted.gradient_shares, parse_spec(json.dumps(spec)), zeros=False)
    return {(warning["term"], warning["kind"]) for warning in found}


def test_a_term_that_is_negligible_or_dominates_the_data_is_warned_of(base: Arrays, digits: Digits) -> None:
    spec = {"method": "full", "epochs": 3}
    assert warned(base, digits, **spec, l2=1e-8) == {("l2", "negligible")}
    assert warned(base, digits, **spec, l2=10.0) == {("l2", "dominant")}
    assert ("penalties", "dominant") in warned(base, digits, **spec, l1=1.0, l2=10.0, l2_sp=10.0)
    assert warned(base, digits, **spec, l2=1e-3) == set()


def shares_of_l2(share: float, data_loss: float = 1.0) -> list[dict[str, Any]]:
    terms = {"data_loss": {"value": data_loss, "share": 1 - share}, "l2": {"value": 0.1, "share": share}}
    return [{"epoch": epoch, **terms} for epoch in (1, 2, 3)]


@pytest.mark.parametrize("share", [1e-6, 0.99])
def test_a_strength_that_nobody_chose_is_not_warned_of(share: float) -> None:
    for spec in ("{}", '{"method": "head"}', '{"l2": 1e-4}'):
        assert fitting.warnings(shares_of_l2(share), parse_spec(spec), zeros=False) == []
    assert len(fitting.warnings(shares_of_l2(share), parse_spec('{"l2": 2e-4}'), zeros=False)) == 1


def test_a_penalty_is_not_warned_of_when_all_images_are_fitted() -> None:
    spec = parse_spec('{"l2": 1e-2}')
    assert fitting.warnings(shares_of_l2(0.98, data_loss=0.01), spec, zeros=False) == []
    assert len(fitting.warnings(shares_of_l2(0.98, data_loss=1.0), spec, zeros=False)) == 1


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step(base: Arrays, digits: Digits) -> None:
    hot = {name: value * np.float32(1e12) for name, value in base.items()}
    with pytest.raises(Diverged, match=r"in step 1, epoch 1"):
        run({"method": "full", "epochs": 50}, hot, digits)
    with pytest.raises(Diverged, match=r"step \d+, epoch \d"):
        run({"method": "full", "epochs": 50, "optimizer": "sgd", "learning_rate": 1.0, "l2": 10.0}, base, digits)


@pytest.mark.parametrize("attack", ["free", "pgd"])
def test_an_exploded_loss_is_seen_where_there_is_only_an_adversarial_one(
    attack: str, base: Arrays, digits: Digits
) -> None:
    hot = {name: value * np.float32(300) for name, value in base.items()}  # finite, and beyond all training
    with pytest.raises(Diverged, match=r"the loss is \d.* after step \d+, epoch 1"):
        run({"method": "full", "epochs": 1, "l2": 0, "adversarial": {"attack": attack}}, hot, digits)


def test_a_new_head_is_drawn_even_for_the_classes_of_the_base(base: Arrays) -> None:
    kept, new = (
        begin(parse_spec(json.dumps({"head": head})), base, classes=10, same_classes=True) for head in ("keep", "new")
    )
    assert (kept.new, new.new) == (frozenset(), frozenset({"head/kernel", "head/bias"}))
    np.testing.assert_array_equal(kept.params["head/kernel"], base["head/kernel"])
    assert not np.array_equal(new.params["head/kernel"], base["head/kernel"])


def test_adapters_of_another_size_than_the_bases_are_refused(base: Arrays) -> None:
    spec = parse_spec('{"method": "adapter"}')
    grown = begin(spec, base, classes=10, same_classes=True)
    assert grown.method.bottleneck == 16
    again = begin(spec, grown.params, classes=10, same_classes=True)
    assert not again.new
    with pytest.raises(InvalidSpec, match="already has adapters of 16 units"):
        begin(
            parse_spec('{"method": "adapter", "adapter": {"bottleneck": 4}}'),
            again.params,
            classes=10,
            same_classes=True,
        )
    kept = begin(parse_spec('{"method": "lora"}'), again.params, classes=10, same_classes=True)
    assert kept.method.bottleneck == 16
