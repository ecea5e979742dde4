"""Weight penalties: terms of the loss on effective kernels, never on biases."""

from collections.abc import Sequence

import tensorflow as tf

from trainer.lenet import Tensor


def l1(kernels: Sequence[Tensor], strength: Tensor) -> Tensor:
    """The lasso, lambda * sum |w| (Tibshirani 1996)."""
    return strength * tf.add_n([tf.reduce_sum(tf.abs(kernel)) for kernel in kernels])


def l2(kernels: Sequence[Tensor], strength: Tensor) -> Tensor:
    """Ridge, alpha / 2 * sum w^2, with gradient alpha * w (Hoerl & Kennard 1970)."""
    return strength * tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])  # which includes the half


def l2_sp(kernels: Sequence[Tensor], anchors: Sequence[Tensor], strength: Tensor) -> Tensor:
    """L2 around the starting point, alpha / 2 * sum (w - w0)^2, with w0 = 0 for new kernels (Li et al. 2018)."""
    return l2([kernel - anchor for kernel, anchor in zip(kernels, anchors, strict=True)], strength)


def soft_threshold(kernel: Tensor, threshold: Tensor) -> Tensor:
    """The proximal operator of L1, sign(w) * max(|w| - threshold, 0); it makes exact zeros (Daubechies et al. 2004)."""
    return tf.sign(kernel) * tf.maximum(tf.abs(kernel) - threshold, 0.0)
