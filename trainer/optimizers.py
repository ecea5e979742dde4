"""Optimizers and learning rate schedules."""

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import tensorflow as tf

from trainer.lenet import Tensor
from trainer.penalties import soft_threshold

BETA_1, BETA_2, TINY = 0.9, 0.999, 1e-7
RISE = 0.3  # share of the steps in which one-cycle's rate rises, and in which epsilon grows


def learning_rates(schedule: str, total: int) -> np.ndarray:
    """Learning rate of every step relative to the peak, (total,) float32.

    `cosine` (Loshchilov & Hutter 2017) falls from 1 to 0; `one_cycle` (Smith & Topin 2018) rises from 1/25 to 1 over
    the first 30% of the steps and then falls to 1/250,000, both along a cosine. `constant` is 1.
    """
    share = np.arange(total) / total
    if schedule == "constant":
        rates = np.ones(total)
    elif schedule == "cosine":
        rates = _cosine(1.0, 0.0, share)
    else:
        rates = np.where(
            share < RISE, _cosine(1 / 25, 1.0, share / RISE), _cosine(1.0, 1 / 25e4, (share - RISE) / (1 - RISE))
        )
    return rates.astype(np.float32)


def _cosine(start: float, end: float, share: np.ndarray) -> np.ndarray:
    return end + (start - end) * 0.5 * (1 + np.cos(np.pi * share))


class Optimizer:
    """Updates of the trained values, which are kept in one flat variable, so that a step is a single fused update.

    `adam`: Kingma & Ba (2015). `adamw`: with decoupled decay (Loshchilov & Hutter 2019). `sgd`: with Nesterov momentum
    (Sutskever et al. 2013).

    Where all values have the same rate, these are the updates of `keras.optimizers`, with two differences on purpose:

    - `adamw` decays neither biases nor the scales of IA3, which Keras leaves to `exclude_from_weight_decay`. A scale
      of one changes nothing; decay would pull it to zero.
    - `sgd` accumulates gradients, v = momentum * v + g, and multiplies by the rate of the step, as PyTorch does. Keras
      accumulates rate * g, so that after a change of rate the old one goes on acting. At a constant rate both agree.

    A value with a relative learning rate r is kept in units of its own, `flat = value / unit`. Adam moves `flat` by the
    rate whatever the unit, so the value by `unit` times as much: the unit is r. A plain gradient grows by the unit
    too: there it is the root of r.
    """

    def __init__(self, name: str, shapes: Mapping[str, tuple[int, ...]], rates: Mapping[str, float]) -> None:
        self._name = name
        self._shapes = dict(shapes)
        self._sizes = [math.prod(shape) for shape in self._shapes.values()]
        self.units = self._constant({key: rates[key] ** (0.5 if name == "sgd" else 1.0) for key in shapes})
        self._decays = self._constant({key: key.rpartition("/")[2] not in ("bias", "scale") for key in shapes})

    def _constant(self, by_name: Mapping[str, float]) -> np.ndarray:
        """One number for every element of `flat`."""
        return np.repeat([float(by_name[key]) for key in self._shapes], self._sizes).astype(np.float32)

    def values(self, flat: Tensor) -> dict[str, Tensor]:
        """The trained values by name."""
        parts = tf.split(flat * self.units, self._sizes)
        return {key: tf.reshape(part, shape) for (key, shape), part in zip(self._shapes.items(), parts, strict=True)}

    def flat(self, values: Mapping[str, Tensor]) -> Tensor:
        """The inverse of `values`."""
        return tf.concat([tf.reshape(values[key], (-1,)) for key in self._shapes], 0) / self.units

    def variables(self) -> tuple[Tensor, list[Tensor]]:
        """New variables, zero: the flat one, and its moments."""
        moments = 1 if self._name == "sgd" else 2
        flat, *rest = (tf.Variable(tf.zeros(sum(self._sizes))) for _ in range(1 + moments))
        return flat, rest

    def step(
        self, flat: Tensor, moments: Sequence[Tensor], gradient: Tensor, rate: Tensor, t: Tensor, momentum: Tensor,
        decay: Tensor, l1: Tensor, proximal: Collection[str],
    ) -> None:  # fmt: skip
        """Take step number `t` (float, from 1), then the proximal step of `l1` on the kernels named in `proximal`."""
        units = self.units
        if self._name == "adamw":
            flat.assign_sub(rate * decay * self._decays * units * flat)
        if self._name == "sgd":
            (m,) = moments
            tf.raw_ops.ResourceApplyMomentum(
                var=flat.handle, accum=m.handle, lr=rate, grad=gradient, momentum=momentum, use_nesterov=True
            )
        else:
            m, v = moments
            tf.raw_ops.ResourceApplyAdam(
                var=flat.handle, m=m.handle, v=v.handle, beta1_power=BETA_1**t, beta2_power=BETA_2**t, lr=rate,
                beta1=BETA_1, beta2=BETA_2, epsilon=TINY, grad=gradient,
            )  # fmt: skip
        if not proximal:
            return
        slope = l1 * units  # derivative of the penalty in the units of `flat`
        if self._name == "sgd":
            threshold = slope / (1.0 - momentum)  # to which momentum amplifies a constant gradient
        else:
            # Adam divides a gradient by its own scale, and so must the proximal step (Yun et al. 2021). The minimum
            # keeps a weight without a gradient from shrinking faster than Adam moves the others.
            size = tf.sqrt(v / (1.0 - BETA_2**t)) + TINY
            threshold = tf.minimum(slope, size + tf.abs(m) / (1.0 - BETA_1**t)) / size
        shrinks = self._constant({key: key in proximal for key in self._shapes})
        flat.assign(soft_threshold(flat, rate * shrinks * threshold))
