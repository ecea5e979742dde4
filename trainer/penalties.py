"""Weight penalties. They act on effective kernels, never on biases, and are part of the loss that is minimized."""

from collections.abc import Sequence

import tensorflow as tf

from trainer.lenet import Tensor


def l1(kernels: Sequence[Tensor], strength: Tensor) -> Tensor:
    """Lambda * sum |w| (Tibshirani 1996)."""
    return strength * tf.add_n([tf.reduce_sum(tf.abs(kernel)) for kernel in kernels])


def l2(kernels: Sequence[Tensor], strength: Tensor) -> Tensor:
    """Alpha / 2 * sum w^2 (Hoerl & Kennard 1970); its gradient is alpha * w."""
    return strength * tf.add_n([tf.nn.l2_loss(kernel) for kernel in kernels])  # whose factor of a half is its own


def l2_sp(kernels: Sequence[Tensor], anchors: Sequence[Tensor], strength: Tensor) -> Tensor:
    """Alpha / 2 * sum (w - w0)^2 (Li et al. 2018): L2 around the starting point, which is zero for what is new."""
    return l2([kernel - anchor for kernel, anchor in zip(kernels, anchors, strict=True)], strength)


def soft_threshold(kernel: Tensor, threshold: Tensor) -> Tensor:
    """sign(w) * max(|w| - threshold, 0): the proximal step of L1, which makes exact zeros (Daubechies et al. 2004)."""
    return tf.sign(kernel) * tf.maximum(tf.abs(kernel) - threshold, 0.0)
