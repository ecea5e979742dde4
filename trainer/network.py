"""The served network, compiled for inference and for attacks. Reports measure this and nothing else."""

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from trainer import attacks
from trainer.lenet import FIRST, HEAD, INPUTS, Params, Tensor, adapters, initial, logits

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


def bottleneck_of(params: Params) -> int:
    """Units of the network's adapters; 0 if it has none."""
    down = params.get("dense1/down/kernel")
    return 0 if down is None else int(down.shape[1])


class Network:
    """LeNet-5 with its parameters. Images are light on dark, (n, 28, 28, 1) float32; labels (n,) int32."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        """Place the parameters on the current device."""
        self._params = {name: tf.convert_to_tensor(value) for name, value in params.items()}
        bias = self._params[f"{HEAD}/bias"]
        with _COMPILING:
            self._compiled = _compiled(int(bias.shape[0]), bottleneck_of(params), bias.device)

    def part(self, x: Tensor, entry: str = FIRST, until: str = "") -> np.ndarray:
        """Inputs of the layer `until` (by default the logits), computed in batches from inputs of the layer `entry`."""
        if entry == until:
            return np.asarray(x)
        tail = self._compiled.part(entry, until)
        return in_batches(lambda batch: tail(self._params, tf.convert_to_tensor(batch)), x)

    def logits(self, images: Tensor) -> np.ndarray:
        """Class scores, (n, classes) float32."""
        return self.part(images)

    def fgsm(self, images: Tensor, labels: Tensor, epsilon: Tensor) -> Tensor:
        """Logits (n, classes) under FGSM."""
        return self._compiled.fgsm(self._params, images, labels, epsilon)

    def apgd(
        self, images: Tensor, labels: Tensor, epsilon: Tensor, steps: Tensor, seed: Tensor, by_ratio: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One run of APGD from a random start: the worst images met, and their margins (n,), positive if misclassified.

        It maximizes the cross-entropy (APGD-CE) or, with `by_ratio`, the difference of logits ratio (APGD-DLR).
        """
        found: tuple[Tensor, Tensor] = self._compiled.apgd(self._params, images, labels, epsilon, steps, seed, by_ratio)
        return found

    def square(
        self, images: Tensor, labels: Tensor, start: Tensor, epsilon: Tensor, first: Tensor, last: Tensor,
        budget: Tensor, seed: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Queries `first` to `last` of Square: the images, and their margins (n,), positive if misclassified."""
        found: tuple[Tensor, Tensor] = self._compiled.square(
            self._params, images, labels, start, epsilon, first, last, budget, seed
        )
        return found


_COMPILING = threading.Lock()  # so that networks of one form share what is compiled


@functools.lru_cache(maxsize=8)
def _compiled(classes: int, bottleneck: int, device: str) -> "_Compiled":
    """The compiled functions of networks of this form, shared by the process."""
    with tf.device(device):
        return _Compiled(classes, bottleneck)


class _Compiled:
    """The functions of `Network`, with the parameters as an argument."""

    def __init__(self, classes: int, bottleneck: int) -> None:
        shapes = initial(classes, seed=0) | (adapters(bottleneck, seed=0) if bottleneck else {})
        self._params = {name: tf.TensorSpec(value.shape, tf.float32) for name, value in shapes.items()}
        self._parts: dict[tuple[str, str], Any] = {}
        attacked = [self._params, IMAGES, LABELS]
        flag = tf.TensorSpec((), tf.bool)
        self.fgsm = self._function(_fgsm, *attacked, SCALAR)
        self.apgd = self._function(_apgd, *attacked, SCALAR, COUNT, SEED, flag)
        self.square = self._function(_square, *attacked, IMAGES, SCALAR, COUNT, COUNT, COUNT, SEED)

    def part(self, entry: str, until: str) -> Any:
        """From inputs of the layer `entry` to those of the layer `until`."""
        if (entry, until) not in self._parts:
            function = functools.partial(logits, entry=entry, until=until)
            self._parts[entry, until] = self._function(function, self._params, inputs(entry))
        return self._parts[entry, until]

    def _function(self, function: Callable[..., Any], *signature: Any) -> Any:
        return tf.function(function, autograph=False, input_signature=signature)


def _fgsm(params: Params, images: Tensor, labels: Tensor, epsilon: Tensor) -> Tensor:
    return logits(params, attacks.fgsm(lambda x: attacks.cross_entropy(labels, logits(params, x)), images, epsilon))


def _apgd(
    params: Params, images: Tensor, labels: Tensor, epsilon: Tensor, steps: Tensor, seed: Tensor, by_ratio: Tensor
) -> tuple[Tensor, Tensor]:
    def loss(labels: Tensor, scores: Tensor) -> Tensor:
        return tf.where(by_ratio, attacks.logits_ratio(labels, scores), attacks.cross_entropy(labels, scores))

    start = attacks.in_ball(images, epsilon, seed)
    return attacks.apgd(functools.partial(logits, params), loss, images, labels, start, epsilon, steps)


def _square(
    params: Params, images: Tensor, labels: Tensor, start: Tensor, epsilon: Tensor, first: Tensor, last: Tensor,
    budget: Tensor, seed: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    def objective(x: Tensor) -> Tensor:
        return attacks.margin(labels, logits(params, x))

    return attacks.square(objective, images, start, epsilon, first, last, budget, seed)
