"""What goes over the wire, for validation and for the API's own documentation."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from serving.registry import Version
from trainer.jobs import Job
from trainer.spec import MODEL_NAME, Spec

ModelName = Annotated[str, Field(pattern=MODEL_NAME, description="Name of a model.", examples=["digits"])]

_NUMBER = {"type": "number", "minimum": 0, "maximum": 255}


def _array(items: dict[str, Any], length: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": length, "maxItems": length}


INSTANCE_SCHEMA = {
    "anyOf": [
        _array(_NUMBER, 784),
        _array(_array(_NUMBER, 28), 28),
        _array(_array(_array(_NUMBER, 1), 28), 28),
    ],
    "description": "An image: 28x28, 28x28x1 or 784 numbers, row by row.",
}


class ErrorBody(BaseModel):
    """What went wrong, for a program (`code`, `param`) and for a person."""

    code: str = Field(description="Stable name of the kind of failure.", examples=["invalid_dataset"])
    message: str = Field(description="What went wrong and what to do about it.")
    param: str | None = Field(description="The field that is to blame.")
    details: list[dict[str, Any]] = Field(description="Every offending file, index or field, with the reason.")


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
    base: str = Field(description="What training starts from, `name:version`.")
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"] = Field(
        description="Where the job stands."
    )
    stage: Literal["validating", "training", "evaluating", "exporting", "publishing"] | None = Field(
        description="What a running job is doing."
    )
    progress: dict[str, Any] = Field(
        description="Of the last epoch: `epoch` of `epochs`, the data loss and each penalty apart, validation accuracy."
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


class ModelSummary(BaseModel):
    """A model and the numbers of its live versions."""

    name: str = Field(description="Its name.")
    object: Literal["model"] = Field("model", description="Kind of this object.")
    versions: list[int] = Field(description="Live versions, newest first.")
    labels: dict[str, int] = Field(description="Labels and the versions that they stand for.")
    classes: list[str] = Field(description="Class names of the newest version.")


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
    versions: list[VersionView] = Field(description="Live versions, newest first.")


class PredictOptions(BaseModel):
    """What shall classify the images of a prediction, and how they are written."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: ModelName
    version: Annotated[int, Field(ge=1, lt=2**63)] | None = Field(None, description="A version; else the label's.")
    label: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        None, description="A label; without version and label it is `stable`, the version that went live last."
    )
    range: Literal["unit", "byte"] = Field("unit", description="Do pixels go from 0 to 1 or from 0 to 255?")


class PredictRequest(PredictOptions):
    """Images to classify."""

    instances: list[Annotated[Any, WithJsonSchema(INSTANCE_SCHEMA)]] = Field(
        min_length=1, description="Images of 28x28, 28x28x1 or 784 numbers."
    )


class ClassPrediction(BaseModel):
    """The answer for one image."""

    label: str = Field(description="The most probable class.")
    probabilities: list[float] = Field(description="In the order of `classes`.")


class PredictResponse(BaseModel):
    """The answer for all images, with the version that gave it."""

    model: str = Field(description="The model.")
    version: int = Field(description="The version that answered.")
    classes: list[str] = Field(description="Class names.")
    predictions: list[ClassPrediction] = Field(description="One for each instance, in their order.")


class Ready(BaseModel):
    """What the service can do at this moment."""

    status: Literal["ready", "not_ready"] = Field(description="Do the store and the model server answer?")
    store: Literal["ok", "unavailable"] = Field(description="The store of jobs and models.")
    model_server: Literal["ok", "unavailable"] = Field(description="The model server.")
    model_server_address: str = Field(description="Where the gateway looks for it.")
    workers: dict[str, str] = Field(description="State of every live worker: warming, idle or busy.")
