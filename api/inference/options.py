"""What a prediction asks for besides its images."""

import functools
from collections.abc import Iterable
from typing import Annotated, Any, Literal

import simdjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api.http.errors import invalid_request
from store.errors import InvalidRequest
from trainer.spec import MODEL_NAME

ModelName = Annotated[str, Field(pattern=MODEL_NAME, description="Name of a model.", examples=["digits"])]


class ImageOptions(BaseModel):
    """Options of a prediction whose body is not JSON, as query parameters or form fields."""

    model_config = ConfigDict(extra="forbid")

    model: ModelName
    version: Annotated[int, Field(ge=1, lt=2**63)] | None = Field(
        None, description="A version. Without it, the version of `label`."
    )
    label: Annotated[str, Field(min_length=1, max_length=64)] | None = Field(
        None, description="A label. Without version and label: `stable`, or a label with a share of the traffic."
    )
    top_k: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        None, description="Also return this many of the most probable classes, best first."
    )

    explain: bool = Field(
        False, description="Also explain the answers, of at most 16 images: see `POST /explain`, which always does."
    )
    pictures: Literal["numbers", "png"] = Field(
        "numbers", description="How the pictures of explanations are written: as 28x28 numbers, or as PNG in data URLs."
    )
    target: Annotated[str, Field(max_length=200)] | None = Field(
        None, alias="class", description="Explain this class instead of the answer."
    )
    feedback: bool = Field(
        False, description="Keep the images, 16 at most, for an hour, so that `POST /feedback` can correct the answers."
    )


class PredictOptions(ImageOptions):
    """Options in a JSON body, and how its images are written."""

    model_config = ConfigDict(strict=True)

    range: Literal["unit", "byte"] = Field("unit", description="Whether pixels go from 0 to 1 or from 0 to 255.")


def options_of(given: Iterable[tuple[str, str]]) -> ImageOptions:
    """Options from query parameters or form fields.

    Raises:
        InvalidRequest: one is missing, unknown, wrong or given twice.
    """
    fields: dict[str, str] = {}
    for name, value in given:
        if name in fields:
            raise InvalidRequest(f"{name}: is given more than once", param=name)
        fields[name] = value
    try:
        return ImageOptions.model_validate(fields)
    except ValidationError as exc:
        raise invalid_request(exc.errors(include_url=False), ImageOptions) from exc


def options_in(document: simdjson.Object) -> PredictOptions:
    """Options from a JSON body, which are all of its fields but `instances`.

    Raises:
        InvalidRequest: one is missing, unknown, wrong or given twice.
    """
    names = [name for name in document if name != "instances"]  # look-ups cost far less than items()
    if len(set(names)) + 1 < len(document):
        twice = next(name for name in document if list(document).count(name) > 1)
        raise InvalidRequest(f"{twice}: is given more than once", param=twice)
    try:
        fields = tuple((name, (value := document[name]).__class__, value) for name in names)
    except KeyError:  # a name that holds a NUL is not found
        fields = tuple((name, value.__class__, value) for name, value in document.items() if name != "instances")
    try:
        return _validated(fields)
    except ValidationError:
        given = {name: plain(value) for name, _, value in fields}
    try:
        return PredictOptions.model_validate(given)  # once more, so that the error shows Python's objects
    except ValidationError as exc:
        raise invalid_request(exc.errors(include_url=False), PredictOptions) from exc


def plain(value: Any) -> Any:
    """A field as Python objects: simdjson's own live no longer than their document."""
    match value:
        case simdjson.Array():
            return value.as_list()
        case simdjson.Object():
            return value.as_dict()
    return value


@functools.lru_cache(maxsize=1024)  # clients repeat everything but the images
def _validated(fields: tuple[tuple[str, type, Any], ...]) -> PredictOptions:
    """The options in (name, type, value) triples. Without the type, true, 1 and 1.0 would be the same key."""
    return PredictOptions.model_validate({name: value for name, _, value in fields})
