"""TensorProtos: every dtype both ways, and how TensorFlow reads incomplete ones."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.framework import tensor_pb2

from serving.embedded.tensors import decoded
from tests.contract.conftest import IMAGES, Refusal, Server, config, predict_request, refusal
from tests.contract.models import FIELDS, save

NUMERIC = [kind for kind in FIELDS if kind != "string"]
BROKEN = Refusal("INVALID_ARGUMENT", "tensor parsing error: x")


@pytest.fixture(scope="module")
def many(server: Server, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model of many dtypes."""
    base = tmp_path_factory.mktemp("many") / "many"
    save(base / "1")
    server.reload(config("many", base))
    return "many"


def values(kind: str) -> np.ndarray:
    dtype = np.dtype(tf.as_dtype(kind).as_numpy_dtype)
    found = np.arange(6).reshape(2, 3) - (0 if dtype.kind in "ub" else 2)
    return (found * (1 + 2j) if dtype.kind == "c" else found).astype(dtype)


def echoed(server: Server, model: str, kind: str, tensor: Any) -> Any:
    return server.predict(model, {"x": tensor}, signature=f"echo_{kind}").outputs["y"]


def given(kind: str, sizes: tuple[int, ...], **fields: Any) -> Any:
    shape = tf.TensorShape(sizes).as_proto() if all(size >= 0 for size in sizes) else None
    tensor = tensor_pb2.TensorProto(dtype=tf.as_dtype(kind).as_datatype_enum, tensor_shape=shape, **fields)
    if shape is None:
        for size in sizes:
            tensor.tensor_shape.dim.add(size=size)
    return tensor


@pytest.mark.parametrize("kind", NUMERIC)
def test_every_type_goes_in_as_content_and_comes_out_as_typed_values(server: Server, many: str, kind: str) -> None:
    array = values(kind)
    answer = echoed(server, many, kind, given(kind, array.shape, tensor_content=array.tobytes()))
    assert answer.dtype == tf.as_dtype(kind).as_datatype_enum
    assert answer.tensor_content == b""
    assert len(getattr(answer, FIELDS[kind])) == (12 if array.dtype.kind == "c" else 6)
    np.testing.assert_array_equal(tf.make_ndarray(answer), array)


@pytest.mark.parametrize("kind", FIELDS)
def test_every_type_goes_in_as_typed_values(server: Server, many: str, kind: str) -> None:
    array = np.array([[b"a", b"\xff\x00"]], object) if kind == "string" else values(kind)
    sent = given(kind, array.shape)
    typed = getattr(sent, FIELDS[kind])
    match array.dtype.kind:
        case "c":
            typed.extend(part for number in array.ravel().tolist() for part in (number.real, number.imag))
        case _ if FIELDS[kind] == "half_val":
            typed.extend(array.view(np.uint16).ravel().tolist())
        case _:
            typed.extend(array.ravel().tolist())
    answer = echoed(server, many, kind, sent)
    np.testing.assert_array_equal(tf.make_ndarray(answer), array)


def test_strings_may_come_as_content_too(server: Server, many: str) -> None:
    answer = echoed(server, many, "string", given("string", (2,), tensor_content=b"\x02\x01abc"))
    assert list(answer.string_val) == [b"ab", b"c"]
    for content in (b"\x02\x01ab", b"\x02\x01abcd", b"\x02"):
        sent = predict_request(many, {"x": given("string", (2,), tensor_content=content)}, signature="echo_string")
        assert refusal(server.prediction.Predict, sent) == BROKEN


@pytest.mark.parametrize(
    ("sent", "count", "back"),
    [
        ([], 3, [0, 0, 0]),
        ([5], 3, [5, 5, 5]),
        ([5, 6], 4, [5, 6, 6, 6]),
        ([5, 6, 7, 8], 3, [5, 6, 7]),
    ],
)
@pytest.mark.parametrize("kind", ["float32", "int64", "uint8"])
def test_too_few_values_repeat_the_last_and_too_many_are_ignored(
    server: Server, many: str, kind: str, sent: list[int], count: int, back: list[int]
) -> None:
    answer = echoed(server, many, kind, given(kind, (count,), **{FIELDS[kind]: sent}))
    assert list(getattr(answer, FIELDS[kind])) == back


def test_missing_strings_are_empty_or_repeat_the_last(server: Server, many: str) -> None:
    assert list(echoed(server, many, "string", given("string", (2,))).string_val) == [b"", b""]
    assert list(echoed(server, many, "string", given("string", (2,), string_val=[b"z"])).string_val) == [b"z", b"z"]


def test_nan_and_infinity_are_accepted(server: Server, many: str) -> None:
    sent = np.array([np.nan, np.inf, -np.inf], np.float32)
    np.testing.assert_array_equal(tf.make_ndarray(echoed(server, many, "float32", sent)), sent)


def test_unknown_rank_is_ignored_where_dimensions_are_given(server: Server, many: str) -> None:
    sent = given("float32", (2,), float_val=[1, 2])
    sent.tensor_shape.unknown_rank = True
    assert list(echoed(server, many, "float32", sent).float_val) == [1, 2]


def test_scalars_and_empty_tensors_come_back_as_they_are(server: Server, many: str) -> None:
    scalar = echoed(server, many, "float32", given("float32", (), float_val=[7]))
    assert (len(scalar.tensor_shape.dim), list(scalar.float_val)) == (0, [7])
    empty = echoed(server, many, "float32", given("float32", (0, 3)))
    assert ([dim.size for dim in empty.tensor_shape.dim], list(empty.float_val)) == ([0, 3], [])


@pytest.mark.parametrize(
    "tensor",
    [
        given("float32", (2,), tensor_content=b"1234567"),
        given("float32", (2,), tensor_content=b"123456789"),
        given("float32", (-1,), float_val=[1]),
        given("float32", (), tensor_content=b"12345678"),
        tensor_pb2.TensorProto(),
    ],
    ids=["too short", "too long", "negative dimension", "no shape", "nothing"],
)
def test_malformed_tensors_are_refused(server: Server, many: str, tensor: Any) -> None:
    assert refusal(server.predict, many, {"x": tensor}, signature="echo_float32") == BROKEN


def test_an_unknown_type_is_refused(server: Server, many: str) -> None:
    tensor = tensor_pb2.TensorProto.FromString(b"\x08\x4d")  # 77
    assert refusal(server.predict, many, {"x": tensor}, signature="echo_float32") == BROKEN


def test_several_inputs_and_outputs_are_told_apart_by_name(server: Server, many: str) -> None:
    a, b = np.array([1, 2], np.float32), np.array([10, 20], np.float32)
    outputs = server.predict(many, {"b": b, "a": a}).outputs
    assert list(outputs["sum"].float_val) == [11, 22]
    assert list(outputs["difference"].float_val) == [-9, -18]


def test_an_error_in_the_graph_is_returned(server: Server, many: str) -> None:
    assert list(server.predict(many, {"i": np.int32(2)}, signature="pick").outputs["y"].float_val) == [2]
    found = refusal(server.predict, many, {"i": np.int32(9)}, signature="pick")
    assert found.code == "INVALID_ARGUMENT"
    assert "9 is not in [0, 3)" in found.message


def test_tables_are_filled_when_a_version_is_loaded(server: Server, many: str) -> None:
    outputs = server.predict(many, {"key": np.array([2, 7], np.int64)}, signature="look_up").outputs
    assert list(outputs["value"].int64_val) == [4, -1]


def test_a_signature_without_inputs_takes_none(server: Server, many: str) -> None:
    found = refusal(server.predict, many, {"image": IMAGES}, signature="__saved_model_init_op")
    assert found.message == (
        "input size does not match signature: 1!=0 len({image}) != len({}). Sent extra: {image}. "
        "Missing but required: {}."
    )


def random_tensor(rng: np.random.Generator) -> tuple[str, Any]:
    """A TensorProto whose size, shape, content or dtype may be wrong."""
    kind = str(rng.choice(list(FIELDS)))
    sizes = tuple(int(size) for size in rng.choice([-1, 0, 1, 2, 3], rng.integers(0, 4), p=[0.05, 0.1, 0.25, 0.3, 0.3]))
    tensor = given(kind, sizes)
    tensor.tensor_shape.unknown_rank = bool(rng.random() < 0.1)
    count = int(rng.integers(0, 9))
    if rng.random() < 0.4:
        width = 1 if kind == "string" else np.dtype(tf.as_dtype(kind).as_numpy_dtype).itemsize
        right = max(0, int(np.prod(sizes))) * width
        size = right if rng.random() < 0.7 else right + int(rng.integers(-2, 3))
        tensor.tensor_content = rng.integers(0, 2, max(0, size), np.uint8).tobytes()
    match FIELDS[kind]:
        case "string_val":
            tensor.string_val.extend([rng.bytes(2) for _ in range(count)])
        case "bool_val":
            tensor.bool_val.extend(rng.random(count) < 0.5)
        case "float_val" | "double_val" | "scomplex_val" | "dcomplex_val" as field:
            getattr(tensor, field).extend(rng.normal(size=count).tolist())
        case "int_val" | "int64_val" as field:
            getattr(tensor, field).extend(rng.integers(-70_000, 70_000, count).tolist())
        case field:
            getattr(tensor, field).extend(rng.integers(0, 70_000, count).tolist())
    if rng.random() < 0.03:
        tensor.dtype = 0
    return kind, tensor


def test_decoding_agrees_with_tensorflow_on_random_tensors() -> None:
    rng, outcomes = np.random.default_rng(0), {"refused": 0, "taken": 0}
    for _ in range(2000):
        kind, tensor = random_tensor(rng)
        try:
            known = tf.io.parse_tensor(tensor.SerializeToString(), tf.as_dtype(kind)).numpy()
        except tf.errors.InvalidArgumentError:
            outcomes["refused"] += 1
            with pytest.raises(ValueError, match=r"size|type|shape"):
                decoded(tensor)
        else:
            outcomes["taken"] += 1
            found, known = decoded(tensor), np.asarray(known, object if kind == "string" else None)
            assert (found.dtype, found.shape) == (known.dtype, known.shape), tensor
            np.testing.assert_array_equal(found, known, err_msg=str(tensor))
    assert min(outcomes.values()) > 200, outcomes
