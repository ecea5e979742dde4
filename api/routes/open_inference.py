"""The Open Inference Protocol, version 2, over REST: /v2/...

https://github.com/kserve/open-inference-protocol. The input is `image`, FP32 from 0 to 1 or UINT8; the outputs are
`logits` and `probabilities`.
"""

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api import __version__
from api.gateway import gateway_of, stored
from api.http.errors import invalid_request
from api.http.fast_path import Json
from api.http.openapi import NAME, PLAIN_ERRORS, VERSION, Name, Number, add_fast_routes
from api.inference.json_body import PIXELS, SHAPES, as_images, check_range, is_array, is_object, numbers, parse
from api.inference.options import plain
from api.inference.router import parse_version
from api.routes.predict import ask
from store.errors import InvalidInstances, InvalidRequest, TooLarge

TOPS = {"FP32": 1.0, "FP64": 1.0, "UINT8": 255.0}  # the largest value of a pixel, by data type

router = APIRouter(tags=["Open Inference Protocol"], responses=PLAIN_ERRORS)


class InferInput(BaseModel):
    """The description of a tensor."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Literal["image"] = Field(description="The only input.")
    shape: list[int] = Field(min_length=2, max_length=4, description="[n, 28, 28, 1], [n, 28, 28] or [n, 784].")
    datatype: Literal["FP32", "FP64", "UINT8"] = Field(description="Floats from 0 to 1, or bytes.")
    parameters: dict[str, Any] = Field({}, description="Ignored.")


class InferOutput(BaseModel):
    """An output to return."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Literal["logits", "probabilities", "distance"] = Field(description="Its name.")
    parameters: dict[str, Any] = Field({}, description="Ignored.")


class InferParameters(BaseModel):
    """Parameters of a request; others are ignored."""

    model_config = ConfigDict(strict=True)

    label: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(None, description="A label.")


class InferenceOptions(BaseModel):
    """An Open Inference Protocol request without its numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | None = Field(None, max_length=256, description="Returned with the answer.")
    parameters: InferParameters = Field(InferParameters(), description="What should answer.")
    input: InferInput
    outputs: list[InferOutput] = Field([], description="The outputs to return; all by default.")


class InferTensor(InferInput):
    """A tensor with its data."""

    data: list[Any] = Field(description="Its numbers, row by row, nested or not.")


class InferRequest(BaseModel):
    """A request of the Open Inference Protocol."""

    id: str | None = Field(None, description="Returned with the answer.")
    parameters: InferParameters = Field(InferParameters(), description="What should answer.")
    inputs: list[InferTensor] = Field(min_length=1, max_length=1, description="The images.")
    outputs: list[InferOutput] = Field([], description="The outputs to return; all by default.")


class InferResponse(BaseModel):
    """The answer."""

    model_name: str = Field(description="The model.")
    model_version: str = Field(description="The version that answered.")
    id: str | None = Field(None, description="The request's id.")
    outputs: list[dict[str, Any]] = Field(
        description="The tensors `logits` and `probabilities`, [n, classes] FP32, and `distance`, [n] FP32, to the "
        "nearest image that was learned, where the version has it."
    )


async def infer(request: Request) -> Response:
    """Classify images."""
    options, images = _read(await request.body(), gateway_of(request).settings.max_instances)
    where = request.path_params
    found = await ask(request, images, where["name"], parse_version(where.get("version")), options.parameters.label)
    arrays = found.outputs
    if missing := [output.name for output in options.outputs if output.name not in arrays]:
        raise InvalidRequest(f"outputs: {found.model}:{found.version} has no {missing[0]!r}", param="outputs")
    outputs = [
        {"name": name, "datatype": "FP32", "shape": arrays[name].shape, "data": arrays[name].ravel()}
        for name in ([output.name for output in options.outputs] or arrays)
    ]
    body = {"model_name": found.model, "model_version": str(found.version), "id": options.id, "outputs": outputs}
    if options.id is None:
        del body["id"]
    return Json(body)


add_fast_routes(
    router,
    infer,
    {
        "/v2/models/{name}/infer": [NAME],
        "/v2/models/{name}/versions/{version}/infer": [NAME, VERSION],
    },
    verb="infer",
    request=InferRequest,
    response=InferResponse,
)


@router.get("/v2")
async def server() -> dict[str, Any]:
    """Name and version of this server."""
    return {"name": "temper", "version": __version__, "extensions": []}


@router.get("/v2/health/live")
async def live() -> dict[str, bool]:
    """The gateway is alive."""
    return {"live": True}


@router.get("/v2/health/ready")
async def ready(request: Request) -> JSONResponse:
    """Whether a model server answers."""
    up = bool(gateway_of(request).pool.up)
    return JSONResponse({"ready": up}, 200 if up else 503)


@router.get("/v2/models/{name}")
async def metadata(request: Request, name: Name) -> dict[str, Any]:
    """Inputs and outputs of the version that gets requests without version or label."""
    return await _metadata(request, name, None)


@router.get("/v2/models/{name}/versions/{version}")
async def metadata_of_version(request: Request, name: Name, version: Number) -> dict[str, Any]:
    """Inputs and outputs of one version."""
    return await _metadata(request, name, version)


@router.get("/v2/models/{name}/ready")
async def model_ready(request: Request, name: Name) -> JSONResponse:
    """Whether the model can predict."""
    return await _ready(request, name, None)


@router.get("/v2/models/{name}/versions/{version}/ready")
async def version_ready(request: Request, name: Name, version: Number) -> JSONResponse:
    """Whether the version can predict."""
    return await _ready(request, name, version)


def _read(body: bytes, most: int) -> tuple[InferenceOptions, np.ndarray]:
    """Options and images. The parsed document is freed on return."""
    document = parse(body)
    inputs = document.get("inputs")
    if not is_array(inputs) or len(inputs) != 1 or not is_object(inputs[0]):
        raise InvalidRequest("inputs: must be an array with one tensor, `image`", param="inputs")
    tensor = inputs[0]
    try:
        fields = {key: plain(value) for key, value in document.items() if key != "inputs"}
        described = {key: plain(value) for key, value in tensor.items() if key != "data"}
        options = InferenceOptions.model_validate({**fields, "input": described})
    except ValidationError as exc:
        found: list[Any] = exc.errors(include_url=False)
        for error in found:
            if error["loc"][0] == "input":
                error["loc"] = ("inputs", 0, *error["loc"][1:])
        raise invalid_request(found, InferenceOptions) from exc
    return options, _images(tensor.get("data"), options.input.shape, options.input.datatype, most)


def _images(data: Any, shape: list[int], datatype: str, most: int) -> np.ndarray:
    if tuple(shape[1:]) not in SHAPES or shape[0] < 1:
        raise InvalidInstances(f"inputs.0.shape: {shape} is not [n, 28, 28, 1], [n, 28, 28] or [n, 784]")
    if shape[0] > most:
        raise TooLarge(f"{shape[0]} images, more than the limit of {most}")
    top = TOPS[datatype]
    found = numbers(data, top) if is_array(data) else None
    if found is None or (datatype == "UINT8" and found.dtype.kind != "u"):
        raise InvalidInstances(f"inputs.0.data: must be an array of {datatype} numbers")
    if found.size != shape[0] * PIXELS:
        raise InvalidInstances(f"inputs.0.data: {found.size} numbers do not fill shape {shape}")
    pixels = found.reshape(-1, PIXELS)
    check_range(pixels, "inputs.0.data", top)
    return as_images(pixels, top)


async def _metadata(request: Request, name: str, version: int | None) -> dict[str, Any]:
    router, model = gateway_of(request).router, stored(request, name)
    target = await router.resolve(model, version, None)
    shape, classes = [-1, len(target.classes)], {"classes": list(target.classes)}
    outputs = [
        {"name": output, "datatype": "FP32", "shape": shape, "parameters": classes}
        for output in ("logits", "probabilities")
    ]
    if target.abstention:
        outputs.append({"name": "distance", "datatype": "FP32", "shape": [-1]})
    return {
        "name": name, "versions": [str(number) for number in reversed(router.versions(model))],
        "platform": "tensorflow_savedmodel",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, *target.input.shape]}], "outputs": outputs,
    }  # fmt: skip


async def _ready(request: Request, name: str, version: int | None) -> JSONResponse:
    gateway = gateway_of(request)
    await gateway.router.resolve(stored(request, name), version, None)
    up = bool(gateway.pool.up)
    return JSONResponse({"name": name, "ready": up}, 200 if up else 503)
