"""Fine-tuning methods: which values are trained, and how they change the base.

A method is a pair of functions. `start` returns the trained values at step 0, which leave the network as it is.
`effective` maps base and trained values to the parameters of the served network. Every training step uses it, and so
does the merge before export, so what is trained is what is served.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import tensorflow as tf

from trainer.lenet import FIRST, HEAD, LAYERS, Arrays, Params, Tensor

# The layer that follows each layer.
AFTER = dict(itertools.pairwise(LAYERS))


@dataclass(frozen=True)
class Method:
    """A method, with the options that determine the shapes of its trained values."""

    name: str  # full, head, bias, lora, adapter or ia3
    targets: tuple[str, ...] = ()  # of bias, lora and ia3
    rank: int = 0  # of lora
    bottleneck: int = 0  # units of the network's adapters, which every method keeps; 0 without

    def start(self, params: Mapping[str, np.ndarray], seed: int) -> Arrays:
        """Trained values at step 0, for a network with parameters `params`.

        `full`: all parameters. `head`: the classifier, which every method trains. `bias` (BitFit, Ben Zaken et al.
        2022): biases of the targets. `lora` (Hu et al. 2021): for each target A (fan_in, rank), Kaiming-uniform, and
        B (rank, out), zero, so that W0 + A B = W0; a convolution kernel (h, w, in, out) is treated as the matrix
        (h*w*in, out). `adapter` (Houlsby et al. 2019): the adapters. `ia3` (Liu et al. 2022): for each target a scale
        (out,), one, of its output channels or units.
        """
        if self.name == "full":
            return dict(params)
        trained = {name: params[name] for name in (f"{HEAD}/kernel", f"{HEAD}/bias")}
        if self.name == "adapter":
            trained |= {name: value for name, value in params.items() if "/down/" in name or "/up/" in name}
        rng = np.random.default_rng(seed)
        for layer in self.targets:
            if self.name == "bias":
                trained[f"{layer}/bias"] = params[f"{layer}/bias"]
            elif self.name == "ia3":
                trained[f"{layer}/scale"] = np.ones(params[f"{layer}/bias"].shape, np.float32)
            elif self.name == "lora":
                kernel = params[f"{layer}/kernel"]
                fan_in = int(np.prod(kernel.shape[:-1]))
                bound = np.sqrt(3.0 / fan_in)
                trained[f"{layer}/lora_a"] = rng.uniform(-bound, bound, (fan_in, self.rank)).astype(np.float32)
                trained[f"{layer}/lora_b"] = np.zeros((self.rank, kernel.shape[-1]), np.float32)
        return trained


# Learning rates relative to that of the spec. Values that start at zero or at random, or that act through a product,
# need longer steps than pretrained weights (LoRA+, Hayou et al. 2024, for B against A). Chosen on validation splits.
RATES = {"lora_a": 4.0, "lora_b": 16.0, "scale": 4.0}
HEAD_RATE = 4.0


def relative_rate(method: str, name: str) -> float:
    """Learning rate of a trained value, relative to the spec's."""
    layer, _, part = name.rpartition("/")
    if method == "full":
        return 1.0
    return HEAD_RATE if layer == HEAD else RATES.get(part, 4.0)


def effective(base: Params, trained: Params, scale: Tensor) -> dict[str, Tensor]:
    """Parameters of the served network.

    `lora`: W = W0 + scale * A B with scale = alpha / rank. `ia3`: the kernel of the next layer is multiplied along its
    input axis, which equals scaling the activations, whatever the sign. All others: the trained value itself.
    """
    params = {name: trained.get(name, value) for name, value in base.items()}
    for name, value in trained.items():
        layer, _, part = name.rpartition("/")
        if part == "lora_a":
            kernel = base[f"{layer}/kernel"]
            update = tf.linalg.matmul(value, trained[f"{layer}/lora_b"])
            params[f"{layer}/kernel"] = kernel + scale * tf.reshape(update, kernel.shape)
        elif part == "scale":
            following = f"{AFTER[layer]}/kernel"
            fan_in = params[following].shape[-2]
            per_input = tf.tile(value, (fan_in // value.shape[0],))  # dense1 has 49 inputs of each channel
            params[following] = params[following] * tf.reshape(per_input, (fan_in, 1))
    return params


def trained_kernels(trained: Iterable[str]) -> list[str]:
    """Names of the effective kernels that training changes. Penalties act on these."""
    changed = set()
    for name in trained:
        layer, _, part = name.rpartition("/")
        if part != "bias":
            changed.add(f"{AFTER[layer] if part == 'scale' else layer}/kernel")
    return sorted(changed)


def direct_kernels(trained: Iterable[str]) -> list[str]:
    """Names of the effective kernels that are trained directly, so that exact zeros survive the merge."""
    names = set(trained)
    scaled = {f"{AFTER[name.rpartition('/')[0]]}/kernel" for name in names if name.endswith("/scale")}
    return sorted(name for name in names - scaled if name.endswith("/kernel"))


def first_trained(trained: Iterable[str]) -> str:
    """The first layer that training changes; the layers before it can be computed once."""
    names = list(trained)
    layers = {name.partition("/")[0] for name in trained_kernels(names)}
    layers |= {name.partition("/")[0] for name in names if name.endswith("/bias")}
    return next((layer for layer in LAYERS if layer in layers), FIRST)
