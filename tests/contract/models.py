"""A SavedModel with what LeNet lacks: other dtypes, strings, several inputs and outputs."""

from pathlib import Path

import numpy as np
import tensorflow as tf

# Every dtype that Predict carries, with the TensorProto field that holds its values.
FIELDS = {
    "float32": "float_val", "float64": "double_val", "int32": "int_val", "uint8": "int_val", "int16": "int_val",
    "int8": "int_val", "uint16": "int_val", "int64": "int64_val", "bool": "bool_val", "float16": "half_val",
    "bfloat16": "half_val", "uint32": "uint32_val", "uint64": "uint64_val", "complex64": "scomplex_val",
    "complex128": "dcomplex_val", "string": "string_val",
}  # fmt: skip


def save(directory: Path) -> None:
    """Write a SavedModel with many signatures.

    `echo_<type>(x [any shape]) -> y`, the same; `serving_default(a float32 [n], b float32 [n]) -> sum, difference`;
    `pick(i int32 []) -> y float32`, which fails outside 0..2; `text(name string [n]) -> name, name_bytes`;
    `look_up(key int64 [n]) -> value`, in a table that the SavedModel's initializer fills with the squares of 0..2.
    """
    module = tf.Module()
    signatures = {}
    for kind in FIELDS:
        spec = tf.TensorSpec(None, tf.as_dtype(kind), name="x")
        signatures[f"echo_{kind}"] = tf.function(
            lambda x: {"y": tf.identity(x)}, autograph=False, input_signature=[spec]
        )
    pair = [tf.TensorSpec([None], tf.float32, name=name) for name in "ab"]
    signatures["serving_default"] = tf.function(
        lambda a, b: {"sum": a + b, "difference": a - b}, autograph=False, input_signature=pair
    )
    table = tf.constant(np.arange(3, dtype=np.float32))
    signatures["pick"] = tf.function(
        lambda i: {"y": tf.gather(table, i)}, autograph=False, input_signature=[tf.TensorSpec([], tf.int32, name="i")]
    )
    signatures["text"] = tf.function(
        lambda name: {"name": tf.identity(name), "name_bytes": tf.strings.upper(name)},
        autograph=False,
        input_signature=[tf.TensorSpec([None], tf.string, name="name")],
    )
    keys = tf.range(3, dtype=tf.int64)
    module.squares = tf.lookup.StaticHashTable(tf.lookup.KeyValueTensorInitializer(keys, keys * keys), -1)
    signatures["look_up"] = tf.function(
        lambda key: {"value": module.squares.lookup(key)},
        autograph=False,
        input_signature=[tf.TensorSpec([None], tf.int64, name="key")],
    )
    tf.saved_model.save(module, str(directory), signatures=signatures)
