"""POST /predict, and the core that all three faces of the predict path share."""

import asyncio
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response

from api.gateway import gateway_of
from api.http.fast_path import FastRoute, Json
from api.http.openapi import errors, whole
from api.http.tracing import answered_by
from api.inference import bodies
from api.inference.json_body import parse_instances
from api.routes.examples import IMAGE_EXAMPLE
from api.routes.schemas import ImageOptions, PredictRequest, PredictResponse
from store.errors import InvalidRequest, TooLarge, UnsupportedMediaType

TIMEOUT, STICKY = "X-Request-Timeout", "X-Sticky-Key"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a version says of n images."""

    model: str
    version: int
    classes: tuple[str, ...]
    logits: np.ndarray  # (n, classes) float32
    probabilities: np.ndarray  # (n, classes) float32


async def answer(
    request: Request, images: np.ndarray, model: str, version: int | None = None, label: str | None = None
) -> Answer:
    """Have the version that is meant classify images, (n, 28, 28, 1) float32 in [0, 1] or (n, 784) uint8.

    Raises:
        UnknownModel: there is no such model, version or label.
        InvalidRequest: both are named, or a header is wrong.
        Overloaded, ModelServerError: of the micro-batches.
    """
    gateway = gateway_of(request)
    if version is not None and label is not None:
        raise InvalidRequest("give a version or a label, not both", param="label")
    headers = dict(request.scope["headers"])
    timeout_s = _timeout(headers.get(b"x-request-timeout"), gateway.settings.predict_timeout_s)
    number, classes = await gateway.router.resolve(model, version, label, headers.get(b"x-sticky-key"))
    answered_by(request.scope, model, number)
    found = await gateway.batcher.predict(model, number, images, timeout_s)
    return Answer(model, number, classes, found.logits, found.probabilities)


def _timeout(given: bytes | None, most: float) -> float:
    if given is None:
        return most
    try:
        seconds = math.nan if b"_" in given else float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        text = given.decode(errors="replace")
        raise InvalidRequest(f"{TIMEOUT}: {text!r} is no number of seconds above 0", param=TIMEOUT)
    return min(seconds, most)


async def predict(request: Request) -> Response:
    """Classify images: JSON instances, raw bytes, an .npy, a PNG or JPEG, or many of them in a form or a zip."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    most, names = gateway_of(request).settings.max_instances, None
    options: ImageOptions
    if kind == bodies.FORM:
        options, files = await bodies.read_form(request, most)
        images = await gateway_of(request).images.decode(files)
        names = [name for name, _ in files]
    elif kind in bodies.KINDS:
        body = await request.body()
        options = bodies.options_of(request.query_params.multi_items())
        match kind:
            case "application/octet-stream":
                images = bodies.from_bytes(body)
            case "application/x-npy":
                images = bodies.from_npy(body)
            case bodies.ZIP:
                files = await asyncio.to_thread(bodies.unzipped, body, gateway_of(request).settings.max_predict_bytes)
                images = await gateway_of(request).images.decode(files)
                names = [name for name, _ in files]
            case _:
                images = await gateway_of(request).images.decode([("the body", body)])
    else:
        body = await request.body()
        if kind != "application/json" and (kind or not body):
            known = ", ".join(("application/json", *bodies.KINDS))
            raise UnsupportedMediaType(f"Content-Type {kind!r}: send one of {known}")
        if request.scope["query_string"]:
            raise InvalidRequest("with a JSON body everything is said in the body, nothing in the query", param="query")
        options, images = parse_instances(body, most)
    if len(images) > most:
        raise TooLarge(f"{len(images)} images, more than {most}", param="body")
    found = await answer(request, images, options.model, options.version, options.label)
    return Json(_written(found, options.top_k, names))


def _written(found: Answer, top_k: int | None, names: list[str] | None) -> dict[str, Any]:
    """The body of `PredictResponse`."""
    classes = found.classes
    predictions: list[dict[str, Any]] = [
        {"label": classes[top], "probabilities": row}
        for top, row in zip(found.probabilities.argmax(axis=1).tolist(), found.probabilities, strict=True)
    ]
    if top_k is not None:
        for prediction, row in zip(predictions, found.probabilities, strict=True):
            best = np.argsort(-row, kind="stable")[:top_k].tolist()
            prediction["top_k"] = [{"label": classes[index], "probability": row[index]} for index in best]
    if names is not None:
        predictions = [{"file": name, **prediction} for name, prediction in zip(names, predictions, strict=True)]
    return {"model": found.model, "version": found.version, "classes": classes, "predictions": predictions}


def add(app: FastAPI) -> None:
    """The route."""
    image = {"schema": {"type": "string", "format": "binary"}}
    options = ImageOptions.model_json_schema()["properties"]
    schema = whole(PredictRequest)
    form = {"type": "object", "properties": {**options, "image": {"type": "string", "format": "binary"}}}
    header = {
        TIMEOUT: {"type": "number", "description": "Seconds after which the answer is of no use (504)."},
        STICKY: {"type": "string", "description": "Requests with the same key follow the same label."},
    }
    app.router.add_api_route(
        "/predict", predict, methods=["POST"], tags=["predict"], route_class_override=FastRoute,
        response_model=PredictResponse, responses=errors(400, 404, 413, 415, 422, 429, 503, 504),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": schema, "example": IMAGE_EXAMPLE},
                    **dict.fromkeys(bodies.KINDS, image), bodies.FORM: {"schema": form},
                },
            },
            "parameters": [
                {"name": name, "in": place, "schema": found, "description": found["description"]}
                for place, group in (("query", options), ("header", header)) for name, found in group.items()
            ],
        },
    )  # fmt: skip
