"""The training step: whole epochs in one compiled function.

It is compiled per `Structure`. Everything else (data, weights, coefficients) is an input, so a worker traces once per
structure, not once per job.
"""

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from store.records import GREY_28
from trainer import attacks, penalties
from trainer.augmentation import affine, contrasted, cut_out, flipped, mixed
from trainer.lenet import FIRST, Arrays, Tensor, adapters, dropout_masks, initial, logits
from trainer.methods import Method, direct_kernels, effective, relative_rate, trained_kernels
from trainer.network import COUNT, LABELS, SCALAR, inputs
from trainer.optimizers import Optimizer

TERMS = ("data_loss", "adversarial_loss", "l1", "l2", "l2_sp")


@dataclass(frozen=True)
class Structure:
    """What the compiled functions depend on."""

    method: Method
    classes: int
    entry: str = FIRST  # first layer that is computed in every step
    penalties: frozenset[str] = frozenset()  # of l1, l2 and l2_sp
    attack: str | None = None  # pgd (one step of which is fgsm), trades, free, vat
    norm: str = "linf"  # of vat
    clean: bool = True  # whether the loss has a clean part
    dropout: bool = True
    augment: bool = False
    mixup: bool = False
    ema: bool = False
    optimizer: str = "adam"
    halves: bool = False  # compute the gradients of a batch's halves at once; whatever the number of cores
    device: str = ""  # that holds the variables


@dataclass(frozen=True)
class Coefficients:
    """Scalar inputs of every step. Shifts are in pixels, angles in radians, scales relative."""

    seed: int = 0
    batch_size: int = 64
    replays: int = 1  # updates for each batch
    attack_steps: int = 1
    attack_size: float = 1.25  # of a step of the attack, in epsilons
    epsilon: float = 0.0
    spread: float = 0.0
    adversarial_weight: float = 0.0  # a share with pgd, a factor with trades and vat
    l1: float = 0.0
    l2: float = 0.0
    l2_sp: float = 0.0
    dropout: float = 0.0
    label_smoothing: float = 0.0
    shift: float = 0.0
    rotate: float = 0.0
    scale: float = 0.0
    contrast: float = 0.0
    cutout: float = 0.0
    flip: float = 0.0  # probability
    ema: float = 0.0
    momentum: float = 0.9
    weight_decay: float = 0.0


FLOATS = tuple(field.name for field in fields(Coefficients) if field.type is float)
COUNTS = tuple(field.name for field in fields(Coefficients) if field.type is int)
DRAWS = 16  # random seeds of an update, half of them for each half of the batch
SCHEDULE = ("rate", "reach", "mix", "t")  # of every update: learning rate, share of epsilon, of mixup, number from 1


class State(NamedTuple):
    """The variables of a run."""

    base: dict[str, Tensor]
    anchors: dict[str, Tensor]  # that l2_sp pulls the kernels to
    lora_scale: Tensor
    class_weights: Tensor
    flat: Tensor  # the trained values, see `Optimizer`
    moments: list[Tensor]
    served: Tensor  # their moving average, or `flat` itself


class TrainStep:
    """The training step of one run.

    Runs of one structure share what is compiled, and each has its own variables: they may go on in several threads.
    """

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        with _COMPILING:
            self._compiled = _compiled(structure)
        with tf.device(structure.device):
            self._state = self._compiled.state()

    def load(
        self, base: Mapping[str, np.ndarray], seed: int, *, lora_scale: float = 0.0, new: frozenset[str] = frozenset(),
        class_weights: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        """Start: load the base, and reset the trained values and the optimizer.

        Args:
            new: names of parameters that the base does not have; l2_sp pulls them to zero.
            class_weights: (classes,) weight of the images of each class, with mean one over the data.
        """
        state = self._state
        for name, variable in state.base.items():
            variable.assign(base[name])
        for name, anchor in state.anchors.items():
            anchor.assign(tf.zeros_like(anchor) if name in new else base[name])
        for moment in state.moments:
            moment.assign(tf.zeros_like(moment))
        state.lora_scale.assign(lora_scale)
        ones = np.ones(self.structure.classes, np.float32)
        state.class_weights.assign(ones if class_weights is None else class_weights)
        self.restore(self.structure.method.start(base, seed))

    def snapshot(self) -> Arrays:
        """A copy of the trained values, for `restore`."""
        return {name: value.numpy() for name, value in self._compiled.optimizer.values(self._state.served).items()}

    def restore(self, trained: Mapping[str, np.ndarray]) -> None:
        """Put trained values back; the optimizer's moments stay."""
        flat = self._compiled.optimizer.flat(trained)
        self._state.flat.assign(flat)
        self._state.served.assign(flat)

    def state(self) -> list[np.ndarray]:
        """A copy of everything that training changes, for `resume`."""
        return [variable.numpy() for variable in self._changing()]

    def resume(self, state: Sequence[np.ndarray]) -> None:
        """Go on, after `load`, from where another step of this structure was."""
        for variable, value in zip(self._changing(), state, strict=True):
            variable.assign(value)

    def _changing(self) -> list[Tensor]:
        return [self._state.flat, *self._state.moments, self._state.served]

    def params(self) -> dict[str, Tensor]:
        """Effective parameters of the served network, with the update merged in."""
        return self._compiled.effective(self._state, self._state.served)

    def traces(self) -> int:
        """How often the epoch of this structure has been traced."""
        return self._compiled.traces

    def epoch(
        self, features: Tensor, labels: Tensor, order: Tensor, schedule: np.ndarray, done: int, c: Coefficients
    ) -> tuple[dict[str, float], int | None]:
        """One pass over the data.

        Args:
            features: inputs of the layer `entry`, float32, on the device.
            labels: (n,) int32.
            order: (n,) int32, shuffled indices.
            schedule: (updates, 4) float32, see `SCHEDULE`.
            done: number of updates before this epoch.

        Returns:
            The mean of every term of the loss, and the index of the first update whose loss was not finite (or None).
        """
        given = features, labels, order, tf.constant(schedule), tf.constant(done, tf.int32), _inputs(c)
        sums = self._compiled.epoch(self._state, *given).numpy()
        wrong = None if np.isinf(sums[-1]) else int(sums[-1])
        means = dict(zip(TERMS, (sums[:-1] / len(schedule)).tolist(), strict=True))
        return {name: means[name] for name in self.terms()}, wrong

    def warm_up(self, features: Tensor, labels: Tensor, c: Coefficients) -> None:
        """Go through an epoch without updates, in which TensorFlow optimizes the graph of a new structure.

        That takes as long as ten epochs of a small data set, and would be taken for the time of the first.
        """
        if not self._compiled.warm:
            order, schedule = tf.zeros(0, tf.int32), tf.zeros((0, len(SCHEDULE)))
            self._compiled.epoch(self._state, features, labels, order, schedule, tf.constant(0), _inputs(c))
            self._compiled.warm = True

    def terms(self) -> tuple[str, ...]:
        """Names of the terms of the loss."""
        return self._compiled.terms()

    def shares(self, features: Tensor, labels: Tensor, c: Coefficients) -> dict[str, float]:
        """Share of each term in the update: the norm of its gradient over the sum of all norms, at these weights."""
        norms = self._compiled.shares(self._state, features, labels, _inputs(c)).numpy().astype(float)
        total = norms.sum() or 1.0
        return dict(zip(self.terms(), (norms / total).tolist(), strict=True))


def _inputs(c: Coefficients) -> dict[str, Tensor]:
    floats = {name: tf.constant(getattr(c, name), tf.float32) for name in FLOATS}
    return floats | {name: tf.constant(getattr(c, name), tf.int32) for name in COUNTS}


_COMPILING = threading.Lock()  # so that runs which begin together do not all compile the same


@functools.lru_cache(maxsize=32)
def _compiled(structure: Structure) -> "_Compiled":
    """The compiled functions of this structure, shared by the process."""
    return _Compiled(structure)


class _Compiled:
    """The compiled functions of one structure. They read and write the variables of a `State`."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        method = structure.method
        self._shapes = initial(structure.classes, seed=0)
        if method.bottleneck:
            self._shapes |= adapters(method.bottleneck, seed=0)
        trained = method.start(self._shapes, seed=0)
        self._trained = trained_kernels(trained)
        self._proximal = frozenset(direct_kernels(trained)) if "l1" in structure.penalties else frozenset()
        self.optimizer = Optimizer(
            structure.optimizer,
            {name: value.shape for name, value in trained.items()},
            {name: relative_rate(method.name, name) for name in trained},
        )
        self.traces = 0  # of the epoch
        self.warm = False  # has an epoch been run?
        self._data = inputs(structure.entry), LABELS
        self._coefficients = dict.fromkeys(FLOATS, SCALAR) | dict.fromkeys(COUNTS, COUNT)
        schedule = tf.TensorSpec((None, len(SCHEDULE)), tf.float32)
        self.epoch = self._traced(self._run_epoch, LABELS, schedule, COUNT, self._coefficients)

    @functools.cached_property
    def shares(self) -> Any:
        """`_gradient_norms`, compiled."""
        return self._traced(self._gradient_norms, self._coefficients)

    def _traced(self, function: Callable[..., Tensor], *signature: Any) -> Any:
        with tf.device(self.structure.device):
            compiled = tf.function(function, autograph=False)
            return compiled.get_concrete_function(self.state(), *self._data, *signature)

    def state(self) -> State:
        """New variables on the current device."""

        def variables(names: Iterable[str]) -> dict[str, Tensor]:
            return {name: tf.Variable(self._shapes[name], trainable=False) for name in names}

        flat, moments = self.optimizer.variables()
        served = tf.Variable(tf.zeros_like(flat), trainable=False) if self.structure.ema else flat
        return State(
            base=variables(self._shapes), anchors=variables(self._trained),
            lora_scale=tf.Variable(0.0, trainable=False),
            class_weights=tf.Variable(tf.ones(self.structure.classes), trainable=False),
            flat=flat, moments=moments, served=served,
        )  # fmt: skip

    def effective(self, state: State, flat: Tensor) -> dict[str, Tensor]:
        """Parameters of the network with the trained values in `flat`."""
        return effective(state.base, self.optimizer.values(flat), state.lora_scale)

    def terms(self) -> tuple[str, ...]:
        """Names of the terms of the loss."""
        structure = self.structure
        present = set(structure.penalties)
        if structure.clean:
            present.add("data_loss")
        if structure.attack:
            present.add("adversarial_loss")
        return tuple(name for name in TERMS if name in present)

    def _run_epoch(
        self, state: State, features: Tensor, labels: Tensor, order: Tensor, schedule: Tensor, done: Tensor,
        c: dict[str, Tensor],
    ) -> Tensor:  # fmt: skip
        self.traces += 1
        # Shuffle before cutting into batches, so that batches differ between epochs. One gather for all is cheaper than
        # one in every step.
        features = tf.gather(features, order)
        targets = tf.one_hot(tf.gather(labels, order), self.structure.classes)
        size, replays = c["batch_size"], c["replays"]
        updates = tf.shape(schedule)[0]

        def step(index: Tensor, delta: Tensor, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            batch = index // replays
            x, y = (array[batch * size : (batch + 1) * size] for array in (features, targets))
            rate, reach, mix, t = tf.unstack(schedule[index])
            now = c | {"epsilon": c["epsilon"] * reach, "mix": mix}
            if self.structure.attack == "free":
                x, y = self._disturbed(x, y, tf.stack([c["seed"], DRAWS * (done + batch * replays)]), now)
            terms, gradient, delta = self._gradient(
                state, x, y, delta, tf.stack([c["seed"], DRAWS * (done + index)]), now
            )
            self._update(state, gradient, rate, t, c)
            position = tf.cast(index, tf.float32)
            wrong = tf.where(tf.math.is_finite(tf.reduce_sum(terms)), np.inf, position)
            return index + 1, delta, tf.concat([sums[:-1] + terms, [tf.minimum(sums[-1], wrong)]], 0)

        delta = tf.zeros((size if self.structure.attack == "free" else 0, *GREY_28.shape))
        start = (0, delta, tf.constant([0.0] * len(TERMS) + [np.inf]))
        return tf.while_loop(lambda index, *_: index < updates, step, start)[-1]

    def _disturbed(self, x: Tensor, y: Tensor, chance: Tensor, c: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Images and targets after augmentation, mixup and label smoothing."""
        if self.structure.augment:
            x = affine(x, c["shift"], c["rotate"], c["scale"], chance + [0, 2])
            for change, size, draw in ((flipped, "flip", 5), (contrasted, "contrast", 6), (cut_out, "cutout", 7)):
                changed = functools.partial(change, x, c[size], chance + [0, draw])
                x = tf.cond(c[size] > 0.0, changed, functools.partial(tf.identity, x))
        if self.structure.mixup:
            x, y = mixed(x, y, c["mix"])
        return x, (1.0 - c["label_smoothing"]) * y + c["label_smoothing"] / self.structure.classes

    def _gradient(
        self, state: State, x: Tensor, y: Tensor, delta: Tensor, chance: Tensor, c: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Terms of the loss on a batch, its gradient, and the perturbation that `free` carries over."""
        if self.structure.attack == "free":
            n = tf.shape(x)[0]
            x = attacks.project(x + delta[:n], x, c["epsilon"])
            terms, (gradient, input_gradient) = self._differentiated(state, x, y, chance, c, x)
            moved = delta[:n] + c["epsilon"] * tf.sign(input_gradient)
            delta = tf.concat([tf.clip_by_value(moved, -c["epsilon"], c["epsilon"]), delta[n:]], 0)
            return terms, gradient, delta
        if not self.structure.halves:
            x, y = self._disturbed(x, y, chance, c)
            terms, (gradient,) = self._differentiated(state, x, y, chance, c)
            return terms, gradient, delta
        n = tf.shape(x)[0]
        cut = (n + 1) // 2
        rest = tf.minimum(cut, n - 1)  # an image that is alone is in both halves
        found = []
        for part, draws in ((slice(None, cut), chance), (slice(rest, None), chance + [0, DRAWS // 2])):
            half = self._disturbed(x[part], y[part], draws, c)
            terms, (gradient,) = self._differentiated(state, *half, draws, c)
            found.append((terms, gradient))
        share = tf.cast(cut, tf.float32) / tf.cast(cut + n - rest, tf.float32)
        terms, gradient = (share * one + (1.0 - share) * two for one, two in zip(*found, strict=True))
        return terms, gradient, delta

    def _differentiated(
        self, state: State, x: Tensor, y: Tensor, chance: Tensor, c: dict[str, Tensor], *also: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Terms of the loss, and its gradients in the trained values and in other tensors."""
        sources = [state.flat, *also]
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(sources)
            values, factors = self._terms(state, x, y, chance, c, tape)
            loss = tf.add_n([factors.get(name, 1.0) * value for name, value in values.items()])
        nothing = tf.constant(0.0)
        return tf.stack([values.get(name, nothing) for name in TERMS]), tape.gradient(loss, sources)

    def _update(self, state: State, gradient: Tensor, rate: Tensor, t: Tensor, c: dict[str, Tensor]) -> None:
        """Change the trained values."""
        self.optimizer.step(
            state.flat, state.moments, gradient, rate, t, c["momentum"], c["weight_decay"], c["l1"], self._proximal
        )
        if self.structure.ema:
            decay = tf.minimum(c["ema"], (1.0 + t) / (10.0 + t))  # the first weights are soon forgotten
            state.served.assign(decay * state.served + (1.0 - decay) * state.flat)

    def _terms(
        self, state: State, x: Tensor, y: Tensor, chance: Tensor, c: dict[str, Tensor], tape: tf.GradientTape, *,
        prox: bool = True,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
        """Every term of the loss on a batch, and its factor in the loss where that is not one.

        With `prox`, L1 has no gradient on kernels for which the optimizer takes the proximal step instead.
        """
        params = self.effective(state, state.flat)
        inference = functools.partial(logits, params, entry=self.structure.entry)

        def training(x: Tensor) -> Tensor:
            return inference(x, dropout_masks(tf.shape(x)[0], c["dropout"], chance) if self.structure.dropout else ())

        values, factors = self._losses(state, x, y, inference, training, chance, c, tape)
        kernels = {name: params[name] for name in self._trained}
        if "l1" in self.structure.penalties:
            still = self._proximal if prox else ()
            lasso = [tf.stop_gradient(kernel) if name in still else kernel for name, kernel in kernels.items()]
            values["l1"] = penalties.l1(lasso, c["l1"])
        if "l2" in self.structure.penalties:
            values["l2"] = penalties.l2(list(kernels.values()), c["l2"])
        if "l2_sp" in self.structure.penalties:
            anchors = [state.anchors[name] for name in kernels]
            values["l2_sp"] = penalties.l2_sp(list(kernels.values()), anchors, c["l2_sp"])
        return values, factors

    def _losses(
        self, state: State, x: Tensor, y: Tensor, inference: attacks.Function, training: attacks.Function,
        chance: Tensor, c: dict[str, Tensor], tape: tf.GradientTape,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:  # fmt: skip
        """The clean and the adversarial loss, if the structure has them."""
        attack, weight = self.structure.attack, c["adversarial_weight"]

        def mean(losses: Tensor) -> Tensor:
            return tf.reduce_mean(losses * tf.linalg.matvec(y, state.class_weights))

        if attack is None:
            return {"data_loss": mean(attacks.soft_cross_entropy(y, training(x)))}, {}
        if attack == "free":
            return {"adversarial_loss": mean(attacks.soft_cross_entropy(y, training(x)))}, {}
        with tape.stop_recording():
            worst = self._worst(x, y, inference, chance, c)
        if not self.structure.clean:
            return {"adversarial_loss": mean(attacks.soft_cross_entropy(y, training(worst)))}, {}
        scores, worst_scores = tf.split(training(tf.concat([x, worst], 0)), 2)
        values = {"data_loss": mean(attacks.soft_cross_entropy(y, scores))}
        if attack == "pgd":
            values["adversarial_loss"] = mean(attacks.soft_cross_entropy(y, worst_scores))
            return values, {"data_loss": 1.0 - weight, "adversarial_loss": weight}
        held = tf.stop_gradient(scores) if attack == "vat" else scores
        values["adversarial_loss"] = tf.reduce_mean(attacks.divergence(held, worst_scores))
        return values, {"adversarial_loss": weight}

    def _worst(self, x: Tensor, y: Tensor, inference: attacks.Function, chance: Tensor, c: dict[str, Tensor]) -> Tensor:
        """Adversarial examples against the network in inference mode."""
        epsilon, steps = c["epsilon"], c["attack_steps"]
        if self.structure.attack == "vat":
            return attacks.vat(inference, x, epsilon, steps, chance + [0, 3], self.structure.norm)
        size = c["attack_size"] * epsilon
        if self.structure.attack == "trades":
            clean = inference(x)
            start = attacks.project(x + 1e-3 * tf.random.stateless_normal(tf.shape(x), chance + [0, 3]), x, epsilon)
            return attacks.pgd(lambda z: attacks.divergence(clean, inference(z)), x, start, epsilon, steps, size)
        own = tf.random.stateless_uniform((tf.shape(x)[0], 1, 1, 1), chance + [0, 4])  # Kurakin et al. (2017)
        shrink = 1.0 - c["spread"] * own
        start = attacks.in_ball(x, epsilon * shrink, chance + [0, 3])
        return attacks.pgd(
            lambda z: attacks.soft_cross_entropy(y, inference(z)), x, start, epsilon * shrink, steps, size * shrink
        )

    def _gradient_norms(self, state: State, features: Tensor, labels: Tensor, c: dict[str, Tensor]) -> Tensor:
        """Norm of the gradient of each term times its factor, (terms,)."""
        y = tf.one_hot(labels, self.structure.classes)
        with tf.GradientTape(watch_accessed_variables=False, persistent=True) as tape:
            tape.watch(state.flat)
            values, factors = self._terms(state, features, y, tf.stack([c["seed"], 0]), c, tape, prox=False)
            weighted = {name: factors.get(name, 1.0) * value for name, value in values.items()}
        gradients = [tape.gradient(weighted[name], state.flat) for name in self.terms()]
        return tf.stack([tf.norm(gradient / self.optimizer.units) for gradient in gradients])
