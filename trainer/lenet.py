"""LeNet-5 as a pure function of its parameters (LeCun et al. 1998, with ReLU, max-pooling and same padding).

conv1 6@5x5 - pool - conv2 16@5x5 - pool - dense1 120 - dense2 84 - head, 107,786 parameters for ten classes. Either
dense layer may be followed by an adapter (Houlsby et al. 2019): x + up(relu(down(x))).
Parameters are a flat mapping from `"<layer>/kernel"` and `"<layer>/bias"` to tensors, variables or arrays; those of an
adapter are named `"dense1/down/kernel"` and so on.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from store.records import GREY_28

Tensor = Any  # TensorFlow has no types that mypy can use.
Params = Mapping[str, Tensor]
Arrays = dict[str, np.ndarray]

HEAD = "head"
CONVOLUTIONS, DENSE = ("conv1", "conv2"), ("dense1", "dense2")
DENSE_UNITS = (120, 84)
LAYERS = (*CONVOLUTIONS, *DENSE, HEAD)
FIRST = LAYERS[0]
INPUTS = {  # shape of the input of each layer, for one image
    "conv1": GREY_28.shape, "conv2": (14, 14, 6), "dense1": (7, 7, 16), "dense2": (120,), HEAD: (84,)
}  # fmt: skip


def kernel_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """Shape of every layer's kernel. Biases have the last dimension of it."""
    return {
        "conv1": (5, 5, 1, 6),
        "conv2": (5, 5, 6, 16),
        "dense1": (7 * 7 * 16, 120),
        "dense2": (120, 84),
        HEAD: (84, classes),
    }


def initial(classes: int, seed: int) -> Arrays:
    """He-normal kernels (He et al. 2015) and zero biases, float32, determined by the seed."""
    rng = np.random.default_rng(seed)
    params: Arrays = {}
    for layer, shape in kernel_shapes(classes).items():
        gain = 1.0 if layer == HEAD else 2.0
        scale = np.sqrt(gain / np.prod(shape[:-1]))
        params[f"{layer}/kernel"] = (scale * rng.standard_normal(shape)).astype(np.float32)
        params[f"{layer}/bias"] = np.zeros(shape[-1], np.float32)
    return params


def adapters(bottleneck: int, seed: int) -> Arrays:
    """New adapters, which are the identity because `up` is zero."""
    rng = np.random.default_rng(seed)
    params: Arrays = {}
    for layer, units in zip(DENSE, DENSE_UNITS, strict=True):
        down = np.sqrt(2.0 / units) * rng.standard_normal((units, bottleneck))
        params[f"{layer}/down/kernel"] = down.astype(np.float32)
        params[f"{layer}/down/bias"] = np.zeros(bottleneck, np.float32)
        params[f"{layer}/up/kernel"] = np.zeros((bottleneck, units), np.float32)
        params[f"{layer}/up/bias"] = np.zeros(units, np.float32)
    return params


def dropout_masks(n: Tensor, rate: Tensor, seed: Tensor) -> list[Tensor]:
    """Dropout masks of dense1 and dense2, (n, 120) and (n, 84): 0 with probability `rate`, else 1 / (1 - rate).

    Srivastava et al. (2014). Both are drawn in one call, which costs more than the numbers.
    """
    chance = tf.random.stateless_uniform((n, sum(DENSE_UNITS)), seed)
    masks: list[Tensor] = tf.split(tf.cast(chance >= rate, tf.float32) / (1.0 - rate), DENSE_UNITS, axis=1)
    return masks


def logits(params: Params, x: Tensor, masks: Sequence[Tensor] = (), *, entry: str = FIRST, until: str = "") -> Tensor:
    """Logits, or the input of the layer `until`.

    Args:
        params: parameters by name.
        x: input of the layer `entry`; for the first one (n, 28, 28, 1) float32 in [0, 1], light on dark.
        masks: from `dropout_masks`; none at inference.

    Returns:
        (n, classes) float32.
    """
    end = LAYERS.index(until) if until else len(LAYERS)
    dropped = dict(zip((*DENSE[1:], HEAD), masks, strict=False))  # by the layer whose input they mask
    for layer in LAYERS[LAYERS.index(entry) : end]:
        kernel, bias = params[f"{layer}/kernel"], params[f"{layer}/bias"]
        if layer in CONVOLUTIONS:
            x = tf.nn.relu(tf.nn.bias_add(tf.nn.conv2d(x, kernel, strides=1, padding="SAME"), bias))
            x = tf.nn.max_pool2d(x, ksize=2, strides=2, padding="SAME")
            continue
        if layer == "dense1":
            x = tf.reshape(x, (-1, 7 * 7 * 16))
        if layer in dropped:
            x = x * dropped[layer]
        x = tf.linalg.matmul(x, kernel) + bias
        if layer != HEAD:
            x = tf.nn.relu(x)
        if f"{layer}/down/kernel" in params:
            small = tf.nn.relu(tf.linalg.matmul(x, params[f"{layer}/down/kernel"]) + params[f"{layer}/down/bias"])
            x += tf.linalg.matmul(small, params[f"{layer}/up/kernel"]) + params[f"{layer}/up/bias"]
    return x
