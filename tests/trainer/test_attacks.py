"""Attacks: that they stay where they may, and find what there is to find."""

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.test_learning import images_and_labels, numpy_logits
from trainer import attacks, report
from trainer.evaluate import accuracy
from trainer.fit import Split
from trainer.lenet import Arrays, initial, logits
from trainer.network import Network
from trainer.worker.pretrained import pretrained

EPSILON = tf.constant(0.1)


@pytest.fixture(scope="module")
def digits_split(digits: tuple[np.ndarray, np.ndarray]) -> Split:
    images, labels = digits
    return Split(tf.constant(images[:80, ..., None] / np.float32(255)), labels[:80].astype(np.int32))


@pytest.fixture(scope="module")
def base() -> Arrays:
    return pretrained()[0]


def climb(params: Arrays, labels: np.ndarray) -> attacks.Function:
    return lambda x: attacks.cross_entropy(labels, logits(params, x))


def test_fgsm_is_epsilon_times_the_sign_of_the_gradient_clipped_to_images() -> None:
    params, (x, y) = initial(10, seed=0), images_and_labels(6)
    x = x.round(1)  # some pixels at 0 and 1, where clipping bites
    found = attacks.fgsm(climb(params, y), tf.constant(x), tf.constant(0.2)).numpy()
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
        input_gradient = (loss(up)[n] - loss(down)[n]) / (2 * step)
        if abs(input_gradient) > 1e-4:
            assert found[n, i, j, 0] == pytest.approx(
                np.clip(x[n, i, j, 0] + 0.2 * np.sign(input_gradient), 0, 1), abs=1e-6
            )
            agreed += 1
    assert agreed > 10


@pytest.mark.parametrize("epsilon", [0.1, np.linspace(0, 0.3, 50).reshape(50, 1, 1, 1)])
def test_pgd_stays_in_every_images_ball_and_beats_its_start(epsilon: float | np.ndarray) -> None:
    params, (x, y) = initial(10, seed=0), images_and_labels(50)
    size = tf.constant(epsilon, tf.float32)
    start = attacks.in_ball(tf.constant(x), size, tf.constant([0, 1]))
    found = attacks.pgd(climb(params, y), tf.constant(x), start, size, tf.constant(10), 0.25 * size)
    assert (np.abs(found.numpy() - x) <= epsilon + 1e-6).all()
    assert 0 <= found.numpy().min() <= found.numpy().max() <= 1
    height = climb(params, y)
    assert tf.reduce_mean(height(found)) > tf.reduce_mean(height(start)) > 0


def test_trades_climbs_the_divergence_from_the_clean_prediction() -> None:
    params, (x, _) = initial(10, seed=0), images_and_labels(20)
    clean = logits(params, tf.constant(x))
    np.testing.assert_allclose(attacks.divergence(clean, clean).numpy(), 0, atol=1e-6)
    start = attacks.in_ball(tf.constant(x), 0.01 * EPSILON, tf.constant([0, 1]))
    found = attacks.pgd(
        lambda z: attacks.divergence(clean, logits(params, z)), tf.constant(x), start, EPSILON, tf.constant(5), 0.05
    )
    before, after = (tf.reduce_mean(attacks.divergence(clean, logits(params, z))) for z in (start, found))
    assert after > 10 * before


@pytest.mark.parametrize(("norm", "epsilon"), [("l2", 1.0), ("linf", 0.05)])
def test_vat_finds_a_worse_direction_than_chance_of_the_length_it_may_have(
    norm: str, epsilon: float, base: Arrays, digits_split: Split
) -> None:
    network, x = functools.partial(logits, base), digits_split.images
    found = attacks.vat(network, x, tf.constant(epsilon), tf.constant(2), tf.constant([0, 1]), norm).numpy()
    change = found - x.numpy()
    length = np.sqrt((change**2).sum((1, 2, 3))) if norm == "l2" else np.abs(change).max((1, 2, 3))
    assert length.max() <= epsilon + 1e-5
    noise = np.random.default_rng(0).normal(size=change.shape)
    noise = np.sign(noise) if norm == "linf" else noise / np.sqrt((noise**2).sum((1, 2, 3), keepdims=True))
    random = np.clip(x.numpy() + epsilon * noise, 0, 1).astype(np.float32)
    worst, chance = (tf.reduce_mean(attacks.divergence(network(x), network(z))) for z in (found, random))
    assert worst > 5 * chance


def test_the_margin_is_above_zero_just_where_the_image_is_misclassified() -> None:
    scores = tf.constant([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    np.testing.assert_allclose(attacks.margin(tf.constant([0, 2]), scores).numpy(), [-1.0, 1.0])


def last(steps: Iterator[np.ndarray]) -> np.ndarray:
    return list(steps)[-1]


def test_an_undefended_network_falls_to_pgd_and_to_square(base: Arrays, digits_split: Split) -> None:
    model = functools.partial(Network, base)
    assert accuracy(model().logits(digits_split.images), digits_split.labels) > 0.8
    assert last(report.withstood_pgd(model, digits_split, 0.3, steps=10, restarts=2)).mean() <= 0.02
    assert last(report.withstood_square(model, digits_split, 0.3, queries=500)).mean() <= 0.1


def test_more_restarts_and_larger_balls_only_ever_take_away(base: Arrays, digits_split: Split) -> None:
    model = functools.partial(Network, base)
    counts = [standing.sum() for standing in report.withstood_pgd(model, digits_split, 0.03, steps=5, restarts=3)]
    assert counts == sorted(counts, reverse=True)
    wide = last(report.withstood_pgd(model, digits_split, 0.06, steps=5, restarts=3)).sum()
    assert wide <= counts[-1]


def test_square_stays_in_the_ball_and_its_margins_are_those_of_its_images(base: Arrays, digits_split: Split) -> None:
    network, x, y = Network(base), digits_split.images, tf.constant(digits_split.labels)
    start = attacks.stripes(x, EPSILON, tf.constant([0, 3]))
    span = (tf.constant(0), tf.constant(200), tf.constant(200))
    found, height = network.square(x, y, start, EPSILON, *span, tf.constant([0, 4]))
    assert np.abs(found.numpy() - x.numpy()).max() <= 0.1 + 1e-6
    assert 0 <= found.numpy().min() <= found.numpy().max() <= 1
    np.testing.assert_allclose(attacks.margin(y, logits(base, found)).numpy(), height.numpy(), atol=1e-4)
    assert (height >= attacks.margin(y, logits(base, start)) - 1e-4).numpy().all()


def test_masking_is_told_by_square_by_fgsm_and_by_epsilon_one() -> None:
    honest = [{"epsilon": 0.1, "fgsm": 0.9, "pgd": 0.5, "square": 0.6}]
    assert report.gradient_masking(honest, 0.0, 500) == []
    assert len(report.gradient_masking([{"epsilon": 0.1, "fgsm": 0.9, "pgd": 0.5, "square": 0.4}], 0.0, 500)) == 1
    assert len(report.gradient_masking([{"epsilon": 0.1, "fgsm": 0.4, "pgd": 0.5, "square": 0.6}], 0.0, 500)) == 1
    assert len(report.gradient_masking(honest, 0.11, 500)) == 1


@pytest.mark.parametrize(("images", "tolerated", "suspicious"), [(20, 2, 3), (500, 5, 6), (150, 2, 3)])
def test_a_few_images_that_a_weaker_attack_finds_are_no_sign_of_masking(
    images: int, tolerated: int, suspicious: int
) -> None:
    def signs(more: int) -> list[str]:
        point = {"epsilon": 0.1, "fgsm": 0.9, "pgd": 10 / images, "square": (10 - more) / images}
        return report.gradient_masking([point], 0.0, images)

    assert signs(1) == signs(tolerated) == []
    assert len(signs(suspicious)) == 1
    assert report.gradient_masking([], 2 / 10, 10) == []


def test_a_network_with_flat_gradients_is_caught(base: Arrays, digits_split: Split) -> None:
    """Logits times 1,000: the softmax saturates and cross-entropy has no gradient, but nothing is any safer."""
    masked = base | {name: value * np.float32(1000) for name, value in base.items() if name.startswith("head/")}
    model = functools.partial(Network, masked)
    by_cross_entropy = last(report.withstood_pgd(model, digits_split, 0.3, steps=10, restarts=1)).mean()
    with_ratio = last(report.withstood_pgd(model, digits_split, 0.3, steps=10, restarts=2)).mean()
    assert by_cross_entropy > 0.5
    assert with_ratio <= 0.05  # the second restart climbs the difference of logits ratio


def test_the_logits_ratio_is_the_margin_in_units_of_the_spread_of_the_best_three() -> None:
    scores, labels = tf.constant([[3.0, 1.0, 2.0, 0.0], [0.0, 5.0, 4.0, 1.0]]), tf.constant([0, 2])
    expected = [-1.0 / 2.0, 1.0 / 4.0]
    np.testing.assert_allclose(attacks.logits_ratio(labels, scores).numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(attacks.logits_ratio(labels, 1000 * scores).numpy(), expected, rtol=1e-6)
    two, label = tf.constant([[3.0, 1.0]]), tf.constant([0])
    np.testing.assert_allclose(attacks.logits_ratio(label, two).numpy(), attacks.margin(label, two).numpy())


@pytest.mark.parametrize("loss", [attacks.cross_entropy, attacks.logits_ratio])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_apgd_stays_in_the_ball_and_returns_the_worst_point_that_it_met(
    base: Arrays, digits_split: Split, loss: Any, steps: int
) -> None:
    x, y = digits_split.images, tf.constant(digits_split.labels)
    met: list[np.ndarray] = []

    def network(at: Any) -> Any:
        met.append(at.numpy())  # tf.while_loop runs eagerly here, so every point is seen
        return logits(base, at)

    start = attacks.in_ball(x, EPSILON, tf.constant([0, 5]))
    found, margins = attacks.apgd(network, loss, x, y, start, EPSILON, tf.constant(steps))
    assert np.abs(found.numpy() - x.numpy()).max() <= 0.1 + 1e-6
    assert 0 <= found.numpy().min() <= found.numpy().max() <= 1
    np.testing.assert_allclose(attacks.margin(y, logits(base, found)).numpy(), margins.numpy(), atol=1e-4)
    seen = np.stack([attacks.margin(y, logits(base, tf.constant(at))).numpy() for at in met])
    np.testing.assert_allclose(seen.max(axis=0), margins.numpy(), atol=1e-4)
    assert (seen.max(axis=0) > seen[-1] + 1e-3).any() or steps == 1  # the last point is not the worst one


def test_apgd_takes_the_steps_of_its_paper() -> None:
    """Written out in NumPy, an image at a time, for a loss that is a quadratic of the pixels."""
    rng = np.random.default_rng(0)
    x = rng.random((3, 28, 28, 1)).astype(np.float32)
    peak = np.clip(x + rng.uniform(-0.15, 0.15, x.shape), 0, 1).astype(np.float32)
    weight = rng.uniform(0.1, 10, x.shape).astype(np.float32)
    epsilon, steps = 0.1, 40

    def height(at: Any, where: Any = slice(None)) -> Any:
        return -tf.reduce_sum(weight[where] * (at - peak[where]) ** 2, axis=(1, 2, 3))

    def slope(at: np.ndarray, where: Any) -> np.ndarray:
        return np.asarray(-2 * weight[where] * (at - peak[where]))

    def clip(at: np.ndarray, where: Any) -> np.ndarray:
        return np.asarray(np.clip(np.clip(at, x[where] - epsilon, x[where] + epsilon), 0, 1))

    def network(at: Any) -> Any:  # logits 0 and the loss, below zero: the margin of label 0 is the loss
        return tf.stack([tf.zeros_like(height(at)), height(at)], axis=1)

    labels = tf.zeros(3, tf.int32)
    found, margins = attacks.apgd(
        network, attacks.margin, tf.constant(x), labels, tf.constant(x), tf.constant(epsilon), tf.constant(steps)
    )
    for i in range(3):
        w = slice(i, i + 1)
        points, losses, size = [x[w]], [float(height(x[w], w)[0])], 2 * epsilon
        best, best_loss, checked, halved = x[w], losses[0], losses[0], True
        at, previous, window, since = x[w], x[w], 8, 0  # 22% of 40 steps
        current, rises = losses[0], 0
        for k in range(steps):
            momentum = 0.75 if k else 1.0
            z = clip(at + size * np.sign(slope(at, w)), w)
            at, previous = clip(at + momentum * (z - at) + (1 - momentum) * (at - previous), w), at
            loss = float(height(at, w)[0])
            points.append(at)
            losses.append(loss)
            rises, current, since = rises + (loss > current), loss, since + 1
            if loss > best_loss:
                best, best_loss = at, loss
            if since == window:
                stuck = not halved and checked >= best_loss
                halved = rises <= 0.75 * window or stuck
                if halved:
                    size, at, current = size / 2, best, best_loss
                checked, rises, since, window = best_loss, 0, 0, max(window - 1, 2)
        assert float(margins[i]) == pytest.approx(max(losses), rel=1e-3)
        np.testing.assert_allclose(found.numpy()[w], points[int(np.argmax(losses))], atol=2e-3)
