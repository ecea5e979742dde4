"""Attacks: that they stay where they may, and find what there is to find."""

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import tensorflow as tf

from tests.trainer.test_learning import images_and_labels, numpy_logits
from trainer import attacks, report
from trainer.evaluate import accuracy
from trainer.fit import Split, serve
from trainer.lenet import Arrays, initial, logits
from trainer.worker.run_job import pretrained

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
    model = functools.partial(serve, base)
    assert accuracy(model().logits(digits_split.images), digits_split.labels) > 0.8
    assert last(report.withstood_pgd(model, digits_split, 0.3, steps=10, restarts=2)).mean() <= 0.02
    assert last(report.withstood_square(model, digits_split, 0.3, queries=500)).mean() <= 0.1


def test_more_restarts_and_larger_balls_only_ever_take_away(base: Arrays, digits_split: Split) -> None:
    model = functools.partial(serve, base)
    counts = [standing.sum() for standing in report.withstood_pgd(model, digits_split, 0.03, steps=5, restarts=3)]
    assert counts == sorted(counts, reverse=True)
    wide = last(report.withstood_pgd(model, digits_split, 0.06, steps=5, restarts=3)).sum()
    assert wide <= counts[-1]


def test_square_stays_in_the_ball_and_its_margins_are_those_of_its_images(base: Arrays, digits_split: Split) -> None:
    network, x, y = serve(base), digits_split.images, tf.constant(digits_split.labels)
    start = attacks.stripes(x, EPSILON, tf.constant([0, 3]))
    span = (tf.constant(0), tf.constant(200), tf.constant(200))
    found, height = network.square(x, y, start, EPSILON, *span, tf.constant([0, 4]))
    assert np.abs(found.numpy() - x.numpy()).max() <= 0.1 + 1e-6
    assert 0 <= found.numpy().min() <= found.numpy().max() <= 1
    np.testing.assert_allclose(attacks.margin(y, logits(base, found)).numpy(), height.numpy(), atol=1e-4)
    assert (height >= attacks.margin(y, logits(base, start)) - 1e-4).numpy().all()


def test_masking_is_told_by_square_by_fgsm_and_by_epsilon_one() -> None:
    honest = [{"epsilon": 0.1, "fgsm": 0.9, "pgd": 0.5, "square": 0.6}]
    assert report.gradient_masking(honest, 0.0) == []
    assert len(report.gradient_masking([{"epsilon": 0.1, "fgsm": 0.9, "pgd": 0.5, "square": 0.4}], 0.0)) == 1
    assert len(report.gradient_masking([{"epsilon": 0.1, "fgsm": 0.4, "pgd": 0.5, "square": 0.6}], 0.0)) == 1
    assert len(report.gradient_masking(honest, 0.11)) == 1


def test_a_network_with_flat_gradients_is_caught(base: Arrays, digits_split: Split) -> None:
    """Logits times 1,000: the softmax saturates and cross-entropy has no input_gradient, but nothing is any safer."""
    masked = base | {name: value * np.float32(1000) for name, value in base.items() if name.startswith("head/")}
    model = functools.partial(serve, masked)
    by_cross_entropy = last(report.withstood_pgd(model, digits_split, 0.3, steps=10, restarts=1)).mean()
    with_margin = last(report.withstood_pgd(model, digits_split, 0.3, steps=10, restarts=2)).mean()
    assert by_cross_entropy > 0.5
    assert with_margin <= 0.05  # the second restart climbs the margin
