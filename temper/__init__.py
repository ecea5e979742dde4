"""A client of a Temper service: `Client` blocks, `AsyncClient` is for asyncio; both have the same verbs."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from temper.client import AsyncClient, Client
    from temper.errors import (
        BadRequest,
        Conflict,
        Forbidden,
        GateFailed,
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
        Correction,
        CorrectionDeleted,
        Dataset,
        DatasetDeleted,
        Deleted,
        Delivery,
        DryRun,
        Estimate,
        Event,
        Failure,
        Gate,
        Health,
        Job,
        Label,
        Model,
        ModelSummary,
        Prediction,
        Verification,
        Version,
        Webhook,
        WebhookDeleted,
    )

__all__ = [
    "AsyncClient", "BadRequest", "Checkpoint", "ClassPrediction", "Client", "Conflict", "Correction",
    "CorrectionDeleted", "Dataset", "DatasetDeleted", "Deleted", "Delivery", "DryRun", "Estimate", "Event", "Failure",
    "Forbidden", "Gate", "GateFailed", "Health", "IdempotencyMismatch", "InvalidDataset", "InvalidImage",
    "InvalidInstances", "InvalidRequest", "InvalidSpec", "Job", "JobFailed", "Label", "Model", "ModelSummary",
    "NotFound", "NotTemper", "Prediction", "ServerError", "StorageFull", "TemperError", "TimedOut", "TooLarge",
    "TooManyRequests", "Unauthorized", "Unavailable", "Unreachable", "UnsupportedMediaType", "Verification",
    "Version", "Webhook", "WebhookDeleted",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for: in a wheel the service is inside this package, and its processes need no client."""
    if name in __all__:
        from temper import client, errors, records

        for module in (client, errors, records):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
