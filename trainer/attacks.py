"""Adversarial examples in the L-infinity ball: |x' - x| <= epsilon and x' in [0, 1], in units of [0, 1] pixels."""

from collections.abc import Callable

import tensorflow as tf

from trainer.lenet import Tensor

Logits = Callable[[Tensor], Tensor]


def cross_entropy(labels: Tensor, logits: Tensor) -> Tensor:
    """Mean negative log-likelihood of `labels` (n,) under `logits` (n, classes)."""
    return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))


def project(perturbed: Tensor, images: Tensor, epsilon: Tensor) -> Tensor:
    """The nearest point of the ball around `images` that is an image."""
    return tf.clip_by_value(tf.clip_by_value(perturbed, images - epsilon, images + epsilon), 0.0, 1.0)


def step(logits: Logits, start: Tensor, images: Tensor, labels: Tensor, epsilon: Tensor, size: Tensor) -> Tensor:
    """One ascent on the loss from `start`: project(start + size * sign(gradient))."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(start)
        loss = cross_entropy(labels, logits(start))
    ascent = size * tf.sign(tape.gradient(loss, start))
    return tf.stop_gradient(project(start + ascent, images, epsilon))


def fgsm(logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor) -> Tensor:
    """X + epsilon * sign(gradient) (Goodfellow et al. 2015): the attack that reports use."""
    return step(logits, images, images, labels, epsilon, epsilon)


def fgsm_random_start(logits: Logits, images: Tensor, labels: Tensor, epsilon: Tensor, seed: Tensor) -> Tensor:
    """FGSM of step 1.25 epsilon from a random point of the ball (Wong et al. 2020): the attack to train with.

    Every image draws an epsilon of its own between 0 and `epsilon` (after Kurakin et al. 2017): on small sets this
    costs no clean accuracy, where one epsilon for all costs a point, and keeps most of the robustness.
    """
    epsilon *= tf.random.stateless_uniform((tf.shape(images)[0], 1, 1, 1), seed + [0, 3])
    noise = epsilon * tf.random.stateless_uniform(tf.shape(images), seed, -1.0, 1.0)
    return step(logits, project(images + noise, images, epsilon), images, labels, epsilon, 1.25 * epsilon)
