"""The predict path of TensorFlow Serving's REST API: /v1/models/...

https://www.tensorflow.org/tfx/serving/api_rest. Unlike there, every answer has `model_spec`, and images are checked.
"""

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from api.gateway import gateway_of, stored
from api.http.fast_path import Json
from api.http.openapi import LABEL, NAME, PLAIN_ERRORS, VERSION, Instance, Name, Number, add_fast_routes
from api.inference.json_body import as_images, images_of, is_array, is_object, one_by_one, parse
from api.inference.options import plain
from api.inference.router import parse_version
from api.routes.predict import ask
from store.errors import InvalidRequest, TooLarge, UnknownModel

INPUT = "image"
TOPS = {"serving_default": 1.0, "serving_bytes": 255.0}  # the largest value of a pixel, by signature
Labelled = Annotated[str, Path(min_length=1, max_length=64, description="A label.")]

router = APIRouter(tags=["TensorFlow Serving REST"], responses=PLAIN_ERRORS)


class TensorFlowPredict(BaseModel):
    """A request in TensorFlow Serving's row format (`instances`) or column format (`inputs`)."""

    signature_name: Literal["serving_default", "serving_bytes"] = Field(
        "serving_default", description="Pixels from 0 to 1, or bytes from 0 to 255."
    )
    instances: list[Instance] | None = Field(None, description="Row format: images, or objects with an `image` each.")
    inputs: list[Instance] | None = Field(
        None, description="Column format: an array of images, or an object with the array as `image`."
    )


class TensorFlowPredictions(BaseModel):
    """The answer, in the format of the request."""

    predictions: list[dict[str, list[float] | float]] | None = Field(None, description="The outputs for each image.")
    outputs: dict[str, list[list[float]] | list[float]] | None = Field(None, description="The outputs for all images.")
    model_spec: dict[str, str] = Field(description="Name, version and signature that answered.")


async def predict(request: Request) -> Response:
    """Classify images, in row format (`instances`) or in column format (`inputs`)."""
    images, signature, rows = _read(await request.body(), gateway_of(request).settings.max_instances)
    where = request.path_params
    found = await ask(request, images, where["name"], parse_version(where.get("version")), where.get("label"))
    body: dict[str, Any]
    if rows:
        names = tuple(found.outputs)
        columns = zip(*found.outputs.values(), strict=True)
        body = {"predictions": [dict(zip(names, row, strict=True)) for row in columns]}
    else:
        body = {"outputs": found.outputs}
    body["model_spec"] = {"name": found.model, "version": str(found.version), "signature_name": signature}
    return Json(body)


add_fast_routes(
    router,
    predict,
    {
        "/v1/models/{name}:predict": [NAME],
        "/v1/models/{name}/versions/{version}:predict": [NAME, VERSION],
        "/v1/models/{name}/labels/{label}:predict": [NAME, LABEL],
    },
    verb="predict",
    request=TensorFlowPredict,
    response=TensorFlowPredictions,
)


@router.get("/v1/models/{name}")
async def status(request: Request, name: Name) -> JSONResponse:
    """The state of every live version."""
    return _status(_versions(request, name))


@router.get("/v1/models/{name}/versions/{version}")
async def status_of_version(request: Request, name: Name, version: Number) -> JSONResponse:
    """The state of one version."""
    if version not in _versions(request, name):
        raise UnknownModel(f"Could not find version {version} of model {name}")
    return _status([version])


@router.get("/v1/models/{name}/labels/{label}")
async def status_of_label(request: Request, name: Name, label: Labelled) -> JSONResponse:
    """The state of the version that a label points to."""
    return _status([(await gateway_of(request).router.resolve(stored(request, name), None, label)).version])


@router.get("/v1/models/{name}/metadata")
async def metadata(request: Request, name: Name) -> JSONResponse:
    """The signatures of the version that gets requests without version or label."""
    return await _metadata(request, name, None, None)


@router.get("/v1/models/{name}/versions/{version}/metadata")
async def metadata_of_version(request: Request, name: Name, version: Number) -> JSONResponse:
    """The signatures of one version."""
    return await _metadata(request, name, version, None)


@router.get("/v1/models/{name}/labels/{label}/metadata")
async def metadata_of_label(request: Request, name: Name, label: Labelled) -> JSONResponse:
    """The signatures of the version that a label points to."""
    return await _metadata(request, name, None, label)


def _read(body: bytes, most: int) -> tuple[np.ndarray, str, bool]:
    """The images of a body, its signature, and whether it is in row format. The parsed document is freed on return."""
    document = parse(body)
    signature = plain(document.get("signature_name", "")) or "serving_default"
    if not isinstance(signature, str) or signature not in TOPS:
        raise InvalidRequest(f'Serving signature name: "{signature}" not found in signature def')
    rows = "instances" in document
    if rows == ("inputs" in document):
        raise InvalidRequest(
            "expecting only one of 'inputs' or 'instances' keys to exist" if rows else
            "Missing 'inputs' or 'instances' key"
        )  # fmt: skip
    field, top = "instances" if rows else "inputs", TOPS[signature]
    given = document[field]
    if rows and is_array(given) and len(given) and is_object(given[0]):
        if len(given) > most:
            raise TooLarge(f"{len(given)} instances, more than the limit of {most}")
        images = as_images(one_by_one([_named(instance) for instance in given], field, top), top)
    elif not rows and is_object(given):
        _named(given)
        images = images_of(body, given, INPUT, most, top)
    else:
        images = images_of(body, document, field, most, top)
    return images, signature, rows


def _named(instance: Any) -> Any:
    """The image of an object that names its inputs."""
    if not is_object(instance):
        raise InvalidRequest("instances: some are objects and some are not; write all in one form")
    names = set(instance.keys())
    if names != {INPUT}:
        raise InvalidRequest(f"the only named input is {INPUT!r}, not {', '.join(sorted(names)) or 'none'}")
    return instance[INPUT]


def _versions(request: Request, name: str) -> list[int]:
    versions = gateway_of(request).router.versions(stored(request, name))
    if not versions:
        raise UnknownModel(f"Could not find any versions of model {name}")
    return versions


def _status(versions: list[int]) -> JSONResponse:
    fine = {"error_code": "OK", "error_message": ""}
    states = [{"version": str(version), "state": "AVAILABLE", "status": fine} for version in versions]
    return JSONResponse({"model_version_status": states})


async def _metadata(request: Request, name: str, version: int | None, label: str | None) -> JSONResponse:
    target = await gateway_of(request).router.resolve(stored(request, name), version, label)
    outputs = {output: _tensor("DT_FLOAT", -1, len(target.classes)) for output in ("logits", "probabilities")}
    if target.abstention:
        outputs["distance"] = _tensor("DT_FLOAT", -1)
    floats, whole_bytes = _tensor("DT_FLOAT", -1, *target.input.shape), _tensor("DT_UINT8", -1, target.input.pixels)
    signatures = {
        signature: {
            "inputs": {INPUT: floats if top == 1 else whole_bytes},
            "outputs": outputs, "method_name": "tensorflow/serving/predict", "defaults": {},
        }
        for signature, top in TOPS.items()
    }  # fmt: skip
    spec = {"name": name, "version": str(target.version), "signature_name": ""}
    return JSONResponse({"model_spec": spec, "metadata": {"signature_def": {"signature_def": signatures}}})


def _tensor(dtype: str, *sizes: int) -> dict[str, Any]:
    dims = [{"size": str(size), "name": ""} for size in sizes]
    return {"dtype": dtype, "tensor_shape": {"dim": dims, "unknown_rank": False}, "name": ""}
