"""TensorProtos to arrays and back, by TensorFlow's own rules (tensorflow/core/framework/tensor.cc)."""

import math
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import types_pb2

MAX_REPEATED = 1 << 28  # elements that repetition may fill: a request of a few bytes must not take all memory

# The field that holds the values of each dtype (tensorflow/core/framework/tensor.proto).
FIELDS = {
    types_pb2.DT_FLOAT: "float_val", types_pb2.DT_DOUBLE: "double_val", types_pb2.DT_INT32: "int_val",
    types_pb2.DT_UINT8: "int_val", types_pb2.DT_INT16: "int_val", types_pb2.DT_INT8: "int_val",
    types_pb2.DT_UINT16: "int_val", types_pb2.DT_STRING: "string_val", types_pb2.DT_COMPLEX64: "scomplex_val",
    types_pb2.DT_COMPLEX128: "dcomplex_val", types_pb2.DT_INT64: "int64_val", types_pb2.DT_BOOL: "bool_val",
    types_pb2.DT_HALF: "half_val", types_pb2.DT_BFLOAT16: "half_val", types_pb2.DT_UINT32: "uint32_val",
    types_pb2.DT_UINT64: "uint64_val",
}  # fmt: skip
KINDS = {dtype: np.dtype(tf.as_dtype(dtype).as_numpy_dtype) for dtype in FIELDS}
_DTYPES = {kind: dtype for dtype, kind in KINDS.items()} | {np.dtype(object): types_pb2.DT_STRING}
# Packed repeated fields of fixed width look on the wire as they do in memory. Their tags, by field name:
PACKED = {"float_val": b"\x2a", "double_val": b"\x32", "scomplex_val": b"\x4a", "dcomplex_val": b"\x62"}


def type_name(dtype: int) -> str:
    """A dtype's name in TensorFlow's C++, such as `float` for 1."""
    name: str = tf.as_dtype(dtype).name
    return {"float32": "float", "float64": "double", "float16": "half"}.get(name, name)


def decoded(tensor: Any) -> np.ndarray:
    """The array of a TensorProto, as Tensor::FromProto reads it. Strings become objects.

    Raises:
        ValueError: dtype, shape and values do not make a tensor.
    """
    if tensor.dtype not in FIELDS:
        raise ValueError("no type")
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    count = math.prod(shape)
    if len(shape) > 64 or any(size < 0 for size in shape) or count >= 1 << 63:
        raise ValueError("no shape")
    kind = KINDS[tensor.dtype]
    if count == 0:
        return np.zeros(shape, kind)
    if content := tensor.tensor_content:
        if kind.hasobject:
            return _strings(content, count).reshape(shape)
        if len(content) != count * kind.itemsize:
            raise ValueError("wrong size")
        # A read-only view will do: the session never writes to a feed, and copies what is not aligned.
        return np.frombuffer(content, kind).reshape(shape)
    values = _values(getattr(tensor, FIELDS[tensor.dtype]), kind)[:count]
    if len(values) < count:
        if count > MAX_REPEATED:
            raise ValueError("too large")
        last = values[-1:] if len(values) else np.full(1, b"" if kind.hasobject else 0, kind)
        values = np.concatenate([values, np.repeat(last, count - len(values))])
    return values.reshape(shape)


def _values(field: Any, kind: np.dtype) -> np.ndarray:
    if kind.hasobject:
        return np.array([*field, None], object)[:-1]
    if kind.kind == "c":
        part = np.float32 if kind.itemsize == 8 else np.float64
        return np.array(field[: len(field) // 2 * 2], part).view(kind)
    if kind.itemsize == 2 and kind.kind not in "iu":
        return np.array(field, np.int64).astype(np.uint16).view(kind)
    if kind.kind in "iu" and kind.itemsize < 4:
        return np.array(field, np.int64).astype(kind)  # wraps like a C++ cast: 256 becomes 0
    return np.array(field, kind)


def _strings(content: bytes, count: int) -> np.ndarray:
    """`count` strings: first all lengths as varints, then all bytes."""
    sizes, at = [], 0
    for _ in range(count):
        size = shift = 0
        while True:
            if at >= len(content) or shift > 28:
                raise ValueError("wrong size")
            byte, at = content[at], at + 1
            size |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        sizes.append(size)
    if at + sum(sizes) != len(content):
        raise ValueError("wrong size")
    found = np.empty(count, object)
    for index, size in enumerate(sizes):
        found[index], at = content[at : at + size], at + size
    return found


def dtype_of(array: np.ndarray) -> int:
    """The DataType number of an array."""
    number: int = _DTYPES[array.dtype]
    return number


def encode(array: np.ndarray, tensor: Any) -> None:
    """Fill an empty TensorProto with `array` as typed values, which is how the real server answers."""
    dtype = dtype_of(array)
    tensor.dtype = dtype
    shape = tensor.tensor_shape
    for size in array.shape:
        shape.dim.add(size=size)
    name = FIELDS[dtype]
    if tag := PACKED.get(name):
        if data := array.tobytes():
            tensor.MergeFromString(tag + _varint(len(data)) + data)
        return
    if name == "half_val":
        array = array.view(np.uint16)
    getattr(tensor, name).extend(array.ravel().tolist())


def _varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    found.append(number)
    return bytes(found)
