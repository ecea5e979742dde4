"""Training by a spec: from the base's parameters to the served ones. Knows nothing of jobs, files or servers."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf

from store.errors import Diverged
from trainer import evaluate
from trainer.attacks import STEP_SHARE
from trainer.lenet import FIRST, HEAD, Arrays, adapters, initial
from trainer.methods import Method, first_trained
from trainer.network import Network, network
from trainer.optimizers import RISE, learning_rates
from trainer.spec import Adversarial, Fgsm, Free, Pgd, Spec, Trades, Vat, refused
from trainer.train_step import SCHEDULE, Coefficients, Structure, TrainStep, train_step

PROBE_IMAGES, PROBE_STEPS = 128, 10  # of the attack on validation images after each epoch
SHARE_IMAGES = 64
EXPLODED = 100.0  # nats of cross-entropy, as a mean over an epoch: from there no run has come back
ROBUST = 0.2  # accuracy under PGD that counts as robust, and by which FGSM's must exceed it to be overfitted
ADVICE = "lower the learning rate"
NEGLIGIBLE, DOMINANT = 1e-3, 0.9  # shares of the update below and above which a regularizer is warned of
FITTED = 0.1  # nats of data loss below which the images are fitted


@dataclass(frozen=True)
class Split:
    """Images, light on dark, on the device, with their labels."""

    images: Any  # (n, 28, 28, 1) float32
    labels: np.ndarray  # (n,) int32


@dataclass(frozen=True)
class Start:
    """What training starts from."""

    params: Arrays  # of the network that will be served
    new: frozenset[str]  # names of those that the base did not have
    method: Method
    lora_scale: float


@dataclass
class Fitted:
    """What came of a run."""

    params: Arrays  # effective, to serve
    trained: Arrays  # what the method has changed
    method: Method
    lora_scale: float
    history: list[dict[str, Any]] = field(default_factory=list)  # a record an epoch
    gradient_shares: list[dict[str, Any]] = field(default_factory=list)  # of each term, by epoch
    kept_epoch: int = 0
    ended_by: str = "epochs"  # or early_stopping, catastrophic_overfitting
    overfitted_epoch: int | None = None  # in which the attack was found to be overfitted
    images_per_second: float = 0.0

    @property
    def network(self) -> Network:
        """The served network, on the device that is current."""
        return serve(self.params)


def serve(params: Arrays) -> Network:
    """The compiled network with these parameters, on the device that is current."""
    device = tf.constant(0.0).device
    return network(params[f"{HEAD}/bias"].shape[0], bottleneck_of(params), device).use(params)


def bottleneck_of(params: Arrays) -> int:
    """Units of the network's adapters; 0 without."""
    down = params.get("dense1/down/kernel")
    return 0 if down is None else int(down.shape[1])


def begin(spec: Spec, base: Arrays, *, classes: int, same_classes: bool) -> Start:
    """The network to train: the base's, with a new head unless the classes are the base's, and with the adapters.

    Raises:
        InvalidSpec: the base has adapters of another size.
    """
    params, new = dict(base), set[str]()
    if not same_classes:
        fresh = {name: value for name, value in initial(classes, spec.seed).items() if name.startswith(f"{HEAD}/")}
        params |= fresh
        new |= set(fresh)
    bottleneck = bottleneck_of(base)
    if spec.adapter:
        if bottleneck not in (0, spec.adapter.bottleneck):
            raise refused("adapter.bottleneck", f"the base has adapters of {bottleneck} units already")
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


def structure(spec: Spec, start: Start, classes: int, device: str) -> Structure:
    """What has to be compiled for a spec."""
    attack = spec.adversarial
    untouched = spec.augmentation is None and spec.mixup == 0 and attack is None
    entry = first_trained(start.method.start(start.params, 0)) if untouched else FIRST
    if untouched and spec.dropout and entry == HEAD:
        entry = "dense2"  # which takes in what dropout has left of dense1
    return Structure(
        method=start.method,
        classes=classes,
        entry=entry,
        penalties=frozenset(name for name in ("l1", "l2", "l2_sp") if getattr(spec, name) > 0),
        attack={Fgsm: "pgd", Pgd: "pgd", Trades: "trades", Free: "free", Vat: "vat", type(None): None}[type(attack)],
        norm=attack.norm if isinstance(attack, Vat) else "linf",
        clean=not (isinstance(attack, Free) or (isinstance(attack, Fgsm | Pgd) and attack.weight == 1)),
        dropout=spec.dropout > 0,
        augment=spec.augmentation is not None,
        mixup=spec.mixup > 0,
        optimizer=spec.optimizer,
        device=device,
    )


def coefficients(spec: Spec, images: int) -> Coefficients:
    """The inputs of every step of a run on so many images."""
    attack, augmentation = spec.adversarial, spec.augmentation
    steps = 1 if attack is None or isinstance(attack, Fgsm | Free) else attack.steps
    return Coefficients(
        seed=spec.seed,
        # A small set still takes twenty steps an epoch: with fewer, a default job ends before it has learned anything.
        batch_size=min(spec.batch_size, max(8, images // 20)),
        replays=attack.replays if isinstance(attack, Free) else 1,
        attack_steps=steps,
        attack_size=1.25 if isinstance(attack, Fgsm) else STEP_SHARE / steps,
        epsilon=attack.epsilon if attack else 0.0,
        spread=attack.spread if isinstance(attack, Fgsm | Pgd) else 0.0,
        adversarial_weight=_weight(attack),
        l1=spec.l1, l2=spec.l2, l2_sp=spec.l2_sp, dropout=spec.dropout, label_smoothing=spec.label_smoothing,
        shift=augmentation.shift if augmentation else 0.0,
        rotate=float(np.radians(augmentation.rotate)) if augmentation else 0.0,
        scale=augmentation.scale if augmentation else 0.0,
        momentum=spec.momentum or 0.0,
        weight_decay=spec.weight_decay or 0.0,
    )  # fmt: skip


def _weight(attack: Adversarial | None) -> float:
    if attack is None or isinstance(attack, Free):
        return 0.0
    return attack.beta if isinstance(attack, Trades) else attack.weight


def schedule(spec: Spec, updates: int) -> np.ndarray:
    """What changes from update to update, (updates, 4) float32, see `train_step.SCHEDULE`."""
    rng = np.random.default_rng([spec.seed, 1])
    number = np.arange(updates)
    columns = {
        "rate": spec.learning_rate * learning_rates(spec.schedule, updates),
        # From the start, an attack at full strength can drive a net this small into one class.
        "reach": np.minimum(1.0, number / updates / RISE),
        "mix": rng.beta(spec.mixup, spec.mixup, updates) if spec.mixup else np.ones(updates),
        "t": number + 1,
    }
    return np.stack([columns[name] for name in SCHEDULE], axis=1).astype(np.float32)


def class_weights(labels: np.ndarray, classes: int) -> np.ndarray:
    """Inverse frequency, of mean one over the images: n / (classes * n_k) (King & Zeng 2001)."""
    counts = np.bincount(labels, minlength=classes)
    return (len(labels) / (classes * np.maximum(counts, 1))).astype(np.float32)


def fit(
    spec: Spec, start: Start, train: Split, validation: Split, *, classes: int,
    on_epoch: Callable[[dict[str, Any]], None] = lambda record: None,
) -> Fitted:  # fmt: skip
    """Train, on the device that is current.

    The last epoch's weights are kept; with early stopping those of the least validation cross-entropy; with an
    attack those of the best validation accuracy, clean and under the attack in the shares of the loss.

    Args:
        on_epoch: told every epoch's record.

    Raises:
        Diverged: the loss is no finite number any more.
    """
    fitted = train_step(structure(spec, start, classes, tf.constant(0.0).device))
    entry = fitted.structure.entry
    n = len(train.labels)
    c = coefficients(spec, n)
    weights = class_weights(train.labels, classes) if spec.class_weights else None
    fitted.load(start.params, spec.seed, lora_scale=start.lora_scale, new=start.new, class_weights=weights)
    seen = serve(start.params)
    features, held_out = (tf.constant(seen.part(split.images, until=entry)) for split in (train, validation))
    labels = tf.constant(train.labels)
    updates = -(-n // c.batch_size) * c.replays
    plan = schedule(spec, spec.epochs * updates)
    result = Fitted({}, {}, start.method, start.lora_scale)
    choice = Choice(spec, fitted, validation)
    rng = np.random.default_rng(spec.seed)
    seconds = 0.0
    for epoch in range(1, spec.epochs + 1):
        order = tf.constant(rng.permutation(n).astype(np.int32))
        done = (epoch - 1) * updates
        began = time.perf_counter()
        terms, wrong = fitted.epoch(features, labels, order, plan[done : done + updates], done, c)
        seconds += time.perf_counter() - began
        if wrong is not None:
            raise Diverged(f"the loss is no finite number in step {done + wrong + 1}, epoch {epoch}; {ADVICE}")
        # `free`, and `pgd` of weight 1, have no clean part.
        cross_entropy = terms.get("data_loss", terms.get("adversarial_loss", 0.0))
        if cross_entropy > EXPLODED:
            raise Diverged(f"the loss is {cross_entropy:.3g} after step {done + updates}, epoch {epoch}; {ADVICE}")
        logits = seen.use(fitted.params()).part(held_out, entry)
        record = {
            "epoch": epoch, **terms, "validation_accuracy": evaluate.accuracy(logits, validation.labels),
            "validation_cross_entropy": evaluate.cross_entropy(logits, validation.labels),
        }  # fmt: skip
        if not np.isfinite(logits).all():
            raise Diverged(f"the weights are no finite numbers after step {done + updates}, epoch {epoch}; {ADVICE}")
        verdict = choice.judge(record, seen, warm=plan[done + updates - 1, 1] >= 1)
        if len(fitted.terms()) > 1:
            some = order[:SHARE_IMAGES]
            shares = fitted.shares(tf.gather(features, some), tf.gather(labels, some), c)
            values = {name: {"value": terms[name], "share": shares[name]} for name in terms}
            result.gradient_shares.append({"epoch": epoch, **values})
        result.history.append(record)
        on_epoch(record)
        if verdict:
            result.ended_by = verdict
            break
    result.overfitted_epoch = epoch if result.ended_by == "catastrophic_overfitting" else choice.never_robust
    result.kept_epoch = choice.restore(epoch)
    result.params = {name: np.asarray(value) for name, value in fitted.params().items()}
    result.trained = fitted.snapshot()
    result.images_per_second = len(result.history) * n * c.replays / seconds
    return result


class Choice:
    """Which epoch's weights are kept, and when training ends before its time."""

    def __init__(self, spec: Spec, fitted: TrainStep, validation: Split) -> None:
        self._spec = spec
        self._fitted = fitted
        self._attack = None if isinstance(spec.adversarial, Vat) else spec.adversarial
        some = np.unique(np.linspace(0, len(validation.labels) - 1, PROBE_IMAGES).astype(int))
        self._images, self._labels = tf.gather(validation.images, some), validation.labels[some]
        self._best: tuple[float, int, Arrays] = (-np.inf, 0, {})
        self._improved, self._mark = 0, -np.inf  # last epoch better by `min_delta`, and its score
        self._most_robust = 0.0
        self._first_fall = 0

    @property
    def never_robust(self) -> int | None:
        """First epoch, after the warm-up, that withstood FGSM and not PGD, in a run that never withstood PGD."""
        return self._first_fall if self._first_fall and self._most_robust < ROBUST else None

    def judge(self, record: dict[str, Any], seen: Network, *, warm: bool) -> str:
        """Why training shall end now, or nothing. Adds the accuracy under attack to the record.

        FGSM can be overfitted: the network learns to mask the one step, and falls to any attack of several (Wong et
        al. 2020; Andriushchenko & Flammarion 2020). A PGD probe shows it.
        """
        spec, score, patient = self._spec, -record["validation_cross_entropy"], _patience(self._spec)
        overfitted = False
        if self._attack:
            epsilon = tf.constant(self._attack.epsilon, tf.float32)
            probe = tf.constant(PROBE_STEPS), tf.constant([spec.seed, 0]), tf.constant(False)
            labels = tf.constant(self._labels)
            _, margins = seen.apgd(self._images, labels, epsilon, *probe)
            robust = float(np.mean(margins.numpy() <= 0))
            fast = evaluate.accuracy(seen.fgsm(self._images, labels, epsilon).numpy(), self._labels)
            record |= {"validation_accuracy_under_pgd": robust, "validation_accuracy_under_fgsm": fast}
            falls = warm and fast > robust + ROBUST
            overfitted = falls and self._most_robust >= ROBUST and robust < self._most_robust / 2
            if falls and robust < ROBUST / 2:
                self._first_fall = self._first_fall or record["epoch"]
            self._most_robust = max(self._most_robust, robust) if warm else 0.0
            share = self._attack.weight if isinstance(self._attack, Fgsm | Pgd) else 1.0
            score = (1 - share) * record["validation_accuracy"] + share * robust
        elif not spec.early_stopping:
            return ""
        # As in Keras, against the last improvement that counted: the best score may creep up by less than `min_delta`.
        if score > self._mark + (spec.early_stopping.min_delta if spec.early_stopping else 0.0):
            self._improved, self._mark = record["epoch"], score
        if score >= self._best[0]:  # the later of equals
            self._best = (score, record["epoch"], self._fitted.snapshot())
        if overfitted:
            return "catastrophic_overfitting"
        return "early_stopping" if record["epoch"] - self._improved >= patient else ""

    def restore(self, last: int) -> int:
        """Put the best weights back; their epoch."""
        _, epoch, trained = self._best
        if trained:
            self._fitted.restore(trained)
        return epoch or last


def _patience(spec: Spec) -> float:
    """Epochs without improvement before stopping."""
    return spec.early_stopping.patience if spec.early_stopping else np.inf


def warnings(gradient_shares: list[dict[str, Any]], spec: Spec, *, zeros: bool) -> list[dict[str, str]]:
    """Regularizers with next to no share in the update, or that leave none to the data.

    Strengths that are the defaults are not warned of, and a data loss near zero is no sign that a penalty is too
    strong: when all images are fitted, the penalty is what is left of the update.

    Args:
        gradient_shares: value and share of every term, an epoch each.
        zeros: L1 has made exact zeros, so it is not negligible however small its share.
    """
    found = []
    for name in gradient_shares[0] if gradient_shares else ():
        if name in ("epoch", "data_loss") or _is_default(spec, name):
            continue
        shares = [record[name]["share"] for record in gradient_shares]
        share = float(np.median(shares))
        if share < NEGLIGIBLE and not (name == "l1" and zeros):
            text = f"{name} makes up {share:.1g} of the update, which is negligible; raise it or leave it out"
            found.append({"term": name, "kind": "negligible", "message": text})
        learning = [share for share, record in zip(shares, gradient_shares, strict=True) if _data_loss(record) > FITTED]
        if name != "adversarial_loss" and len(learning) > len(shares) / 2 and float(np.median(learning)) > DOMINANT:
            text = f"{name} makes up {np.median(learning):.0%} of the update and dominates the data loss; lower it"
            found.append({"term": name, "kind": "dominant", "message": text})
    return found


def _is_default(spec: Spec, name: str) -> bool:
    field = Spec.model_fields.get(name)  # none of `adversarial_loss`, which is there only where it was asked for
    return field is not None and getattr(spec, name) == field.default


def _data_loss(record: dict[str, Any]) -> float:
    term: dict[str, float] = record.get("data_loss") or record["adversarial_loss"]
    return term["value"]
