"""The JSON body of a prediction, its numbers parsed straight into one array.

As Python objects the numbers of an image take 25 kB and ten times as long.
"""

from typing import Any

import numpy as np
import simdjson
from pydantic import ValidationError

from api.errors import invalid_request
from api.schemas import PredictOptions
from serving.errors import InvalidInstances, InvalidRequest, MalformedRequest, TooLarge

PIXELS = 28 * 28


def parse_instances(body: bytes, max_instances: int) -> tuple[PredictOptions, np.ndarray]:
    """What is wanted, and the images as (n, 28, 28, 1) float32 in [0, 1].

    Raises:
        MalformedRequest: the body is no JSON.
        InvalidRequest: a field is missing, unknown or wrong.
        InvalidInstances: with the index and the reason of every instance that is no image.
        TooLarge: there are more than `max_instances`.
    """
    try:
        document = simdjson.Parser().parse(body)
    except (ValueError, UnicodeDecodeError, RuntimeError) as exc:
        raise MalformedRequest(f"the body is no JSON: {exc}") from exc
    if not isinstance(document, simdjson.Object):
        raise InvalidRequest("body: must be a JSON object", param="body")
    try:
        fields = {key: _plain(value) for key, value in document.items() if key != "instances"}
        options = PredictOptions.model_validate(fields)
    except ValidationError as exc:
        raise invalid_request(exc.errors(include_url=False)) from exc
    instances = document.get("instances")
    if not isinstance(instances, simdjson.Array) or not len(instances):
        raise InvalidRequest("instances: must be an array of at least one image", param="instances")
    if len(instances) > max_instances:
        raise TooLarge(f"{len(instances)} instances, more than {max_instances}", param="instances")
    return options, _images(instances, 1.0 if options.range == "unit" else 255.0)


def _plain(value: Any) -> Any:
    """A field as Python objects; simdjson's own live no longer than their document."""
    match value:
        case simdjson.Array():
            return value.as_list()
        case simdjson.Object():
            return value.as_dict()
    return value


def _images(instances: Any, top: float) -> np.ndarray:
    images = np.empty((len(instances), 28, 28, 1), np.float32)
    wrong = []
    for index, instance in enumerate(instances):
        reason = _wrong_shape(instance)
        if reason is None:
            try:
                pixels = np.frombuffer(instance.as_buffer(of_type="d"))
            except (TypeError, ValueError):
                reason = "holds something that is not a number"
            else:
                if pixels.min() >= 0 and pixels.max() <= top:
                    images[index] = pixels.reshape(28, 28, 1) / top
                    continue
                hint = '; for 0 to 255 say "range": "byte"' if top == 1 else ""
                reason = f"has values that are not from 0 to {top:g}{hint}"
        wrong.append({"index": index, "reason": reason})
    if wrong:
        first = f"instance {wrong[0]['index']} {wrong[0]['reason']}"
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise InvalidInstances(first + more, param="instances", details=wrong)
    return images


def _wrong_shape(instance: Any) -> str | None:
    """What is wrong with the nesting of an instance; None for 28x28, 28x28x1 and 784 values."""
    if not isinstance(instance, simdjson.Array):
        return "is no array"
    # Counting is far cheaper than to look at every pixel; what is in strings is found out later.
    arrays = instance.mini.count(b"[")  # type: ignore[arg-type]  # bytes, whatever its stub says
    if len(instance) == PIXELS:
        return None if arrays == 1 else "is nested, where 784 numbers should be"
    if len(instance) != 28:
        return f"has {len(instance)} elements, where 28 rows or 784 numbers should be"
    for number, row in enumerate(instance):
        if not isinstance(row, simdjson.Array) or len(row) != 28:
            return f"has a row {number} that is not 28 pixels"
        if arrays != 1 + 28 and not all(isinstance(pixel, simdjson.Array) and _is_one(pixel) for pixel in row):
            return f"has a row {number} whose pixels are neither numbers nor arrays of one number"
    return None


def _is_one(pixel: Any) -> bool:
    return len(pixel) == 1 and not isinstance(pixel[0], (simdjson.Array, simdjson.Object))
