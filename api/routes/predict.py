"""POST /predict."""

import asyncio
import math
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile

from api.gateway import gateway_of, stored, tenant_of
from api.http.fast_path import FastRoute, Json
from api.http.openapi import Instance, errors, whole
from api.http.tracing import answered_by
from api.inference import bodies
from api.inference.json_body import parse_instances
from api.inference.options import ImageOptions, PredictOptions, options_of
from api.inference.service import Prediction
from api.routes.examples import IMAGE_EXAMPLE
from api.routes.feedback import check_feedback, keep
from store.errors import InvalidRequest, TooLarge, UnsupportedMediaType
from store.records import Abstention

TIMEOUT, STICKY = "X-Request-Timeout", "X-Sticky-Key"
MAX_FIELDS = 16  # of a form, besides its files

router = APIRouter(tags=["predict"])


class PredictRequest(PredictOptions):
    """Images to classify."""

    instances: list[Instance] = Field(min_length=1, description="Images of 28x28, 28x28x1 or 784 numbers.")


class Ranked(BaseModel):
    """A class and its probability."""

    label: str = Field(description="The class.")
    probability: float = Field(description="Its probability.")


Picture = list[list[float]] | str


class Attribution(BaseModel):
    """How much each pixel adds to the logit of a class, compared with a blank image."""

    picture: Picture = Field(description="28x28: what each pixel adds, in nats; as PNG, over the faded image.")
    logit: float = Field(description="The class's logit for the image.")
    baseline_logit: float = Field(description="The class's logit for a blank image. What pixels add sums to the rest.")


class Stability(BaseModel):
    """The smallest change that was found to change the answer."""

    epsilon: float | None = Field(
        description="Largest change of a pixel, of 1, that it takes; null if none was found up to `limit`. PGD with 10 "
        "steps has looked for it: the true one may be smaller."
    )
    label: str | None = Field(description="The answer after it.")
    limit: float = Field(description="The largest epsilon that was tried.")


class Adversarial(BaseModel):
    """The worst image that was found within a distance of the image."""

    epsilon: float = Field(description="Largest change of a pixel.")
    label: str = Field(description="The answer for it.")
    probability: float = Field(description="The answer's probability.")
    probabilities: list[float] = Field(description="In the order of `classes`.")
    image: Picture = Field(description="28x28, from 0 to 1.")


class Neighbour(BaseModel):
    """A training image that is like the image for the last layer of the version."""

    label: str = Field(description="Its class.")
    name: str = Field(description="Its file, or its number.")
    distance: float = Field(description="Euclidean, between inputs of the last layer.")
    image: Picture = Field(description="28x28, from 0 to 1.")


class Explanation(BaseModel):
    """Why a version gives its answer for an image, and what would change it."""

    explained: str = Field(alias="class", description="The class whose logit is explained: the answer, or `class`.")
    image: Picture = Field(description="The image as the version sees it, 28x28, from 0 to 1.")
    integrated_gradients: Attribution = Field(description="Integrated gradients (Sundararajan et al. 2017).")
    smooth_grad: Picture = Field(
        description="28x28: by how much the logit grows with each pixel, on average of noisy copies (Smilkov et al. "
        "2017)."
    )
    stability: Stability = Field(description="How far the answer stands.")
    adversarial: list[Adversarial] = Field(description="From the image itself to the limit, in equal steps of epsilon.")
    nearest: list[Neighbour] | None = Field(description="The nearest training images, if its data set is still there.")
    nearest_reason: str | None = Field(description="Why there are none.")


class ClassPrediction(BaseModel):
    """The answer for one image."""

    label: str = Field(description="The most probable class.")
    set: list[str] | None = Field(
        None,
        description="The prediction set: all classes that are plausible. It has the right one as often as the "
        "`coverage` of the version's spec says; where it is empty, none is plausible. Absent where the version has no "
        "coverage.",
    )
    none_of_these: bool | None = Field(
        None,
        description="Whether the image is unlike those that were learned, so that no class is to be trusted. The "
        "version's report has the rate of false alarms. Absent for versions without a detector, such as the base.",
    )
    probabilities: list[float] = Field(description="In the order of `classes`.")
    top_k: list[Ranked] | None = Field(None, description="If asked for: the most probable classes, best first.")
    file: str | None = Field(None, description="In a zip or a form: the image's name.")
    explanation: Explanation | None = Field(None, description="If asked for: why.")


class PredictResponse(BaseModel):
    """The answer for all images, and the version that gave it."""

    model: str = Field(description="The model.")
    version: int = Field(description="The version that answered.")
    classes: list[str] = Field(description="Class names.")
    id: str | None = Field(None, description="With `feedback`: what `POST /feedback` calls this prediction.")
    predictions: list[ClassPrediction] = Field(description="One for each image, in the order of the request.")


async def predict(request: Request) -> Response:
    """Classify images: JSON instances, raw bytes, an .npy, an image file, or many image files in a form or a zip."""
    return await _answer(request, *await _read(request))


async def explain(request: Request) -> Response:
    """Classify at most 16 images as `POST /predict` does, and explain the answers."""
    options, images, names = await _read(request)
    return await _answer(request, options.model_copy(update={"explain": True}), images, names)


async def _read(request: Request) -> tuple[ImageOptions, np.ndarray, list[str] | None]:
    """Options, images, and the names of image files if there are some, of a request in any form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    gateway, names = gateway_of(request), None
    most = gateway.settings.max_instances
    options: ImageOptions
    if kind == bodies.FORM:
        options, files = await _read_form(request, most)
        images = await gateway.images.decode(files)
        names = [name for name, _ in files]
    elif kind in bodies.KINDS:
        body = await request.body()
        options = options_of(request.query_params.multi_items())
        match kind:
            case "application/octet-stream":
                images = bodies.from_bytes(body)
            case "application/x-npy":
                images = bodies.from_npy(body)
            case bodies.ZIP:
                files = await asyncio.to_thread(bodies.unzipped, body, gateway.settings.max_predict_bytes)
                images = await gateway.images.decode(files)
                names = [name for name, _ in files]
            case _:
                images = await gateway.images.decode([("the body", body)])
    else:
        body = await request.body()
        if kind != "application/json" and (kind or not body):
            known = ", ".join(("application/json", *bodies.KINDS))
            raise UnsupportedMediaType(f"Content-Type {kind!r} is not supported; send one of {known}")
        if request.scope["query_string"]:
            raise InvalidRequest("put options in the JSON body, not in the query string", param="query")
        options, images = parse_instances(body, most)
    if len(images) > most:
        raise TooLarge(f"{len(images)} images, more than the limit of {most}", param="body")
    return options, images, names


async def _answer(request: Request, options: ImageOptions, images: np.ndarray, names: list[str] | None) -> Response:
    if options.feedback:
        check_feedback(gateway_of(request), len(images))
    found = await ask(request, images, options.model, options.version, options.label)
    body = _body(found, options.top_k, names)
    if options.explain:
        limit_s = _timeout(dict(request.scope["headers"]).get(b"x-request-timeout"))
        explained = await gateway_of(request).explanations.explain(
            found, images, options.target, options.pictures, limit_s
        )
        for prediction, explanation in zip(body["predictions"], explained, strict=True):
            prediction["explanation"] = explanation
    if options.feedback:
        body["id"] = await keep(gateway_of(request), tenant_of(request), found, images)
    return Json(body)


async def ask(
    request: Request, images: np.ndarray, model: str, version: int | None = None, label: str | None = None
) -> Prediction:
    """Call the inference service with the options in a request's headers; the response will name the version."""
    scope = request.scope
    headers = dict(scope["headers"])
    return await gateway_of(request).inference.predict(
        images, stored(request, model), version, label,
        tenant=tenant_of(request),
        sticky_key=headers.get(b"x-sticky-key"),
        timeout_s=_timeout(headers.get(b"x-request-timeout")),
        on_resolved=lambda target: answered_by(scope, *target.servable),
    )  # fmt: skip


def _timeout(given: bytes | None) -> float | None:
    if given is None:
        return None
    try:
        seconds = math.nan if b"_" in given else float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        text = given.decode(errors="replace")
        raise InvalidRequest(f"{TIMEOUT}: {text!r} is not a number of seconds above 0", param=TIMEOUT)
    return seconds


async def _read_form(request: Request, most: int) -> tuple[ImageOptions, list[tuple[str, bytes]]]:
    """Options and files of a multipart form. Query parameters count as fields."""
    files: list[tuple[str, bytes]] = []
    fields = list(request.query_params.multi_items())
    async with request.form(max_files=most + 1, max_fields=MAX_FIELDS) as form:
        for name, value in form.multi_items():
            if isinstance(value, UploadFile):
                files.append((value.filename or name, await value.read()))
            else:
                fields.append((name, value))
    return options_of(fields), files


def _body(found: Prediction, top_k: int | None, names: list[str] | None) -> dict[str, Any]:
    """The body of a `PredictResponse`."""
    classes, probabilities = found.classes, found.outputs["probabilities"]
    predictions: list[dict[str, Any]] = [
        {"label": classes[top], "probabilities": row}
        for top, row in zip(probabilities.argmax(axis=1).tolist(), probabilities, strict=True)
    ]
    if found.abstention:
        _abstain(found.abstention, found, predictions)
    if top_k is not None:
        for prediction, row in zip(predictions, probabilities, strict=True):
            best = np.argsort(-row, kind="stable")[:top_k].tolist()
            prediction["top_k"] = [{"label": classes[index], "probability": row[index]} for index in best]
    if names is not None:
        predictions = [{"file": name, **prediction} for name, prediction in zip(names, predictions, strict=True)]
    return {"model": found.model, "version": found.version, "classes": classes, "predictions": predictions}


def _abstain(rule: Abstention, found: Prediction, predictions: list[dict[str, Any]]) -> None:
    """Add to each prediction its set of plausible classes, and whether the image is unlike those that were learned."""
    if rule.coverage is not None:
        for prediction, inside in zip(predictions, found.outputs["probabilities"] >= rule.threshold, strict=True):
            prediction["set"] = [found.classes[index] for index in inside.nonzero()[0].tolist()]
    if (distances := found.outputs.get("distance")) is not None:
        for prediction, far in zip(predictions, (distances > 1).tolist(), strict=True):
            prediction["none_of_these"] = far


_FILE = {"type": "string", "format": "binary"}
_OPTIONS = ImageOptions.model_json_schema()["properties"]
_HEADERS = {
    TIMEOUT: {"type": "number", "description": "Seconds after which the answer is of no use (504)."},
    STICKY: {"type": "string", "description": "Requests with the same key follow the same label."},
}
_DOCUMENTED = {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": whole(PredictRequest), "example": IMAGE_EXAMPLE},
                **{kind: {"schema": _FILE} for kind in bodies.KINDS},
                bodies.FORM: {"schema": {"type": "object", "properties": {**_OPTIONS, "image": _FILE}}},
            },
        },
        "parameters": [
            {"name": name, "in": place, "schema": schema, "description": schema["description"]}
            for place, group in (("query", _OPTIONS), ("header", _HEADERS)) for name, schema in group.items()
        ],
}  # fmt: skip
for path, endpoint in (("/predict", predict), ("/explain", explain)):
    router.add_api_route(
        path, endpoint, methods=["POST"], route_class_override=FastRoute, response_model=PredictResponse,
        responses=errors(400, 404, 409, 413, 415, 422, 429, 503, 504), openapi_extra=_DOCUMENTED,
    )  # fmt: skip
