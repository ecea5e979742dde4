"""What can go wrong, as one hierarchy that is drawn from the service's answers.

TemperError
├── BadRequest              400  the request cannot be parsed
├── Unauthorized            401  no API key, or an unknown one
├── Forbidden               403  the key does not allow it
├── NotFound                404  no such model, version, label or job
├── Conflict                409  the state does not allow it
│   └── GateFailed               a version that failed its gate gets a label only with an override
├── TooLarge                413
├── UnsupportedMediaType    415
├── InvalidRequest          422  IdempotencyMismatch, InvalidSpec, InvalidDataset, InvalidImage, InvalidInstances
├── TooManyRequests         429
├── ServerError             5xx
│   ├── StorageFull         507
│   └── Unavailable         503  try again later
│       ├── TimedOut        504
│       └── Unreachable          no answer, or one that broke off
├── NotTemper                    something else answers at this URL
└── JobFailed                    a job that was waited for failed or was cancelled
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from temper.records import Job


class TemperError(Exception):
    """A request that failed.

    Attributes:
        status: the HTTP status, None if the error arose on this side.
        code: stable name of the kind of failure, such as `invalid_dataset`.
        message: what went wrong, for a person.
        param: the field that is to blame, as a dotted path, or None.
        details: one mapping for each offending item, with "file", "index", "class" or "field" and "reason".
        request_id: under which the gateway has logged the request.
        retry_after_s: when the service may be asked again, if it said so.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        param: str | None = None,
        details: Sequence[Mapping[str, Any]] = (),
        status: int | None = None,
        request_id: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.param = param
        self.details = [dict(detail) for detail in details]
        self.status = status
        self.request_id = request_id
        self.retry_after_s = retry_after_s


class BadRequest(TemperError):
    """The request cannot be parsed."""


class Unauthorized(TemperError):
    """There is no API key, or an unknown one."""


class Forbidden(TemperError):
    """The API key does not allow it."""


class NotFound(TemperError):
    """There is no such model, version, label or job."""


class Conflict(TemperError):
    """The state does not allow it."""


class GateFailed(Conflict):
    """The version has failed its gate, and gets a label only with an override."""


class TooLarge(TemperError):
    """The body is larger than the service allows."""


class UnsupportedMediaType(TemperError):
    """The service does not read this kind of body."""


class InvalidRequest(TemperError):
    """A field of the request is missing or has a wrong value."""


class IdempotencyMismatch(InvalidRequest):
    """The idempotency key was used for another request before."""


class InvalidSpec(InvalidRequest):
    """The spec has an unknown field, a value out of bounds or a contradiction."""


class InvalidDataset(InvalidRequest):
    """The images to train on cannot be read or trained on."""


class InvalidImage(InvalidRequest):
    """An image to predict on cannot be read."""


class InvalidInstances(InvalidRequest):
    """Arrays to predict on have a wrong shape or wrong values."""


class TooManyRequests(TemperError):
    """The service has more to do than it accepts; try again later."""


class ServerError(TemperError):
    """The service failed."""


class StorageFull(ServerError):
    """No space is left on the service's disk."""


class Unavailable(ServerError):
    """The service, its store or its model servers are away; try again later."""


class TimedOut(Unavailable):
    """The model server did not answer in time."""


class Unreachable(Unavailable):
    """The service gave no answer, or one that broke off."""


class NotTemper(TemperError):
    """Something else answers at this URL."""


class JobFailed(TemperError):
    """A job that was waited for failed or was cancelled; `job` is its last state."""

    def __init__(self, message: str, job: "Job") -> None:
        code, param = (job.error.code, job.error.param) if job.error else (job.status, None)
        super().__init__(message, code=code, param=param)
        self.job = job


BY_STATUS: dict[int, type[TemperError]] = {
    400: BadRequest, 401: Unauthorized, 403: Forbidden, 404: NotFound, 409: Conflict, 413: TooLarge,
    415: UnsupportedMediaType, 422: InvalidRequest, 429: TooManyRequests, 503: Unavailable, 504: TimedOut,
    507: StorageFull,
}  # fmt: skip
BY_CODE: dict[str, type[TemperError]] = {
    "gate_failed": GateFailed, "idempotency_mismatch": IdempotencyMismatch,
    "invalid_spec": InvalidSpec, "invalid_dataset": InvalidDataset, "invalid_image": InvalidImage,
    "invalid_instances": InvalidInstances,
}  # fmt: skip


def from_answer(status: int, error: Mapping[str, Any], retry_after: str | None = None) -> TemperError:
    """The error in the body of an answer.

    Args:
        error: the object under `error`.
        retry_after: the header, in seconds; a date is ignored.

    Raises:
        KeyError, TypeError: it is not an error of Temper.
    """
    general = BY_STATUS.get(status, ServerError if status >= 500 else TemperError)
    kind = BY_CODE.get(error["code"], general)
    kind = kind if issubclass(kind, general) else general
    return kind(
        error["message"], code=error["code"], param=error["param"], details=error["details"], status=status,
        request_id=error.get("request_id"),
        retry_after_s=float(retry_after) if retry_after and retry_after.isdecimal() else None,
    )  # fmt: skip
