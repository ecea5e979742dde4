"""The mathematics of training, against NumPy oracles."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from trainer import attacks, penalties
from trainer.lenet import LAYERS, initial, logits
from trainer.methods import effective, start, touched_kernels
from trainer.program import Coefficients, Program, Structure, program

LORA = Structure("lora", 10, targets=("conv2", "dense1", "dense2"), rank=4, attack="fgsm")


def images_and_labels(n: int = 40, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.random((n, 28, 28, 1), np.float32), rng.integers(0, 10, n).astype(np.int32)


def coefficients(learning_rate: float = 1e-3, **values: Any) -> Coefficients:
    return Coefficients(total_steps=10, batch_size=8, learning_rate=learning_rate, **values)


def one_epoch(model: Program, c: Coefficients, base: dict[str, np.ndarray], seed: int = 0) -> dict[str, float]:
    x, y = images_and_labels()
    model.load(base, seed=seed, lora_scale=2.0)
    order = np.random.default_rng(seed).permutation(len(x)).astype(np.int32)
    return model.epoch(tf.constant(x), tf.constant(y), tf.constant(order), 0, c)


def numpy_logits(params: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """LeNet-5 written out: same padding, ReLU, max-pooling by two."""
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
    scores: np.ndarray = x @ params["head/kernel"].astype(np.float64) + params["head/bias"]
    return scores


def test_the_network_has_107786_parameters() -> None:
    assert sum(value.size for value in initial(10, seed=0).values()) == 107_786


def test_the_network_computes_what_its_description_says() -> None:
    params, (x, _) = initial(10, seed=3), images_and_labels(4)
    np.testing.assert_allclose(logits(params, tf.constant(x)).numpy(), numpy_logits(params, x), atol=1e-4)


def test_dropout_keeps_the_expectation_and_drops_the_share_it_says() -> None:
    params = initial(10, seed=0) | {"dense1/kernel": np.zeros((784, 120), np.float32)}
    params |= {"dense1/bias": np.ones(120, np.float32), "dense2/kernel": np.zeros((120, 84), np.float32)}
    params |= {"dense2/bias": np.ones(84, np.float32), "head/kernel": np.eye(84, dtype=np.float32)}
    params |= {"head/bias": np.zeros(84, np.float32)}
    x, _ = images_and_labels(200)
    dropped = logits(params, tf.constant(x), tf.constant(0.25), tf.constant([1, 2])).numpy()
    assert set(np.unique(dropped.round(4))) == {0.0, np.float32(1.3333)}
    assert abs((dropped == 0).mean() - 0.25) < 0.02


@pytest.mark.parametrize("seed", [0, 1])
def test_penalties_are_lambda_sum_abs_and_alpha_half_sum_of_squares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    kernels = [rng.standard_normal((5, 5, 6, 16)).astype(np.float32), rng.standard_normal((7, 3)).astype(np.float32)]
    tensors = [tf.constant(kernel) for kernel in kernels]
    expected_l1 = 0.3 * sum(np.abs(kernel).sum() for kernel in kernels)
    expected_l2 = 0.3 / 2 * sum((kernel**2).sum() for kernel in kernels)
    assert float(penalties.l1(tensors, 0.3)) == pytest.approx(expected_l1, rel=1e-5)
    assert float(penalties.l2(tensors, 0.3)) == pytest.approx(expected_l2, rel=1e-5)


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
    trained = start("lora", initial(10, 0), ("conv2",), 2, seed=0)
    assert touched_kernels(trained) == ["conv2/kernel", "head/kernel"]
    assert touched_kernels(start("full", initial(10, 0), (), 0, seed=0)) == sorted(f"{name}/kernel" for name in LAYERS)


def test_a_fresh_lora_changes_nothing() -> None:
    base, (x, _) = initial(10, seed=0), images_and_labels()
    model = program(LORA)
    model.load(base, seed=5, lora_scale=2.0)
    np.testing.assert_array_equal(model.logits(tf.constant(x)).numpy(), logits(base, tf.constant(x)).numpy())


def test_the_merge_is_exact() -> None:
    base, (x, _) = initial(10, seed=0), images_and_labels()
    model = program(LORA)
    one_epoch(model, coefficients(learning_rate=0.01), base)
    merged = {name: np.asarray(value) for name, value in model.params().items()}
    assert sum(value.size for value in merged.values()) == 107_786
    trained = model.snapshot()
    for layer in LORA.targets:
        update = 2.0 * trained[f"{layer}/lora_a"] @ trained[f"{layer}/lora_b"]
        expected = base[f"{layer}/kernel"] + update.reshape(base[f"{layer}/kernel"].shape)
        assert np.abs(update).max() > 1e-3
        np.testing.assert_allclose(merged[f"{layer}/kernel"], expected, atol=1e-6)
    np.testing.assert_allclose(numpy_logits(merged, x), model.logits(tf.constant(x)).numpy(), atol=1e-4)


@pytest.mark.parametrize(
    ("structure", "changed"),
    [
        (Structure("head", 10), {"head/kernel", "head/bias"}),
        (LORA, {"conv2/kernel", "dense1/kernel", "dense2/kernel", "head/kernel", "head/bias"}),
        (Structure("full", 10), set(initial(10, 0))),
    ],
    ids=lambda value: value.method if isinstance(value, Structure) else "",
)
def test_frozen_weights_stay_bit_identical(structure: Structure, changed: set[str]) -> None:
    base = {name: value + np.float32(0.01) for name, value in initial(10, seed=0).items()}
    model = program(structure)
    one_epoch(model, coefficients(l1=1e-4, l2=1e-3, dropout=0.2, epsilon=0.1, adversarial_weight=0.5), base)
    after = {name: np.asarray(value) for name, value in model.params().items()}
    assert {name for name in base if not np.array_equal(base[name], after[name])} == changed


def test_fgsm_is_epsilon_times_the_sign_of_the_gradient_clipped_to_images() -> None:
    params, (x, y) = initial(10, seed=0), images_and_labels(6)
    x = x.round(1)  # some pixels at 0 and 1, where clipping bites
    found = attacks.fgsm(lambda z: logits(params, z), tf.constant(x), tf.constant(y), tf.constant(0.2)).numpy()
    assert found.min() >= 0
    assert found.max() <= 1
    assert np.abs(found - x).max() <= 0.2 + 1e-6

    def loss(images: np.ndarray) -> np.ndarray:
        scores = numpy_logits(params, images)
        chosen: np.ndarray = np.log(np.exp(scores).sum(1)) - scores[np.arange(len(y)), y]
        return chosen

    rng, step, agreed = np.random.default_rng(0), 1e-5, 0
    for _ in range(30):  # the sign of the finite difference, at pixels where it is clear
        n, i, j = rng.integers(0, [6, 28, 28])
        up, down = x.astype(np.float64), x.astype(np.float64)
        up[n, i, j], down[n, i, j] = up[n, i, j] + step, down[n, i, j] - step
        slope = (loss(up)[n] - loss(down)[n]) / (2 * step)
        if abs(slope) > 1e-4:
            assert found[n, i, j, 0] == pytest.approx(np.clip(x[n, i, j, 0] + 0.2 * np.sign(slope), 0, 1), abs=1e-6)
            agreed += 1
    assert agreed > 10


def test_the_training_attack_stays_in_the_ball_and_raises_the_loss() -> None:
    params, (x, y) = initial(10, seed=0), images_and_labels(50)

    def score(images: tf.Tensor) -> tf.Tensor:
        return logits(params, images)

    found = attacks.fgsm_random_start(score, tf.constant(x), tf.constant(y), tf.constant(0.1), tf.constant([0, 1]))
    assert np.abs(found.numpy() - x).max() <= 0.1 + 1e-6
    assert 0 <= found.numpy().min() <= found.numpy().max() <= 1
    assert attacks.cross_entropy(y, score(found)) > attacks.cross_entropy(y, score(tf.constant(x)))


def test_the_same_seed_gives_the_same_weights_bit_for_bit() -> None:
    base = initial(10, seed=0)
    c = coefficients(l2=1e-3, dropout=0.3, epsilon=0.1, adversarial_weight=0.5)
    model = program(LORA)
    runs = []
    for seed in (7, 7, 8):
        one_epoch(model, c, base, seed=seed)
        runs.append(model.snapshot())
    assert all(np.array_equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(np.array_equal(runs[0][name], runs[2][name]) for name in runs[0])


def test_other_coefficients_and_data_sizes_trace_nothing_anew() -> None:
    base, model = initial(10, seed=0), program(LORA)
    one_epoch(model, coefficients(), base)
    traces = model._epoch.experimental_get_tracing_count()
    one_epoch(model, coefficients(l1=0.1, l2=0.2, dropout=0.5, epsilon=0.3, adversarial_weight=0.9), base)
    x, y = images_and_labels(33)
    order = tf.range(33)
    model.epoch(tf.constant(x), tf.constant(y), order, 5, Coefficients(total_steps=99, batch_size=5, learning_rate=0.1))
    assert model._epoch.experimental_get_tracing_count() == traces


def test_every_term_of_the_loss_is_minimized() -> None:
    """A penalty that is only reported would leave the kernels as they are."""
    base, model = initial(10, seed=0), program(Structure("full", 10))

    def size(c: Coefficients) -> float:
        one_epoch(model, c, base)
        return float(sum(np.abs(v).sum() for name, v in model.snapshot().items() if name.endswith("kernel")))

    plain = size(coefficients())
    assert size(coefficients(l1=0.1)) < 0.97 * plain
    assert size(coefficients(l2=10.0)) < 0.97 * plain


def test_reported_penalties_are_those_of_the_effective_kernels() -> None:
    base, model = initial(10, seed=0), program(LORA)
    terms = one_epoch(model, Coefficients(total_steps=1, batch_size=40, learning_rate=1e-3, l1=0.01, l2=0.1), base)
    kernels = [base[name] for name in touched_kernels(model.trained)]
    assert terms["l1"] == pytest.approx(0.01 * sum(np.abs(kernel).sum() for kernel in kernels), rel=1e-4)
    assert terms["l2"] == pytest.approx(0.05 * sum((kernel**2).sum() for kernel in kernels), rel=1e-4)
