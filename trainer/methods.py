"""What a fine-tune trains: the trained values, and the effective parameters that they make of the base.

A method is a pair of functions. `start` gives the trained arrays at step 0, at which nothing has changed but a
new head. `effective` maps base and trained values to the parameters of the plain network: it is used in every
training step, and once more to merge the update before export, so what is trained is what is served.
"""

from collections.abc import Mapping

import numpy as np
import tensorflow as tf

from trainer.lenet import HEAD, Params, Tensor


def start(
    method: str, params: Mapping[str, np.ndarray], targets: tuple[str, ...], rank: int, seed: int
) -> dict[str, np.ndarray]:
    """Trained arrays at step 0.

    `full`: every parameter. `head`: the classifier. `lora` (Hu et al. 2021): the classifier and, for each target,
    A (Kaiming-uniform) and B (zero), so that base + A B is the base. A convolution's kernel (h, w, in, out) is
    taken as the matrix (h*w*in, out).
    """
    head = {name: params[name] for name in (f"{HEAD}/kernel", f"{HEAD}/bias")}
    if method == "full":
        return dict(params)
    if method == "head":
        return head
    rng = np.random.default_rng(seed)
    for layer in targets:
        kernel = params[f"{layer}/kernel"]
        fan_in = int(np.prod(kernel.shape[:-1]))
        bound = np.sqrt(3.0 / fan_in)
        head[f"{layer}/lora_a"] = rng.uniform(-bound, bound, (fan_in, rank)).astype(np.float32)
        head[f"{layer}/lora_b"] = np.zeros((rank, kernel.shape[-1]), np.float32)
    return head


# Learning rates relative to the spec's. What starts at zero or anew, or works through a product, needs longer steps
# than a pretrained weight (LoRA+, Hayou et al. 2024, for B against A); chosen on validation splits of small sets.
RATES = {"lora_a": 4.0, "lora_b": 16.0}
HEAD_RATE = 4.0


def relative_rate(method: str, name: str) -> float:
    """Learning rate of a trained value, relative to the spec's."""
    layer, _, part = name.partition("/")
    if method == "full":
        return 1.0
    return HEAD_RATE if layer == HEAD else RATES[part]


def effective(base: Params, trained: Params, scale: Tensor) -> dict[str, Tensor]:
    """Parameters of the plain network: W = W0 + scale * A B (scale = alpha / rank), or the trained value itself."""
    params = {name: trained.get(name, value) for name, value in base.items()}
    for name, a in trained.items():
        layer, _, part = name.partition("/")
        if part == "lora_a":
            kernel = base[f"{layer}/kernel"]
            update = tf.linalg.matmul(a, trained[f"{layer}/lora_b"])
            params[f"{layer}/kernel"] = kernel + scale * tf.reshape(update, kernel.shape)
    return params


def touched_kernels(trained: Mapping[str, object]) -> list[str]:
    """Names of the effective kernels that training changes, which are those that the penalties act on."""
    return sorted({name.partition("/")[0] + "/kernel" for name in trained if not name.endswith("/bias")})
