"""Tensors as JSON, the way TensorFlow Serving reads and writes them (tensorflow_serving/util/json_tensor.cc).

Every message is TensorFlow Serving's, word for word.
"""

import base64
import binascii
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import grpc
import numpy as np
from tensorflow.core.framework import types_pb2

from serving.embedded.rapid_json import ParseError
from serving.embedded.servable import Refused, invalid
from serving.embedded.tensors import KINDS, dtype_of, type_name

SHOWN_BYTES = 256  # where a value quoted in an error message is cut
INT_RANGES = {  # accepted values, [low, high); small types are then cast as in C++
    types_pb2.DT_INT32: (-(1 << 31), 1 << 31), types_pb2.DT_INT16: (-(1 << 31), 1 << 31),
    types_pb2.DT_INT8: (-(1 << 31), 1 << 31), types_pb2.DT_UINT8: (-(1 << 31), 1 << 31),
    types_pb2.DT_INT64: (-(1 << 63), 1 << 63), types_pb2.DT_UINT32: (0, 1 << 32), types_pb2.DT_UINT64: (0, 1 << 64),
}  # fmt: skip
FLOATS = (types_pb2.DT_FLOAT, types_pb2.DT_DOUBLE)
INT64 = range(-(1 << 63), 1 << 63)
TYPES = {dict: "Object", list: "Array", str: "String", int: "Number", float: "Number", type(None): "Null"}


def arrays_of(value: Any, inputs: Mapping[str, int], *, by_row: bool) -> dict[str, np.ndarray]:
    """Arrays by input name, from the value of `instances` (by row) or of `inputs`.

    Args:
        value: parsed JSON; `instances` is a non-empty list.
        inputs: TensorFlow dtype of each input of the signature.

    Raises:
        Refused: INVALID_ARGUMENT.
        ParseError: a number is too big for a double.
    """
    if by_row:
        return _by_row(value, inputs)
    if not _is_named(value):
        if len(inputs) > 1:
            raise invalid(
                "inputs is a plain value/list, but expecting an object as multiple "
                "input tensors required as per tensorinfo_map"
            )
        return {name: _dense(value, dtype) for name, dtype in inputs.items()}
    arrays = {}
    for name, dtype in inputs.items():
        if name not in value:
            raise invalid(f"Missing named input: {name} in 'inputs' object.")
        arrays[name] = _dense(value[name], dtype)
    return arrays


def _by_row(instances: list[Any], inputs: Mapping[str, int]) -> dict[str, np.ndarray]:
    named = _is_named(instances[0])
    if not isinstance(instances[0], dict) and len(inputs) > 1:
        raise invalid(
            "instances is a plain list, but expecting list of objects as multiple "
            "input tensors required as per tensorinfo_map"
        )
    found: dict[str, list[np.ndarray]] = {name: [] for name in inputs}
    for index, element in enumerate(instances):
        if named and not _is_named(element):
            raise invalid(f"Expecting object but got list at item {index} of input list")
        if not named and _is_named(element):
            raise invalid(f"Expecting value/list but got object at item {index} of input list")
        for name, item in element.items() if named else ((next(iter(inputs)), element),):
            try:
                _add(found, name, item, inputs)
            except Refused as exc:
                key = f" key: {name}" if named else ""
                raise invalid(
                    f"Failed to process element: {index}{key} of 'instances' list. "
                    f"Error: {exc.code.name}: {exc.message}"
                ) from exc
        if named and element.keys() != inputs.keys():
            raise invalid(
                f"Failed to process element: {index} of 'instances' list. JSON object: {shown(element)} "
                f"keys must be equal to: {','.join(inputs)}"
            )
    return {name: np.stack(items) for name, items in found.items()}


def _add(found: dict[str, list[np.ndarray]], name: str, item: Any, inputs: Mapping[str, int]) -> None:
    if name not in inputs:
        raise invalid(f"JSON object: does not have named input: {name}")
    array, items = _dense(item, inputs[name]), found[name]
    if items and array.size != items[0].size:
        raise invalid(f"Expecting tensor size: {items[0].size} but got: {array.size}")
    if items and array.shape != items[0].shape:
        shapes = ("[" + ",".join(map(str, shape)) + "]" for shape in (items[0].shape, array.shape))
        raise invalid("Expecting shape {} but got: {}".format(*shapes))
    items.append(array)


def _is_base64(value: Any) -> bool:
    return isinstance(value, dict) and len(value) == 1 and isinstance(value.get("b64"), str)


def _is_named(value: Any) -> bool:
    return isinstance(value, dict) and not _is_base64(value)


def _dense(value: Any, dtype: int) -> np.ndarray:
    """The array in nested lists. The first element at each level sets the shape."""
    if dtype not in (*INT_RANGES, *FLOATS, types_pb2.DT_STRING, types_pb2.DT_BOOL):
        raise Refused(
            grpc.StatusCode.UNIMPLEMENTED, f"Conversion of JSON Value: {shown(value)} to type: {type_name(dtype)}"
        )
    shape, inner = [], value
    while isinstance(inner, list):
        shape.append(len(inner))
        if not inner:
            break
        inner = inner[0]
    leaves: list[Any] = []
    plain = {float, int} if dtype in FLOATS else set()
    _fill(value, 0, shape, dtype, plain, leaves)
    kind = KINDS[dtype]
    if kind.hasobject:
        return np.array([*leaves, None], object)[:-1].reshape(shape)
    if dtype in FLOATS:
        try:
            numbers = np.array(leaves, np.float64)
        except OverflowError as exc:  # an integer of 309 digits or more: the parser should have refused it
            raise ParseError("Number too big to be stored in double.", 0) from exc
        with np.errstate(over="ignore"):  # beyond the largest float32 is infinity
            return numbers.astype(kind).reshape(shape)
    if dtype == types_pb2.DT_UINT64:
        return np.array(leaves, np.uint64).reshape(shape)
    return np.array(leaves, bool if dtype == types_pb2.DT_BOOL else np.int64).astype(kind).reshape(shape)


def _fill(value: Any, level: int, shape: list[int], dtype: int, plain: set[type], leaves: list[Any]) -> None:
    if not isinstance(value, list):
        if level != len(shape):
            raise invalid(
                f"JSON Value: {shown(value)} found at incorrect level: {level + 1} in the JSON DOM. "
                f"Expected at level: {len(shape)}"
            )
        leaves.append(_leaf(value, dtype))
        return
    if level >= len(shape):
        raise invalid(f"Encountered list at unexpected level: {level} expected < {len(shape)}")
    if len(value) != shape[level]:
        raise invalid(
            f"Encountered list at unexpected size: {len(value)} at level: {level} expected size: {shape[level]}"
        )
    if level == len(shape) - 1 and plain.issuperset(map(type, value)):
        leaves += value
        return
    for item in value:
        _fill(item, level + 1, shape, dtype, plain, leaves)


def _leaf(value: Any, dtype: int) -> Any:
    if dtype == types_pb2.DT_STRING:
        if isinstance(value, str):
            try:
                return value.encode("utf-8", "surrogateescape")
            except UnicodeEncodeError as exc:
                raise invalid("JSON Parse error: The surrogate pair in string is invalid.") from exc
        if isinstance(value, dict):
            return _from_base64(value)
    elif dtype == types_pb2.DT_BOOL:
        if isinstance(value, bool):
            return value
    elif dtype in FLOATS:
        if type(value) in (int, float):
            return value
    elif type(value) is int and INT_RANGES[dtype][0] <= value < INT_RANGES[dtype][1]:
        return value
    raise invalid(f"JSON Value: {shown(value)} Type: {_type(value)} is not of expected type: {type_name(dtype)}")


def _type(value: Any) -> str:
    return str(value) if isinstance(value, bool) else TYPES[type(value)]


def _from_base64(value: dict[str, Any]) -> bytes:
    if not _is_base64(value):
        raise invalid(f"JSON Value: {shown(value)} not formatted correctly for base64 data")
    try:
        text = value["b64"]
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise invalid("Unable to base64 decode") from exc


def check_examples(document: Mapping[str, Any]) -> None:
    """Check the body of classify and regress as far as it can be without a model.

    Raises:
        Refused: INVALID_ARGUMENT.
    """
    if "context" in document:
        _check_example(document["context"])
    if "examples" not in document:
        problem = "When method is classify, key 'examples' is expected and was not found"
    elif not isinstance(document["examples"], list):
        problem = "Expecting 'examples' value to be an list/array"
    elif not document["examples"]:
        problem = "'examples' value is an empty array"
    else:
        for example in document["examples"]:
            _check_example(example)
        return
    raise invalid(f"JSON Value: {shown(document)} {problem}")


def _check_example(example: Any) -> None:
    if not isinstance(example, dict):
        raise invalid(f"Example must be JSON object but got JSON {_type(example)}")
    for name, feature in example.items():
        expected = ""
        for value in feature if isinstance(feature, list) else [feature]:
            kind = _feature_kind(name, value)
            if expected and kind != expected:
                raise invalid(f"Unexpected element type in feature: {name} expecting type: {expected}")
            if kind == "int64" and value not in INT64:
                raise invalid(f"Feature: {name} has uint64 element. Only int64 is supported.")
            if isinstance(value, dict):
                _from_base64(value)
            expected = kind


def _feature_kind(name: str, value: Any) -> str:
    if isinstance(value, int):  # a boolean counts as 0 or 1
        return "int64"
    if isinstance(value, float):
        return "float"
    if isinstance(value, str) or _is_base64(value):
        return "bytes"
    raise invalid(f"Feature: {name} has element with unexpected JSON type: {_type(value)}")


def shown(value: Any) -> str:
    """A value as error messages quote it: cut after the token that reaches SHOWN_BYTES."""
    text = ""
    for token in _tokens(value, 1):
        text += token
        if len(text) >= SHOWN_BYTES:
            break
    return text


def _tokens(value: Any, level: int) -> Iterator[str]:
    before, indent = "", "    " * level
    if isinstance(value, dict):
        yield "{"
        for key, item in value.items():
            yield f"{before}\n{indent}{json.dumps(key, ensure_ascii=False)}: "
            yield from _tokens(item, level + 1)
            before = ","
        yield f"\n{indent[4:]}}}" if value else "}"
    elif isinstance(value, list):
        opening = "["
        for item in value:
            tokens = _tokens(item, level + 1)
            yield opening + next(tokens)
            yield from tokens
            opening = ", "
        yield "]" if value else "[]"
    else:
        yield json.dumps(value, ensure_ascii=False)


def listing(key: str, value: str) -> str:
    """A response body: an object with one key, around JSON text."""
    return f'{{\n    "{key}": {value}\n}}'


def rows(outputs: Mapping[str, np.ndarray]) -> str:
    """Outputs by row as JSON text: a list of values, or of objects where there are several outputs.

    Raises:
        Refused: INVALID_ARGUMENT, because an output is a scalar or the outputs differ in their number of rows.
    """
    size = -1
    for name, array in outputs.items():
        if array.ndim == 0:
            raise invalid(f"Tensor name: {name} has no shape information ")
        if size not in (-1, len(array)):
            raise invalid(f"Tensor name: {name} has inconsistent batch size: {len(array)} expecting: {size}")
        size = len(array)
    texts = {name: [_line(item) for item in _texts(name, array)] for name, array in outputs.items()}
    if len(texts) == 1:
        items = ", ".join(*texts.values())
        return f"[{items}\n    ]" if size else "[]"
    objects = (
        "        {\n"
        + ",\n".join(f"            {json.dumps(name)}: {items[row]}" for name, items in texts.items())
        + "\n        }"
        for row in range(size)
    )
    return "[\n" + ",\n".join(objects) + "\n    ]" if size else "[]"


def columns(outputs: Mapping[str, np.ndarray]) -> str:
    """Outputs by column as JSON text: the only output, or an object of all."""
    texts = {name: _texts(name, array) for name, array in outputs.items()}
    if len(texts) == 1:
        return "".join(_block(text, 2) for text in texts.values())
    return (
        "{\n" + ",\n".join(f"        {json.dumps(name)}: {_block(text, 3)}" for name, text in texts.items()) + "\n    }"
    )


def _texts(name: str, array: np.ndarray) -> Any:
    """The array as nested lists of JSON texts."""
    if array.dtype == object:
        if name.endswith("_bytes"):
            texts = [f'{{"b64": "{base64.b64encode(item).decode()}"}}' for item in array.ravel()]
        else:
            decode = (item.decode("utf-8", "surrogateescape") for item in array.ravel())
            texts = [json.dumps(item, ensure_ascii=False) for item in decode]
    elif array.dtype == bool:
        texts = ["true" if item else "false" for item in array.ravel()]
    elif array.dtype.kind in "iu":
        texts = list(map(str, array.ravel().tolist()))
    elif array.dtype.kind == "f" and array.dtype.itemsize in (2, 4, 8):
        texts = _decimals(array)
    else:
        raise invalid(f"Failed to write JSON value for tensor type: {type_name(dtype_of(array))}")
    return np.array([*texts, None], object)[:-1].reshape(array.shape).tolist()


def _decimals(array: np.ndarray) -> list[str]:
    """Six significant digits where those round-trip, else the full precision: 9 for a float, 17 for a double."""
    wide = array.dtype == np.float64
    values = array.astype(np.float64 if wide else np.float32).ravel()
    short = [f"{value:.6g}" for value in values.tolist()]
    exact = np.array(short, np.float64).astype(values.dtype) == values
    full = "{:.17g}" if wide else "{:.9g}"
    texts = []
    for text, same, value in zip(short, exact.tolist(), values.tolist(), strict=True):
        if not math.isfinite(value):
            texts.append("NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity")
            continue
        found = text if same else full.format(value)
        texts.append(found if "." in found or "e" in found else found + ".0")
    return texts


def _line(value: Any) -> str:
    return value if isinstance(value, str) else f"[{', '.join(map(_line, value))}]"


def _block(value: Any, level: int) -> str:
    if isinstance(value, str):
        return value
    indent = "    " * level
    return (
        "[\n" + ",\n".join(indent + _block(item, level + 1) for item in value) + f"\n{indent[4:]}]" if value else "[]"
    )
