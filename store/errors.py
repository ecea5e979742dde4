"""Every failure that Temper reports to somebody, as one hierarchy.

Foreign exceptions are translated into these where they arise. `api/http/errors.py` gives each its HTTP status.
"""

from collections.abc import Sequence
from typing import Any


class TemperError(Exception):
    """A failure with a message for the person who can mend it.

    Attributes:
        code: stable name of the kind of failure.
        param: the field of the request that is to blame, as a dotted path, or None.
        details: one mapping for each offending item, with "file", "index" or "field" and "reason".
    """

    code = "internal_error"

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


class InvalidRequest(TemperError):
    """The request can be parsed, but a field of it is missing or holds what it must not."""

    code = "invalid_request"


class IdempotencyMismatch(InvalidRequest):
    """The idempotency key has been used for another request."""

    code = "idempotency_mismatch"


class InvalidSpec(InvalidRequest):
    """The fine-tuning spec has an unknown field, a value out of bounds or a contradiction."""

    code = "invalid_spec"


class InvalidDataset(InvalidRequest):
    """The uploaded file is no data set that can be trained on."""

    code = "invalid_dataset"


class InvalidImage(InvalidRequest):
    """An image to predict on cannot be decoded."""

    code = "invalid_image"


class InvalidInstances(InvalidRequest):
    """Instances to predict on have a wrong shape or wrong values."""

    code = "invalid_instances"


class TooLarge(TemperError):
    """The body exceeds the configured size."""

    code = "too_large"


class UnsupportedMediaType(TemperError):
    """The Content-Type is none that the route reads."""

    code = "unsupported_media_type"


class NotFound(TemperError):
    """The route or object does not exist."""

    code = "not_found"


class UnknownModel(NotFound):
    """No model, version or label of that name is served."""

    code = "unknown_model"


class UnknownJob(NotFound):
    """No job has that id."""

    code = "unknown_job"


class UnknownCheckpoint(NotFound):
    """The job keeps no checkpoint of that epoch."""

    code = "unknown_checkpoint"


class UnknownDataset(NotFound):
    """No data set has that id."""

    code = "unknown_dataset"


class UnknownWebhook(NotFound):
    """No webhook, or no delivery to it, has that id."""

    code = "unknown_webhook"


class UnknownKey(NotFound):
    """No API key has that id."""

    code = "unknown_key"


class Unauthorized(TemperError):
    """The request brings no API key, or one that is unknown or revoked."""

    code = "unauthorized"


class Forbidden(TemperError):
    """The API key lacks the scope that the route needs, or the request comes from where none may come from."""

    code = "forbidden"


class WrongState(TemperError):
    """The object's state does not allow what was asked."""

    code = "wrong_state"


class GateFailed(WrongState):
    """The version has not fulfilled the conditions for a label; it can be moved with an override."""

    code = "gate_failed"


class Overloaded(TemperError):
    """More is in flight than may wait; try again."""

    code = "overloaded"


class TooMany(Overloaded):
    """The key or its tenant has used up what it may have; try again.

    Attributes:
        retry_after_s: when that makes sense, in seconds.
    """

    code = "rate_limited"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelServerError(TemperError):
    """The model server refused or failed what it should have answered."""

    code = "model_server_error"


class ModelServerUnavailable(ModelServerError):
    """The model server cannot be reached."""

    code = "model_server_unavailable"


class ModelServerTimeout(ModelServerError):
    """The model server did not answer in time."""

    code = "model_server_timeout"


class StoreUnavailable(TemperError):
    """The store of jobs and models cannot be reached."""

    code = "store_unavailable"


class StorageFull(TemperError):
    """No space is left where the service keeps its data."""

    code = "storage_full"


class StorageFailed(TemperError):
    """The disk on which the service keeps its data cannot be read or written."""

    code = "storage_failed"


class ObjectStoreUnavailable(StorageFailed):
    """The object store, through which machines exchange data sets and versions, cannot be reached."""

    code = "object_store_unavailable"


class JobFailed(TemperError):
    """A job cannot succeed. Its code goes into the job's record."""

    code = "job_failed"


class DeviceUnavailable(JobFailed):
    """The spec asks for a GPU and TensorFlow sees none."""

    code = "device_unavailable"


class Diverged(JobFailed):
    """The loss is no finite number any more, or one that no run comes back from."""

    code = "diverged"


class SearchFailed(JobFailed):
    """None of the recipes of a search could be trained."""

    code = "search_failed"


class PublishFailed(JobFailed):
    """The model server did not serve the new version as the trainer computed it."""

    code = "publish_failed"
