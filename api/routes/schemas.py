"""What goes over the wire, for validation and for the API's own documentation."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from serving.registry import Label, Route, Version
from trainer.jobs.records import Job
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


class ImageOptions(BaseModel):
    """What shall classify the images of a prediction."""

    model_config = ConfigDict(extra="forbid")

    model: ModelName
    version: Annotated[int, Field(ge=1, lt=2**63)] | None = Field(None, description="A version; else the label's.")
    label: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        None, description="A label; without version and label it is `stable`, or one that has a share of the traffic."
    )
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Also give so many most probable classes, best first."
    )


class PredictOptions(ImageOptions):
    """The same in a JSON body, and how the images are written."""

    model_config = ConfigDict(strict=True)

    range: Literal["unit", "byte"] = Field("unit", description="Do pixels go from 0 to 1 or from 0 to 255?")


class PredictRequest(PredictOptions):
    """Images to classify."""

    instances: list[Annotated[Any, WithJsonSchema(INSTANCE_SCHEMA)]] = Field(
        min_length=1, description="Images of 28x28, 28x28x1 or 784 numbers."
    )


class Ranked(BaseModel):
    """A class and its probability."""

    label: str = Field(description="The class.")
    probability: float = Field(description="Its probability.")


class ClassPrediction(BaseModel):
    """The answer for one image."""

    label: str = Field(description="The most probable class.")
    probabilities: list[float] = Field(description="In the order of `classes`.")
    top_k: list[Ranked] | None = Field(None, description="Where asked for: the most probable classes, best first.")
    file: str | None = Field(None, description="With a zip or a form: the image's name.")


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
    model_server: Literal["ok", "unavailable"] = Field(description="Does at least one model server answer?")
    model_servers: dict[str, Literal["ok", "unavailable"]] = Field(description="Each of them, by address.")
    workers: dict[str, str] = Field(description="State of every live worker: warming, idle, busy or reporting.")


class PlainError(BaseModel):
    """An error as TensorFlow Serving and the Open Inference Protocol write it."""

    error: str = Field(description="What went wrong.")


class TensorFlowPredict(BaseModel):
    """A request in TensorFlow Serving's row or column format; exactly one of the two."""

    signature_name: Literal["serving_default", "serving_bytes"] = Field(
        "serving_default", description="Pixels from 0 to 1, or bytes from 0 to 255."
    )
    instances: list[Annotated[Any, WithJsonSchema(INSTANCE_SCHEMA)]] | None = Field(
        None, description="Row format: images, or objects with an `image` each."
    )
    inputs: list[Annotated[Any, WithJsonSchema(INSTANCE_SCHEMA)]] | None = Field(
        None, description="Column format: an array of images, or an object with the array as `image`."
    )


class TensorFlowPredictions(BaseModel):
    """The answer, in the format of the request."""

    predictions: list[dict[str, list[float]]] | None = Field(None, description="For each image both outputs.")
    outputs: dict[str, list[list[float]]] | None = Field(None, description="Both outputs for all images.")
    model_spec: dict[str, str] = Field(description="Name, version and signature that answered.")


class InferInput(BaseModel):
    """What a tensor is, without its data."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Literal["image"] = Field(description="The only input.")
    shape: list[int] = Field(min_length=2, max_length=4, description="[n, 28, 28, 1], [n, 28, 28] or [n, 784].")
    datatype: Literal["FP32", "FP64", "UINT8"] = Field(description="Floats from 0 to 1, or bytes.")
    parameters: dict[str, Any] = Field({}, description="None is read.")


class InferOutput(BaseModel):
    """An output that is asked for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Literal["logits", "probabilities"] = Field(description="Its name.")
    parameters: dict[str, Any] = Field({}, description="None is read.")


class InferParameters(BaseModel):
    """Parameters of a request; others than these are not read."""

    model_config = ConfigDict(strict=True)

    label: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(None, description="A label.")


class InferenceOptions(BaseModel):
    """All of an Open Inference Protocol request but the numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | None = Field(None, max_length=256, description="Comes back with the answer.")
    parameters: InferParameters = Field(InferParameters(), description="What shall answer.")
    input: InferInput
    outputs: list[InferOutput] = Field([], description="Those that are wanted; all by default.")


class InferTensor(InferInput):
    """A tensor with its data."""

    data: list[Any] = Field(description="Its numbers, row by row, nested or not.")


class InferRequest(BaseModel):
    """A request of the Open Inference Protocol."""

    id: str | None = Field(None, description="Comes back with the answer.")
    parameters: InferParameters = Field(InferParameters(), description="What shall answer.")
    inputs: list[InferTensor] = Field(min_length=1, max_length=1, description="The images.")
    outputs: list[InferOutput] = Field([], description="Those that are wanted; all by default.")


class InferResponse(BaseModel):
    """Its answer."""

    model_name: str = Field(description="The model.")
    model_version: str = Field(description="The version that answered.")
    id: str | None = Field(None, description="The request's.")
    outputs: list[dict[str, Any]] = Field(description="The tensors `logits` and `probabilities`, [n, classes] FP32.")
