"""Every failure that Temper reports to somebody, as one hierarchy.

Foreign exceptions are translated into these where they arise. `api/http/errors.py` gives each its HTTP status.
"""

from collections.abc import Sequence
from typing import Any


class TemperError(Exception):
    """A failure with a message for the person who can mend it.

    The first paragraph of a class's docstring is the cause, which docs/reference/errors.md shows with the cure.

    Attributes:
        code: stable name of the kind of failure.
        cure: what to do about it, for whoever sees it.
        param: the field of the request that is to blame, as a dotted path, or None.
        details: one mapping for each offending item, with "file", "index" or "field" and "reason".
    """

    code = "internal_error"
    cure = "Look up the request id in the gateway's log, which has the traceback, and report it."

    def __init__(self, message: str, *, param: str | None = None, details: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.details = list(details)

    def body(self) -> dict[str, Any]:
        """The wire form, without the envelope."""
        return {"code": self.code, "message": self.message, "param": self.param, "details": self.details}


def listed(summary: str, details: Sequence[dict[str, Any]]) -> str:
    """The message of an error with details: the first of them in full, and how many follow."""
    if not details:
        return summary
    first = details[0]
    where = next((str(first[key]) for key in ("field", "file", "index", "class") if key in first), "")
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{summary}: {where}: {first['reason']}{more}" if summary else f"{where}: {first['reason']}{more}"


def enumerated(names: Sequence[str]) -> str:
    """The first of some names in words, and how many follow."""
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class MalformedRequest(TemperError):
    """The request cannot be parsed."""

    code = "malformed_request"
    cure = "Correct the syntax that the message quotes: JSON, multipart form or query."


class InvalidRequest(TemperError):
    """The request can be parsed, but a field of it is missing or holds what it must not."""

    code = "invalid_request"
    cure = "Correct the field that `param` names; `details` has one reason for each."


class IdempotencyMismatch(InvalidRequest):
    """The idempotency key has been used for another request."""

    code = "idempotency_mismatch"
    cure = "Use a new key for another request, or repeat the first one unchanged."


class InvalidSpec(InvalidRequest):
    """The fine-tuning spec has an unknown field, a value out of bounds or a contradiction."""

    code = "invalid_spec"
    cure = "Correct the fields in `details`; try the spec with a dry run, which creates nothing."


class InvalidDataset(InvalidRequest):
    """The uploaded file is no data set that can be trained on."""

    code = "invalid_dataset"
    cure = "Mend or leave out the files in `details`; `temper datasets add` checks them without training."


class InvalidImage(InvalidRequest):
    """An image to predict on cannot be decoded."""

    code = "invalid_image"
    cure = "Send PNG, JPEG, WebP or BMP within the limits of pixels and bytes."


class InvalidInstances(InvalidRequest):
    """Instances to predict on have a wrong shape or wrong values."""

    code = "invalid_instances"
    cure = "Send 28x28, 28x28x1 or 784 numbers for each image, in the range that the request names."


class TooLarge(TemperError):
    """The body exceeds the configured size."""

    code = "too_large"
    cure = "Send fewer images at a time, or raise `TEMPER_MAX_UPLOAD_BYTES` or `TEMPER_MAX_PREDICT_BYTES`."


class UnsupportedMediaType(TemperError):
    """The Content-Type is none that the route reads."""

    code = "unsupported_media_type"
    cure = "Set `Content-Type` to one that the message lists."


class NotFound(TemperError):
    """The route or object does not exist."""

    code = "not_found"
    cure = "Check the path, and that the object has not been deleted."


class UnknownModel(NotFound):
    """No model, version or label of that name is served."""

    code = "unknown_model"
    cure = "List what there is with `temper models`; a version answers only once it is live."


class UnknownJob(NotFound):
    """No job has that id."""

    code = "unknown_job"
    cure = "List the jobs with `temper jobs`."


class UnknownCheckpoint(NotFound):
    """The job keeps no checkpoint of that epoch."""

    code = "unknown_checkpoint"
    cure = "List those of the job with `temper checkpoints`; they are kept for 30 days."


class UnknownPrediction(NotFound):
    """No prediction has that id, or not any more: images are kept for an hour."""

    code = "unknown_prediction"
    cure = "Ask again with `feedback`, and correct the answer under the new id."


class UnknownCorrection(NotFound):
    """No correction has that id."""

    code = "unknown_correction"
    cure = "List those of a model with `GET /feedback?model=…`."


class UnknownDataset(NotFound):
    """No data set has that id."""

    code = "unknown_dataset"
    cure = "List those that are kept with `temper datasets list`, or upload the images again."


class UnknownWebhook(NotFound):
    """No webhook, or no delivery to it, has that id."""

    code = "unknown_webhook"
    cure = "List them with `temper webhooks list`; finished deliveries are deleted after 30 days."


class UnknownKey(NotFound):
    """No API key has that id."""

    code = "unknown_key"
    cure = "List the keys with `temper keys list`."


class Unauthorized(TemperError):
    """The request brings no API key, or one that is unknown or revoked."""

    code = "unauthorized"
    cure = (
        "Send a valid key as `Authorization: Bearer …` or `X-API-Key`; an operator makes one with `temper keys create`."
    )


class Forbidden(TemperError):
    """The API key lacks the scope that the route needs, or the request comes from where none may come from."""

    code = "forbidden"
    cure = "Use a key with that scope; for a refused host, add its name to `TEMPER_ALLOWED_HOSTS`."


class WrongState(TemperError):
    """The object's state does not allow what was asked."""

    code = "wrong_state"
    cure = "Look at the object's status, and wait for or undo what the message names."


class FeedbackOff(WrongState):
    """No images of predictions and no corrections are kept here."""

    code = "feedback_off"
    cure = "Set TEMPER_FEEDBACK to the number of corrections that a model may keep."


class NotExplainable(WrongState):
    """The version was exported by a release that did not explain answers."""

    code = "not_explainable"
    cure = "Fine-tune again: versions of this release explain. The base of an earlier release's home does not."


class GateFailed(WrongState):
    """The version has not fulfilled the conditions for a label; it can be moved with an override."""

    code = "gate_failed"
    cure = "Look at `gate` in the report card; fine-tune again, change the gate, or move the label with an override."


class Overloaded(TemperError):
    """More is in flight than may wait; try again."""

    code = "overloaded"
    cure = "Wait as long as `Retry-After` says and repeat; where this lasts, add gateways or model servers."


class TooMany(Overloaded):
    """The key or its tenant has used up what it may have; try again.

    Attributes:
        retry_after_s: when that makes sense, in seconds.
    """

    code = "rate_limited"
    cure = "Wait as long as `Retry-After` says; an operator can raise the key's rate or `TEMPER_MAX_JOBS`."

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelServerError(TemperError):
    """The model server refused or failed what it should have answered."""

    code = "model_server_error"
    cure = "Repeat; if it stays, look at the model server's log and verify the version with `temper verify`."


class ModelServerUnavailable(ModelServerError):
    """The model server cannot be reached."""

    code = "model_server_unavailable"
    cure = "Wait for its restart and repeat; check `TEMPER_MODEL_SERVER`, and run `temper doctor`."


class ModelServerTimeout(ModelServerError):
    """The model server did not answer in time."""

    code = "model_server_timeout"
    cure = "Repeat with fewer images or a longer `X-Request-Timeout`, or raise `TEMPER_PREDICT_TIMEOUT_S`."


class StoreUnavailable(TemperError):
    """The store of jobs and models cannot be reached."""

    code = "store_unavailable"
    cure = "Wait as long as `Retry-After` says and repeat; check the database and `TEMPER_STORE`."


class StorageFull(TemperError):
    """No space is left where the service keeps its data."""

    code = "storage_full"
    cure = "Delete models and data sets, lower `TEMPER_KEEP_VERSIONS`, or make the disk larger."


class StorageFailed(TemperError):
    """The disk on which the service keeps its data cannot be read or written."""

    code = "storage_failed"
    cure = "Check the disk, its mount and the rights on `TEMPER_HOME`; `temper doctor` tries them."


class ObjectStoreUnavailable(StorageFailed):
    """The object store, through which machines exchange data sets and versions, cannot be reached."""

    code = "object_store_unavailable"
    cure = "Check TEMPER_OBJECTS, the AWS_ variables and the object store itself, then send the request again."


class JobFailed(TemperError):
    """A job cannot succeed. Its code goes into the job's record."""

    code = "job_failed"
    cure = "Read the job's `error` and its events, and fine-tune again."


class DeviceUnavailable(JobFailed):
    """The spec asks for a GPU and TensorFlow sees none."""

    code = "device_unavailable"
    cure = "Leave `device` at `auto`, or run a worker on a machine whose GPU `temper doctor` finds."


class Diverged(JobFailed):
    """The loss is no finite number any more, or one that no run comes back from."""

    code = "diverged"
    cure = "Lower `learning_rate`, and strong penalties with it; or leave both to the search."


class SearchFailed(JobFailed):
    """None of the recipes of a search could be trained."""

    code = "search_failed"
    cure = "Read the reason of each trial in `progress`, and give the search more trials or a smaller `learning_rate`."


class PublishFailed(JobFailed):
    """The model server did not serve the new version as the trainer computed it."""

    code = "publish_failed"
    cure = "Check the model servers with `temper health` and `temper doctor`, and fine-tune again."
