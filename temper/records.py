"""What the service answers, as frozen records. Each keeps the whole answer as `json`, also fields unknown here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self


@dataclass(frozen=True, kw_only=True)
class Record:
    """What all records share."""

    PARTS: ClassVar[dict[str, type["Record"]]] = {}  # fields that are records, or lists of them

    json: dict[str, Any] = field(repr=False)

    @classmethod
    def read(cls, json: Mapping[str, Any]) -> Self:
        """The record in the JSON of an answer.

        Raises:
            TypeError: a field is missing.
        """
        values: dict[str, Any] = {}
        for name in {own.name for own in fields(cls)} & json.keys() - {"json"}:
            value, part = json[name], cls.PARTS.get(name)
            if part and isinstance(value, list):
                value = tuple(part.read(one) for one in value)
            elif part and value is not None:
                value = part.read(value)
            values[name] = value
        return cls(json=dict(json), **values)


@dataclass(frozen=True, kw_only=True)
class Failure(Record):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job(Record):
    """A fine-tuning job. Times are in Unix seconds."""

    PARTS: ClassVar = {"error": Failure}

    id: str
    model: str
    status: str  # queued, running, paused, succeeded, failed or cancelled
    created_at: float
    version: int | None = None  # that it has published
    preview_version: int | None = None
    label: str = "stable"  # that moves to the version
    base: str = ""
    stage: str | None = None  # of a running job
    progress: dict[str, Any] = field(default_factory=dict)
    started_at: float | None = None
    finished_at: float | None = None
    spec: dict[str, Any] = field(default_factory=dict)
    resolved_spec: dict[str, Any] | None = None
    dataset: dict[str, Any] = field(default_factory=dict)  # `findings` in it say what is wrong with images
    error: Failure | None = None
    report_status: str = "none"  # then quick, then complete
    attempts: int = 0  # how often a worker has started it
    cancel_requested: bool = False
    pause_requested: bool = False
    priority: int = 0
    queue_position: int | None = None  # 1 for the next one
    estimated_end_at: float | None = None
    metadata: dict[str, str] | None = None
    checkpoint: dict[str, Any] | None = None  # `job` and `epoch`, if it publishes that one's and trains nothing
    gate: dict[str, Any] | None = None  # if not `passed`, the version is live without its label; `conditions` say why

    @property
    def finished(self) -> bool:
        """Whether it has succeeded, failed or been cancelled."""
        return self.finished_at is not None

    @property
    def gate_failures(self) -> list[str]:
        """Why its version is live without its label; nothing if it got that."""
        return failures(self.gate)


def failures(gate: Mapping[str, Any] | None) -> list[str]:
    """Why a gate has failed, in a sentence for each condition; nothing if it passed or there is none."""
    if not gate or gate["passed"]:
        return []
    return [one["message"] for one in gate["conditions"] if not one["passed"]]


def doubts(gate: Mapping[str, Any] | None) -> list[str]:
    """What is worth a look although the gate passed, in a sentence for each condition."""
    if not gate or not gate["passed"]:
        return []
    return [one["message"] for one in gate["conditions"] if one.get("doubt")]


@dataclass(frozen=True, kw_only=True)
class Estimate(Record):
    """What a fine-tune would take."""

    seconds: float  # from its start until its version is live
    seconds_within: float  # how far off that may be, as a share of it
    memory_bytes: int  # peak of the worker
    jobs: int = 0  # finished ones of its kind that this rests on; 0 for another machine's figures


@dataclass(frozen=True, kw_only=True)
class DryRun(Record):
    """What a fine-tune would be. Nothing was created."""

    PARTS: ClassVar = {"estimate": Estimate}

    model: str
    base: str
    dataset: dict[str, Any]
    spec: dict[str, Any]  # with every default, and "auto" for what would be searched
    estimate: Estimate
    resolved_spec: dict[str, Any] | None = None  # the same with its base, if nothing would be searched
    warnings: list[str] = field(default_factory=list)  # what is wrong with images, or would be done in another way


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Record):
    """What the final training of a job had after an epoch."""

    id: str
    job: str
    epoch: int
    created_at: float  # Unix seconds
    validation_accuracy: float | None = None  # None if all images were trained on
    validation_cross_entropy: float | None = None
    version: int | None = None  # that was published from it


@dataclass(frozen=True, kw_only=True)
class Dataset(Record):
    """A data set that is kept. Times are in Unix seconds."""

    id: str
    created_at: float
    filename: str
    size_bytes: int  # of the uploaded file
    sha256: str
    polarity: str  # light_on_dark or dark_on_light
    report: dict[str, Any]  # images of each class, sizes, duplicates, near-constant images
    expires_at: float | None = None


@dataclass(frozen=True, kw_only=True)
class DatasetDeleted(Record):
    """A data set that was deleted."""

    id: str


@dataclass(frozen=True, kw_only=True)
class Event(Record):
    """Something that has happened to a job."""

    id: str
    seq: int  # from 1, without gaps
    created_at: float
    type: str  # status, preview, trial, resolved, epoch, publishing or report
    data: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Correction(Record):
    """An image whose class a user has named, to learn from."""

    id: str
    model: str
    version: int  # that answered
    predicted: str
    label: str  # the right class
    created_at: float  # Unix seconds
    image: str  # PNG in a data URL


@dataclass(frozen=True, kw_only=True)
class CorrectionDeleted(Record):
    """A correction that was deleted."""

    id: str


@dataclass(frozen=True, kw_only=True)
class Webhook(Record):
    """An endpoint that is told what happens. Times are in Unix seconds."""

    id: str
    url: str
    status: str  # enabled, or disabled once it has answered 410
    created_at: float
    types: list[str] | None = None  # what it is told; None for everything
    disabled_because: str | None = None
    old_secret_until: float | None = None  # for how long the secret before the last rotation signs as well
    secret: str | None = field(default=None, repr=False)  # only in what creates it or rotates it


@dataclass(frozen=True, kw_only=True)
class WebhookDeleted(Record):
    """A webhook that was deleted."""

    id: str


@dataclass(frozen=True, kw_only=True)
class Delivery(Record):
    """What a webhook is told, and how far that is. Times are in Unix seconds."""

    id: str  # the `webhook-id` of every attempt
    webhook: str
    type: str
    data: dict[str, Any]
    created_at: float  # when it happened
    status: str  # pending, succeeded or failed
    attempts: int  # that have ended
    attempted_at: float | None = None
    next_attempt_at: float | None = None
    http_status: int | None = None  # that answered the last attempt
    error: str | None = None  # of the last attempt


@dataclass(frozen=True, kw_only=True)
class Version(Record):
    """A live version of a model, with its report card."""

    version: int
    created_at: float
    classes: list[str]  # in the order of the probabilities
    base: str | None = None
    job: str | None = None
    manifest: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelSummary(Record):
    """A model in a list."""

    name: str
    versions: list[int]  # live ones, newest first
    labels: dict[str, int]
    weights: dict[str, float]  # share of the requests of each label besides `stable`
    classes: list[str]  # of `stable`, or the newest version


@dataclass(frozen=True, kw_only=True)
class Model(Record):
    """A model with its live versions, newest first."""

    PARTS: ClassVar = {"versions": Version}

    name: str
    versions: tuple[Version, ...]
    labels: dict[str, int]
    weights: dict[str, float]
    gate: dict[str, Any] | None = None  # what its versions must fulfil to get a label; None for the default


@dataclass(frozen=True, kw_only=True)
class Gate(Record):
    """What the versions to come of a model must fulfil to get their label."""

    model: str
    gate: dict[str, Any] | None  # None for the default


@dataclass(frozen=True, kw_only=True)
class Label(Record):
    """A movable name for a version, and its share of the requests that name neither."""

    model: str
    label: str
    version: int
    weight: float


@dataclass(frozen=True, kw_only=True)
class Deleted(Record):
    """What was deleted: versions, or a label."""

    model: str
    versions: list[int] | None = None
    label: str | None = None


@dataclass(frozen=True, kw_only=True)
class Verification(Record):
    """Whether a version's files are intact and every model server answers as the trainer did."""

    model: str
    version: int
    proven: bool
    failures: dict[str, str | None]  # for "files" and every model server: what is wrong, or None


@dataclass(frozen=True, kw_only=True)
class ClassPrediction(Record):
    """The answer for one image."""

    label: str  # the most probable class
    probabilities: list[float]  # in the order of `classes`
    file: str | None = None  # in a zip: the image's name
    top_k: list[dict[str, Any]] | None = None
    set: list[str] | None = None  # the classes that are plausible; None where the version has no coverage
    none_of_these: bool | None = None  # whether the image is unlike those that were learned; None without a detector
    explanation: dict[str, Any] | None = None  # of `explain`; docs/how-to/explain.md describes it


@dataclass(frozen=True, kw_only=True)
class Prediction(Record):
    """The answer for all images, and the version that gave it."""

    PARTS: ClassVar = {"predictions": ClassPrediction}

    model: str
    version: int
    classes: list[str]
    predictions: tuple[ClassPrediction, ...]
    id: str | None = None  # with `feedback`: what `correct` calls it

    @property
    def labels(self) -> list[str]:
        """The most probable class of each image."""
        return [one.label for one in self.predictions]


@dataclass(frozen=True, kw_only=True)
class Health(Record):
    """Which parts of the service work."""

    status: str  # ready or not_ready
    store: str
    model_server: str
    disk: str
    model_servers: dict[str, str]
    workers: dict[str, str]

    @property
    def ready(self) -> bool:
        """Whether the store and a model server work."""
        return self.status == "ready"
