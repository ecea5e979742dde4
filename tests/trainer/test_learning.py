"""The mathematics of training, against NumPy oracles."""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer import attacks, penalties
from trainer.lenet import LAYERS, Arrays, adapters, dropout_masks, initial, logits
from trainer.methods import Method, direct_kernels, effective, first_trained, trained_kernels
from trainer.optimizers import Optimizer, learning_rates
from trainer.train_step import Coefficients, Structure, TrainStep

ALL = ("conv1", "conv2", "dense1", "dense2")
LORA = Method("lora", targets=("conv2", "dense1", "dense2"), rank=4)
METHODS = [
    Method("full"), Method("head"), Method("bias", targets=ALL), LORA, Method("adapter", bottleneck=8),
    Method("ia3", targets=ALL),
]  # fmt: skip
REGULARIZED = Structure(LORA, 10, penalties=frozenset({"l1", "l2"}), attack="pgd")


def named(value: Any) -> str:
    return value.name if isinstance(value, Method) else ""


def images_and_labels(n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((n, 28, 28, 1), np.float32), rng.integers(0, 10, n).astype(np.int32)


def coefficients(**values: Any) -> Coefficients:
    return Coefficients(**{"batch_size": 8, **values})


def base_for(method: Method) -> Arrays:
    """Parameters none of which is zero."""
    params = initial(10, seed=0) | (adapters(method.bottleneck, seed=0) if method.bottleneck else {})
    return {name: value + np.float32(0 if "/up/" in name else 0.01) for name, value in params.items()}


def one_epoch(
    model: TrainStep, base: Arrays, *, seed: int = 0, rate: float = 1e-3, n: int = 40, **values: Any
) -> dict[str, float]:
    x, y = images_and_labels(n)
    model.load(base, seed=seed, lora_scale=2.0)
    c = coefficients(seed=seed, **values)
    updates = math.ceil(n / c.batch_size) * c.replays
    schedule = np.stack([np.full(updates, rate), np.ones(updates), np.ones(updates), np.arange(updates) + 1], axis=1)
    order = np.random.default_rng(seed).permutation(n).astype(np.int32)
    terms, wrong = model.epoch(tf.constant(x), tf.constant(y), tf.constant(order), schedule.astype(np.float32), 0, c)
    assert wrong is None
    return terms


def merged(model: TrainStep) -> Arrays:
    return {name: np.asarray(value) for name, value in model.params().items()}


def numpy_logits(params: Arrays, images: np.ndarray) -> np.ndarray:
    """LeNet-5 written out: same padding, ReLU, max-pooling by two, adapters."""
    x = images.astype(np.float64)
    for layer in ("conv1", "conv2"):
        kernel = params[f"{layer}/kernel"].astype(np.float64)
        padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (5, 5), axis=(1, 2))  # (n, h, w, in, 5, 5)
        x = np.einsum("nhwcij,ijco->nhwo", windows, kernel) + params[f"{layer}/bias"]
        x = np.maximum(x, 0)
        n, h, w, c = x.shape
        x = x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
    x = x.reshape(len(x), -1)
    for layer in ("dense1", "dense2"):
        x = np.maximum(x @ params[f"{layer}/kernel"].astype(np.float64) + params[f"{layer}/bias"], 0)
        if f"{layer}/down/kernel" in params:
            small = np.maximum(x @ params[f"{layer}/down/kernel"] + params[f"{layer}/down/bias"], 0)
            x = x + small @ params[f"{layer}/up/kernel"] + params[f"{layer}/up/bias"]
    scores: np.ndarray = x @ params["head/kernel"].astype(np.float64) + params["head/bias"]
    return scores


def test_the_network_has_107786_parameters() -> None:
    assert sum(value.size for value in initial(10, seed=0).values()) == 107_786


@pytest.mark.parametrize("bottleneck", [0, 8])
def test_the_network_computes_what_its_description_says(bottleneck: int) -> None:
    params, (x, _) = base_for(Method("adapter", bottleneck=bottleneck)), images_and_labels(4)
    params |= {name: value + np.float32(0.05) for name, value in params.items() if "/up/" in name}
    np.testing.assert_allclose(logits(params, tf.constant(x)).numpy(), numpy_logits(params, x), atol=1e-4)


@pytest.mark.parametrize("entry", LAYERS)
def test_the_network_in_two_parts_is_the_network(entry: str) -> None:
    params, (x, _) = base_for(Method("adapter", bottleneck=8)), images_and_labels(4)
    masks = dropout_masks(4, tf.constant(0.3), tf.constant([1, 2]))
    if entry == "head":  # with dropout nobody enters here: the features depend on that of dense1
        masks = []
    whole = logits(params, tf.constant(x), masks)
    halves = logits(params, logits(params, tf.constant(x), until=entry), masks, entry=entry)
    np.testing.assert_array_equal(whole.numpy(), halves.numpy())


def test_dropout_keeps_the_expectation_and_drops_the_share_it_says() -> None:
    params = initial(10, seed=0) | {"dense1/kernel": np.zeros((784, 120), np.float32)}
    params |= {"dense1/bias": np.ones(120, np.float32), "dense2/kernel": np.zeros((120, 84), np.float32)}
    params |= {"dense2/bias": np.ones(84, np.float32), "head/kernel": np.eye(84, dtype=np.float32)}
    params |= {"head/bias": np.zeros(84, np.float32)}
    x, _ = images_and_labels(200)
    dropped = logits(params, tf.constant(x), dropout_masks(200, tf.constant(0.25), tf.constant([1, 2]))).numpy()
    assert set(np.unique(dropped.round(4))) == {0.0, np.float32(1.3333)}
    assert abs((dropped == 0).mean() - 0.25) < 0.02


@pytest.mark.parametrize("seed", [0, 1])
def test_penalties_are_what_their_formulas_say(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernels = [rng.standard_normal((5, 5, 6, 16)).astype(np.float32), rng.standard_normal((7, 3)).astype(np.float32)]
    anchors = [rng.standard_normal(kernel.shape).astype(np.float32) for kernel in kernels]
    tensors = [tf.constant(kernel) for kernel in kernels]
    l1 = 0.3 * sum(np.abs(kernel).sum() for kernel in kernels)
    l2 = 0.3 / 2 * sum((kernel**2).sum() for kernel in kernels)
    l2_sp = 0.3 / 2 * sum(((kernel - anchor) ** 2).sum() for kernel, anchor in zip(kernels, anchors, strict=True))
    assert float(penalties.l1(tensors, 0.3)) == pytest.approx(l1, rel=1e-5)
    assert float(penalties.l2(tensors, 0.3)) == pytest.approx(l2, rel=1e-5)
    assert float(penalties.l2_sp(tensors, anchors, 0.3)) == pytest.approx(l2_sp, rel=1e-5)


def test_the_soft_threshold_shrinks_by_it_and_makes_exact_zeros() -> None:
    kernel = tf.constant([-2.0, -0.5, -0.1, 0.0, 0.3, 1.5])
    np.testing.assert_allclose(penalties.soft_threshold(kernel, 0.4).numpy(), [-1.6, -0.1, 0, 0, 0, 1.1], atol=1e-6)


def test_the_gradient_of_l2_is_alpha_times_the_effective_kernel() -> None:
    base = {name: tf.constant(value) for name, value in initial(10, seed=0).items()}
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((784, 4)).astype(np.float32), rng.standard_normal((4, 120)).astype(np.float32)
    trained = {"dense1/lora_a": tf.Variable(a), "dense1/lora_b": tf.Variable(b)}
    with tf.GradientTape() as tape:
        kernel = effective(base, trained, tf.constant(0.5))["dense1/kernel"]
        loss = penalties.l2([kernel], tf.constant(0.1))
    whole = base["dense1/kernel"].numpy() + 0.5 * a @ b
    expected = 0.1 * whole @ b.T * 0.5  # by the chain rule through W = W0 + 0.5 A B
    np.testing.assert_allclose(tape.gradient(loss, trained["dense1/lora_a"]).numpy(), expected, rtol=1e-3, atol=1e-4)


def test_penalties_leave_biases_and_untouched_kernels_alone() -> None:
    params = initial(10, 0)

    def touched(method: Method) -> list[str]:
        return trained_kernels(method.start(params | adapters(4, 0), seed=0))

    assert touched(Method("lora", ("conv2",), rank=2)) == ["conv2/kernel", "head/kernel"]
    assert touched(Method("bias", ALL)) == ["head/kernel"]
    assert touched(Method("ia3", ("conv1", "dense1"))) == ["conv2/kernel", "dense2/kernel", "head/kernel"]
    assert trained_kernels(Method("full").start(params, 0)) == sorted(f"{name}/kernel" for name in LAYERS)
    ia3 = Method("ia3", ("dense2",)).start(params, seed=0)
    assert (trained_kernels(ia3), direct_kernels(ia3)) == (["head/kernel"], [])  # head times scale


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        (Method("full"), "conv1"), (Method("head"), "head"), (Method("bias", ("dense1",)), "dense1"),
        (Method("bias", ALL), "conv1"), (LORA, "conv2"), (Method("ia3", ("conv2",)), "dense1"),
        (Method("adapter", bottleneck=4), "dense1"),
    ],
    ids=named,
)  # fmt: skip
def test_what_lies_before_the_first_touched_layer_never_changes(method: Method, layer: str) -> None:
    base = base_for(method)
    assert first_trained(method.start(base, seed=0)) == layer
    model = TrainStep(Structure(method, 10))
    one_epoch(model, base, rate=0.01)
    x, _ = images_and_labels(3)
    before, after = (logits(params, tf.constant(x), until=layer) for params in (base, merged(model)))
    np.testing.assert_array_equal(np.asarray(before), np.asarray(after))


@pytest.mark.parametrize("method", METHODS, ids=named)
def test_a_fresh_method_changes_nothing(method: Method) -> None:
    base, (x, _) = base_for(method), images_and_labels()
    model = TrainStep(Structure(method, 10))
    model.load(base, seed=5, lora_scale=2.0)
    np.testing.assert_array_equal(logits(merged(model), tf.constant(x)), logits(base, tf.constant(x)))


def test_the_merge_of_lora_is_exact() -> None:
    base, (x, _) = initial(10, seed=0), images_and_labels()
    model = TrainStep(Structure(LORA, 10))
    one_epoch(model, base, rate=0.01)
    params, trained = merged(model), model.snapshot()
    assert sum(value.size for value in params.values()) == 107_786
    for layer in LORA.targets:
        update = 2.0 * trained[f"{layer}/lora_a"] @ trained[f"{layer}/lora_b"]
        expected = base[f"{layer}/kernel"] + update.reshape(base[f"{layer}/kernel"].shape)
        assert np.abs(update).max() > 1e-3
        np.testing.assert_allclose(params[f"{layer}/kernel"], expected, atol=1e-6)
    np.testing.assert_allclose(numpy_logits(params, x), logits(params, tf.constant(x)), atol=1e-4)


def test_the_merge_of_ia3_scales_activations_of_either_sign() -> None:
    base, (x, _) = base_for(Method("full")), images_and_labels(5)
    trained = Method("ia3", ALL).start(base, seed=0)
    rng = np.random.default_rng(0)
    scales = {layer: rng.normal(size=trained[f"{layer}/scale"].shape).astype(np.float32) for layer in ALL}
    trained |= {f"{layer}/scale": value for layer, value in scales.items()}
    params = {name: np.asarray(value) for name, value in effective(base, trained, 0.0).items()}
    at = tf.constant(x)
    for layer, after in zip(ALL, LAYERS[1:], strict=True):
        at = logits(base, at, entry=layer, until=after) * scales[layer]  # the activations, channel or unit by one
    expected = logits(base, at, entry="head")
    np.testing.assert_allclose(logits(params, tf.constant(x)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "changed"),
    [
        (Method("head"), {"head/kernel", "head/bias"}),
        (Method("bias", ("conv1", "dense2")), {"conv1/bias", "dense2/bias", "head/kernel", "head/bias"}),
        (LORA, {"conv2/kernel", "dense1/kernel", "dense2/kernel", "head/kernel", "head/bias"}),
        (Method("ia3", ("conv1",)), {"conv2/kernel", "head/kernel", "head/bias"}),
        (Method("adapter", bottleneck=8), {*adapters(8, 0), "head/kernel", "head/bias"}),
        (Method("full"), set(initial(10, 0))),
    ],
    ids=named,
)
def test_frozen_weights_stay_bit_identical(method: Method, changed: set[str]) -> None:
    base = base_for(method)
    model = TrainStep(Structure(method, 10, penalties=frozenset({"l1", "l2", "l2_sp"}), attack="pgd", augment=True))
    values: dict[str, Any] = {
        "l1": 1e-4,
        "l2": 1e-3,
        "l2_sp": 1e-2,
        "dropout": 0.2,
        "epsilon": 0.1,
        "adversarial_weight": 0.5,
    }
    one_epoch(model, base, shift=1.0, **values)
    after = merged(model)
    assert {name for name in base if not np.array_equal(base[name], after[name])} == changed


@pytest.mark.parametrize("attack", [None, "pgd", "trades", "free", "vat"])
def test_the_same_seed_gives_the_same_weights_bit_for_bit(attack: str | None) -> None:
    base = initial(10, seed=0)
    structure = Structure(LORA, 10, penalties=frozenset({"l2"}), attack=attack, clean=attack != "free", mixup=True)
    model = TrainStep(structure)
    runs = []
    for seed in (7, 7, 8):
        values: dict[str, Any] = {"l2": 1e-3, "dropout": 0.3, "epsilon": 0.1, "adversarial_weight": 0.5}
        one_epoch(model, base, seed=seed, replays=3 if attack == "free" else 1, **values)
        runs.append(model.snapshot())
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(np.array_equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_other_coefficients_and_data_sizes_trace_nothing_anew() -> None:
    base, model = initial(10, seed=0), TrainStep(REGULARIZED)
    one_epoch(model, base, l1=1e-3, l2=1e-3)
    traces = model.traces()
    values: dict[str, Any] = {
        "l1": 0.1,
        "l2": 0.2,
        "dropout": 0.5,
        "epsilon": 0.3,
        "adversarial_weight": 0.9,
        "attack_steps": 5,
    }
    one_epoch(model, base, rate=0.1, n=33, batch_size=5, **values)
    assert model.traces() == traces == 1


@pytest.mark.parametrize("images", [40, 41, 39])
def test_the_halves_of_a_batch_together_are_the_batch(images: int) -> None:
    """Of 41 images in batches of 8 the last one is alone."""
    base, found = initial(10, seed=0), []
    for halves in (False, True):
        model = TrainStep(Structure(Method("full"), 10, penalties=frozenset({"l2"}), dropout=False, halves=halves))
        terms = one_epoch(model, base, n=images, l2=1e-2, rate=1e-3)
        found.append(merged(model) | {name: np.float32(value) for name, value in terms.items()})
    for name, whole in found[0].items():
        np.testing.assert_allclose(found[1][name], whole, rtol=1e-3, atol=2e-5, err_msg=name)


def test_runs_of_one_structure_go_on_at_once_and_end_as_they_do_alone() -> None:
    base = initial(10, seed=0)

    def run(seed: int) -> Arrays:
        model = TrainStep(REGULARIZED)
        for _ in range(3):
            one_epoch(model, base, seed=seed, l2=1e-3, dropout=0.2, epsilon=0.1, adversarial_weight=0.5)
        return merged(model)

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(run, range(4)))
    for seed, params in enumerate(together):
        alone = run(seed)
        assert all(np.array_equal(params[name], alone[name]) for name in alone)


def size(model: TrainStep) -> float:
    return float(sum(np.abs(value).sum() for name, value in merged(model).items() if name.endswith("kernel")))


@pytest.mark.parametrize("method", [Method("full"), LORA], ids=named)
@pytest.mark.parametrize(("penalty", "strength"), [("l1", 0.1), ("l2", 10.0)])
def test_a_penalty_is_minimized_and_not_only_reported(method: Method, penalty: str, strength: float) -> None:
    """Keras takes no notice of a regularizer that is added after `compile`: the kernels stay as they are."""
    base, model = initial(10, seed=0), TrainStep(Structure(method, 10, penalties=frozenset({penalty})))
    one_epoch(model, base)
    plain = size(model)
    strengths: dict[str, Any] = {penalty: strength}
    one_epoch(model, base, **strengths)
    assert size(model) < 0.985 * plain


def test_l2_sp_holds_the_weights_at_the_base_and_a_new_head_at_zero() -> None:
    base, model = initial(10, seed=0), TrainStep(Structure(Method("full"), 10, penalties=frozenset({"l2_sp"})))
    distances = []
    for strength in (0.0, 10.0):
        one_epoch(model, base, l2_sp=strength)
        after = merged(model)
        distances.append(sum(np.square(after[name] - base[name]).sum() for name in base if name.endswith("kernel")))
    assert distances[1] < 0.5 * distances[0]
    model.load(base, seed=0, new=frozenset({"head/kernel"}))
    x, y = images_and_labels(8)
    schedule = np.array([[1e-3, 1, 1, 1]], np.float32)
    order = tf.range(8)
    terms, _ = model.epoch(tf.constant(x), tf.constant(y), order, schedule, 0, coefficients(l2_sp=0.1))
    assert terms["l2_sp"] == pytest.approx(0.05 * np.square(base["head/kernel"]).sum(), rel=1e-4)


def test_reported_penalties_are_those_of_the_effective_kernels() -> None:
    base, model = initial(10, seed=0), TrainStep(REGULARIZED)
    terms = one_epoch(model, base, batch_size=40, l1=0.01, l2=0.1)
    kernels = [base[name] for name in trained_kernels(model.snapshot())]
    assert terms["l1"] == pytest.approx(0.01 * sum(np.abs(kernel).sum() for kernel in kernels), rel=1e-4)
    assert terms["l2"] == pytest.approx(0.05 * sum((kernel**2).sum() for kernel in kernels), rel=1e-4)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_l1_gives_directly_trained_kernels_exact_zeros(optimizer: str) -> None:
    base = initial(10, seed=0)
    model = TrainStep(Structure(Method("full"), 10, penalties=frozenset({"l1"}), optimizer=optimizer))
    one_epoch(model, base, l1=0.3, rate=0.01 if optimizer != "sgd" else 0.1)
    after = merged(model)
    zeros = [np.mean(value == 0) for name, value in after.items() if name.endswith("kernel")]
    assert min(zeros) > 0.05
    assert all((value != 0).any() for name, value in after.items() if name.endswith("bias"))


def test_l1_shrinks_the_kernels_of_lora_and_promises_no_zeros() -> None:
    base, model = initial(10, seed=0), TrainStep(Structure(LORA, 10, penalties=frozenset({"l1"})))
    one_epoch(model, base, l1=0.3)
    after = merged(model)
    assert np.abs(after["dense1/kernel"]).sum() < np.abs(base["dense1/kernel"]).sum() - 10
    assert (after["dense1/kernel"] != 0).all()
    assert (after["head/kernel"] == 0).any()  # which is trained directly


@pytest.mark.slow
def test_the_zeros_of_l1_are_those_of_the_lasso() -> None:
    """At the end w = 0 needs |slope| <= lambda, and w != 0 needs slope = -lambda sign(w) (Tibshirani 1996)."""
    base, strength = initial(10, seed=0), 0.02
    model = TrainStep(Structure(Method("head"), 10, penalties=frozenset({"l1"})))
    x, y = images_and_labels(20)
    model.load(base, seed=0)
    updates = 3000
    rates = 3e-3 * learning_rates("cosine", updates)
    order = tf.range(20)
    for at in range(updates):
        schedule = np.array([[rates[at], 1, 1, at + 1]], np.float32)
        model.epoch(tf.constant(x), tf.constant(y), order, schedule, at, coefficients(batch_size=20, l1=strength))
    head = tf.Variable(merged(model)["head/kernel"])
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(attacks.cross_entropy(y, logits(merged(model) | {"head/kernel": head}, tf.constant(x))))
    slope, weights = tape.gradient(loss, head).numpy(), head.numpy()
    assert 0.5 < np.mean(weights == 0) < 0.99
    assert np.abs(slope[weights == 0]).max() <= 1.1 * strength
    np.testing.assert_allclose(slope[weights != 0], -strength * np.sign(weights[weights != 0]), atol=0.2 * strength)


def test_the_loss_takes_logits_and_its_gradient_is_probability_minus_target() -> None:
    """A loss that expects probabilities and gets logits is wrong by silence: it has a value all the same."""
    scores = tf.Variable([[2.0, -1.0, 30.0], [0.0, 5.0, -40.0]])
    labels = tf.constant([2, 2])
    with tf.GradientTape() as tape:
        loss = attacks.soft_cross_entropy(tf.one_hot(labels, 3), scores)
    np.testing.assert_allclose(loss.numpy(), [0.0, 45.0067], atol=1e-3)
    np.testing.assert_allclose(attacks.cross_entropy(labels, scores).numpy(), loss.numpy(), atol=1e-5)
    expected = tf.nn.softmax(scores).numpy() - np.eye(3)[[2, 2]]
    np.testing.assert_allclose(tape.gradient(loss, scores).numpy(), expected, atol=1e-6)


def test_the_first_term_of_an_epoch_is_the_mean_cross_entropy_of_the_logits() -> None:
    base, model = initial(10, seed=0), TrainStep(Structure(Method("full"), 10))
    x, y = images_and_labels()
    terms = one_epoch(model, base, batch_size=40)
    scores = numpy_logits(base, x)
    expected = np.mean(np.log(np.exp(scores).sum(1)) - scores[np.arange(len(y)), y])
    assert terms == {"data_loss": pytest.approx(expected, rel=1e-4)}


@pytest.mark.parametrize(("replays", "batches"), [(1, 5), (3, 5)])
def test_an_epoch_takes_every_image_once_a_replay(replays: int, batches: int) -> None:
    """With a rate of zero the mean loss over the batches is that of the data."""
    attack = "free" if replays > 1 else None
    base, model = initial(10, seed=0), TrainStep(Structure(Method("full"), 10, attack=attack, clean=attack is None))
    x, y = images_and_labels()
    terms = one_epoch(model, base, rate=0.0, replays=replays)
    scores = numpy_logits(base, x)
    expected = np.mean(np.log(np.exp(scores).sum(1)) - scores[np.arange(len(y)), y])
    assert next(iter(terms.values())) == pytest.approx(expected, rel=1e-4)
    assert math.ceil(len(x) / 8) == batches


def test_the_schedules_begin_peak_and_end_where_their_papers_say() -> None:
    cosine, cycle = learning_rates("cosine", 1000), learning_rates("one_cycle", 1000)
    assert (cosine[0], cosine[500]) == (1.0, pytest.approx(0.5))
    assert cosine[-1] < 1e-5
    assert cycle[0] == pytest.approx(1 / 25)
    assert cycle.argmax() == 300
    assert cycle.max() == 1.0
    assert cycle[-1] < 1e-4
    assert set(learning_rates("constant", 10)) == {1.0}


def test_adamw_decays_kernels_and_leaves_biases() -> None:
    base, model = base_for(Method("full")), TrainStep(Structure(Method("full"), 10, optimizer="adamw"))
    one_epoch(model, base, rate=1e-3)
    plain = merged(model)
    one_epoch(model, base, rate=1e-3, weight_decay=1.0)
    decayed = merged(model)
    norm = {name: (np.abs(plain[name]).sum(), np.abs(decayed[name]).sum()) for name in base}
    assert all(after < before for name, (before, after) in norm.items() if name.endswith("kernel"))
    np.testing.assert_allclose(decayed["conv1/bias"], plain["conv1/bias"], atol=2e-3)


def steps_of(name: str, rates: list[float], values: Arrays, relative: float = 1.0, **options: float) -> Arrays:
    """The values after a step at each rate, with gradients that depend on the step alone."""
    optimizer = Optimizer(name, {key: value.shape for key, value in values.items()}, dict.fromkeys(values, relative))
    flat, moments = optimizer.variables()
    flat.assign(optimizer.flat(values))
    momentum, decay = options.get("momentum", 0.0), options.get("weight_decay", 0.0)
    for number, rate in enumerate(rates):
        slope = np.concatenate([gradient.reshape(-1) for gradient in gradients(number, values).values()])
        size, t, m, d = (tf.constant(value, tf.float32) for value in (rate, number + 1, momentum, decay))
        optimizer.step(flat, moments, tf.constant(slope * optimizer.units), size, t, m, d, tf.constant(0.0), ())
    return {key: value.numpy() for key, value in optimizer.values(flat).items()}


def gradients(number: int, values: Arrays) -> Arrays:
    rng = np.random.default_rng(number)
    return {key: rng.normal(size=value.shape).astype(np.float32) for key, value in values.items()}


VALUES = {"a/kernel": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "a/bias": np.ones(4, np.float32)}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adam", {}), ("adamw", {"weight_decay": 0.1}), ("sgd", {"momentum": 0.0}), ("sgd", {"momentum": 0.9}),
    ],
    ids=str,
)  # fmt: skip
def test_optimizers_take_the_steps_of_keras(name: str, options: dict[str, float]) -> None:
    rates = [0.01] * 10 if name == "sgd" else [0.01 * share for share in learning_rates("cosine", 10).tolist()]
    kinds = {"adam": tf.keras.optimizers.Adam, "adamw": tf.keras.optimizers.AdamW, "sgd": tf.keras.optimizers.SGD}
    keras = kinds[name](**({"nesterov": True} if name == "sgd" else {}), **options)
    variables = {key: tf.keras.Variable(value, name=key.replace("/", "_")) for key, value in VALUES.items()}
    if name == "adamw":
        keras.exclude_from_weight_decay(var_list=[variables["a/bias"]])
    for number, rate in enumerate(rates):
        keras.learning_rate = rate
        keras.apply(list(map(tf.constant, gradients(number, VALUES).values())), list(variables.values()))
    for key, value in steps_of(name, rates, VALUES, **options).items():
        np.testing.assert_allclose(value, variables[key].numpy(), rtol=1e-5, atol=1e-6)
        assert np.abs(value - VALUES[key]).min() > 1e-4


def test_a_change_of_rate_takes_effect_at_once_in_sgd() -> None:
    """As in PyTorch; in Keras, what the momentum holds keeps the rate of its day."""
    after = steps_of("sgd", [0.1, 0.0, 0.0], VALUES, momentum=0.9)
    first = steps_of("sgd", [0.1], VALUES, momentum=0.9)
    np.testing.assert_array_equal(after["a/kernel"], first["a/kernel"])


@pytest.mark.parametrize(("name", "tolerance"), [("adam", 1e-4), ("sgd", 1e-6)])
def test_a_relative_rate_is_a_multiple_of_the_rate(name: str, tolerance: float) -> None:
    """Of Adam but for its epsilon, which is added to gradients in other units."""
    relative, plain = (steps_of(name, rates, VALUES, r) for rates, r in (([0.01] * 5, 4.0), ([0.04] * 5, 1.0)))
    for key, value in relative.items():
        np.testing.assert_allclose(value, plain[key], atol=tolerance)


def test_products_are_exact_float32() -> None:
    assert not tf.config.experimental.tensor_float_32_execution_enabled()


def test_mixup_mixes_images_and_labels_in_the_same_share() -> None:
    from trainer.augmentation import mixed

    x, y = tf.constant([[0.0], [1.0], [2.0]]), tf.eye(3)
    images, targets = mixed(x, y, tf.constant(0.75))
    np.testing.assert_allclose(images.numpy(), [[0.5], [0.75], [1.75]])
    np.testing.assert_allclose(targets.numpy()[0], [0.75, 0, 0.25])


def test_a_flip_mirrors_about_half_of_the_images_and_changes_no_other() -> None:
    from trainer.augmentation import flipped

    x = np.random.default_rng(0).random((200, 28, 28, 1), np.float32)
    found = flipped(tf.constant(x), tf.constant(0.5), tf.constant([0, 1])).numpy()
    mirrored = (found == x[:, :, ::-1]).all((1, 2, 3))
    assert 70 < mirrored.sum() < 130
    np.testing.assert_array_equal(found[~mirrored], x[~mirrored])


def test_contrast_moves_all_pixels_of_an_image_alike_and_stays_in_range() -> None:
    from trainer.augmentation import contrasted

    x = np.random.default_rng(0).uniform(0.4, 0.6, (50, 28, 28, 1)).astype(np.float32)
    found = contrasted(tf.constant(x), tf.constant(0.4), tf.constant([0, 1])).numpy()
    factors = found.std((1, 2, 3)) / x.std((1, 2, 3))
    assert 0.6 <= factors.min() < 0.75
    assert 1.25 < factors.max() <= 1.4
    assert 0.1 < np.abs(found.mean((1, 2, 3)) - 0.5).max() <= 0.21
    assert contrasted(tf.constant(x), tf.constant(0.9), tf.constant([0, 1])).numpy().max() <= 1


def test_a_cutout_blanks_one_square_of_its_size_at_most() -> None:
    from trainer.augmentation import cut_out

    found = cut_out(tf.ones((200, 28, 28, 1)), tf.constant(8.0), tf.constant([0, 1])).numpy()[..., 0] == 0
    assert found.sum((1, 2)).max() in (49, 64)  # a pixel's middle may be the square's middle
    for blank in found:
        rows, columns = np.flatnonzero(blank.any(1)), np.flatnonzero(blank.any(0))
        assert blank.sum() == len(rows) * len(columns)
        assert np.ptp(rows) == len(rows) - 1
        assert np.ptp(columns) == len(columns) - 1


def test_the_served_weights_are_the_moving_average_of_the_trained_ones() -> None:
    base, (x, y) = initial(10, seed=0), images_and_labels(40)
    averaged, plain = (TrainStep(Structure(Method("full"), 10, dropout=False, ema=ema)) for ema in (True, False))
    for model in (averaged, plain):
        model.load(base, seed=0)
    data = tf.constant(x), tf.constant(y), tf.range(40)
    expected = base["dense2/kernel"]
    for done in range(4):
        for model in (averaged, plain):
            model.epoch(
                *data, np.array([[1e-2, 1, 1, done + 1]], np.float32), done, coefficients(batch_size=40, ema=0.3)
            )
        decay = min(0.3, (2 + done) / (11 + done))
        expected = decay * expected + (1 - decay) * merged(plain)["dense2/kernel"]
        np.testing.assert_allclose(merged(averaged)["dense2/kernel"], expected, atol=1e-6)
    np.testing.assert_array_equal(averaged.snapshot()["dense2/kernel"], merged(averaged)["dense2/kernel"])


def test_a_shift_moves_and_an_idle_distortion_changes_nothing() -> None:
    from trainer.augmentation import affine

    x = np.zeros((50, 28, 28, 1), np.float32)
    x[:, 14, 14] = 1
    zero = tf.constant(0.0)
    idle = affine(tf.constant(x), zero, zero, zero, tf.constant([0, 1])).numpy()
    np.testing.assert_allclose(idle, x, atol=1e-5)
    moved = affine(tf.constant(x), tf.constant(3.0), zero, zero, tf.constant([0, 1])).numpy()[..., 0]
    line = np.arange(28)
    rows, columns = ((moved.sum(axis) @ line) / moved.sum((1, 2)) - 14 for axis in (2, 1))
    assert np.abs([rows, columns]).max() <= 3.01
    assert np.abs([rows, columns]).max() > 2
