"""The fine-tuning spec: one model with the bounds and the meaning of every field, for API, command and trainer."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from store.validation import in_words

_NAME = "1 to 64 of the characters a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
MODEL_NAME = in_words(r"^[a-z0-9][a-z0-9._-]{0,63}$", _NAME)
BASE_NAME = in_words(r"^[a-z0-9][a-z0-9._-]{0,63}(:[1-9][0-9]{0,8})?$", "a model's name, or name:version")
FEW = 160  # images that determine the smallest batch
FEWEST_OF_A_CLASS = 3  # images without which nothing can be chosen by predictions on held-out ones
Layer = Literal["conv1", "conv2", "dense1", "dense2"]
Method = Literal["full", "head", "bias", "lora", "adapter", "ia3"]


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"names {value!r} twice")
    return values


def _with_accuracy(values: tuple[str, ...]) -> tuple[str, ...]:
    if "accuracy" not in values:
        raise ValueError("must contain 'accuracy'")
    return values


def _not_null(value: Any) -> Any:
    if value is None:
        raise ValueError("must be a number, not null; 0 switches it off")
    return value


Layers = Annotated[tuple[Layer, ...], AfterValidator(_distinct), Field(min_length=1, strict=False)]
Strength = Annotated[float, BeforeValidator(_not_null)]


class Strict(BaseModel):
    """Refuses unknown fields and conversions; immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Lora(Strict):
    """Low-rank adaptation (Hu et al. 2021): W = W0 + alpha / rank * A B."""

    rank: int = Field(4, ge=1, le=64, description="Rank of the update of each target layer.")
    alpha: float = Field(8.0, gt=0, le=1024, description="Scale of the update, divided by the rank.")
    targets: Layers = Field(("conv2", "dense1", "dense2"), description="Layers that get an update.")


class Bias(Strict):
    """BitFit (Ben Zaken et al. 2022): biases and the classifier."""

    targets: Layers = Field(get_args(Layer), description="Layers whose biases are trained.")


class Ia3(Strict):
    """IA3 (Liu et al. 2022): a learned scale for every output channel or unit of a target layer, and the classifier."""

    targets: Layers = Field(get_args(Layer), description="Layers whose activations are scaled.")


class Adapter(Strict):
    """Adapters (Houlsby et al. 2019): x + up(relu(down(x))) after each dense layer, and the classifier."""

    bottleneck: int = Field(16, ge=1, le=128, description="Units between down and up.")


OPTIONS = {"lora": Lora, "bias": Bias, "ia3": Ia3, "adapter": Adapter}  # method -> its options


class Attack(Strict):
    """What the L-infinity attacks share: no pixel changes by more than epsilon."""

    epsilon: float = Field(0.1, ge=0, le=1, description="Largest change of a pixel, in units of [0, 1]; 0 is off.")


class Fgsm(Attack):
    """One step of 1.25 epsilon from a random start (Wong et al. 2020)."""

    attack: Literal["fgsm"] = Field("fgsm", description="One step from a random start.")
    weight: float = Field(0.5, gt=0, le=1, description="Share of the adversarial loss; the rest is the clean loss.")
    spread: float = Field(
        1.0, ge=0, le=1,
        description="Every image draws its own epsilon between (1 - spread) epsilon and epsilon; 0 is one for all.",
    )  # fmt: skip


class Pgd(Attack):
    """Projected gradient ascent from a random start (Madry et al. 2018)."""

    attack: Literal["pgd"] = Field(description="Several steps from a random start.")
    steps: int = Field(7, ge=1, le=100, description="Steps of the attack, each of 2.5 epsilon / steps.")
    weight: float = Field(1.0, gt=0, le=1, description="Share of the adversarial loss; the rest is the clean loss.")
    spread: float = Field(0.0, ge=0, le=1, description="As with `fgsm`.")


class Trades(Attack):
    """Clean loss + beta * KL(clean prediction, worst prediction nearby) (Zhang et al. 2019)."""

    attack: Literal["trades"] = Field(description="Several steps away from the clean prediction.")
    steps: int = Field(7, ge=1, le=100, description="Steps of the attack, each of 2.5 epsilon / steps.")
    beta: float = Field(1.0, gt=0, le=100, description="Weight of the divergence; use more with more data.")


class Free(Attack):
    """Every batch is replayed, and one gradient serves the weights and the attack (Shafahi et al. 2019)."""

    attack: Literal["free"] = Field(description="One step in each replay.")
    replays: int = Field(4, ge=2, le=16, description="Updates for each batch (m); an epoch has m times as many.")


class Vat(Strict):
    """Clean loss + weight * KL to the prediction where it changes most; needs no labels (Miyato et al. 2019)."""

    attack: Literal["vat"] = Field(description="Power iteration; needs no labels.")
    norm: Literal["l2", "linf"] = Field("l2", description="Norm of the perturbation of an image.")
    epsilon: float = Field(1.0, ge=0, le=28, description="Its size: Euclidean, or of a pixel (then at most 1).")
    steps: int = Field(1, ge=1, le=10, description="Power iterations.")
    weight: float = Field(1.0, gt=0, le=100, description="Weight of the divergence.")

    @model_validator(mode="after")
    def _pixels_end_at_one(self) -> Self:
        if self.norm == "linf" and self.epsilon > 1:
            raise ValueError("epsilon: must be at most 1 with the norm linf")
        return self


ATTACK_NAMES = ("fgsm", "pgd", "trades", "free", "vat")


def _attack(value: Any) -> Any:
    return value.get("attack", "fgsm") if isinstance(value, Mapping) else getattr(value, "attack", None)


Adversarial = Annotated[
    Annotated[Fgsm, Tag("fgsm")]
    | Annotated[Pgd, Tag("pgd")]
    | Annotated[Trades, Tag("trades")]
    | Annotated[Free, Tag("free")]
    | Annotated[Vat, Tag("vat")],
    Discriminator(_attack),
]


class Augmentation(Strict):
    """Small random distortions of the training images."""

    shift: float = Field(0.0, ge=0, le=8, description="Largest shift along each axis, in pixels.")
    rotate: float = Field(0.0, ge=0, le=180, description="Largest turn, in degrees.")
    scale: float = Field(0.0, ge=0, le=0.5, description="Largest relative change of size along each axis.")
    flip: bool = Field(False, description="Mirror every other image, left to right.")
    contrast: float = Field(
        0.0, ge=0, le=0.9, description="Largest relative change of contrast; brightness changes by up to half of it."
    )
    cutout: int = Field(0, ge=0, le=20, description="Side of a square that is blanked at a random place, in pixels.")


class EarlyStopping(Strict):
    """Stop when validation loss (with an attack: accuracy under it) stops improving, and keep the best weights."""

    patience: int = Field(5, ge=1, le=1000, description="Epochs without improvement before stopping.")
    min_delta: float = Field(0.0, ge=0, description="Smallest improvement that counts.")


Objective = Literal["accuracy", "robust_accuracy", "sparsity", "calibration"]
OBJECTIVES: tuple[str, ...] = get_args(Objective)
Objectives = Annotated[
    tuple[Objective, ...], AfterValidator(_distinct), AfterValidator(_with_accuracy), Field(min_length=1, strict=False)
]
_LIMIT = in_words(
    rf"^({'|'.join(OBJECTIVES)}) ?>= ?(0(\.[0-9]+)?|1(\.0+)?)$",
    f"such as 'robust_accuracy >= 0.6', with a share and one of {', '.join(OBJECTIVES)}",
)
Limit = Annotated[str, Field(pattern=_LIMIT)]


class Choose(Strict):
    """How one of several recipes is picked, where the search has several objectives."""

    weights: dict[Objective, Annotated[float, Field(ge=0, le=1000)]] = Field(
        default_factory=dict, description="The recipe with the largest weighted sum of these objectives is chosen."
    )
    limits: tuple[Limit, ...] = Field(
        (), strict=False,
        description="Only recipes within these limits are chosen from; if there are none, the one that comes nearest.",
    )  # fmt: skip

    def bounds(self) -> list[tuple[str, float]]:
        """The limits as names and least values."""
        return [(name.strip(), float(least)) for name, _, least in (limit.partition(">=") for limit in self.limits)]


class Search(Strict):
    """Bounds of the automatic search."""

    trials: int = Field(16, ge=1, le=1000, description="Recipes to try.")
    folds: int | None = Field(
        None, ge=2, le=10,
        description="Parts of the images, each of which is held out once; null for 5, or for 3 from 200 images on.",
    )  # fmt: skip
    seconds: float | None = Field(
        None, gt=0, le=86400,
        description="Time for the search and the training of its choice; null for as long as the trials take.",
    )  # fmt: skip
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Seed of the recipes that are sampled.")
    objective: Objectives = Field(
        ("accuracy",),
        description="What is sought. With several, the report has their Pareto front. `robust_accuracy` is that under "
        "an attack of `epsilon`, `sparsity` the share of zeros in the kernels, `calibration` 1 - the expected "
        "calibration error.",
    )  # fmt: skip
    epsilon: float = Field(0.1, gt=0, le=1, description="Size of the attack of `robust_accuracy`, in units of [0, 1].")
    choose: Choose | None = Field(None, description="How one is chosen; null gives several objectives equal weights.")
    preview: bool = Field(
        True, description="Publish a version from a quick recipe first, if the model has none; the choice replaces it."
    )

    @model_validator(mode="after")
    def _chooses_by_its_objectives(self) -> Self:
        if self.epsilon != Search.model_fields["epsilon"].default and "robust_accuracy" not in self.objective:
            raise ValueError("epsilon: is that of 'robust_accuracy', which is not in `objective`")
        if self.choose:
            named = [*self.choose.weights, *(name for name, _ in self.choose.bounds())]
            if unknown := [name for name in named if name not in self.objective]:
                raise ValueError(f"choose: names {unknown[0]!r}, which is not in `objective`")
            if self.choose.weights and not any(self.choose.weights.values()):
                raise ValueError("choose: all weights are 0")
            if not named:
                raise ValueError("choose: is empty; give weights or limits, or leave it out")
            if len(self.objective) == 1:
                raise ValueError("choose: is for several objectives; name these in `objective`")
        return self


Share = Annotated[float, Field(ge=0, le=1)]


def _recall(value: Any) -> Any:
    shares = list(value.values()) if isinstance(value, dict) else [value]
    numbers = all(isinstance(share, int | float) and not isinstance(share, bool) for share in shares)
    if not (numbers and shares and all(0 <= share <= 1 for share in shares)):
        raise ValueError("must be a number from 0 to 1, or an object with such a number for each of some classes")
    return {name: float(share) for name, share in value.items()} if isinstance(value, dict) else float(value)


_RECALL_SCHEMA = {"type": "number", "minimum": 0, "maximum": 1}
Recall = Annotated[
    float | dict[str, float],
    PlainValidator(_recall),
    WithJsonSchema(
        {"anyOf": [_RECALL_SCHEMA, {"type": "object", "additionalProperties": _RECALL_SCHEMA, "minProperties": 1}]}
    ),
]


class Gate(Strict):
    """Conditions for a version to get its label. All are about held-out images; null leaves one out."""

    accuracy: Share | None = Field(None, description="Least accuracy.")
    robust_accuracy: Share | None = Field(None, description="Least accuracy under the quick attack of the report.")
    calibration_error: Share | None = Field(None, description="Largest expected calibration error.")
    generalization_gap: Share | None = Field(None, description="Most by which accuracy in training may be higher.")
    forgetting: Share | None = Field(
        None, description="Largest loss of accuracy on the base's own task, which is then measured before publishing."
    )
    class_recall: Recall | None = Field(
        None, description="Least recall: a number for every class, or an object with one for each of some classes."
    )
    not_worse: bool = Field(
        True,
        description="Not clearly worse than the version that `stable` stands for, on the same held-out images "
        "and on those that were held out for that version (McNemar's test, 5%).",
    )
    same_classes: bool = Field(True, description="The classes of the version that `stable` stands for.")

    @classmethod
    def stored(cls, values: Mapping[str, Any] | None) -> Self | None:
        """The gate in stored JSON, without the conditions that this release does not know; None if there is none."""
        known = {name: value for name, value in (values or {}).items() if name in cls.model_fields}
        return cls.model_validate_json(json.dumps(known)) if known else None


class Spec(Strict):
    """How to fine-tune. Every field has a default; zero or null switches an effect off."""

    method: Method = Field(
        "lora",
        description="What is trained: `full` everything, `head` the classifier; or the classifier and `bias` biases, "
        "`lora` low-rank updates, `adapter` bottlenecks after the dense layers, `ia3` scales of activations. All but "
        "`adapter` are merged back into a plain LeNet-5.",
    )
    lora: Lora | None = Field(None, description="Options of `lora`; only with that method.")
    bias: Bias | None = Field(None, description="Options of `bias`; only with that method.")
    ia3: Ia3 | None = Field(None, description="Options of `ia3`; only with that method.")
    adapter: Adapter | None = Field(None, description="Options of `adapter`; only with that method.")
    head: Literal["keep", "new"] = Field(
        "keep",
        description="`keep` starts from the base's classifier if the data has the base's classes; `new` never does: "
        "use it where '0' to '9' are names of something else.",
    )
    base: str = Field(
        "lenet5",
        pattern=BASE_NAME,
        description="Published model to start from, `name` or `name:version`.",
    )
    l1: Strength = Field(
        0.0, ge=0, le=1,
        description="Lasso: lambda * sum |w| on the effective kernels, no biases. Kernels that are trained directly "
        "get exact zeros (proximal steps); those under `lora` or `ia3` shrink, but get no exact zeros (subgradient).",
    )  # fmt: skip
    l2: Strength = Field(
        1e-4, ge=0, le=10, description="Ridge: alpha / 2 * sum w^2 on the effective kernels, no biases."
    )
    l2_sp: Strength = Field(
        0.0, ge=0, le=10,
        description="alpha / 2 * sum (w - w_base)^2 on the effective kernels; from zero for a new classifier.",
    )  # fmt: skip
    dropout: Strength = Field(0.2, ge=0, le=0.9, description="Share of the dense units set to zero in training.")
    label_smoothing: Strength = Field(
        0.0, ge=0, lt=1, description="Share of the target that is spread over all classes."
    )
    mixup: Strength = Field(
        0.0, ge=0, le=10, description="Images and labels are mixed in pairs, with shares drawn from Beta(mixup, mixup)."
    )
    augmentation: Augmentation | None = Field(None, description="Random shifts, turns and scalings, or null.")
    adversarial: Adversarial | None = Field(None, description="Adversarial training, or null.")
    epochs: int = Field(20, ge=1, le=1000, description="Passes over the training images.")
    batch_size: int = Field(
        64,
        ge=1,
        le=4096,
        description="Largest batch; small data sets use smaller ones, see `min_steps`.",
    )
    min_steps: int = Field(
        20, ge=1, le=100,
        description="Steps of an epoch for which small data sets get smaller batches; fewer than 160 images get "
        "batches as large as 160 do. Half as many make `full` cheaper and no worse at its learning rate of 0.01.",
    )  # fmt: skip
    learning_rate: float = Field(
        1e-3, gt=0, le=1,
        description="Peak learning rate. Unless everything is trained, the classifier, LoRA's A, adapters and scales "
        "learn 4 times as fast, and LoRA's B 16 times.",
    )  # fmt: skip
    schedule: Literal["constant", "cosine", "one_cycle"] = Field(
        "cosine",
        description="Learning rate: `cosine` decays it to zero, `one_cycle` warms up over 30% first.",
    )
    ema: Strength = Field(
        0.0, ge=0, lt=1,
        description="Serve the exponential moving average of the weights; the share of the old average in each update, "
        "such as 0.99.",
    )  # fmt: skip
    optimizer: Literal["adam", "adamw", "sgd"] = Field("adam", description="`sgd` has Nesterov momentum.")
    momentum: float | None = Field(None, ge=0, lt=1, description="Of `sgd`, by default 0.9.")
    weight_decay: float | None = Field(
        None, ge=0, le=1, description="Of `adamw`, by default 0.01: decoupled decay of kernels, which is not L2."
    )
    class_weights: Literal["auto"] | None = Field(
        None, description="`auto` gives images of rare classes more weight, inversely to the frequency of the class."
    )
    validation_split: float = Field(
        0.2, ge=0, le=0.5,
        description="Share of every class held out for the report; the default takes at least one image of each. With "
        "`folds` it may be 0: then all images are trained on, and the report rests on the out-of-fold predictions.",
    )  # fmt: skip
    folds: int | None = Field(
        None, ge=2, le=10, description="Also cross-validate on this many folds, so that every image is scored."
    )
    calibrate: Annotated[bool, BeforeValidator(lambda value: value is None or value)] = Field(
        True,
        description="Divide the classifier by the temperature that suits the held-out predictions best (Guo et al. "
        "2017): the same classes, with honest probabilities.",
    )
    coverage: float | None = Field(
        0.95, gt=0, lt=1,
        description="Predictions come with the set of plausible classes (conformal prediction), which has the right "
        "one for this share of the images; null for no sets.",
    )  # fmt: skip
    twin: bool = Field(
        False,
        description="Also train the same network on the same images for as long without any regularizer, so that the "
        "report can say what regularization bought. It is not published.",
    )
    early_stopping: EarlyStopping | None = Field(None, description="Stop early and keep the best weights, or null.")
    checkpoints: int = Field(
        0, ge=0, le=10,
        description="Evenly spaced epochs of the final training, the last one among them, whose weights are kept so "
        "that they can be published later.",
    )  # fmt: skip
    search: Search | None = Field(
        None,
        description="Bounds of the search for the fields that are `auto`, which with `search` alone are all that are "
        "not given; null if nothing is searched.",
    )
    gate: Gate | None = Field(
        None,
        description="What the version must fulfil to get its label; null for the model's gate, or else `Gate` with its "
        "defaults: not clearly worse than the version before.",
    )
    polarity: Literal["auto", "light_on_dark", "dark_on_light"] = Field(
        "auto",
        description="Whether foreground is lighter or darker than background. `auto` decides from the borders. "
        "The exported graph applies it.",
    )
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="`gpu` fails if there is none.")
    seed: int = Field(
        0, ge=0, le=2**31 - 1,
        description="Seed of everything random. The same seed, data and machine give the same weights, bit for bit.",
    )  # fmt: skip

    @field_validator(*OPTIONS, "momentum", "weight_decay", mode="after")
    @classmethod
    def _belongs(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse options of a method or optimizer that was not chosen."""
        field, chosen = OWNERS[str(info.field_name)]
        owner = info.data.get(field, chosen)  # missing where it is itself refused
        if value is not None and owner != chosen:
            raise ValueError(f"is an option of {field} {chosen!r}, but the {field} is {owner!r}; leave it out")
        return value

    @model_validator(mode="after")
    def _fill_in(self) -> Self:
        """Fill in the defaults of what was chosen, and set what is off to null."""
        filled: dict[str, Any] = {}
        if self.method in OPTIONS and getattr(self, self.method) is None:
            filled[self.method] = OPTIONS[self.method]()
        if self.optimizer == "sgd" and self.momentum is None:
            filled["momentum"] = 0.9
        if self.optimizer == "adamw" and self.weight_decay is None:
            filled["weight_decay"] = 0.01
        if self.adversarial is not None and self.adversarial.epsilon == 0:
            filled["adversarial"] = None
        if self.augmentation == Augmentation():
            filled["augmentation"] = None
        for name, value in filled.items():
            object.__setattr__(self, name, value)
        return self


OWNERS = {method: ("method", method) for method in OPTIONS} | {
    "momentum": ("optimizer", "sgd"), "weight_decay": ("optimizer", "adamw")
}  # fmt: skip


SEARCHED = (
    "method", "head", "learning_rate", "epochs", "schedule", "l1", "l2", "l2_sp", "dropout", "label_smoothing", "mixup",
    "augmentation", "ema", "min_steps",
)  # fmt: skip


_AROUND = {"checkpoints": 0, "calibrate": False}  # of what happens beside training


def unregularized(spec: Spec) -> Spec:
    """The same method, data, seed and epochs without anything that regularizes."""
    off: dict[str, Any] = dict.fromkeys(("augmentation", "adversarial", "early_stopping"))
    off |= dict.fromkeys(("l1", "l2", "l2_sp", "dropout", "label_smoothing", "mixup", "ema"), 0.0)
    decay = None if spec.weight_decay is None else 0.0
    return spec.model_copy(update={**off, "weight_decay": decay, **_AROUND})


def regularizes(spec: Spec) -> bool:
    """Tell whether anything in the spec regularizes."""
    return unregularized(spec) != spec.model_copy(update=_AROUND)


def pinned(spec: Spec, base: str) -> dict[str, Any]:
    """The spec as JSON values, with its base as `name:version`."""
    return described(spec) | {"base": base}


def described(spec: Spec) -> dict[str, Any]:
    """The spec as JSON values."""
    result: dict[str, Any] = json.loads(spec.model_dump_json())
    return result


def batch_size(spec: Spec, images: int) -> int:
    """Images of a batch.

    With too few steps an epoch, a default job on a small set ends before it has learned anything.
    """
    return min(spec.batch_size, max(FEW, images) // spec.min_steps)


def kept_epochs(spec: Spec) -> frozenset[int]:
    """The epochs whose weights a training keeps as checkpoints, evenly spaced, with its last one among them."""
    return frozenset(-(-number * spec.epochs // spec.checkpoints) for number in range(1, spec.checkpoints + 1))
