"""A client of a Temper service: `Client` blocks, `AsyncClient` is for asyncio; both have the same verbs."""

from temper.client import AsyncClient, Client
from temper.errors import (
    BadRequest,
    Conflict,
    Forbidden,
    IdempotencyMismatch,
    InvalidDataset,
    InvalidImage,
    InvalidInstances,
    InvalidRequest,
    InvalidSpec,
    JobFailed,
    NotFound,
    NotTemper,
    ServerError,
    StorageFull,
    TemperError,
    TimedOut,
    TooLarge,
    TooManyRequests,
    Unauthorized,
    Unavailable,
    Unreachable,
    UnsupportedMediaType,
)
from temper.records import (
    Checkpoint,
    ClassPrediction,
    Dataset,
    DatasetDeleted,
    Deleted,
    Event,
    Failure,
    Health,
    Job,
    Label,
    Model,
    ModelSummary,
    Prediction,
    Verification,
    Version,
)

__all__ = [
    "AsyncClient", "BadRequest", "Checkpoint", "ClassPrediction", "Client", "Conflict", "Dataset", "DatasetDeleted",
    "Deleted", "Event", "Failure", "Forbidden", "Health", "IdempotencyMismatch", "InvalidDataset", "InvalidImage",
    "InvalidInstances", "InvalidRequest", "InvalidSpec", "Job", "JobFailed", "Label", "Model", "ModelSummary",
    "NotFound", "NotTemper", "Prediction", "ServerError", "StorageFull", "TemperError", "TimedOut", "TooLarge",
    "TooManyRequests", "Unauthorized", "Unavailable", "Unreachable", "UnsupportedMediaType", "Verification",
    "Version",
]  # fmt: skip
