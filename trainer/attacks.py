"""Adversarial examples: |x' - x| <= epsilon in the norm of the attack and x' in [0, 1], in units of [0, 1] pixels.

An attack maximizes an objective: images to one number each. Images are (n, 28, 28, 1) float32; epsilon is a scalar or
(n, 1, 1, 1). Results are constants to gradients.
"""

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from trainer.lenet import Tensor

Function = Callable[[Tensor], Tensor]
STEP_SHARE = 2.5  # an attack of k steps takes steps of 2.5 epsilon / k (Madry et al. 2018)
MOMENTUM, RISES = 0.75, 0.75  # of APGD: weight of the new direction; share of steps that must raise the loss
TINY = 1e-12


def cross_entropy(labels: Tensor, logits: Tensor) -> Tensor:
    """Negative log-likelihood (n,) of `labels` (n,) under `logits` (n, classes)."""
    return tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)


def soft_cross_entropy(targets: Tensor, logits: Tensor) -> Tensor:
    """Cross-entropy (n,) of the distributions `targets` (n, classes) and softmax(logits)."""
    return tf.nn.softmax_cross_entropy_with_logits(targets, logits)


def divergence(logits: Tensor, others: Tensor) -> Tensor:
    """KL(softmax(logits) || softmax(others)), (n,)."""
    log_p, log_q = tf.nn.log_softmax(logits), tf.nn.log_softmax(others)
    return tf.reduce_sum(tf.exp(log_p) * (log_p - log_q), axis=1)


def margin(labels: Tensor, logits: Tensor) -> Tensor:
    """Highest other logit minus that of the label (n,): positive if misclassified (Carlini & Wagner 2017)."""
    own = tf.one_hot(labels, tf.shape(logits)[1])
    other = tf.reduce_max(logits - 1e9 * own, axis=1)
    return other - tf.reduce_sum(logits * own, axis=1)


def logits_ratio(labels: Tensor, logits: Tensor) -> Tensor:
    """DLR, the margin over the distance of the best from the third-best logit (n,) (Croce & Hein 2020).

    Scaling the logits leaves it as it is, so a saturated softmax hides nothing. With fewer than three classes there
    is no third logit, and it is the margin.
    """
    if logits.shape[1] < 3:
        return margin(labels, logits)
    best = tf.math.top_k(logits, 3).values
    return margin(labels, logits) / (best[:, 0] - best[:, 2] + TINY)


def project(perturbed: Tensor, images: Tensor, epsilon: Tensor) -> Tensor:
    """Project onto the L-infinity ball around `images`, and onto [0, 1]."""
    return tf.clip_by_value(tf.clip_by_value(perturbed, images - epsilon, images + epsilon), 0.0, 1.0)


def input_gradient(objective: Function, at: Tensor) -> Tensor:
    """Gradient of the objective with respect to each image."""
    with tf.GradientTape(watch_accessed_variables=False) as tape:
        tape.watch(at)
        height = objective(at)
    return tape.gradient(height, at)


def in_ball(images: Tensor, epsilon: Tensor, seed: Tensor) -> Tensor:
    """A uniformly random point of the L-infinity ball around each image."""
    noise = tf.random.stateless_uniform(tf.shape(images), seed, -1.0, 1.0)
    return project(images + epsilon * noise, images, epsilon)


def fgsm(objective: Function, images: Tensor, epsilon: Tensor) -> Tensor:
    """The fast gradient sign method, x + epsilon * sign(gradient), clipped to [0, 1] (Goodfellow et al. 2015)."""
    return project(images + epsilon * tf.sign(input_gradient(objective, images)), images, epsilon)


def pgd(objective: Function, images: Tensor, start: Tensor, epsilon: Tensor, steps: Tensor, size: Tensor) -> Tensor:
    """Projected gradient ascent: `steps` signed steps of `size` from `start` (Madry et al. 2018).

    One step of 1.25 epsilon from a random start is the fast FGSM of Wong et al. (2020).
    """

    def ascend(index: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        return index + 1, project(at + size * tf.sign(input_gradient(objective, at)), images, epsilon)

    _, found = tf.while_loop(lambda index, _: index < steps, ascend, (0, start))
    return tf.stop_gradient(found)


class _Ascent(NamedTuple):
    """State of APGD between two steps; n rows each, but for the last two."""

    at: Tensor  # current points
    previous: Tensor
    gradient: Tensor  # at the current points
    loss: Tensor
    best: Tensor  # points of the greatest loss so far
    best_gradient: Tensor
    best_loss: Tensor
    size: Tensor  # of a step, (n, 1, 1, 1)
    worst: Tensor  # points of the greatest margin so far
    worst_margin: Tensor
    rises: Tensor  # steps since the checkpoint that raised the loss
    checked_loss: Tensor  # greatest loss at the last checkpoint
    halved: Tensor  # bool, at the last checkpoint
    since: Tensor  # steps since the checkpoint, ()
    window: Tensor  # steps from the last checkpoint to the next, ()


def apgd(
    network: Function, loss: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor, start: Tensor,
    epsilon: Tensor, steps: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Auto-PGD (Croce & Hein 2020, algorithm 1): ascent with momentum whose step size adapts to each image.

        z = project(x_k + size * sign(gradient))
        x_{k+1} = project(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}))

    The size starts at 2 epsilon. At each checkpoint it is halved, and the ascent goes on from the best point, where
    fewer than three quarters of the steps raised the loss, or where neither size nor best loss has changed since the
    checkpoint before. Checkpoints come after 22% of the steps, then at intervals that shrink by 3% down to 6%.

    Args:
        network: images to logits.
        loss: labels and logits to the loss (n,) that is maximized.
        start: where to begin, in the ball.

    Returns:
        The points of the greatest margin that were met, and their margins (n,): above zero where misclassified. It
        ends early when all are.
    """

    def evaluate(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(at)
            logits = network(at)
            height = loss(labels, logits)
        return height, tape.gradient(height, at), margin(labels, logits)

    def share(of_steps: float) -> Tensor:
        return tf.maximum(tf.cast(of_steps * tf.cast(steps, tf.float32), tf.int32), 1)

    def step(index: Tensor, s: _Ascent) -> tuple[Tensor, _Ascent]:
        ascended = project(s.at + s.size * tf.sign(s.gradient), images, epsilon)
        weight = tf.where(index == 0, 1.0, MOMENTUM)  # the first step has no direction to keep
        at = project(s.at + weight * (ascended - s.at) + (1.0 - weight) * (s.at - s.previous), images, epsilon)
        height, gradient, gap = evaluate(at)
        better, worse = height > s.best_loss, gap > s.worst_margin
        best, best_gradient = _pick(better, at, s.best), _pick(better, gradient, s.best_gradient)
        best_loss = tf.maximum(height, s.best_loss)
        rises = s.rises + tf.cast(height > s.loss, tf.float32)
        due = s.since + 1 >= s.window
        oscillates = rises <= RISES * tf.cast(s.window, tf.float32)
        stuck = ~s.halved & (s.checked_loss >= best_loss)
        halve = due & (oscillates | stuck)
        return index + 1, _Ascent(
            at=_pick(halve, best, at), previous=s.at, gradient=_pick(halve, best_gradient, gradient),
            loss=tf.where(halve, best_loss, height), best=best, best_gradient=best_gradient, best_loss=best_loss,
            size=_pick(halve, s.size / 2.0, s.size),
            worst=_pick(worse, at, s.worst), worst_margin=tf.maximum(gap, s.worst_margin),
            rises=tf.where(due, 0.0, rises), checked_loss=tf.where(due, best_loss, s.checked_loss),
            halved=tf.where(due, halve, s.halved), since=tf.where(due, 0, s.since + 1),
            window=tf.where(due, tf.maximum(s.window - share(0.03), share(0.06)), s.window),
        )  # fmt: skip

    height, gradient, gap = evaluate(start)
    begin = _Ascent(
        at=start, previous=start, gradient=gradient, loss=height, best=start, best_gradient=gradient,
        best_loss=height, size=2.0 * epsilon * tf.ones_like(start[:, :1, :1]), worst=start, worst_margin=gap,
        rises=tf.zeros_like(height), checked_loss=height, halved=tf.ones_like(height, tf.bool),
        since=tf.constant(0), window=share(0.22),
    )  # fmt: skip
    _, end = tf.while_loop(
        lambda index, s: (index < steps) & tf.reduce_any(s.worst_margin <= 0), step, (0, begin), parallel_iterations=1
    )
    return end.worst, end.worst_margin


def _pick(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """Images of `one` where `chosen` (n,), else of `other`."""
    return tf.where(chosen[:, None, None, None], one, other)


def vat(network: Function, images: Tensor, epsilon: Tensor, steps: Tensor, seed: Tensor, norm: str) -> Tensor:
    """Images moved by epsilon in the direction that changes the prediction most (Miyato et al. 2019).

    The direction is found by `steps` power iterations on KL(p(x) || p(x + d)); `norm` is `l2` or `linf`.
    """
    clean = tf.stop_gradient(network(images))
    direction = _unit(tf.random.stateless_normal(tf.shape(images), seed))
    short = 1e-2 * tf.sqrt(tf.cast(tf.size(images[0]), tf.float32))

    def iterate(index: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
        return index + 1, _unit(input_gradient(lambda d: divergence(clean, network(images + short * d)), direction))

    _, direction = tf.while_loop(lambda index, _: index < steps, iterate, (0, direction))
    step = direction if norm == "l2" else tf.sign(direction)
    return tf.stop_gradient(tf.clip_by_value(images + epsilon * step, 0.0, 1.0))


def _unit(x: Tensor) -> Tensor:
    """Each image scaled to Euclidean length one."""
    return x / (tf.sqrt(tf.reduce_sum(tf.square(x), axis=(1, 2, 3), keepdims=True)) + TINY)


def square(
    objective: Function, images: Tensor, start: Tensor, epsilon: Tensor, first: Tensor, last: Tensor, budget: Tensor,
    seed: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Queries `first` to `last` of Square (Andriushchenko et al. 2020): random search without gradients.

    Each query sets a random square of every image to plus or minus epsilon, and keeps it where the objective rises.
    Squares shrink as the `budget` is spent, on the schedule of the paper.

    Returns:
        The current images, and their objective (n,).
    """
    n = tf.shape(images)[0]
    side = tf.shape(images)[1]

    def query(index: Tensor, at: Tensor, height: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        spent = tf.cast(index, tf.float32) / tf.cast(budget, tf.float32) * 10_000.0
        halvings = tf.reduce_sum(tf.cast(spent > tf.constant(HALVINGS), tf.float32))
        share = 0.8 * tf.pow(0.5, halvings)
        size = tf.clip_by_value(tf.cast(tf.round(tf.sqrt(share) * tf.cast(side, tf.float32)), tf.int32), 1, side - 1)
        random = tf.random.stateless_uniform((3, n, 1, 1, 1), seed + tf.stack([0, index]))
        room = tf.cast(side - size + 1, tf.float32)
        top, left = tf.cast(random[0] * room, tf.int32), tf.cast(random[1] * room, tf.int32)
        line = tf.range(side)
        rows, columns = tf.reshape(line, (1, -1, 1, 1)), tf.reshape(line, (1, 1, -1, 1))
        inside = (rows >= top) & (rows < top + size) & (columns >= left) & (columns < left + size)
        sign = tf.where(random[2] < 0.5, -1.0, 1.0)
        candidate = tf.where(inside, tf.clip_by_value(images + epsilon * sign, 0.0, 1.0), at)
        reached = objective(candidate)
        better = reached > height
        return index + 1, _pick(better, candidate, at), tf.where(better, reached, height)

    _, found, height = tf.while_loop(
        lambda index, *_: index < last, query, (first, start, objective(start)), parallel_iterations=1
    )
    return found, height


HALVINGS = (10.0, 50.0, 200.0, 1000.0, 2000.0, 4000.0, 6000.0, 8000.0)  # of 10,000 queries


def stripes(images: Tensor, epsilon: Tensor, seed: Tensor) -> Tensor:
    """The initial point of Square: every column moved by plus or minus epsilon."""
    shape = tf.shape(images)
    random = tf.random.stateless_uniform((shape[0], 1, shape[2], 1), seed)
    return tf.clip_by_value(images + epsilon * tf.where(random < 0.5, -1.0, 1.0), 0.0, 1.0)
