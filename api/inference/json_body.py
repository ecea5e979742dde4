"""JSON bodies of predictions, whose numbers are parsed straight into one array.

As Python objects the numbers of one image would take 25 kB and several times as long.
"""

import functools
from typing import Any

import numpy as np
import simdjson

from api.inference.options import PredictOptions, options_in
from store.errors import InvalidInstances, InvalidRequest, MalformedRequest, TooLarge
from store.records import GREY_28

SIDE, PIXELS = GREY_28.height, GREY_28.pixels
SHAPES = ((SIDE, SIDE), GREY_28.shape, (PIXELS,))  # of an image, as clients write it
NUMBER = b"0123456789+-.eE \t\r\n"  # what numbers and the space around them are made of


def parse_instances(body: bytes, max_instances: int) -> tuple[PredictOptions, np.ndarray]:
    """Options and images: (n, 28, 28, 1) float32 in [0, 1], or (n, 784) uint8 if the pixels are whole bytes.

    Raises:
        MalformedRequest: the body is not JSON.
        InvalidRequest: a field is missing, unknown or wrong.
        InvalidInstances: with the index and the reason of every instance that is not an image.
        TooLarge: there are more than `max_instances`.
    """
    document = parse(body)
    options = options_in(document)
    return options, images_of(body, document, "instances", max_instances, 1.0 if options.range == "unit" else 255.0)


def parse(body: bytes) -> Any:
    """The body as a simdjson object.

    Raises:
        MalformedRequest: it is not JSON.
        InvalidRequest: it is not an object.
    """
    try:
        document = simdjson.Parser().parse(body)
    except (ValueError, UnicodeDecodeError, RuntimeError) as exc:
        if b"NaN" in body or b"Infinity" in body:
            raise MalformedRequest("the body is not JSON: JSON has no NaN and no Infinity") from exc
        reason = str(exc).removesuffix(" This is a fatal and unrecoverable error.").rstrip()
        raise MalformedRequest(f"the body is not JSON: {reason}") from exc
    if not is_object(document):
        raise InvalidRequest("body: must be a JSON object", param="body")
    return document


def is_array(value: Any) -> bool:
    """Tell whether simdjson found an array here."""
    return isinstance(value, simdjson.Array)


def is_object(value: Any) -> bool:
    """Tell whether simdjson found an object here."""
    return isinstance(value, simdjson.Object)


def images_of(body: bytes, document: Any, field: str, max_instances: int, top: float) -> np.ndarray:
    """The images in the array `field` of a parsed body, whose pixels go from 0 to `top`, as `parse_instances` does."""
    instances = document.get(field)
    if not is_array(instances) or not len(instances):
        raise InvalidRequest(f"{field}: must be an array of at least one image", param=field)
    count = len(instances)
    if count > max_instances:
        raise TooLarge(f"{count} images, more than {max_instances}", param=field)
    if _is_regular(body, field, count):
        pixels = numbers(instances, top)
        whole = pixels is not None and pixels.size == count * PIXELS  # an empty pixel leaves no gap in the skeleton
        if pixels is not None and whole and np.minimum.reduce(pixels) >= 0 and np.maximum.reduce(pixels) <= top:
            return as_images(pixels.reshape(count, PIXELS), top)
    return as_images(one_by_one(instances, field, top), top)


def as_images(pixels: np.ndarray, top: float) -> np.ndarray:
    """(n, 784) numbers from 0 to `top` in one of the two forms that model servers accept."""
    if top == 255 and pixels.dtype.kind == "u":
        return pixels.astype(np.uint8)
    return (pixels / top if top != 1 else pixels).astype(np.float32).reshape(-1, *GREY_28.shape)


def numbers(array: Any, top: float) -> np.ndarray | None:
    """All numbers of nested arrays, as uint64 if they are whole and `top` is 255, else as float64; None otherwise."""
    if top == 255:
        try:
            return np.frombuffer(array.as_buffer(of_type="u"), np.uint64)
        except (TypeError, ValueError):
            pass
    try:
        return np.frombuffer(array.as_buffer(of_type="d"))
    except (TypeError, ValueError):
        return None


def _is_regular(body: bytes, field: str, count: int) -> bool:
    """Tell from brackets and commas alone whether `field` holds `count` images of one nesting.

    False means only that a closer look is needed: another field may contain the name.
    """
    name = b'"%s"' % field.encode()
    if body.count(name) != 1:
        return False
    skeleton = body[body.index(name) + len(name) :].translate(None, NUMBER)
    return skeleton.startswith(_skeletons(count))


@functools.lru_cache(maxsize=64)
def _skeletons(count: int) -> tuple[bytes, ...]:
    """What remains of `count` images without their numbers, for 784, 28x28 and 28x28x1."""
    flat = b"[" + b"," * (PIXELS - 1) + b"]"
    rows = b"[" + b",".join([b"[" + b"," * (SIDE - 1) + b"]"] * SIDE) + b"]"
    pixels = b"[" + b",".join([b"[" + b",".join([b"[]"] * SIDE) + b"]"] * SIDE) + b"]"
    return tuple(b":[" + b",".join([image] * count) + b"]" for image in (flat, rows, pixels))


def one_by_one(instances: Any, field: str, top: float) -> np.ndarray:
    """The pixels of a sequence of simdjson arrays, (n, 784) float64; the error names each that is not an image."""
    found = np.empty((len(instances), PIXELS))
    wrong = []
    for index, instance in enumerate(instances):
        reason = _wrong_shape(instance)
        if reason is None:
            pixels = numbers(instance, top)
            if pixels is None:
                reason = "holds something that is not a number"
            elif pixels.min() >= 0 and pixels.max() <= top:
                found[index] = pixels
            else:
                reason = _out_of(top, field)
        if reason:
            wrong.append({"index": index, "reason": reason})
    if wrong:
        raise not_images(wrong, field)
    return found


def _out_of(top: float, field: str) -> str:
    hint = '; POST /predict takes 0 to 255 with "range": "byte"' if top == 1 and field == "instances" else ""
    return f"has values that are not between 0 and {top:g}{hint}"


def check_range(pixels: np.ndarray, field: str, top: float) -> None:
    """Raise `InvalidInstances` unless the pixels, (n, 784), go from 0 to `top`."""
    wrong = np.flatnonzero(~((pixels >= 0) & (pixels <= top)).all(axis=1))  # a NaN is neither
    if len(wrong):
        raise not_images([{"index": int(index), "reason": _out_of(top, field)} for index in wrong], field)


def not_images(wrong: list[dict[str, Any]], field: str) -> InvalidInstances:
    """The error that names the instances that are not images."""
    first = f"instance {wrong[0]['index']} {wrong[0]['reason']}"
    more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
    return InvalidInstances(first + more, param=field, details=wrong)


def _wrong_shape(instance: Any) -> str | None:
    """What is wrong with the nesting of an instance; None for 28x28, 28x28x1 and 784 values."""
    if not is_array(instance):
        return "is not an array"
    # Counting is far cheaper than looking at every pixel. Brackets in strings are found out later.
    arrays = instance.mini.count(b"[")
    if len(instance) == PIXELS:
        return None if arrays == 1 else f"has {PIXELS} elements that are not all numbers"
    if len(instance) != SIDE:
        return f"has {len(instance)} elements; expected {SIDE} rows or {PIXELS} numbers"
    for number, row in enumerate(instance):
        if not is_array(row) or len(row) != SIDE:
            return f"has a row {number} that is not {SIDE} pixels long"
        if arrays != 1 + SIDE and not all(is_array(pixel) and _is_one(pixel) for pixel in row):
            return f"has a row {number} with pixels that are neither numbers nor arrays of one number"
    return None


def _is_one(pixel: Any) -> bool:
    return len(pixel) == 1 and not is_array(pixel[0]) and not is_object(pixel[0])
