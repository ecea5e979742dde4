"""The training program: whole epochs in one compiled function.

A program is compiled for a `Structure`. Everything else (data, weights and coefficients) is an input, so that a
worker traces once a structure and not once a job.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import tensorflow as tf

from trainer import attacks, penalties
from trainer.lenet import Tensor, initial, logits
from trainer.methods import effective, relative_rate, start, touched_kernels


@dataclass(frozen=True)
class Structure:
    """What the compiled functions depend on."""

    method: str
    classes: int
    targets: tuple[str, ...] = ()
    rank: int = 0
    attack: str | None = None
    augment: bool = False
    device: str = ""  # where its variables lie: the one that was current when it was made


@dataclass(frozen=True)
class Coefficients:
    """Inputs of a step, all scalars. Shifts are in pixels, angles in radians, scales relative."""

    total_steps: int
    batch_size: int
    learning_rate: float
    seed: int = 0
    l1: float = 0.0
    l2: float = 0.0
    dropout: float = 0.0
    epsilon: float = 0.0
    adversarial_weight: float = 0.0
    shift: float = 0.0
    rotate: float = 0.0
    zoom: float = 0.0


COEFFICIENTS = tuple(field.name for field in fields(Coefficients) if field.type is float)
IMAGES = tf.TensorSpec((None, 28, 28, 1), tf.float32)
LABELS = tf.TensorSpec((None,), tf.int32)
SCALAR = tf.TensorSpec((), tf.float32)

TERMS = ("data_loss", "adversarial_loss", "l1", "l2")
WARM_UP = 0.3  # share of the steps in which epsilon grows
BETA_1, BETA_2, TINY = 0.9, 0.999, 1e-7


@functools.cache
def program(structure: Structure) -> "Program":
    """The process's program of this structure; one job at a time may use it."""
    return Program(structure)


class Program:
    """Variables and compiled functions of one structure. `load` begins a job."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        shapes = initial(structure.classes, seed=0)
        trained = start(structure.method, shapes, structure.targets, structure.rank, seed=0)
        self.base = {name: tf.Variable(value, trainable=False) for name, value in shapes.items()}
        self.trained = {name: tf.Variable(value) for name, value in trained.items()}
        self.moments = {name: (tf.Variable(0 * value), tf.Variable(0 * value)) for name, value in trained.items()}
        self.lora_scale = tf.Variable(0.0, trainable=False)

    def load(self, base: Mapping[str, np.ndarray], seed: int, lora_scale: float) -> None:
        """Begin a job: the base's weights, untouched trained values, an optimizer without memory."""
        for name, variable in self.base.items():
            variable.assign(base[name])
        self.restore(start(self.structure.method, base, self.structure.targets, self.structure.rank, seed))
        for m, v in self.moments.values():
            m.assign(tf.zeros_like(m))
            v.assign(tf.zeros_like(v))
        self.lora_scale.assign(lora_scale)

    def snapshot(self) -> dict[str, np.ndarray]:
        """A copy of the trained values, for `restore`."""
        return {name: variable.numpy() for name, variable in self.trained.items()}

    def restore(self, trained: Mapping[str, np.ndarray]) -> None:
        """Put trained values back."""
        for name, variable in self.trained.items():
            variable.assign(trained[name])

    def params(self) -> dict[str, Tensor]:
        """Effective parameters of the plain network: the merge."""
        return effective(self.base, self.trained, self.lora_scale)

    @tf.function(autograph=False, input_signature=[IMAGES])
    def logits(self, images: Tensor) -> Tensor:
        """(n, classes) for (n, 28, 28, 1) light-on-dark images, at inference."""
        return logits(self.params(), images)

    @tf.function(autograph=False, input_signature=[IMAGES, LABELS, SCALAR])
    def fgsm(self, images: Tensor, labels: Tensor, epsilon: Tensor) -> Tensor:
        """The images under FGSM against the present weights."""
        params = self.params()
        return attacks.fgsm(functools.partial(logits, params), images, labels, epsilon)

    def epoch(self, images: Tensor, labels: Tensor, order: Tensor, done: int, c: Coefficients) -> dict[str, float]:
        """One pass over the data; the mean of every term of the loss.

        Args:
            images: (n, 28, 28, 1) float32 light on dark, already on the device.
            labels: (n,) int32.
            order: (n,) int32, the shuffled indices.
            done: steps taken in earlier epochs.
        """
        floats = {name: tf.constant(getattr(c, name), tf.float32) for name in COEFFICIENTS}
        counts = tf.constant([done, c.total_steps, c.batch_size, c.seed], tf.int32)
        means = self._epoch(images, labels, order, counts, floats)
        return dict(zip(TERMS, (float(mean) for mean in means), strict=True))

    @tf.function(
        autograph=False,
        input_signature=[IMAGES, LABELS, LABELS, tf.TensorSpec((4,), tf.int32), dict.fromkeys(COEFFICIENTS, SCALAR)],
    )
    def _epoch(self, images: Tensor, labels: Tensor, order: Tensor, counts: Tensor, c: dict[str, Tensor]) -> Tensor:
        done, total, batch_size, seed = tf.unstack(counts)
        n = tf.shape(order)[0]
        steps = (n + batch_size - 1) // batch_size

        def step(index: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
            batch = order[index * batch_size : (index + 1) * batch_size]
            chance = tf.stack([seed, 8 * (done + index)])
            share = tf.cast(done + index, tf.float32) / tf.cast(total, tf.float32)
            rate = c["learning_rate"] * 0.5 * (1.0 + tf.cos(np.pi * share))
            # The attack grows to its full strength over the first 30% of the steps: from the start it can drive a net
            # this small into one class.
            reach = c | {"epsilon": c["epsilon"] * tf.minimum(1.0, share / WARM_UP)}
            terms = self._step(tf.gather(images, batch), tf.gather(labels, batch), chance, rate, done + index, reach)
            return index + 1, sums + terms

        _, sums = tf.while_loop(lambda index, _: index < steps, step, (0, tf.zeros(len(TERMS))))
        return tf.unstack(sums / tf.cast(steps, tf.float32))

    def _step(self, x: Tensor, y: Tensor, chance: Tensor, rate: Tensor, done: Tensor, c: dict[str, Tensor]) -> Tensor:
        """One update; the value of every term of the loss before it."""
        if self.structure.augment:
            x = affine(x, c["shift"], c["rotate"], c["zoom"], chance + [0, 2])
        zero = tf.constant(0.0)
        variables = list(self.trained.values())
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(variables)
            params = self.params()
            data = attacks.cross_entropy(y, logits(params, x, c["dropout"], chance))
            loss, adversarial = data, zero
            if self.structure.attack == "fgsm":
                with tape.stop_recording():
                    inference = functools.partial(logits, params)
                    worst = attacks.fgsm_random_start(inference, x, y, c["epsilon"], chance + [0, 3])
                adversarial = attacks.cross_entropy(y, logits(params, worst, c["dropout"], chance + [0, 4]))
                loss = (1.0 - c["adversarial_weight"]) * data + c["adversarial_weight"] * adversarial
            kernels = [params[name] for name in touched_kernels(self.trained)]
            l1, l2 = penalties.l1(kernels, c["l1"]), penalties.l2(kernels, c["l2"])
            loss += l1 + l2
        gradients = tape.gradient(loss, variables)
        self._adam(gradients, rate, tf.cast(done + 1, tf.float32))
        return tf.stack([data, adversarial, l1, l2])

    def _adam(self, gradients: list[Tensor], rate: Tensor, t: Tensor) -> None:
        """Adam (Kingma & Ba 2015) through its fused kernel."""
        for (name, variable), gradient in zip(self.trained.items(), gradients, strict=True):
            m, v = self.moments[name]
            tf.raw_ops.ResourceApplyAdam(
                var=variable.handle, m=m.handle, v=v.handle, beta1_power=BETA_1**t, beta2_power=BETA_2**t,
                lr=rate * relative_rate(self.structure.method, name), beta1=BETA_1, beta2=BETA_2, epsilon=TINY,
                grad=gradient,
            )  # fmt: skip


def affine(images: Tensor, shift: Tensor, rotate: Tensor, zoom: Tensor, seed: Tensor) -> Tensor:
    """Random shift, rotation and scaling of each (28, 28, 1) image, bilinear, black outside."""
    u = tf.random.stateless_uniform((tf.shape(images)[0], 5), seed, -1.0, 1.0)
    angle = rotate * u[:, 0]
    cos, sin = tf.cos(angle), tf.sin(angle)
    sx, sy = 1.0 + zoom * u[:, 1], 1.0 + zoom * u[:, 2]
    centre = 13.5
    a, b, d, e = cos / sx, -sin / sx, sin / sy, cos / sy
    tx = centre - a * centre - b * centre + shift * u[:, 3]
    ty = centre - d * centre - e * centre + shift * u[:, 4]
    nought = tf.zeros_like(a)
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=images, transforms=tf.stack([a, b, tx, d, e, ty, nought, nought], axis=1),
        output_shape=tf.shape(images)[1:3], interpolation="BILINEAR", fill_mode="CONSTANT", fill_value=0.0,
    )  # fmt: skip
