"""Schemas that several routes share: errors and predictions. Other routes have theirs beside them."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from trainer.spec import MODEL_NAME

ModelName = Annotated[str, Field(pattern=MODEL_NAME, description="Name of a model.", examples=["digits"])]

_NUMBER = {"type": "number", "minimum": 0, "maximum": 255}


def _array(items: dict[str, Any], length: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": length, "maxItems": length}


INSTANCE_SCHEMA = {
    "anyOf": [
        _array(_NUMBER, 784),
        _array(_array(_NUMBER, 28), 28),
        _array(_array(_array(_NUMBER, 1), 28), 28),
    ],
    "description": "An image: 28x28, 28x28x1 or 784 numbers, row by row.",
}


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


class ImageOptions(BaseModel):
    """What shall classify the images of a prediction."""

    model_config = ConfigDict(extra="forbid")

    model: ModelName
    version: Annotated[int, Field(ge=1, lt=2**63)] | None = Field(None, description="A version; else the label's.")
    label: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        None, description="A label; without version and label it is `stable`, or one that has a share of the traffic."
    )
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Also give so many most probable classes, best first."
    )


class PredictOptions(ImageOptions):
    """The same in a JSON body, and how the images are written."""

    model_config = ConfigDict(strict=True)

    range: Literal["unit", "byte"] = Field("unit", description="Do pixels go from 0 to 1 or from 0 to 255?")


class PredictRequest(PredictOptions):
    """Images to classify."""

    instances: list[Annotated[Any, WithJsonSchema(INSTANCE_SCHEMA)]] = Field(
        min_length=1, description="Images of 28x28, 28x28x1 or 784 numbers."
    )


class Ranked(BaseModel):
    """A class and its probability."""

    label: str = Field(description="The class.")
    probability: float = Field(description="Its probability.")


class ClassPrediction(BaseModel):
    """The answer for one image."""

    label: str = Field(description="The most probable class.")
    probabilities: list[float] = Field(description="In the order of `classes`.")
    top_k: list[Ranked] | None = Field(None, description="Where asked for: the most probable classes, best first.")
    file: str | None = Field(None, description="With a zip or a form: the image's name.")


class PredictResponse(BaseModel):
    """The answer for all images, with the version that gave it."""

    model: str = Field(description="The model.")
    version: int = Field(description="The version that answered.")
    classes: list[str] = Field(description="Class names.")
    predictions: list[ClassPrediction] = Field(description="One for each instance, in their order.")


class PlainError(BaseModel):
    """An error as TensorFlow Serving and the Open Inference Protocol write it."""

    error: str = Field(description="What went wrong.")


class TensorFlowPredict(BaseModel):
    """A request in TensorFlow Serving's row or column format; exactly one of the two."""

    signature_name: Literal["serving_default", "serving_bytes"] = Field(
        "serving_default", description="Pixels from 0 to 1, or bytes from 0 to 255."
    )
    instances: list[Annotated[Any, WithJsonSchema(INSTANCE_SCHEMA)]] | None = Field(
        None, description="Row format: images, or objects with an `image` each."
    )
    inputs: list[Annotated[Any, WithJsonSchema(INSTANCE_SCHEMA)]] | None = Field(
        None, description="Column format: an array of images, or an object with the array as `image`."
    )


class TensorFlowPredictions(BaseModel):
    """The answer, in the format of the request."""

    predictions: list[dict[str, list[float]]] | None = Field(None, description="For each image both outputs.")
    outputs: dict[str, list[list[float]]] | None = Field(None, description="Both outputs for all images.")
    model_spec: dict[str, str] = Field(description="Name, version and signature that answered.")


class InferInput(BaseModel):
    """What a tensor is, without its data."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Literal["image"] = Field(description="The only input.")
    shape: list[int] = Field(min_length=2, max_length=4, description="[n, 28, 28, 1], [n, 28, 28] or [n, 784].")
    datatype: Literal["FP32", "FP64", "UINT8"] = Field(description="Floats from 0 to 1, or bytes.")
    parameters: dict[str, Any] = Field({}, description="None is read.")


class InferOutput(BaseModel):
    """An output that is asked for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Literal["logits", "probabilities"] = Field(description="Its name.")
    parameters: dict[str, Any] = Field({}, description="None is read.")


class InferParameters(BaseModel):
    """Parameters of a request; others than these are not read."""

    model_config = ConfigDict(strict=True)

    label: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(None, description="A label.")


class InferenceOptions(BaseModel):
    """All of an Open Inference Protocol request but the numbers."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: str | None = Field(None, max_length=256, description="Comes back with the answer.")
    parameters: InferParameters = Field(InferParameters(), description="What shall answer.")
    input: InferInput
    outputs: list[InferOutput] = Field([], description="Those that are wanted; all by default.")


class InferTensor(InferInput):
    """A tensor with its data."""

    data: list[Any] = Field(description="Its numbers, row by row, nested or not.")


class InferRequest(BaseModel):
    """A request of the Open Inference Protocol."""

    id: str | None = Field(None, description="Comes back with the answer.")
    parameters: InferParameters = Field(InferParameters(), description="What shall answer.")
    inputs: list[InferTensor] = Field(min_length=1, max_length=1, description="The images.")
    outputs: list[InferOutput] = Field([], description="Those that are wanted; all by default.")


class InferResponse(BaseModel):
    """Its answer."""

    model_name: str = Field(description="The model.")
    model_version: str = Field(description="The version that answered.")
    id: str | None = Field(None, description="The request's.")
    outputs: list[dict[str, Any]] = Field(description="The tensors `logits` and `probabilities`, [n, classes] FP32.")
