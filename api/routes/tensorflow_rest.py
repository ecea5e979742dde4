"""The predict path that clients of TensorFlow Serving's REST API speak: /v1/models/...

https://www.tensorflow.org/tfx/serving/api_rest. Beyond it, every answer has `model_spec`, and images are checked.
"""

from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, Path, Request, Response
from fastapi.responses import JSONResponse

from api.gateway import gateway_of
from api.http.fast_path import FastRoute, Json
from api.http.openapi import LABEL, NAME, PLAIN_ERRORS, VERSION, Name, Number, whole
from api.inference.json_body import as_images, images_of, is_array, is_object, one_by_one, parse, plain
from api.inference.router import parse_version
from api.routes.predict import Answer, answer
from api.routes.schemas import TensorFlowPredict, TensorFlowPredictions
from serving.registry import Route
from store.errors import InvalidRequest, TooLarge, UnknownModel

INPUT = "image"
TOPS = {"serving_default": 1.0, "serving_bytes": 255.0}  # what pixels of a signature go up to
Labelled = Annotated[str, Path(min_length=1, max_length=64, description="A label.")]


def add(app: FastAPI) -> None:
    """The routes under /v1."""
    schema = whole(TensorFlowPredict)
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    for path, parameters in (
        ("/v1/models/{name}:predict", [NAME]),
        ("/v1/models/{name}/versions/{version}:predict", [NAME, VERSION]),
        ("/v1/models/{name}/labels/{label}:predict", [NAME, LABEL]),
    ):
        app.router.add_api_route(
            path, predict, methods=["POST"], tags=["TensorFlow Serving REST"], route_class_override=FastRoute,
            response_model=TensorFlowPredictions, responses=PLAIN_ERRORS,
            operation_id=f"predict by {parameters[-1]['name']}",
            openapi_extra={"requestBody": body, "parameters": parameters},
        )  # fmt: skip

    documented: dict[str, Any] = {"tags": ["TensorFlow Serving REST"], "responses": PLAIN_ERRORS}

    @app.get("/v1/models/{name}", **documented)
    async def status(request: Request, name: Name) -> JSONResponse:
        """The state of every live version."""
        return _status(sorted(_route(request, name).classes, reverse=True))

    @app.get("/v1/models/{name}/versions/{version}", **documented)
    async def status_of_version(request: Request, name: Name, version: Number) -> JSONResponse:
        """The state of one version."""
        if version not in _route(request, name).classes:
            raise UnknownModel(f"Could not find version {version} of model {name}")
        return _status([version])

    @app.get("/v1/models/{name}/labels/{label}", **documented)
    async def status_of_label(request: Request, name: Name, label: Labelled) -> JSONResponse:
        """The state of the version that a label stands for."""
        return _status([(await gateway_of(request).router.resolve(name, None, label))[0]])

    @app.get("/v1/models/{name}/metadata", **documented)
    async def metadata(request: Request, name: Name) -> JSONResponse:
        """The signatures of the version that requests get."""
        return await _metadata(request, name, None, None)

    @app.get("/v1/models/{name}/versions/{version}/metadata", **documented)
    async def metadata_of_version(request: Request, name: Name, version: Number) -> JSONResponse:
        """The signatures of one version."""
        return await _metadata(request, name, version, None)

    @app.get("/v1/models/{name}/labels/{label}/metadata", **documented)
    async def metadata_of_label(request: Request, name: Name, label: Labelled) -> JSONResponse:
        """The signatures of the version that a label stands for."""
        return await _metadata(request, name, None, label)


async def predict(request: Request) -> Response:
    """Classify images, in row format (`instances`) or in column format (`inputs`)."""
    images, signature, rows = _read(await request.body(), gateway_of(request).settings.max_instances)
    where = request.path_params
    found = await answer(request, images, where["name"], parse_version(where.get("version")), where.get("label"))
    outputs: dict[str, Any]
    if rows:
        pairs = zip(found.logits, found.probabilities, strict=True)
        outputs = {"predictions": [{"logits": scores, "probabilities": shares} for scores, shares in pairs]}
    else:
        outputs = {"outputs": {"logits": found.logits, "probabilities": found.probabilities}}
    outputs["model_spec"] = _spec(found, signature)
    return Json(outputs)


def _read(body: bytes, most: int) -> tuple[np.ndarray, str, bool]:
    """The images of a body, its signature, and whether it is in row format. The parsed document goes with the call."""
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
            raise TooLarge(f"{len(given)} instances, more than {most}")
        images = as_images(one_by_one([_named(instance) for instance in given], field, top), top)
    elif not rows and is_object(given):
        _named(given)
        images = images_of(body, given, INPUT, most, top)
    else:
        images = images_of(body, document, field, most, top)
    return images, signature, rows


def _spec(found: Answer, signature: str) -> dict[str, str]:
    return {"name": found.model, "version": str(found.version), "signature_name": signature}


def _named(instance: Any) -> Any:
    """The image of an object that names its inputs."""
    if not is_object(instance):
        raise InvalidRequest("instances: some are objects and some are not")
    names = set(instance.keys())
    if names != {INPUT}:
        raise InvalidRequest(f"the only named input is {INPUT!r}, not {', '.join(sorted(names)) or 'none'}")
    return instance[INPUT]


def _route(request: Request, name: str) -> Route:
    route = gateway_of(request).router.all.get(name)
    if route is None:
        raise UnknownModel(f"Could not find any versions of model {name}")
    return route


def _status(versions: list[int]) -> JSONResponse:
    fine = {"error_code": "OK", "error_message": ""}
    states = [{"version": str(version), "state": "AVAILABLE", "status": fine} for version in versions]
    return JSONResponse({"model_version_status": states})


async def _metadata(request: Request, name: str, version: int | None, label: str | None) -> JSONResponse:
    number, classes = await gateway_of(request).router.resolve(name, version, label)
    outputs = {output: _tensor("DT_FLOAT", -1, len(classes)) for output in ("logits", "probabilities")}
    signatures = {
        signature: {
            "inputs": {INPUT: _tensor("DT_FLOAT", -1, 28, 28, 1) if top == 1 else _tensor("DT_UINT8", -1, 784)},
            "outputs": outputs, "method_name": "tensorflow/serving/predict", "defaults": {},
        }
        for signature, top in TOPS.items()
    }  # fmt: skip
    spec = {"name": name, "version": str(number), "signature_name": ""}
    return JSONResponse({"model_spec": spec, "metadata": {"signature_def": {"signature_def": signatures}}})


def _tensor(dtype: str, *sizes: int) -> dict[str, Any]:
    dims = [{"size": str(size), "name": ""} for size in sizes]
    return {"dtype": dtype, "tensor_shape": {"dim": dims, "unknown_rank": False}, "name": ""}
