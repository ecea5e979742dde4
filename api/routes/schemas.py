"""What goes over the wire, for validation and for the API's own documentation."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serving.registry import Label, Route, Version
from trainer.jobs.records import Job
from trainer.spec import Spec


class ErrorBody(BaseModel):
    """What went wrong, for a program (`code`, `param`) and for a person."""

    code: str = Field(description="Stable name of the kind of failure.", examples=["invalid_dataset"])
    message: str = Field(description="What went wrong and what to do about it.")
    param: str | None = Field(description="The field that is to blame.")
    details: list[dict[str, Any]] = Field(description="Every offending file, index or field, with the reason.")
    request_id: str = Field(description="The request's id: its own `X-Request-ID`, or one that was made for it.")


class Error(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorBody = Field(description="What went wrong.")


class JobError(BaseModel):
    """Why a job failed."""

    code: str = Field(description="Stable name of the kind of failure.")
    message: str = Field(description="What went wrong.")
    param: str | None = Field(description="The field of the spec that is to blame.")


class JobView(BaseModel):
    """A fine-tuning job."""

    id: str = Field(description="Name of the job.", examples=["ftjob-0198c0ffee01a2b3c4d5e6"])
    object: Literal["fine_tuning.job"] = Field("fine_tuning.job", description="Kind of this object.")
    model: str = Field(description="The model that gets a new version.")
    version: int | None = Field(description="That version, once it is live.")
    label: str = Field(description="The label that moves to it.")
    base: str = Field(description="What training starts from, `name:version`.")
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"] = Field(
        description="Where the job stands."
    )
    stage: Literal["validating", "training", "evaluating", "exporting", "publishing", "warming"] | None = Field(
        description="What a running job is doing."
    )
    progress: dict[str, Any] = Field(
        description="Of the last epoch: `epoch` of `epochs`, the data loss and each penalty apart, validation "
        "accuracy. `publishing` has the time of every step: staged, verified, renamed, available, proven, warmed, "
        "labelled."
    )
    created_at: float = Field(description="Unix seconds.")
    started_at: float | None = Field(description="Unix seconds.")
    finished_at: float | None = Field(description="Unix seconds.")
    spec: Spec = Field(description="The spec with every default filled in.")
    dataset: dict[str, Any] = Field(description="What was uploaded: number of images, of each class, polarity, hash.")
    error: JobError | None = Field(description="Why it failed.")
    report_status: Literal["none", "quick", "complete"] = Field(description="How much of the report card is there.")

    @classmethod
    def of(cls, job: Job) -> "JobView":
        """The public face of a job record."""
        fields = {name: value for name, value in vars(job).items() if name in cls.model_fields and name != "spec"}
        return cls.model_validate({**fields, "spec": Spec.model_validate(job.spec, strict=False)})


class JobList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[JobView] = Field(description="The jobs of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last id.")


class VersionView(BaseModel):
    """A live version of a model, with what is known of it."""

    version: int = Field(description="Its number.")
    created_at: float = Field(description="Unix seconds.")
    classes: list[str] = Field(description="Class names, in the order of the probabilities.")
    base: str | None = Field(description="What it was fine-tuned from.")
    job: str | None = Field(description="The job that made it.")
    manifest: dict[str, Any] = Field(description="Spec, data set, polarity and hashes.")
    report: dict[str, Any] = Field(description="The report card.")

    @classmethod
    def of(cls, version: Version) -> "VersionView":
        """The public face of a version record."""
        return cls(
            version=version.version, created_at=version.created_at, classes=version.manifest["classes"],
            base=version.manifest["base"], job=version.manifest.get("job"), manifest=version.manifest,
            report=version.report,
        )  # fmt: skip


class LabelView(BaseModel):
    """A name that stands for a version."""

    model: str = Field(description="The model.")
    object: Literal["label"] = Field("label", description="Kind of this object.")
    label: str = Field(description="The label.")
    version: int = Field(description="The version that it stands for.")
    weight: float = Field(description="Share of the requests without version and label that follow it.")

    @classmethod
    def of(cls, model: str, name: str, label: Label) -> "LabelView":
        """The public face of a label record."""
        return cls(model=model, label=name, version=label.version, weight=label.weight)


class LabelMove(BaseModel):
    """Where a label shall stand."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: Annotated[int, Field(ge=1, lt=2**63)] = Field(description="A live version.", examples=[1])
    weight: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Share of the requests without version and label; those with the same `X-Sticky-Key` follow "
        "the same label. Without it the label keeps the share that it has."
    )  # fmt: skip


class Deleted(BaseModel):
    """What was removed."""

    model: str = Field(description="The model.")
    versions: list[int] | None = Field(None, description="The versions that are gone.")
    label: str | None = Field(None, description="The label that is gone.")
    deleted: Literal[True] = Field(True, description="It is gone.")


class Verification(BaseModel):
    """Whether a version is, on disk and at every model server, what was trained."""

    model: str = Field(description="The model.")
    version: int = Field(description="The version.")
    proven: bool = Field(description="Are the files sound, and does every server answer the probe as the trainer did?")
    failures: dict[str, str | None] = Field(
        description="Of `files` and of every model server: what is wrong, or null.",
        examples=[{"files": None, "127.0.0.1:8500": None}],
    )


class ModelSummary(BaseModel):
    """A model and the numbers of its live versions."""

    name: str = Field(description="Its name.")
    object: Literal["model"] = Field("model", description="Kind of this object.")
    versions: list[int] = Field(description="Live versions, newest first.")
    labels: dict[str, int] = Field(description="Labels and the versions that they stand for.")
    weights: dict[str, float] = Field(description="Shares of the traffic that do not follow `stable`, by label.")
    classes: list[str] = Field(description="Class names of the newest version.")

    @classmethod
    def of(cls, name: str, route: Route) -> "ModelSummary":
        """The public face of a route."""
        return cls(
            name=name, versions=sorted(route.classes, reverse=True), classes=list(route.classes[max(route.classes)]),
            **_labels(route.labels),
        )  # fmt: skip


def _labels(labels: dict[str, Label]) -> dict[str, Any]:
    return {
        "labels": {name: label.version for name, label in labels.items()},
        "weights": {name: label.weight for name, label in labels.items() if label.weight},
    }


class ModelList(BaseModel):
    """Models by name."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[ModelSummary] = Field(description="The models of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last name.")


class ModelView(BaseModel):
    """A model with its versions and their reports."""

    name: str = Field(description="Its name.")
    object: Literal["model"] = Field("model", description="Kind of this object.")
    labels: dict[str, int] = Field(description="Labels and the versions that they stand for.")
    weights: dict[str, float] = Field(description="Shares of the traffic that do not follow `stable`, by label.")
    versions: list[VersionView] = Field(description="Live versions, newest first.")

    @classmethod
    def of(cls, name: str, labels: dict[str, Label], versions: list[VersionView]) -> "ModelView":
        """The public face of a model's records."""
        return cls(name=name, versions=versions, **_labels(labels))


class Ready(BaseModel):
    """What the service can do at this moment."""

    status: Literal["ready", "not_ready"] = Field(description="Do the store and the model server answer?")
    store: Literal["ok", "unavailable"] = Field(description="The store of jobs and models.")
    model_server: Literal["ok", "unavailable"] = Field(description="Does at least one model server answer?")
    model_servers: dict[str, Literal["ok", "unavailable"]] = Field(description="Each of them, by address.")
    workers: dict[str, str] = Field(description="State of every live worker: warming, idle or busy.")
