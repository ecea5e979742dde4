"""The Open Inference Protocol, version 2, over REST: /v2/...

https://github.com/kserve/open-inference-protocol. The input is `image`, FP32 from 0 to 1 or UINT8; the outputs are
`logits` and `probabilities`.
"""

from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from pydantic import ValidationError

from api import __version__
from api.gateway import gateway_of
from api.http.errors import invalid_request
from api.http.fast_path import FastRoute, Json
from api.http.openapi import NAME, PLAIN_ERRORS, VERSION, Name, Number, whole
from api.inference.json_body import PIXELS, SHAPES, as_images, check_range, is_array, is_object, numbers, parse, plain
from api.routes.predict import answer
from api.routes.schemas import InferenceOptions, InferRequest, InferResponse
from store.errors import InvalidInstances, InvalidRequest, TooLarge

TOPS = {"FP32": 1.0, "FP64": 1.0, "UINT8": 255.0}  # what pixels of a datatype go up to


def add(app: FastAPI) -> None:
    """The routes under /v2."""
    schema = whole(InferRequest)
    documented: dict[str, Any] = {"tags": ["Open Inference Protocol"], "responses": PLAIN_ERRORS}
    for path, parameters in (
        ("/v2/models/{name}/infer", [NAME]),
        ("/v2/models/{name}/versions/{version:int}/infer", [NAME, VERSION]),
    ):
        app.router.add_api_route(
            path, infer, methods=["POST"], route_class_override=FastRoute, response_model=InferResponse, **documented,
            operation_id=f"infer by {parameters[-1]['name']}",
            openapi_extra={
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "parameters": parameters,
            },
        )  # fmt: skip

    @app.get("/v2", **documented)
    async def server() -> dict[str, Any]:
        """What this server is."""
        return {"name": "temper", "version": __version__, "extensions": []}

    @app.get("/v2/health/live", **documented)
    async def live() -> dict[str, bool]:
        """The gateway lives."""
        return {"live": True}

    @app.get("/v2/health/ready", **documented)
    async def ready(request: Request) -> JSONResponse:
        """A model server answers."""
        up = bool(gateway_of(request).pool.up)
        return JSONResponse({"ready": up}, 200 if up else 503)

    @app.get("/v2/models/{name}", **documented)
    async def metadata(request: Request, name: Name) -> dict[str, Any]:
        """Inputs and outputs of the version that requests get."""
        return await _metadata(request, name, None)

    @app.get("/v2/models/{name}/versions/{version}", **documented)
    async def metadata_of_version(request: Request, name: Name, version: Number) -> dict[str, Any]:
        """Inputs and outputs of one version."""
        return await _metadata(request, name, version)

    @app.get("/v2/models/{name}/ready", **documented)
    async def model_ready(request: Request, name: Name) -> JSONResponse:
        """Predictions can be asked of the model."""
        return await _ready(request, name, None)

    @app.get("/v2/models/{name}/versions/{version}/ready", **documented)
    async def version_ready(request: Request, name: Name, version: Number) -> JSONResponse:
        """Predictions can be asked of the version."""
        return await _ready(request, name, version)


async def infer(request: Request) -> Response:
    """Classify images."""
    options, images = _read(await request.body(), gateway_of(request).settings.max_instances)
    where = request.path_params
    found = await answer(request, images, where["name"], where.get("version"), options.parameters.label)
    arrays = {"logits": found.logits, "probabilities": found.probabilities}
    outputs = [
        {"name": name, "datatype": "FP32", "shape": arrays[name].shape, "data": arrays[name].ravel()}
        for name in ([output.name for output in options.outputs] or arrays)
    ]
    body = {"model_name": found.model, "model_version": str(found.version), "id": options.id, "outputs": outputs}
    if options.id is None:
        del body["id"]
    return Json(body)


def _read(body: bytes, most: int) -> tuple[InferenceOptions, np.ndarray]:
    """What is wanted, and the images. The parsed document goes with the call."""
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
        raise invalid_request(exc.errors(include_url=False), InferenceOptions) from exc
    return options, _images(tensor.get("data"), options.input.shape, options.input.datatype, most)


def _images(data: Any, shape: list[int], datatype: str, most: int) -> np.ndarray:
    if tuple(shape[1:]) not in SHAPES or shape[0] < 1:
        raise InvalidInstances(f"inputs.0.shape: {shape}, where [n, 28, 28, 1], [n, 28, 28] or [n, 784] should be")
    if shape[0] > most:
        raise TooLarge(f"{shape[0]} images, more than {most}")
    top = TOPS[datatype]
    found = numbers(data, top) if is_array(data) else None
    if found is None or (datatype == "UINT8" and found.dtype.kind != "u"):
        raise InvalidInstances(f"inputs.0.data: must be an array of {datatype} numbers")
    if found.size != shape[0] * PIXELS:
        raise InvalidInstances(f"inputs.0.data: {found.size} numbers are not of shape {shape}")
    pixels = found.reshape(-1, PIXELS)
    check_range(pixels, "inputs.0.data", top)
    return as_images(pixels, top)


async def _metadata(request: Request, name: str, version: int | None) -> dict[str, Any]:
    gateway = gateway_of(request)
    _, classes = await gateway.router.resolve(name, version, None)
    outputs = [
        {"name": output, "datatype": "FP32", "shape": [-1, len(classes)], "parameters": {"classes": list(classes)}}
        for output in ("logits", "probabilities")
    ]
    return {
        "name": name, "versions": [str(number) for number in sorted(gateway.router.all[name].classes)],
        "platform": "tensorflow_savedmodel",
        "inputs": [{"name": "image", "datatype": "FP32", "shape": [-1, 28, 28, 1]}], "outputs": outputs,
    }  # fmt: skip


async def _ready(request: Request, name: str, version: int | None) -> JSONResponse:
    gateway = gateway_of(request)
    await gateway.router.resolve(name, version, None)
    up = bool(gateway.pool.up)
    return JSONResponse({"name": name, "ready": up}, 200 if up else 503)
