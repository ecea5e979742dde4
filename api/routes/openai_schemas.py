"""What OpenAI's clients send and read. Their strict mode checks these fields; times are whole Unix seconds."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, model_validator

from api.routes.jobs import JobError, Metadata
from serving.registry import Version
from store.records import DEFAULT_TENANT, public_name
from store.validation import TEXT
from trainer.jobs import records
from trainer.jobs.events import Event as JobEvent
from trainer.jobs.library import KeptDataset
from trainer.spec import BASE_NAME, MODEL_NAME, Spec

STANDARD_RATE = float(Spec.model_fields["learning_rate"].default)  # that a multiplier multiplies


class FileFields(BaseModel):
    """The text fields of an upload."""

    purpose: Literal["fine-tune"] = Field(description="`fine-tune` is the only purpose here.")
    anchor: Literal["created_at"] | None = Field(None, alias="expires_after[anchor]", description="`created_at`.")
    seconds: int | None = Field(
        None, alias="expires_after[seconds]", ge=3600, le=2_592_000,
        description="Seconds after which the file is deleted; without them it is kept.",
    )  # fmt: skip

    @model_validator(mode="after")
    def _both(self) -> Self:
        if (self.anchor is None) != (self.seconds is None):
            raise ValueError("expires_after: give both anchor and seconds")
        return self


def _file_form() -> dict[str, Any]:
    schema = FileFields.model_json_schema()
    binary = {"type": "string", "contentMediaType": "application/octet-stream"}
    file = {**binary, "description": "Labelled images, as `data` of `POST /finetune`: a zip or an .npz."}
    return {"type": "object", "properties": {"file": file, **schema["properties"]}, "required": ["file", "purpose"]}


FILE_FORM = _file_form()


class File(BaseModel):
    """A data set that is kept."""

    id: str = Field(description="Name of the file.")
    object: Literal["file"] = Field("file", description="Kind of this object.")
    bytes: int = Field(description="Size of the upload.")
    created_at: int = Field(description="Unix seconds.")
    expires_at: int | None = Field(description="Unix seconds after which it is deleted.")
    filename: str = Field(description="Name of the uploaded file.")
    purpose: Literal["fine-tune"] = Field("fine-tune", description="Always `fine-tune`.")
    status: Literal["processed"] = Field("processed", description="Uploads are validated before they are answered.")
    status_details: None = Field(None, description="Always null.")

    @classmethod
    def of(cls, kept: KeptDataset) -> "File":
        """The record of a data set as a file."""
        expires_at = None if kept.expires_at is None else int(kept.expires_at)
        return cls(
            id=kept.id, bytes=kept.size_bytes, created_at=int(kept.created_at), expires_at=expires_at,
            filename=kept.dataset.filename,
        )  # fmt: skip


class FileList(BaseModel):
    """Files."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[File] = Field(description="The files of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last id.")


class FileDeleted(BaseModel):
    """What was deleted."""

    id: str = Field(description="The file.")
    object: Literal["file"] = Field("file", description="Kind of this object.")
    deleted: Literal[True] = Field(True, description="Always true.")


def _searched(value: Any) -> Any:
    return None if value == "auto" else value


def _or_auto(kind: str) -> Any:
    return WithJsonSchema({"anyOf": [{"type": kind}, {"type": "string", "const": "auto"}]})


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Hyperparameters(_Strict):
    """The three that OpenAI has; `auto` leaves a value to the search or the spec."""

    n_epochs: Annotated[int | None, BeforeValidator(_searched), _or_auto("integer")] = Field(
        None, ge=1, le=1000, description="`epochs` of the spec."
    )
    batch_size: Annotated[int | None, BeforeValidator(_searched), _or_auto("integer")] = Field(
        None, ge=1, le=4096, description="`batch_size` of the spec."
    )
    learning_rate_multiplier: Annotated[float | None, BeforeValidator(_searched), _or_auto("number")] = Field(
        None, gt=0, le=1000,
        description=f"Times the `learning_rate` of the spec, or {STANDARD_RATE:g} if that has none.",
    )  # fmt: skip

    def given(self) -> dict[str, Any]:
        """Those that are not `auto`."""
        return self.model_dump(exclude_none=True)


class Supervised(_Strict):
    """Options of supervised training."""

    hyperparameters: Hyperparameters | None = Field(None, description="How long and how fast.")


class Method(_Strict):
    """How to train."""

    type: Literal["supervised"] = Field(description="`supervised` is the only type here.")
    supervised: Supervised | None = Field(None, description="Its options.")


class JobRequest(_Strict):
    """A fine-tune as OpenAI's clients ask for it, and with `spec` as Temper's do."""

    model: str = Field(
        pattern=BASE_NAME, description="What training starts from: `lenet5`, or a model or version of yours.",
        examples=["lenet5"],
    )  # fmt: skip
    training_file: str = Field(max_length=100, pattern=TEXT, description="Id of a file or data set.")
    validation_file: str | None = Field(None, max_length=100, pattern=TEXT, description="Likewise, to validate on.")
    suffix: str | None = Field(
        None, pattern=MODEL_NAME,
        description="The model that gets the new version. Without it, that is the model that training starts from; or "
        "a new one, `lenet5-…`, if that is the base.",
    )  # fmt: skip
    seed: int | None = Field(None, ge=0, le=2**31 - 1, description="`seed` of the spec.")
    metadata: Metadata | None = Field(None, description="Up to 16 names with values of your own.")
    method: Method | None = Field(None, description="How to train.")
    hyperparameters: Hyperparameters | None = Field(None, description="As in `method`, where newer clients send them.")
    integrations: list[Any] | None = Field(None, max_length=0, description="None are supported.")
    spec: dict[str, Any] | None = Field(
        None, description='How to train, as in `POST /finetune`; clients send it as `extra_body={"spec": …}`.'
    )

    def asked_hyperparameters(self) -> tuple[str, dict[str, Any]]:
        """Where hyperparameters are given, and those that are not `auto`."""
        in_method = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        if in_method is not None:
            return "method.supervised.hyperparameters", in_method.given()
        return "hyperparameters", self.hyperparameters.given() if self.hyperparameters else {}


class JobHyperparameters(BaseModel):
    """What a job was given or has found; `auto` is still searched."""

    n_epochs: int | Literal["auto"] = Field(description="Epochs.")
    batch_size: int | Literal["auto"] = Field(description="Largest batch.")
    learning_rate_multiplier: float | Literal["auto"] = Field(
        description=f"Learning rate as a multiple of {STANDARD_RATE:g}."
    )


class JobSupervised(BaseModel):
    """Options of supervised training."""

    hyperparameters: JobHyperparameters = Field(description="How long and how fast.")


class JobMethod(BaseModel):
    """How a job trains."""

    type: Literal["supervised"] = Field("supervised", description="Always `supervised`.")
    supervised: JobSupervised = Field(description="Its options.")


Status = Literal["validating_files", "queued", "running", "succeeded", "failed", "cancelled"]
STATUSES: dict[str, Status] = {
    "queued": "queued", "paused": "queued", "running": "running", "succeeded": "succeeded", "failed": "failed",
    "cancelled": "cancelled",
}  # fmt: skip


class Job(BaseModel):
    """A fine-tuning job."""

    id: str = Field(description="Name of the job.")
    object: Literal["fine_tuning.job"] = Field("fine_tuning.job", description="Kind of this object.")
    created_at: int = Field(description="Unix seconds.")
    finished_at: int | None = Field(description="Unix seconds.")
    estimated_finish: int | None = Field(None, description="Unix seconds, where it is known.")
    model: str = Field(description="What training starts from, `name:version`.")
    fine_tuned_model: str | None = Field(description="The new version, `name:version`, once it is live.")
    status: Status = Field(description="Where the job stands; `queued` also while it is paused.")
    error: JobError | None = Field(description="Why it failed.")
    hyperparameters: JobHyperparameters = Field(description="How long and how fast.")
    method: JobMethod = Field(description="How it trains.")
    organization_id: str = Field(description="Whose it is.")
    result_files: list[str] = Field(description="Always empty: results are in the report card of the version.")
    seed: int = Field(description="Seed of everything random.")
    training_file: str = Field(description="What it learns from.")
    validation_file: str | None = Field(description="What it is validated on, if that was given.")
    trained_tokens: None = Field(None, description="Always null: images have none.")
    metadata: dict[str, str] | None = Field(description="What the client has noted.")

    @classmethod
    def of(cls, job: records.Job, tenant: str) -> "Job":
        """The record of a job as OpenAI shows one."""
        spec, dataset = job.resolved_spec or job.spec or {}, job.dataset
        found = JobHyperparameters(
            n_epochs=_number(spec, "epochs"), batch_size=_number(spec, "batch_size"),
            learning_rate_multiplier=_multiple(spec.get("learning_rate")),
        )  # fmt: skip
        seed = spec.get("seed")
        return cls(
            id=job.id, created_at=int(job.created_at),
            finished_at=None if job.finished_at is None else int(job.finished_at), model=public_name(job.base),
            fine_tuned_model=f"{public_name(job.model)}:{job.version}" if job.status == "succeeded" else None,
            status=STATUSES.get(job.status, "running"),
            error=JobError.model_validate(job.error) if job.error else None, hyperparameters=found,
            method=JobMethod(supervised=JobSupervised(hyperparameters=found)), organization_id=tenant, result_files=[],
            seed=seed if isinstance(seed, int) else 0, training_file=dataset.kept or dataset.id,
            validation_file=(dataset.validation.kept or dataset.validation.id) if dataset.validation else None,
            metadata=job.metadata,
        )  # fmt: skip


def _number(spec: Mapping[str, Any], name: str) -> int | Literal["auto"]:
    value = spec.get(name)
    return value if isinstance(value, int) else "auto"


def _multiple(rate: Any) -> float | Literal["auto"]:
    return round(rate / STANDARD_RATE, 6) if isinstance(rate, int | float) else "auto"


class JobList(BaseModel):
    """Jobs, newest first."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[Job] = Field(description="The jobs of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last id.")


class Event(BaseModel):
    """Something that has happened to a job."""

    id: str = Field(description="The job's id and the event's number.")
    object: Literal["fine_tuning.job.event"] = Field("fine_tuning.job.event", description="Kind of this object.")
    created_at: int = Field(description="Unix seconds.")
    level: Literal["info", "warn", "error"] = Field(description="`error` where the job failed.")
    message: str = Field(description="What has happened, in words.")
    type: Literal["message", "metrics"] = Field(description="`metrics` of an epoch or a trial, or a `message`.")
    data: dict[str, Any] = Field(description="The particulars, as in `GET /finetune/{id}/events`.")

    @classmethod
    def of(cls, event: JobEvent) -> "Event":
        """The record of an event as OpenAI shows one."""
        return cls(
            id=f"{event.job}-{event.seq}", created_at=int(event.at), message=_in_words(event), data=event.data,
            level="error" if event.data.get("status") == "failed" else "info",
            type="metrics" if event.type in ("epoch", "trial") else "message",
        )  # fmt: skip


def _in_words(event: JobEvent) -> str:
    data, kind = event.data, str(event.type)
    match kind:
        case "status":
            more = [f": {data['stage']}"] if data.get("stage") else []
            more += [f": {error['message']}"] if (error := data.get("error")) else []
            more += [f": version {data['version']} is live"] if data.get("version") else []
            return f"The job is {STATUSES.get(data['status'], 'running')}{''.join(more)}"
        case "preview":
            return f"Version {data['version']} is live while better recipes are searched"
        case "trial":
            return f"Trial {data.get('trial')}: {data.get('tried')} of {data.get('trials')} in this round"
        case "resolved":
            return "The recipe is chosen"
        case "epoch":
            loss, accuracy = data.get("data_loss"), data.get("validation_accuracy")
            text = f"Epoch {data.get('epoch')} of {data.get('epochs')}"
            text += "" if loss is None else f", loss {loss:.4f}"
            return text + ("" if accuracy is None else f", validation accuracy {accuracy:.3f}")
        case "publishing":
            return f"Publishing: {data['step']}"
        case "report":
            return f"The report card is {data['report_status']}"
    return kind  # of another release


class EventList(BaseModel):
    """Events, newest first."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[Event] = Field(description="The events of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last id.")


class CheckpointMetrics(BaseModel):
    """How good a checkpoint is, on the images that its training never saw; null where that is not measured."""

    train_loss: float | None = Field(description="Cross-entropy on the training images, in nats.")
    train_mean_token_accuracy: float | None = Field(description="Accuracy on the training images.")
    full_valid_loss: float | None = Field(description="Cross-entropy on the held-out images, in nats.")
    full_valid_mean_token_accuracy: float | None = Field(description="Accuracy on the held-out images.")


class JobCheckpoint(BaseModel):
    """A version that a job has made live, so that it can be used."""

    id: str = Field(description="The job's id and the version.")
    object: Literal["fine_tuning.job.checkpoint"] = Field(
        "fine_tuning.job.checkpoint", description="Kind of this object."
    )
    created_at: int = Field(description="Unix seconds.")
    fine_tuned_model_checkpoint: str = Field(description="The version, `name:version`.")
    fine_tuning_job_id: str = Field(description="The job.")
    metrics: CheckpointMetrics = Field(description="How good it is.")
    step_number: int = Field(description="The epoch whose weights it has.")

    @classmethod
    def of(cls, version: Version, job_id: str) -> "JobCheckpoint":
        """A version as OpenAI shows a checkpoint."""
        train, held_out, training = version.report.train, version.report.validation, version.report.training
        return cls(
            id=f"{job_id}-v{version.version}", created_at=int(version.created_at),
            fine_tuned_model_checkpoint=f"{public_name(version.model)}:{version.version}", fine_tuning_job_id=job_id,
            step_number=training.kept_epoch if training else 0,
            metrics=CheckpointMetrics(
                train_loss=train and train.cross_entropy, train_mean_token_accuracy=train and train.accuracy,
                full_valid_loss=held_out and held_out.cross_entropy,
                full_valid_mean_token_accuracy=held_out and held_out.accuracy,
            ),
        )  # fmt: skip


class JobCheckpointList(BaseModel):
    """Checkpoints, newest first."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[JobCheckpoint] = Field(description="The checkpoints of this page.")
    has_more: bool = Field(description="Are there more? Ask with `after` = the last id.")


class Model(BaseModel):
    """A version that is live."""

    id: str = Field(description="`name:version`.")
    object: Literal["model"] = Field("model", description="Kind of this object.")
    created: int = Field(description="Unix seconds.")
    owned_by: str = Field(DEFAULT_TENANT, description="Whose it is.")


class ModelList(BaseModel):
    """Versions, newest first."""

    object: Literal["list"] = Field("list", description="Kind of this object.")
    data: list[Model] = Field(description="All that are live.")


class ModelDeleted(BaseModel):
    """What was deleted."""

    id: str = Field(description="The version or model.")
    object: Literal["model"] = Field("model", description="Kind of this object.")
    deleted: Literal[True] = Field(True, description="Always true.")
