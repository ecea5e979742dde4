"""Our messages against the official ones, and the direction of imports."""

import ast
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from tensorflow_serving.apis import get_model_status_pb2, model_management_pb2, predict_pb2

from serving.pb import model_server_pb2 as ours

ROOT = Path(__file__).parent.parent
TENSORFLOW_FREE = (
    "api.app", "cli.main", "cli.supervisor", "trainer.spec", "trainer.jobs.datasets", "trainer.jobs.images",
    "trainer.jobs.records", "serving.client", "serving.registry", "serving.tensorflow_serving", "serving.publishing",
    "store.settings", "store.engine", "store.errors", "store.logging", "api.inference.service",
)  # fmt: skip

# proto3 packs repeated floats: on the wire they are bytes.
PACKED = ("float_val", FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_FLOAT, True)


def same_fields(mine: Descriptor, official: Descriptor, seen: set[str]) -> None:
    if mine.full_name in seen:
        return
    seen.add(mine.full_name)
    for field in mine.fields:
        twin = official.fields_by_name.get(field.name)
        assert twin is not None, f"{official.full_name} has no {field.name}"
        assert field.number == twin.number, field.full_name
        if (field.name, field.type, twin.type, twin.is_packed) == PACKED:
            continue
        assert field.is_repeated == twin.is_repeated, field.full_name
        enum_as_int = (field.type, twin.type) == (FieldDescriptor.TYPE_INT32, FieldDescriptor.TYPE_ENUM)
        assert field.type == twin.type or enum_as_int, field.full_name
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            same_fields(field.message_type, twin.message_type, seen)
        if field.type == FieldDescriptor.TYPE_ENUM:
            theirs = twin.enum_type.values_by_name
            assert all(theirs[value.name].number == value.number for value in field.enum_type.values)


@pytest.mark.parametrize(
    ("mine", "official"),
    [
        (ours.PredictRequest, predict_pb2.PredictRequest),
        (ours.PredictResponse, predict_pb2.PredictResponse),
        (ours.GetModelStatusRequest, get_model_status_pb2.GetModelStatusRequest),
        (ours.GetModelStatusResponse, get_model_status_pb2.GetModelStatusResponse),
        (ours.ReloadConfigRequest, model_management_pb2.ReloadConfigRequest),
        (ours.ReloadConfigResponse, model_management_pb2.ReloadConfigResponse),
    ],
    ids=lambda message: message.DESCRIPTOR.name,
)
def test_every_field_has_the_official_number_and_type(mine: type, official: type) -> None:
    same_fields(mine.DESCRIPTOR, official.DESCRIPTOR, set())  # type: ignore[attr-defined]


def test_generated_code_is_that_of_the_proto_file(tmp_path: Path) -> None:
    command = ["-m", "grpc_tools.protoc", "-I", "proto", f"--python_out={tmp_path}", "proto/model_server.proto"]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    generated = (tmp_path / "model_server_pb2.py").read_text()
    assert generated == (ROOT / "serving/pb/model_server_pb2.py").read_text()


@pytest.mark.parametrize(
    ("room", "may_not_know"),
    [
        ("store", ("api", "cli", "serving", "trainer")),
        ("serving", ("api", "cli", "trainer")),
        ("trainer", ("api", "cli")),
        ("api", ("cli",)),
        ("api/inference", ("fastapi", "starlette", "api.gateway", "api.routes")),  # the core knows no request
    ],
)
def test_imports_point_in_one_direction(room: str, may_not_know: tuple[str, ...]) -> None:
    for path in (ROOT / room).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            wrong = [name for name in names for room_ in may_not_know if f"{name}.".startswith(f"{room_}.")]
            assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("module", TENSORFLOW_FREE)
def test_importing_it_leaves_tensorflow_unloaded(module: str) -> None:
    code = f"import {module}, sys; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_packed_floats_are_the_bytes_that_we_take_them_for() -> None:
    values = np.array([0.1, -2.5, 3e38], "<f4")
    official = predict_pb2.PredictResponse()
    official.outputs["x"].float_val.extend(values.tolist())
    read = ours.PredictResponse.FromString(official.SerializeToString())
    np.testing.assert_array_equal(np.frombuffer(read.outputs["x"].float_val, "<f4"), values)
