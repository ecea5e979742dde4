"""Records that several processes share: what a worker writes, the store keeps and the gateway shows.

They are frozen, and read leniently: a record of another release keeps its unknown fields, and loses those whose value
does not fit any more. `dump` gives back what was set and nothing else, so a record survives the round trip unchanged.
"""

import copy
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

log = logging.getLogger("temper.store")

PREDICT, FINETUNE, ADMIN = SCOPES = ("predict", "finetune", "admin")  # of API keys
DEFAULT_TENANT = "default"  # whose everything is where there are no keys


def public_name(stored: str) -> str:
    """The name by which its tenant calls a stored model, `tenant~model`; also of `name:version`."""
    return stored.partition("~")[2] or stored


def owner_of(stored: str) -> str:
    """Whose a stored model is; the base, which is everyone's, counts as the default tenant's."""
    tenant, separator, _ = stored.partition("~")
    return tenant if separator else DEFAULT_TENANT


class Record(BaseModel):
    """What all of them share."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> Self:
        """The record in stored JSON, without the fields that this release cannot read."""
        try:
            return cls.model_validate(stored)
        except ValidationError as exc:
            log.warning(
                "%s: cannot read %s", cls.__name__, ", ".join(".".join(map(str, e["loc"])) for e in exc.errors())
            )
        fields = copy.deepcopy(dict(stored))
        while True:
            try:
                return cls.model_validate(fields)
            except ValidationError as exc:
                _remove(fields, exc.errors()[0]["loc"])

    def dump(self) -> dict[str, Any]:
        """As JSON: the fields that were set, and the unknown ones."""
        return self.model_dump(mode="json", exclude_unset=True)


def _remove(fields: dict[str, Any], location: Sequence[int | str]) -> None:
    """Remove the value at a location, or the whole field if the location is not a path in the JSON."""
    inner: Any = fields
    try:
        for step in location[:-1]:
            inner = inner[step]
        del inner[location[-1]]
    except (KeyError, IndexError, TypeError):
        del fields[str(location[0])]


class InputForm(Record):
    """The images that a version takes: grey, `height` by `width` pixels."""

    height: int = 28
    width: int = 28
    channels: int = 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of one image."""
        return self.height, self.width, self.channels

    @property
    def pixels(self) -> int:
        """Numbers of one image."""
        return self.height * self.width * self.channels


GREY_28 = InputForm()  # the only form today


class Finding(Record):
    """Something that is wrong with a data set; each image is in one finding at most.

    `kind` is `conflict` (equal to an image of another class), `leak` (to validate or test on, and a near copy of one to
    train on), `blank_after_alpha` (shows something until its transparency becomes white), `constant` (shows next to
    nothing), `duplicate` (equal to another image of its class), `unread` (arrays that are not read; no images) or
    `layout` (folders that may be meant otherwise).
    """

    kind: str = ""
    message: str = ""  # in words, with the first images
    images: int = 0
    listed: list[dict[str, Any]] = Field(default_factory=list)  # the first: "file" or "index", "class", perhaps "part"


class DatasetCard(Record):
    """A prepared data set. `id` is the SHA-256 of its content: of images, labels and classes, not of file names."""

    id: str = ""
    prepared: str = ""  # SHA-256 of content and file names, which names its file; the id where images have no names
    kept: str | None = None  # the data set or file by whose id a job was given it; None if it was uploaded with the job
    filename: str = ""
    images: int = 0
    classes: dict[str, int] = Field(default_factory=dict)  # images of each class
    polarity: str = "light_on_dark"
    validation: "DatasetCard | None" = None  # uploaded with it, to measure on
    test: "DatasetCard | None" = None  # uploaded with it, and scored apart: nothing is trained or chosen on these

    findings: list[Finding] = Field(default_factory=list)  # what is wrong with images of any part
    excluded: int = 0  # images of the upload that were left out, as the client wished
    corrections: list[str] = Field(default_factory=list)  # what each of the last images was taken for

    @property
    def warnings(self) -> list[str]:
        """What is wrong with it, in words."""
        return [finding.message for part in self.parts for finding in part.findings]

    @property
    def parts(self) -> "tuple[DatasetCard, ...]":
        """It, and the images to validate and to test on where these are apart."""
        return (self, *(part for part in (self.validation, self.test) if part))

    @property
    def content(self) -> str:
        """SHA-256 of all of its parts; its id if there is but one."""
        if len(self.parts) == 1:
            return self.id
        ids = [part and part.id for part in (self, self.validation, self.test)]
        return hashlib.sha256(json.dumps(ids).encode()).hexdigest()

    @property
    def file(self) -> str:
        """Name of the file of prepared images, without those of the other parts."""
        return f"{self.prepared or self.id}.npz"


class DatasetReport(Record):
    """What is worth knowing of an upload before training on it.

    An image is listed as {"file" or "index", "class"}, with a "reason" where it is near-constant.
    """

    images: int = Field(0, description="Number of images to train on.")
    validation_images: int = Field(0, description="Number of images to validate on, where the upload has them apart.")
    test_images: int = Field(0, description="Likewise to test on.")
    classes: dict[str, int] = Field(default_factory=dict, description="Images to train on of each class.")
    smallest: tuple[int, int] = Field(
        (0, 0), description="Width and height of the image with the fewest pixels, as it was uploaded."
    )
    largest: tuple[int, int] = Field((0, 0), description="Likewise of the one with the most.")
    sizes: int = Field(0, description="How many different sizes there are.")
    duplicates: int = Field(
        0, description="Images that equal another one at 28x28 pixels, without the first of each such group."
    )
    conflicts: int = Field(0, description="Duplicates whose class is not that of the first of their group.")
    duplicate_groups: list[list[dict[str, Any]]] = Field(
        default_factory=list, description="The first groups of equal images, those of several classes before others."
    )
    near_constant: int = Field(0, description="Images that show next to nothing.")
    near_constant_images: list[dict[str, Any]] = Field(default_factory=list, description="The first of these.")
    blank_after_alpha: int = Field(
        0, description="Of these, the images that show something until their transparency becomes white."
    )
    blank_after_alpha_images: list[dict[str, Any]] = Field(default_factory=list, description="The first of these.")


class Abstention(Record):
    """When a version should rather not name one class; measured on images that were held out."""

    coverage: float | None = None  # share of prediction sets that have the right class; None without sets
    threshold: float = 0.0  # least probability of a class in a set
    limits: tuple[float, float] | None = None  # squared distances, by features and by pixels, that are 1 in the answers
    false_alarms: float = 0.0  # share of images of the data that are beyond one of them
    images: int = 0  # that were held out

    @classmethod
    def rule(cls, card: Mapping[str, Any]) -> Self:
        """What a report card says of it, without what else was measured."""
        return cls.read({name: value for name, value in card.items() if name in Abstention.model_fields})


class Manifest(Record):
    """What a published version is; also `assets.extra/manifest.json` in its directory."""

    classes: tuple[str, ...] = ()  # in the order of the probabilities
    polarity: str = "light_on_dark"
    base: str | None = None  # name:version, None for a pretrained model
    base_sha256: str | None = None
    sha256: str = ""  # of the effective parameters
    spec: dict[str, Any] = Field(default_factory=dict)  # as asked for, with "auto" where it was searched
    resolved_spec: dict[str, Any] | None = None  # that it was trained with; None in those of earlier releases
    dataset: DatasetCard | None = None
    job: str | None = None
    adapter_bottleneck: int = 0  # units; 0 without adapters
    preview: bool = False  # from a quick recipe, while its job was searching for a better one
    checkpoint: dict[str, Any] | None = None  # if it is one of another job's: that job and the epoch
    abstention: Abstention | None = None  # None in those of earlier releases
    input: InputForm = GREY_28

    @property
    def trained_with(self) -> dict[str, Any]:
        """The spec of the training; a version of an earlier release has only what was asked for."""
        return self.resolved_spec or self.spec

    @property
    def grouped(self) -> bool:
        """Tell whether near copies were held out together; those of earlier releases were not."""
        return self.abstention is not None


class Epoch(Record):
    """One epoch of a run. Losses are means over its steps, in nats; a term that does not take part is absent."""

    epoch: int = 0
    data_loss: float | None = None
    adversarial_loss: float | None = None
    l1: float | None = None
    l2: float | None = None
    l2_sp: float | None = None
    validation_accuracy: float | None = None
    validation_cross_entropy: float | None = None
    validation_accuracy_under_pgd: float | None = None
    validation_accuracy_under_fgsm: float | None = None


class Best(Record):
    """The best trial so far. The interval is that of the accuracy (95%, Wilson 1927), the cross-entropy in nats."""

    trial: int = 0
    accuracy: float = 0.0
    accuracy_interval: tuple[float, float] = (0.0, 1.0)
    cross_entropy: float = 0.0


class Progress(Epoch):
    """How far a job is: its last trial or epoch, and when each step of the publication was done (Unix seconds)."""

    round: int | None = None  # of the search: more epochs and folds for fewer trials
    trial: int | None = None  # its number; it was trained for `epochs` on each of `folds`
    tried: int | None = None  # of `trials` in this round
    trials: int | None = None
    best: Best | None = None
    epochs: int | None = None
    fold: int | None = None
    folds: int | None = None
    publishing: dict[str, float] = Field(default_factory=dict)


class Score(Record):
    """Accuracy on `images` images, with its 95% interval (Wilson 1927), and cross-entropy in nats."""

    images: int = 0
    accuracy: float = 0.0
    accuracy_interval: tuple[float, float] = (0.0, 1.0)
    cross_entropy: float = 0.0


class Validation(Score):
    """The score on held-out images, by class.

    If all images were trained on, `out_of_fold` says that each was classified by a network of a fold.
    """

    out_of_fold: bool = False

    classification_report: dict[str, Any] = Field(default_factory=dict)
    confusion_matrix: list[list[int]] = Field(default_factory=list)  # rows are true classes


class ScoreApart(Score):
    """The score on the images of a test part, which nothing was trained or chosen on."""

    expected_calibration_error: float = 0.0
    covered: float | None = None  # share of images whose class is in their set
    none_of_these: float | None = None  # share of images that are called unlike the data


class AbstentionCard(Abstention):
    """The rule, and what it comes to on the images that were held out.

    `coverage_interval` is what coverage may turn out to be for other images (95%), because so few were held out.
    """

    coverage_interval: tuple[float, float] | None = None
    mean_size: float | None = None  # classes of a set
    single: float | None = None  # share of sets with one class
    empty: float | None = None


class Difference(Record):
    """A figure of the version less that of its twin on the same images, with its 95% interval."""

    value: float = 0.0
    interval: tuple[float, float] = (0.0, 0.0)


class TwinCard(Record):
    """The same network on the same images for as long without any regularizer, and what regularization changed."""

    accuracy: float = 0.0  # on held-out images, as all of this but in training
    train_accuracy: float = 0.0
    generalization_gap: float = 0.0
    expected_calibration_error: float = 0.0
    robust_accuracy: float = 0.0  # under the quick attack
    differences: dict[str, Difference] = Field(default_factory=dict)  # of the same names, but for `train_accuracy`


class LabelErrors(Record):
    """Images whose label is probably wrong, by predictions of networks that were not trained on them."""

    images: int = 0
    checked: int = 0
    estimated_share: float = 0.0
    unknown: str | None = None  # why none could be checked
    listed: list[dict[str, Any]] = Field(default_factory=list)  # with class, suggested class, and probability


class Copies(Record):
    """Near copies among the images; they are held out together."""

    images: int = 0
    groups: int = 0
    of_several_classes: int = 0
    listed: list[list[dict[str, Any]]] = Field(default_factory=list)


class Strangers(Record):
    """Images that do not belong where they are, the first of them by name."""

    images: int = 0
    listed: list[dict[str, Any]] = Field(default_factory=list)


class InspectionCard(Record):
    """What held-out predictions say about the data.

    An image is {"position" in the prepared data set, "file" or "index"}, with "part" if it was uploaded apart.
    """

    label_errors: LabelErrors | None = None
    copies: Copies | None = None
    leaks: Strangers | None = None  # to measure on, and near copies of images that are trained on, `copy_of`
    strangers: Strangers | None = None
    overlaps: list[dict[str, Any]] = Field(default_factory=list)  # pairs of classes that are taken for each other
    misclassified: list[dict[str, Any]] = Field(default_factory=list)  # the surest first
    least_certain: list[dict[str, Any]] = Field(default_factory=list)  # right ones
    corrections: list[dict[str, Any]] = Field(default_factory=list)  # what was taken for another class `before`


class CrossValidation(Score):
    """The score on out-of-fold predictions."""

    folds: list[float] = Field(default_factory=list)  # accuracy of each


class Gap(Record):
    """Training minus validation accuracy; validation minus training cross-entropy."""

    accuracy: float = 0.0
    cross_entropy: float = 0.0


class Bin(Record):
    """Images whose confidence lies in (lower, upper]; their mean confidence and their accuracy, if there are any."""

    lower: float = 0.0
    upper: float = 1.0
    images: int = 0
    confidence: float | None = None
    accuracy: float | None = None


class Calibration(Record):
    """Expected calibration error (Guo et al. 2017)."""

    expected_calibration_error: float = 0.0
    temperature: float = 1.0  # by which the logits were divided before, if the spec says `calibrate`
    bins: list[Bin] = Field(default_factory=list)


class AttackedAt(Record):
    """Accuracy under each attack at one epsilon, and under the worst of them for each image."""

    epsilon: float = 0.0
    fgsm: float = 0.0
    pgd: float = 0.0
    square: float = 0.0
    worst: float = 0.0


class Robustness(Record):
    """Accuracy under `attack` before publishing; the curve and the signs of gradient masking follow."""

    attack: str = "fgsm"
    epsilon: float = 0.0
    accuracy: float = 0.0
    accuracy_under_fgsm: float | None = None
    images: int | None = None
    curve: list[AttackedAt] | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    gradient_masking: list[str] = Field(default_factory=list)
    trusted: bool | None = None


class RegularizerWarning(Record):
    """A term that does nothing (`negligible`) or leaves nothing to the data (`dominant`)."""

    term: str = ""
    kind: str = ""
    message: str = ""


class Regularization(Record):
    """Value and gradient share of every term, an epoch each, and warnings."""

    epochs: list[dict[str, Any]] = Field(default_factory=list)
    warnings: list[RegularizerWarning] = Field(default_factory=list)


class Sparsity(Record):
    """Share of exact zeros in the served kernels."""

    zeros: float = 0.0
    by_layer: dict[str, float] = Field(default_factory=dict)
    exact_zeros_in: list[str] | None = None  # layers in which L1 promises them
    shrunk_without_zeros: list[str] | None = None


class Parameters(Record):
    """Numbers that the method trains, of all that are served; size of the delta file."""

    trained: int = 0
    total: int = 0
    delta_bytes: int | None = None


class Training(Record):
    """How training went: epochs run, the epoch whose weights are kept, and why it ended."""

    epochs: int = 0
    kept_epoch: int = 0
    ended_by: str = "epochs"  # or early_stopping, catastrophic_overfitting, checkpoint
    overfitted_attack_in_epoch: int | None = None


class Cost(Record):
    """What the job took: seconds of each stage, peak memory in bytes."""

    seconds: dict[str, float] = Field(default_factory=dict)
    images_per_second: int = 0
    peak_memory_bytes: int = 0
    peak_gpu_memory_bytes: int | None = None


class Forgetting(Record):
    """Accuracy on the base's own task, before and after."""

    sample: str = ""
    images: int = 0
    base: float = 0.0
    accuracy: float = 0.0
    lost: float = 0.0


class TrialScore(Score):
    """What a trial reached in a round, at the best temperature; the standard error is that of the cross-entropy."""

    epochs: int = 0
    folds: int = 0
    standard_error: float = 0.0
    ended_s: float = 0.0  # after the search began
    objectives: dict[str, float] = Field(default_factory=dict)  # shares; in the last round of a search of several


class TrialCard(Record):
    """A recipe that was tried: where it comes from, what it reached, and why it went no further."""

    trial: int = 0
    origin: str = ""  # recipe, earlier, sampled or variant
    recipe: str = ""  # in words
    settings: dict[str, Any] = Field(default_factory=dict)
    scores: list[TrialScore] = Field(default_factory=list)
    seconds: float = 0.0
    dropped: str | None = None


class Worth(Record):
    """The best trial with another value of a field, less the chosen trial, in the first round."""

    field: str = ""
    chosen: Any = None
    other: Any = None
    cross_entropy: float = 0.0
    accuracy: float = 0.0


class SearchCard(Record):
    """How the recipe was chosen."""

    chosen: int | None = None
    sentence: str = ""
    worth: list[Worth] = Field(default_factory=list)
    front: list[int] = Field(default_factory=list)  # trials on the Pareto front, if there were several objectives
    trials: list[TrialCard] = Field(default_factory=list)


class Condition(Record):
    """A condition of a gate, and what was measured.

    `limit` and `value` are shares. Of `class_recall` they are those of the class that is farthest below its limit, and
    of `not_worse` the value is the difference in accuracy. The interval is that of the value (95%).
    """

    condition: str = ""  # the field of the gate
    limit: float | None = None
    value: float | None = None  # None if it could not be measured, or is no number
    interval: tuple[float, float] | None = None
    passed: bool = False
    doubt: bool = False  # it passed, and yet there is reason to look
    message: str = ""  # the same in words


class Override(Record):
    """A label that was given to a version although its gate had failed."""

    label: str = ""
    at: float = 0.0  # Unix seconds


class GateCard(Record):
    """Whether a version could have its label, and why."""

    passed: bool = True
    compared_with: int | None = None  # the version that `stable` stood for; None if there was none to compare with
    conditions: list[Condition] = Field(default_factory=list)
    seconds: float = 0.0  # that it took
    overrides: list[Override] = Field(default_factory=list)

    @property
    def reasons(self) -> list[str]:
        """Why it failed."""
        return [one.message for one in self.conditions if not one.passed]


class CorrectionsCard(Record):
    """Images that users have corrected, and that were trained on: how many are classified right, now and before."""

    images: int = 0
    right: int = 0
    right_before: int = 0
    out_of_fold: bool = False  # by networks that were not trained on them


class ReportCard(Record):
    """How good a version is. A pretrained model has a card of other fields, which are kept as they are."""

    warnings: list[str] = Field(default_factory=list)
    base: dict[str, float] | None = None  # accuracy of what training began with, where it knew the same classes
    train: Score | None = None
    validation: Validation | None = None
    test: ScoreApart | None = None  # where the data set has a test part
    generalization_gap: Gap | None = None
    calibration: Calibration | None = None
    robustness: Robustness | None = None
    regularization: Regularization | None = None
    sparsity: Sparsity | None = None
    parameters: Parameters | None = None
    training: Training | None = None
    history: list[Epoch] = Field(default_factory=list)
    cross_validation: CrossValidation | None = None
    search: SearchCard | None = None
    forgetting: Forgetting | None = None
    twin: TwinCard | None = None
    abstention: AbstentionCard | None = None
    inspection: InspectionCard | None = None
    gate: GateCard | None = None
    corrections: CorrectionsCard | None = None
    device: str | None = None
    cost: Cost | None = None
