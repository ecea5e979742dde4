"""LeNet-5 as a pure function of its parameters (LeCun et al. 1998, with ReLU, max-pooling and same padding).

conv1 6@5x5 - pool - conv2 16@5x5 - pool - dense1 120 - dense2 84 - head, 107,786 parameters for ten classes.
Parameters are a flat mapping `"<layer>/kernel" | "<layer>/bias"` to tensors, variables or arrays.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import tensorflow as tf

Tensor = Any  # TensorFlow has no types that mypy can use.
Params = Mapping[str, Tensor]

HEAD = "head"
LAYERS = ("conv1", "conv2", "dense1", "dense2", HEAD)


def kernel_shapes(classes: int) -> dict[str, tuple[int, ...]]:
    """Shape of every layer's kernel; the bias has the last of its dimensions."""
    return {
        "conv1": (5, 5, 1, 6),
        "conv2": (5, 5, 6, 16),
        "dense1": (7 * 7 * 16, 120),
        "dense2": (120, 84),
        HEAD: (84, classes),
    }


def initial(classes: int, seed: int) -> dict[str, np.ndarray]:
    """He-normal kernels (He et al. 2015) and zero biases, float32, the same for the same seed."""
    rng = np.random.default_rng(seed)
    params: dict[str, np.ndarray] = {}
    for layer, shape in kernel_shapes(classes).items():
        gain = 1.0 if layer == HEAD else 2.0
        scale = np.sqrt(gain / np.prod(shape[:-1]))
        params[f"{layer}/kernel"] = (scale * rng.standard_normal(shape)).astype(np.float32)
        params[f"{layer}/bias"] = np.zeros(shape[-1], np.float32)
    return params


def logits(params: Params, images: Tensor, dropout: Tensor = None, seed: Tensor = None) -> Tensor:
    """Class scores before the softmax.

    Args:
        params: parameters by name.
        images: (n, 28, 28, 1) float32 in [0, 1], light on dark.
        dropout: share of the units of dense1 and dense2 set to zero (Srivastava et al. 2014); None at inference.
        seed: (2,) int32, needed with `dropout`.

    Returns:
        (n, classes) float32.
    """
    x = images
    for layer in ("conv1", "conv2"):
        x = tf.nn.conv2d(x, params[f"{layer}/kernel"], strides=1, padding="SAME")
        x = tf.nn.relu(tf.nn.bias_add(x, params[f"{layer}/bias"]))
        x = tf.nn.max_pool2d(x, ksize=2, strides=2, padding="SAME")
    x = tf.reshape(x, (-1, 7 * 7 * 16))
    for position, layer in enumerate(("dense1", "dense2")):
        x = tf.nn.relu(tf.linalg.matmul(x, params[f"{layer}/kernel"]) + params[f"{layer}/bias"])
        if dropout is not None:
            chance = tf.random.stateless_uniform(tf.shape(x), seed + [0, position])
            x = tf.where(chance >= dropout, x / (1.0 - dropout), 0.0)
    return tf.linalg.matmul(x, params[f"{HEAD}/kernel"]) + params[f"{HEAD}/bias"]
