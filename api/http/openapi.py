"""Parts of the API's documentation that several routes share."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Path, Query
from pydantic import BaseModel, Field, WithJsonSchema

from api.http.fast_path import FastRoute, Handler
from api.inference.options import ModelName
from store.records import GREY_28
from store.validation import TEXT
from store.webhooks import WebhookType
from trainer.jobs.records import ANNOUNCED

After = Annotated[str | None, Query(max_length=100, pattern=TEXT, description="The last item of the previous page.")]
Limit = Annotated[int, Query(ge=1, le=100, description="Maximum number of items.")]
Name = Annotated[ModelName, Path()]
DatasetId = Annotated[str, Path(max_length=100, pattern=TEXT, description="The data set's id.")]
CorrectionId = Annotated[str, Path(max_length=100, pattern=TEXT, description="The correction's id.")]
JobId = Annotated[str, Path(max_length=100, pattern=TEXT, description="The job's id.")]
Number = Annotated[int, Path(ge=1, lt=2**63, description="A version.")]


def _array(items: dict[str, Any], length: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": length, "maxItems": length}


_NUMBER = {"type": "number", "minimum": 0, "maximum": 255}
Instance = Annotated[Any, WithJsonSchema({
    "anyOf": [
        _array(_NUMBER, GREY_28.pixels),
        _array(_array(_NUMBER, GREY_28.width), GREY_28.height),
        _array(_array(_array(_NUMBER, 1), GREY_28.width), GREY_28.height),
    ],
    "description": "An image: 28x28, 28x28x1 or 784 numbers, row by row.",
})]  # fmt: skip


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


class PlainError(BaseModel):
    """An error as TensorFlow Serving and the Open Inference Protocol write it."""

    error: str = Field(description="What went wrong.")


class OpenAIErrorBody(BaseModel):
    """What went wrong, as OpenAI's clients read it."""

    code: str = Field(description="Stable name of the kind of failure.", examples=["unknown_job"])
    message: str = Field(description="What went wrong and what to do about it.")
    param: str | None = Field(description="The field that is to blame.")
    type: str = Field(description="The family of the failure.", examples=["invalid_request_error"])


class OpenAIError(BaseModel):
    """The body of every answer under `/openai/v1` that is not a success."""

    error: OpenAIErrorBody = Field(description="What went wrong.")


TEXTS = {
    400: "The request cannot be parsed",
    401: "No API key, or an unknown or revoked one",
    403: "The API key lacks a scope, or the request comes from a foreign site",
    404: "Unknown model, version, job, checkpoint, data set or webhook",
    409: "The state does not allow it",
    413: "Too large",
    415: "Media type not supported",
    422: "Invalid content",
    429: "Too many requests at once",
    503: "The store or the model server is unavailable",
    504: "The model server did not answer in time",
    507: "No space is left on the disk",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documentation of error responses."""
    return {status: {"model": Error, "description": TEXTS[status]} for status in statuses}


def openai_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Documentation of error responses under `/openai/v1`, where content that is invalid is a 400."""
    texts = {**TEXTS, 400: "The request is invalid", 404: "Unknown file, job or model"}
    documented: dict[int | str, dict[str, Any]] = {
        status: {"model": OpenAIError, "description": texts[status]} for status in (400, 401, 403, *statuses, 503)
    }
    return {**documented, "4XX": {"model": OpenAIError, "description": "Refused"}}  # instead of FastAPI's own 422


PLAIN_ERRORS: dict[int | str, dict[str, Any]] = {
    **{
        status: {"model": PlainError, "description": TEXTS[status]}
        for status in (400, 401, 403, 404, 413, 429, 503, 504)
    },
    "4XX": {"model": PlainError, "description": "Refused"},  # instead of the 422 that FastAPI documents by itself
}


def _parameter(name: str, about: str, kind: str = "string", place: str = "path", **more: Any) -> dict[str, Any]:
    return {"name": name, "in": place, "required": True, "description": about, "schema": {"type": kind, **more}}


# Parameters of routes that read the request themselves.
NAME, LABEL = _parameter("name", "The model."), _parameter("label", "A label.")
VERSION = _parameter("version", "A version.", "integer")


def whole(model: type[BaseModel]) -> dict[str, Any]:
    """The schema of a body that its route reads itself, with all references resolved."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def filled(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return filled(parts[node["$ref"].rpartition("/")[2]])
            return {key: filled(value) for key, value in node.items()}
        return [filled(value) for value in node] if isinstance(node, list) else node

    found: dict[str, Any] = filled(schema)
    return found


def add_fast_routes(
    router: APIRouter, endpoint: Handler, paths: Mapping[str, list[dict[str, Any]]], *,
    verb: str, request: type[BaseModel], response: type[BaseModel],
) -> None:  # fmt: skip
    """Add the POST routes of one endpoint that reads its JSON body itself.

    Args:
        paths: each with the documentation of its parameters, the last of which tells it from the others.
        verb: what the endpoint does, for the operations' ids.
    """
    for path, parameters in paths.items():
        router.add_api_route(
            path, endpoint, methods=["POST"], route_class_override=FastRoute, response_model=response,
            operation_id=f"{verb} by {parameters[-1]['name']}",
            openapi_extra={
                "requestBody": {"required": True, "content": {"application/json": {"schema": whole(request)}}},
                "parameters": parameters,
            },
        )  # fmt: skip


WEBHOOKS: dict[WebhookType, str] = {
    "fine_tuning.job.created": "A job was queued",
    "fine_tuning.job.running": "A worker has begun a job, or goes on with it",
    "fine_tuning.job.succeeded": "A job has succeeded: its version is live",
    "fine_tuning.job.failed": "A job has failed",
    "fine_tuning.job.cancelled": "A job was cancelled",
    "fine_tuning.job.report_completed": "The costly part of a job's report card is there",
    "model.label.moved": "A label stands for another version, or for none",
}
_SIGNATURE = r"^v1,[A-Za-z0-9+/]{43}=( v1,[A-Za-z0-9+/]{43}=)*$"
_SIGNED = [
    _parameter("webhook-id", "Names the delivery, and is the same in every attempt.", place="header"),
    _parameter("webhook-timestamp", "When this attempt was made, in Unix seconds.", "integer", "header"),
    _parameter(
        "webhook-signature",
        "`v1,` and the base64 of the HMAC-SHA256 of `{webhook-id}.{webhook-timestamp}.{body}` under the secret's "
        "bytes. For a day after a rotation there are two of these, with a space between.",
        place="header", pattern=_SIGNATURE,
    ),
]  # fmt: skip
_RECEIVED = {
    "2XX": {"description": "It is received; answer within 15 seconds"},
    "410": {"description": "Disable this webhook"},
    "default": {"description": "Send it again later"},
}


def add_webhooks(app: FastAPI) -> None:
    """Have an app's document describe what is sent to webhooks. Built on the first request, like the rest of it."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        if "webhooks" not in document:
            schemas = document["components"]["schemas"]
            schemas |= {"JobAnnouncement": _of_job(schemas["JobView"]), "LabelMove": _LABEL_MOVE}
            document["webhooks"] = {kind: {"post": _delivery(kind)} for kind in WEBHOOKS}
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _record(about: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "description": about, "properties": dict(fields), "required": list(fields)}


def _of_job(view: Mapping[str, Any]) -> dict[str, Any]:
    """What is told of a job: some fields of it, as its own schema has them."""
    return _record("A job when something happened to it.", {name: view["properties"][name] for name in ANNOUNCED})


_LABEL_MOVE = _record("A label that has moved.", {
    "model": {"type": "string", "description": "The model."},
    "label": {"type": "string", "description": "The label."},
    "from": {"type": ["integer", "null"], "description": "The version that it stood for; null if it is new."},
    "to": {"type": ["integer", "null"], "description": "The version that it stands for; null if it was deleted."},
})  # fmt: skip
_LABEL_MOVE["properties"]["override"] = {
    "type": "boolean", "const": True, "description": "Only there if the gate of that version had failed.",
}  # fmt: skip


def _delivery(kind: WebhookType) -> dict[str, Any]:
    """The request that tells an endpoint of something."""
    data = "LabelMove" if kind == "model.label.moved" else "JobAnnouncement"
    body = _record(f"{WEBHOOKS[kind]}.", {
        "type": {"type": "string", "const": kind, "description": "What has happened."},
        "timestamp": {"type": "string", "format": "date-time", "description": "When it happened, in UTC."},
        "data": {"$ref": f"#/components/schemas/{data}", "description": "The particulars."},
    })  # fmt: skip
    return {
        "tags": ["webhooks"], "operationId": kind, "summary": WEBHOOKS[kind],
        "description": "Sent, and sent again until it is received, to every webhook that wants this type.",
        "parameters": _SIGNED,
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": _RECEIVED,
    }  # fmt: skip
