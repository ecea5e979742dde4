"""Train a spec: from the base's parameters to those that are served. Independent of jobs, files and servers."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tensorflow as tf

from store.errors import Diverged
from trainer import evaluate
from trainer.asked import refused
from trainer.attacks import STEP_SHARE
from trainer.checkpoints import Checkpoint, State
from trainer.lenet import FIRST, HEAD, Arrays, adapters, initial
from trainer.methods import Method, first_trained
from trainer.network import Network, bottleneck_of
from trainer.optimizers import RISE, learning_rates
from trainer.parallel import Paused
from trainer.spec import Adversarial, Augmentation, Fgsm, Free, Pgd, Spec, Trades, Vat, batch_size, kept_epochs
from trainer.train_step import SCHEDULE, Coefficients, Structure, TrainStep

PROBE_IMAGES, PROBE_STEPS = 128, 10  # of the attack on validation images after each epoch
HALVED = 32  # images of a batch from which on its halves are worth computing at the same time
SHARE_IMAGES = 64  # that gradient shares are measured on
SHARES = 20  # times at most that they are measured in a run
EXPLODED = 100.0  # nats, mean cross-entropy over an epoch; no run has recovered from more
ROBUST = 0.2  # accuracy under PGD that counts as robust, and by which FGSM's must exceed it to be overfitted
ADVICE = "lower the learning rate"
NEGLIGIBLE, DOMINANT = 1e-3, 0.9  # shares of the update below and above which a regularizer is warned of
PENALTIES = ("l1", "l2", "l2_sp")
FITTED = 0.1  # nats of data loss below which the images are fitted


@dataclass(frozen=True)
class Split:
    """Light-on-dark images, on the device, and their labels."""

    images: Any  # (n, 28, 28, 1) float32
    labels: np.ndarray  # (n,) int32

    def take(self, positions: np.ndarray) -> "Split":
        """The images at these positions."""
        return Split(tf.gather(self.images, positions), self.labels[positions])


def sample(split: Split, most: int) -> Split:
    """At most `most` images, evenly spaced."""
    return split.take(np.unique(np.linspace(0, len(split.labels) - 1, most).astype(int)))


@dataclass(frozen=True)
class Start:
    """What training starts from."""

    params: Arrays  # of the network that will be served
    new: frozenset[str]  # names of parameters that the base does not have
    method: Method
    lora_scale: float


@dataclass
class Fitted:
    """The result of a run."""

    params: Arrays  # effective parameters, to serve
    trained: Arrays  # values that the method trained
    method: Method
    lora_scale: float
    history: list[dict[str, Any]] = field(default_factory=list)  # one record per epoch
    gradient_shares: list[dict[str, Any]] = field(default_factory=list)  # value and share of every term, every so often
    kept_epoch: int = 0
    ended_by: str = "epochs"  # or early_stopping, catastrophic_overfitting, or checkpoint: it went on after this epoch
    overfitted_epoch: int | None = None  # epoch in which FGSM was withstood but PGD was not; see `Selection`
    images_per_second: float = 0.0

    @property
    def network(self) -> Network:
        """The served network, on the current device."""
        return Network(self.params)

    def cooled(self, temperature: float) -> "Fitted":
        """The same with its logits divided by a temperature. Every method trains the classifier directly."""
        return replace(self, params=cooled(self.params, temperature), trained=cooled(self.trained, temperature))


def cooled(params: Arrays, temperature: float) -> Arrays:
    """Parameters of which the classifier's are divided by a temperature."""
    by = np.float32(temperature)
    return {name: value / by if name.startswith(f"{HEAD}/") else value for name, value in params.items()}


def begin(spec: Spec, base: Arrays, *, classes: int, same_classes: bool) -> Start:
    """The network to train: the base, with a new head if the classes differ and adapters if the spec has them.

    Raises:
        InvalidSpec: the base already has adapters of another size.
    """
    params, new = dict(base), set[str]()
    if not same_classes or spec.head == "new":
        fresh = {name: value for name, value in initial(classes, spec.seed).items() if name.startswith(f"{HEAD}/")}
        params |= fresh
        new |= set(fresh)
    bottleneck = bottleneck_of(base)
    if spec.adapter:
        if bottleneck not in (0, spec.adapter.bottleneck):
            raise refused(
                "adapter.bottleneck",
                f"is {spec.adapter.bottleneck}, but the base already has adapters of {bottleneck} units",
            )
        if not bottleneck:
            bottleneck = spec.adapter.bottleneck
            params |= adapters(bottleneck, spec.seed)
            new |= set(params) - set(base)
    options = spec.lora or spec.bias or spec.ia3
    method = Method(
        spec.method,
        targets=tuple(sorted(options.targets)) if options else (),
        rank=spec.lora.rank if spec.lora else 0,
        bottleneck=bottleneck,
    )
    return Start(params, frozenset(new), method, spec.lora.alpha / spec.lora.rank if spec.lora else 0.0)


def structure(spec: Spec, start: Start, classes: int, images: int, device: str) -> Structure:
    """The structure to compile for a spec."""
    attack = spec.adversarial
    untouched = spec.augmentation is None and spec.mixup == 0 and attack is None
    entry = first_trained(start.method.start(start.params, 0)) if untouched else FIRST
    if untouched and spec.dropout and entry == HEAD:
        entry = "dense2"  # its input passes through the dropout of dense1
    return Structure(
        method=start.method,
        classes=classes,
        entry=entry,
        penalties=frozenset(name for name in PENALTIES if getattr(spec, name) > 0),
        attack={Fgsm: "pgd", Pgd: "pgd", Trades: "trades", Free: "free", Vat: "vat", type(None): None}[type(attack)],
        norm=attack.norm if isinstance(attack, Vat) else "linf",
        clean=not (isinstance(attack, Free) or (isinstance(attack, Fgsm | Pgd) and attack.weight == 1)),
        dropout=spec.dropout > 0,
        augment=spec.augmentation is not None,
        mixup=spec.mixup > 0,
        ema=spec.ema > 0,
        optimizer=spec.optimizer,
        halves=batch_size(spec, images) >= HALVED and not isinstance(attack, Free) and "CPU" in device,
        device=device,
    )


def coefficients(spec: Spec, images: int) -> Coefficients:
    """The scalar inputs of every step of a run on `images` images."""
    attack, augmentation = spec.adversarial, spec.augmentation or Augmentation()
    steps = 1 if attack is None or isinstance(attack, Fgsm | Free) else attack.steps
    return Coefficients(
        seed=spec.seed,
        batch_size=batch_size(spec, images),
        replays=attack.replays if isinstance(attack, Free) else 1,
        attack_steps=steps,
        attack_size=1.25 if isinstance(attack, Fgsm) else STEP_SHARE / steps,
        epsilon=attack.epsilon if attack else 0.0,
        spread=attack.spread if isinstance(attack, Fgsm | Pgd) else 0.0,
        adversarial_weight=_weight(attack),
        l1=spec.l1, l2=spec.l2, l2_sp=spec.l2_sp, dropout=spec.dropout, label_smoothing=spec.label_smoothing,
        shift=augmentation.shift, rotate=float(np.radians(augmentation.rotate)), scale=augmentation.scale,
        contrast=augmentation.contrast, cutout=float(augmentation.cutout), flip=0.5 if augmentation.flip else 0.0,
        ema=spec.ema,
        momentum=spec.momentum or 0.0,
        weight_decay=spec.weight_decay or 0.0,
    )  # fmt: skip


def _weight(attack: Adversarial | None) -> float:
    if attack is None or isinstance(attack, Free):
        return 0.0
    return attack.beta if isinstance(attack, Trades) else attack.weight


def schedule(spec: Spec, updates: int) -> np.ndarray:
    """Values that change with every update, (updates, 4) float32, in the order of `train_step.SCHEDULE`."""
    rng = np.random.default_rng([spec.seed, 1])
    number = np.arange(updates)
    columns = {
        "rate": spec.learning_rate * learning_rates(spec.schedule, updates),
        # At full strength from the start, an attack can collapse a network this small into predicting one class.
        "reach": np.minimum(1.0, number / updates / RISE),
        "mix": rng.beta(spec.mixup, spec.mixup, updates) if spec.mixup else np.ones(updates),
        "t": number + 1,
    }
    return np.stack([columns[name] for name in SCHEDULE], axis=1).astype(np.float32)


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Weight of each class, n / (classes * n_k), with mean one over the images (King & Zeng 2001)."""
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (classes * np.maximum(counts, 1))).astype(np.float32)


def fit(
    spec: Spec, start: Start, train: Split, validation: Split | None, *, classes: int,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None, shares: bool = True,
    checkpoint: Checkpoint | None = None, keep: Callable[[Fitted], None] = lambda fitted: None,
) -> Fitted:  # fmt: skip
    """Train on the current device, from the last epoch that a checkpoint has.

    The weights of the last epoch are kept. With early stopping it is the epoch of the lowest validation cross-entropy;
    with an attack, that of the best validation accuracy, clean and under PGD, weighted as in the loss.

    Args:
        validation: None if all images are trained on; some of them stand in for it, and their figures are not recorded.
        on_epoch: called with the record of every epoch that is trained; raises to end the run. If it raises `Paused`,
            the checkpoint is saved first.
        shares: also measure the share of each term in the update.
        keep: called after the epochs that the spec keeps, before a checkpoint is saved, with what the run would give if
            it ended with the weights of this epoch.

    Raises:
        Diverged: the loss or the weights are not finite, or the loss has exploded.
    """
    run = Training(spec, start, train, classes)
    model, entry = run.model, run.entry
    measured = validation or sample(train, PROBE_IMAGES)
    judged = tf.constant(Network(start.params).part(measured.images, until=entry))
    result = Fitted({}, {}, start.method, start.lora_scale)
    selection = Selection(spec, model, measured)
    checkpoint, verdict, to_keep = checkpoint or Checkpoint(), "", kept_epochs(spec)
    if found := checkpoint.load():
        verdict = _resume(found, run, selection, result)

    def state() -> State:
        return _state(run, selection, result, verdict)

    while (epoch := 1 + len(result.history)) <= spec.epochs and not verdict:
        terms = run.epoch()
        record = {"epoch": epoch, **terms}
        if validation or selection.attack:
            served = Network(model.params())
            logits = served.part(judged, entry)
            if not np.isfinite(logits).all():
                raise Diverged(f"the weights are not finite after step {run.done}, epoch {epoch}; {ADVICE}")
            record |= {
                "validation_accuracy": evaluate.accuracy(logits, measured.labels),
                "validation_cross_entropy": evaluate.cross_entropy(logits, measured.labels),
            }
            verdict = selection.judge(record, served, warm=run.warm)
        if validation is None:
            record = {name: value for name, value in record.items() if not name.startswith("validation_")}
        if shares and len(model.terms()) > 1 and epoch % math.ceil(spec.epochs / SHARES) == 0:
            parts = run.shares()
            values = {name: {"value": terms[name], "share": parts[name]} for name in terms}
            result.gradient_shares.append({"epoch": epoch, **values})
        result.history.append(record)
        if epoch in to_keep or (to_keep and verdict):
            result.kept_epoch, result.overfitted_epoch = epoch, selection.never_robust
            keep(replace(result, params=run.params(), trained=model.snapshot()))
        checkpoint.save(state, last=bool(verdict) or epoch == spec.epochs)
        try:
            on_epoch(record)
        except Paused:
            checkpoint.save(state, now=True)
            raise
    epoch, result.ended_by = len(result.history), verdict or "epochs"
    result.overfitted_epoch = epoch if result.ended_by == "catastrophic_overfitting" else selection.never_robust
    result.kept_epoch = selection.restore(epoch)
    result.params = run.params()
    result.trained = model.snapshot()
    result.images_per_second = run.images_per_second
    return result


def _state(run: "Training", selection: "Selection", result: Fitted, verdict: str) -> State:
    """Everything that the rest of a run depends on, after an epoch."""
    arrays, best = selection.state()
    arrays = {f"best/{name}": value for name, value in arrays.items()}
    arrays |= {f"{number}": value for number, value in enumerate(run.model.state())}
    record = {
        "done": run.done, "seconds": run.seconds, "selection": best, "verdict": verdict,
        "history": result.history, "gradient_shares": result.gradient_shares,
    }  # fmt: skip
    return arrays, record


def _resume(found: State, run: "Training", selection: "Selection", result: Fitted) -> str:
    """Go on from the epoch of a `_state`; returns the verdict on it."""
    arrays, record = found
    best = {name.removeprefix("best/"): value for name, value in arrays.items() if name.startswith("best/")}
    state = [arrays[f"{number}"] for number in range(len(arrays) - len(best))]
    run.resume(state, record["done"], record["seconds"])
    selection.resume(best, record["selection"])
    result.history, result.gradient_shares = record["history"], record["gradient_shares"]
    verdict: str = record["verdict"]
    return verdict


class Training:
    """A run on the current device, one epoch at a time."""

    def __init__(self, spec: Spec, start: Start, train: Split, classes: int) -> None:
        self.model = TrainStep(structure(spec, start, classes, len(train.labels), tf.constant(0.0).device))
        self.entry = self.model.structure.entry  # the layers before it do not change, and are computed here
        self._c = coefficients(spec, len(train.labels))
        weights = class_weights(train.labels, classes) if spec.class_weights else None
        self.model.load(start.params, spec.seed, lora_scale=start.lora_scale, new=start.new, class_weights=weights)
        self._features = tf.constant(Network(start.params).part(train.images, until=self.entry))
        self._labels = tf.constant(train.labels)
        self.model.warm_up(self._features, self._labels, self._c)
        self._order = tf.zeros(0, tf.int32)  # of the last epoch
        self._updates = -(-len(train.labels) // self._c.batch_size) * self._c.replays  # an epoch
        self._plan = schedule(spec, spec.epochs * self._updates)
        self._rng = np.random.default_rng(spec.seed)
        self.seconds = 0.0  # in epochs
        self.done = 0  # updates

    def epoch(self) -> dict[str, float]:
        """Train for an epoch. Returns the means of the terms of the loss.

        Raises:
            Diverged: the loss is not finite, or has exploded.
        """
        number = self.done // self._updates + 1
        self._order = tf.constant(self._shuffled())
        plan = self._plan[self.done : self.done + self._updates]
        began = time.perf_counter()
        terms, wrong = self.model.epoch(self._features, self._labels, self._order, plan, self.done, self._c)
        self.seconds += time.perf_counter() - began
        if wrong is not None:
            raise Diverged(f"the loss is not finite in step {self.done + wrong + 1}, epoch {number}; {ADVICE}")
        self.done += self._updates
        # `free`, and `pgd` of weight 1, have no clean part.
        cross_entropy = terms.get("data_loss", terms.get("adversarial_loss", 0.0))
        if cross_entropy > EXPLODED:
            raise Diverged(f"the loss is {cross_entropy:.3g} after step {self.done}, epoch {number}; {ADVICE}")
        return terms

    def _shuffled(self) -> np.ndarray:
        """The order of the images in the next epoch: in epoch e, the e-th permutation that the seed gives."""
        return self._rng.permutation(self._labels.shape[0]).astype(np.int32)

    def resume(self, state: Sequence[np.ndarray], done: int, seconds: float) -> None:
        """Go on, instead of from the start, after the `done` updates that gave a state of the model."""
        self.model.resume(state)
        self.done, self.seconds = done, seconds
        for _ in range(done // self._updates):
            self._shuffled()

    def finish(self, check: Callable[[], None] = lambda: None) -> Arrays:
        """Train for the remaining epochs. Returns the effective parameters.

        Args:
            check: called before each epoch; raises to end the run.

        Raises:
            Diverged: see `epoch` and `params`.
        """
        while self.done < len(self._plan):
            check()
            self.epoch()
        return self.params()

    def params(self) -> Arrays:
        """Effective parameters.

        Raises:
            Diverged: they are not finite.
        """
        params = {name: np.asarray(value) for name, value in self.model.params().items()}
        if not all(np.isfinite(value).all() for value in params.values()):
            raise Diverged(f"the weights are not finite after step {self.done}; {ADVICE}")
        return params

    def shares(self) -> dict[str, float]:
        """Share of each term in the update, on some images of the last epoch."""
        some = self._order[:SHARE_IMAGES]
        return self.model.shares(tf.gather(self._features, some), tf.gather(self._labels, some), self._c)

    @property
    def warm(self) -> bool:
        """Whether epsilon has reached its full size."""
        return bool(self._plan[self.done - 1, 1] >= 1)

    @property
    def images_per_second(self) -> float:
        """Images that updates were made from, a second."""
        return float(self.done / self._updates * self._labels.shape[0] * self._c.replays / self.seconds)


def withstands(network: Network, split: Split, epsilon: float, seed: int) -> np.ndarray:
    """Whether each image is classified correctly under a short APGD, (n,) bool."""
    size, steps, chance = tf.constant(epsilon, tf.float32), tf.constant(PROBE_STEPS), tf.constant([seed, 0])
    _, margins = network.apgd(split.images, tf.constant(split.labels), size, steps, chance, tf.constant(False))
    found: np.ndarray = margins.numpy() <= 0
    return found


class Selection:
    """Selects the epoch whose weights are kept, and decides when to stop early."""

    def __init__(self, spec: Spec, model: TrainStep, validation: Split) -> None:
        self._spec = spec
        self._model = model
        self.attack = None if isinstance(spec.adversarial, Vat) else spec.adversarial
        self._probe = sample(validation, PROBE_IMAGES)
        self._best: tuple[float, int, Arrays] = (-np.inf, 0, {})
        self._improved, self._mark = 0, -np.inf  # last epoch better by `min_delta`, and its score
        self._most_robust = 0.0
        self._first_fall = 0

    @property
    def never_robust(self) -> int | None:
        """In a run that never withstood PGD: the first epoch after the warm-up that withstood FGSM all the same."""
        return self._first_fall if self._first_fall and self._most_robust < ROBUST else None

    def judge(self, record: dict[str, Any], served: Network, *, warm: bool) -> str:
        """The reason to stop now, or an empty string. Adds the accuracy under attack to the record.

        One-step attacks can be overfitted: the network learns to mask that step and falls to any attack of several
        (Wong et al. 2020; Andriushchenko & Flammarion 2020). A short APGD on validation images shows it. A run that
        was robust before is stopped, because its earlier weights are better; one that never was is only flagged.
        """
        spec, score, patient = self._spec, -record["validation_cross_entropy"], _patience(self._spec)
        overfitted = False
        if self.attack:
            size, probe = self.attack.epsilon, self._probe
            robust = float(np.mean(withstands(served, probe, size, spec.seed)))
            fast = evaluate.accuracy(
                served.fgsm(probe.images, tf.constant(probe.labels), tf.constant(size, tf.float32)).numpy(),
                probe.labels,
            )
            record |= {"validation_accuracy_under_pgd": robust, "validation_accuracy_under_fgsm": fast}
            falls = warm and fast > robust + ROBUST
            overfitted = falls and self._most_robust >= ROBUST and robust < self._most_robust / 2
            if falls and robust < ROBUST / 2:
                self._first_fall = self._first_fall or record["epoch"]
            self._most_robust = max(self._most_robust, robust) if warm else 0.0
            share = self.attack.weight if isinstance(self.attack, Fgsm | Pgd) else 1.0
            score = (1 - share) * record["validation_accuracy"] + share * robust
        elif not spec.early_stopping:
            return ""
        # As in Keras, against the last improvement that counted: the best score may creep up by less than `min_delta`.
        if score > self._mark + (spec.early_stopping.min_delta if spec.early_stopping else 0.0):
            self._improved, self._mark = record["epoch"], score
        if score >= self._best[0]:  # the later of equals
            self._best = (score, record["epoch"], self._model.snapshot())
        if overfitted:
            return "catastrophic_overfitting"
        return "early_stopping" if record["epoch"] - self._improved >= patient else ""

    def state(self) -> tuple[Arrays, list[Any]]:
        """The best weights, and the rest of what is remembered of earlier epochs; for `resume`."""
        score, epoch, trained = self._best
        return trained, [score, epoch, self._improved, self._mark, self._most_robust, self._first_fall]

    def resume(self, best: Arrays, rest: list[Any]) -> None:
        """Remember what another selection did."""
        score, epoch, self._improved, self._mark, self._most_robust, self._first_fall = rest
        self._best = score, epoch, best

    def restore(self, last: int) -> int:
        """Restore the best weights and return their epoch; `last` if none were kept."""
        _, epoch, trained = self._best
        if trained:
            self._model.restore(trained)
        return epoch or last


def _patience(spec: Spec) -> float:
    """Epochs without improvement after which training stops."""
    return spec.early_stopping.patience if spec.early_stopping else np.inf


def warnings(gradient_shares: list[dict[str, Any]], spec: Spec, *, zeros: bool) -> list[dict[str, str]]:
    """Regularizers with next to no share in the update, or that leave none to the data.

    Strengths that are the defaults are not warned of, and a data loss near zero is no sign that a penalty is too
    strong: when all images are fitted, the penalty is what is left of the update.

    Args:
        gradient_shares: value and share of every term, a record each.
        zeros: L1 has made exact zeros, so it is not negligible however small its share.
    """
    found = []
    learning = [record for record in gradient_shares if _data_loss(record) > FITTED]
    if len(learning) <= len(gradient_shares) / 2:
        learning = []  # most of the time the images were fitted

    def share(names: Sequence[str], records: Sequence[dict[str, Any]]) -> float:
        return float(np.median([sum(record[name]["share"] for name in names) for record in records] or [0.0]))

    terms = [name for name in (gradient_shares or [{}])[0] if name not in ("epoch", "data_loss")]
    asked = [name for name in terms if not _is_default(spec, name)]
    for name in asked:
        if (part := share([name], gradient_shares)) < NEGLIGIBLE and not (name == "l1" and zeros):
            text = f"{name} makes up {part:.1g} of the update, which is negligible; raise it or leave it out"
            found.append({"term": name, "kind": "negligible", "message": text})
        if name in PENALTIES and (part := share([name], learning)) > DOMINANT:
            text = f"{name} makes up {part:.0%} of the update and dominates the data loss; lower it"
            found.append({"term": name, "kind": "dominant", "message": text})
    together = share([name for name in asked if name in PENALTIES], learning)
    if together > DOMINANT and all(one["kind"] != "dominant" for one in found):
        text = f"the penalties together make up {together:.0%} of the update and dominate the data loss; lower them"
        found.append({"term": "penalties", "kind": "dominant", "message": text})
    return found


def _is_default(spec: Spec, name: str) -> bool:
    field = Spec.model_fields.get(name)  # none of `adversarial_loss`, which is there only where it was asked for
    return field is not None and getattr(spec, name) == field.default


def _data_loss(record: dict[str, Any]) -> float:
    term: dict[str, float] = record.get("data_loss") or record["adversarial_loss"]
    return term["value"]
