"""One update of the trained values, and how the learning rate goes over a run."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer.lenet import Tensor
from trainer.penalties import soft_threshold

BETA_1, BETA_2, TINY = 0.9, 0.999, 1e-7
RISE = 0.3  # share of the steps in which one-cycle's rate rises, and in which epsilon grows


def learning_rates(schedule: str, total: int) -> np.ndarray:
    """Rate of every step relative to the peak, (total,) float32.

    `cosine` (Loshchilov & Hutter 2017) falls from one to zero; `one_cycle` (Smith & Topin 2018) rises from 1/25 to
    one over the first 30% and falls to 1/10,000 of its start, both along a cosine.
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
    """Moments of some variables, and the step that moves them.

    `adam`: Kingma & Ba (2015). `adamw`: with decoupled decay (Loshchilov & Hutter 2019), on all but biases and
    scales. `sgd`: with Nesterov momentum (Sutskever et al. 2013).
    """

    def __init__(self, name: str, variables: dict[str, tf.Variable], relative_rate: Callable[[str], float]) -> None:
        self._name = name
        self._variables = variables
        self._relative_rate = relative_rate
        slots = 1 if name == "sgd" else 2
        self._moments = {
            key: tuple(tf.Variable(tf.zeros_like(variable), trainable=False) for _ in range(slots))
            for key, variable in variables.items()
        }

    def forget(self) -> None:
        """Begin anew."""
        for moments in self._moments.values():
            for moment in moments:
                moment.assign(tf.zeros_like(moment))

    def step(
        self, gradients: dict[str, Tensor], rate: Tensor, t: Tensor, momentum: Tensor, decay: Tensor,
        l1: Tensor, proximal: frozenset[str],
    ) -> None:  # fmt: skip
        """Step number `t` (float, from 1). The kernels in `proximal` then take the proximal step of `l1`."""
        for name, variable in self._variables.items():
            own = rate * self._relative_rate(name)
            if self._name == "adamw" and name.rpartition("/")[2] not in ("bias", "scale"):
                variable.assign_sub(own * decay * variable)
            if self._name == "sgd":
                (m,) = self._moments[name]
                tf.raw_ops.ResourceApplyMomentum(
                    var=variable.handle, accum=m.handle, lr=own, grad=gradients[name], momentum=momentum,
                    use_nesterov=True,
                )  # fmt: skip
                threshold = l1 / (1.0 - momentum)  # a steady gradient adds up to so much of itself
            else:
                m, v = self._moments[name]
                tf.raw_ops.ResourceApplyAdam(
                    var=variable.handle, m=m.handle, v=v.handle, beta1_power=BETA_1**t, beta2_power=BETA_2**t,
                    lr=own, beta1=BETA_1, beta2=BETA_2, epsilon=TINY, grad=gradients[name],
                )  # fmt: skip
                # Adam measures every gradient in units of its own size, and so does the proximal step (Yun et al.
                # 2021). A weight without a gradient shrinks no faster than Adam moves others.
                unit = tf.sqrt(v / (1.0 - BETA_2**t)) + TINY
                threshold = tf.minimum(l1, unit + tf.abs(m) / (1.0 - BETA_1**t)) / unit
            if name in proximal:
                variable.assign(soft_threshold(variable, own * threshold))
