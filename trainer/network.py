"""The served network, compiled for inference and for attacks. Reports measure this and nothing else."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from trainer import attacks
from trainer.lenet import FIRST, INPUTS, Arrays, Tensor, adapters, initial, logits

BATCH = 1024
LABELS = tf.TensorSpec((None,), tf.int32)
SCALAR, COUNT = tf.TensorSpec((), tf.float32), tf.TensorSpec((), tf.int32)
SEED = tf.TensorSpec((2,), tf.int32)


def inputs(layer: str) -> tf.TensorSpec:
    """Signature of the input of a layer."""
    return tf.TensorSpec((None, *INPUTS[layer]), tf.float32)


IMAGES = inputs(FIRST)


def in_batches(function: Callable[..., Any], *arrays: Any) -> np.ndarray:
    """Apply `function` to slices of the arrays, and concatenate the results."""
    n = len(arrays[0])
    parts = [np.asarray(function(*(array[at : at + BATCH] for array in arrays))) for at in range(0, n, BATCH)]
    return np.concatenate(parts)


@functools.lru_cache(maxsize=8)
def network(classes: int, bottleneck: int, device: str) -> "Network":
    """The compiled network of this form, shared by the process; one job at a time may use it."""
    with tf.device(device):
        return Network(classes, bottleneck)


class Network:
    """LeNet-5 with replaceable parameters. Images are light on dark, (n, 28, 28, 1) float32; labels (n,) int32."""

    def __init__(self, classes: int, bottleneck: int = 0) -> None:
        shapes = initial(classes, seed=0) | (adapters(bottleneck, seed=0) if bottleneck else {})
        self._params = {name: tf.Variable(value, trainable=False) for name, value in shapes.items()}
        self._tails: dict[tuple[str, str], Any] = {}

    def use(self, params: Mapping[str, Tensor]) -> "Network":
        """Load parameters, and return the network."""
        for name, variable in self._params.items():
            variable.assign(params[name])
        return self

    def params(self) -> Arrays:
        """A copy of the parameters."""
        return {name: variable.numpy() for name, variable in self._params.items()}

    def part(self, x: Tensor, entry: str = FIRST, until: str = "") -> np.ndarray:
        """Inputs of the layer `until` (by default the logits), computed in batches from inputs of the layer `entry`."""
        if entry == until:
            return np.asarray(x)
        if (entry, until) not in self._tails:
            function = functools.partial(logits, self._params, entry=entry, until=until)
            self._tails[entry, until] = tf.function(function, autograph=False, input_signature=[inputs(entry)])
        tail = self._tails[entry, until]
        return in_batches(lambda batch: tail(tf.convert_to_tensor(batch)), x)

    def logits(self, images: Tensor) -> np.ndarray:
        """Class scores, (n, classes) float32."""
        return self.part(images)

    @tf.function(autograph=False, input_signature=[IMAGES, LABELS, SCALAR])
    def fgsm(self, images: Tensor, labels: Tensor, epsilon: Tensor) -> Tensor:
        """Logits (n, classes) under FGSM."""
        return self._scores(attacks.fgsm(lambda x: attacks.cross_entropy(labels, self._scores(x)), images, epsilon))

    @tf.function(autograph=False, input_signature=[IMAGES, LABELS, SCALAR, COUNT, SEED, tf.TensorSpec((), tf.bool)])
    def apgd(
        self, images: Tensor, labels: Tensor, epsilon: Tensor, steps: Tensor, seed: Tensor, by_ratio: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One run of APGD from a random start: the worst images met, and their margins (n,), positive if misclassified.

        It maximizes the cross-entropy (APGD-CE) or, with `by_ratio`, the difference of logits ratio (APGD-DLR).
        """

        def loss(labels: Tensor, scores: Tensor) -> Tensor:
            return tf.where(by_ratio, attacks.logits_ratio(labels, scores), attacks.cross_entropy(labels, scores))

        start = attacks.in_ball(images, epsilon, seed)
        return attacks.apgd(self._scores, loss, images, labels, start, epsilon, steps)

    @tf.function(autograph=False, input_signature=[IMAGES, LABELS, IMAGES, SCALAR, COUNT, COUNT, COUNT, SEED])
    def square(
        self, images: Tensor, labels: Tensor, start: Tensor, epsilon: Tensor, first: Tensor, last: Tensor,
        budget: Tensor, seed: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Queries `first` to `last` of Square: the images, and their margins (n,), positive if misclassified."""

        def objective(x: Tensor) -> Tensor:
            return attacks.margin(labels, self._scores(x))

        return attacks.square(objective, images, start, epsilon, first, last, budget, seed)

    def _scores(self, images: Tensor) -> Tensor:
        return logits(self._params, images)
