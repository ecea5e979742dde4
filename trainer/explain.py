"""Why a network gives its answers, in a graph that is exported with it: saliency, and what changes an answer.

The graph is loaded with every version that is served, so it is small: what is needed often is a function of its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from store.records import GREY_28
from trainer.attacks import STEP_SHARE, Function, margin, project
from trainer.lenet import Tensor

NODES = 256  # of the quadrature over the path; networks with ReLU have kinks, so many equal ones do best
NOISE, SAMPLES, SEED = 0.15, 64, (17, 1)  # standard deviation of SmoothGrad's noise; copies; the same noise every time
LIMIT, SIZES, STEPS = 0.5, 32, 10  # largest epsilon that is tried, how many up to it, and steps of the attack
EPSILONS = np.arange(1, SIZES + 1, dtype=np.float32) * np.float32(LIMIT / SIZES)

IMAGES = tf.TensorSpec((None, *GREY_28.shape), tf.float32)
NUMBERS = tf.TensorSpec((None,), tf.int32)


class Explanation(NamedTuple):
    """What is known of n images. It takes `NODES` + `SAMPLES` times their memory."""

    integrated_gradients: Tensor  # (n, 28, 28, 1): how much each pixel adds to the target's logit
    baseline_logits: Tensor  # (1, classes): of a blank image
    smooth_grad: Tensor  # (n, 28, 28, 1): how much the target's logit grows with each pixel
    adversarial: Tensor  # (n, SIZES, 28, 28, 1): the worst found within each epsilon, from LIMIT / SIZES to LIMIT
    adversarial_probabilities: Tensor  # (n, SIZES, classes)
    smallest_epsilon: Tensor  # (n,): at which the answer was changed; infinity if it was not


class Explainer:
    """Explains the answers of a network.

    Args:
        network: images (n, 28, 28, 1) float32 in [0, 1] to logits (n, classes).
        blank: the value of all pixels of an image without content.
    """

    def __init__(self, network: Function, blank: float) -> None:
        self._blank = blank

        def gradient(images: Tensor, labels: Tensor, against: Tensor) -> Tensor:
            """Of the logits of `labels`, or of the margin by which another class leads where `against` is true."""
            with tf.GradientTape(watch_accessed_variables=False) as tape:
                tape.watch(images)
                logits = network(images)
                own = tf.reduce_sum(tf.one_hot(labels, logits.shape[1]) * logits, axis=1)
                height = tf.where(against, margin(labels, logits), own)
            return tape.gradient(height, images)

        against = tf.TensorSpec((), tf.bool)
        self._network: Callable[[Tensor], Tensor] = _function(network, IMAGES)
        self._gradient: Callable[[Tensor, Tensor, bool], Tensor] = _function(gradient, IMAGES, NUMBERS, against)
        sizes = tf.TensorSpec((None, SIZES), tf.float32)
        self._attack: Callable[[Tensor, Tensor, Tensor], Any] = _function(self._worst_within, IMAGES, NUMBERS, sizes)

    def explain(self, images: Tensor, targets: Tensor) -> Explanation:
        """Explain the logits of the classes `targets` (n,) int32, and find what changes the answers."""
        attributions, smooth = self.saliency(images, targets)
        points, epsilon = self.adversarial_path(images)
        probabilities = tf.reshape(tf.nn.softmax(self._network(_flat(points))), (tf.shape(images)[0], SIZES, -1))
        blank = self._network(tf.fill((1, *GREY_28.shape), self._blank))
        return Explanation(attributions, blank, smooth, points, probabilities, epsilon)

    def saliency(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Integrated gradients of the targets' logits, and SmoothGrad, each (n, 28, 28, 1).

            (x - b) * integral over a from 0 to 1 of the gradient at b + a (x - b)

        for the blank image b (Sundararajan et al. 2017). They sum to the target's logit at x minus that at b
        (completeness), but for the error of the midpoint rule, which is about one percent. SmoothGrad is the mean
        gradient over noisy copies (Smilkov et al. 2017).
        """
        shares = tf.constant((np.arange(NODES, dtype=np.float32) + 0.5) / NODES, shape=(1, NODES, 1, 1, 1))
        difference = images - self._blank
        path = self._blank + shares * difference[:, None]
        copies = images[:, None] + NOISE * tf.random.stateless_normal((1, SAMPLES, *GREY_28.shape), SEED)
        labels = tf.repeat(targets, NODES + SAMPLES)
        gradients = self._gradient(_flat(tf.concat([path, copies], axis=1)), labels, tf.constant(False))
        along, around = tf.split(_grouped(gradients, NODES + SAMPLES), (NODES, SAMPLES), axis=1)
        return difference * tf.reduce_mean(along, axis=1), tf.reduce_mean(around, axis=1)

    def adversarial_path(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What PGD (Madry et al. 2018) makes of images within balls of growing epsilon, up to `LIMIT`.

        A change of the answer within a ball is one within all larger balls, so the worst point so far is kept.

        Returns:
            The points (n, SIZES, 28, 28, 1), and the least epsilon (n,) at which one was found that changes the answer:
            a second look divides the step up to the first such ball.
        """
        step, sizes = LIMIT / SIZES, tf.constant(EPSILONS[None])
        labels = tf.argmax(self._network(images), axis=1, output_type=tf.int32)
        points, margins = self._attack(images, labels, tf.repeat(sizes, tf.shape(images)[0], axis=0))
        standing = _count(margins <= 0)  # balls that hold nothing yet: margins grow with the balls
        _, margins = self._attack(images, labels, step * standing + sizes / SIZES)
        within = tf.minimum(_count(margins <= 0) + 1.0, float(SIZES))
        epsilon = tf.where(standing < SIZES, step * (standing + within / SIZES), np.float32(np.inf))
        return points, epsilon[:, 0]

    def _worst_within(self, images: Tensor, labels: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The worst points (n, SIZES, 28, 28, 1) in balls of growing sizes (n, SIZES), and their margins (n, SIZES)."""
        centres, labels = tf.repeat(images, SIZES, axis=0), tf.repeat(labels, SIZES)
        epsilon = tf.reshape(sizes, (-1, 1, 1, 1))

        def ascend(index: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
            direction = tf.sign(self._gradient(at, labels, tf.constant(True)))
            return index + 1, project(at + STEP_SHARE / STEPS * epsilon * direction, centres, epsilon)

        _, points = tf.while_loop(lambda index, _: index < STEPS, ascend, (0, centres))
        margins = tf.reshape(margin(labels, self._network(points)), (-1, 1, SIZES))
        within = tf.linalg.band_part(tf.ones((SIZES, SIZES)), -1, 0) > 0  # whether a ball holds another
        held = tf.where(within, margins, np.float32(-np.inf))
        worst = tf.argmax(held, axis=2)
        return tf.gather(_grouped(points, SIZES), worst, axis=1, batch_dims=1), tf.reduce_max(held, axis=2)


def _function(function: Callable[..., Any], *signature: tf.TensorSpec) -> Any:
    """A function of the graph, which is stored once however often it is called."""
    return tf.function(function, input_signature=signature, autograph=False)


def _count(true: Tensor) -> Tensor:
    """How many of each row (n, m) are true, (n, 1) float32."""
    return tf.reduce_sum(tf.cast(true, tf.float32), axis=1, keepdims=True)


def _flat(several: Tensor) -> Tensor:
    """(n, m, 28, 28, 1) as (n * m, 28, 28, 1)."""
    return tf.reshape(several, (-1, *GREY_28.shape))


def _grouped(flat: Tensor, count: int) -> Tensor:
    """(n * m, 28, 28, 1) as (n, m, 28, 28, 1)."""
    return tf.reshape(flat, (-1, count, *GREY_28.shape))
