"""Weight penalties. They act on effective kernels, never on biases, and are part of the loss that is minimized."""

from collections.abc import Sequence

import tensorflow as tf

from trainer.lenet import Tensor


def l1(kernels: Sequence[Tensor], strength: Tensor) -> Tensor:
    """Lambda * sum |w| (Tibshirani 1996)."""
    return strength * tf.add_n([tf.reduce_sum(tf.abs(kernel)) for kernel in kernels])


def l2(kernels: Sequence[Tensor], strength: Tensor) -> Tensor:
    """Alpha / 2 * sum w^2 (Hoerl & Kennard 1970); its gradient is alpha * w."""
    return strength / 2 * tf.add_n([tf.reduce_sum(tf.square(kernel)) for kernel in kernels])
