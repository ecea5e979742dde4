"""Our protocol messages against the official ones, and which room may import which."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from tensorflow_serving.apis import get_model_status_pb2, model_management_pb2, predict_pb2

from serving.pb import model_server_pb2 as ours

ROOT = Path(__file__).parent.parent
# A room is the modules below its longest matching prefix. Each may import itself and the rooms named here, at the top
# of a file or within a function. `free` is the part of the trainer that needs no TensorFlow.
FREE = ("trainer.spec", "trainer.asked", "trainer.recipes", "trainer.checkpoints", "trainer.jobs")
ROOMS = {
    "cli": {"api", "free", "serving", "store", "temper"},
    "api": {"free", "serving", "store"},
    "trainer.worker": {"trainer", "free", "serving", "serving.quiet", "store"},
    "trainer.convert": {"serving", "serving.quiet", "store"},
    "trainer": {"free", "serving.quiet", "store"},
    "free": {"store"},
    "serving.__main__": {"serving.embedded", "serving.quiet", "store"},
    "serving.embedded": {"serving.pb"},
    "serving": {"serving.pb", "store"},
    "serving.quiet": set(),
    "serving.pb": set(),
    "store": set(),
    "temper": set(),
}
WITH_TENSORFLOW = {"trainer", "trainer.convert", "trainer.worker", "serving.embedded", "serving.quiet"}

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


def test_generated_code_matches_the_proto_file(tmp_path: Path) -> None:
    command = ["-m", "grpc_tools.protoc", "-I", "proto", f"--python_out={tmp_path}", "proto/model_server.proto"]
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT)
    generated = (tmp_path / "model_server_pb2.py").read_text()
    assert generated == (ROOT / "serving/pb/model_server_pb2.py").read_text()


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def room_of(module: str) -> str:
    if any(within(module, package) for package in FREE):
        return "free"
    if module == "trainer.__main__":  # the worker's process
        return "trainer.worker"
    return max((room for room in ROOMS if within(module, room)), key=len)


SOURCES = {module_name(path): path for top in {room.partition(".")[0] for room in ROOMS} - {"free"}
           for path in (ROOT / top).rglob("*.py")}  # fmt: skip


def imports(module: str) -> set[str]:
    """What a module imports, by its full name, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module, f"{module} imports relatively"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & SOURCES.keys()) or {node.module}
    return found


def test_each_room_imports_only_the_rooms_below_it() -> None:
    wrong = [
        f"{module} imports {imported}: {room_of(module)} may not know {room_of(imported)}"
        for module in SOURCES
        for imported in sorted(imports(module) & SOURCES.keys())
        if room_of(imported) not in {room_of(module), *ROOMS[room_of(module)]}
    ]
    assert wrong == []


def test_the_predict_core_knows_no_request() -> None:
    above = ("fastapi", "starlette", "api.gateway", "api.routes")
    wrong = [
        f"{module} imports {imported}"
        for module in SOURCES
        if within(module, "api.inference")
        for imported in imports(module)
        if any(within(imported, package) for package in above)
    ]
    assert wrong == []


def test_imports_form_no_cycle() -> None:
    order = graphlib.TopologicalSorter({module: imports(module) & SOURCES.keys() - {module} for module in SOURCES})
    order.prepare()  # raises CycleError, which names the cycle


def test_only_the_rooms_that_compute_name_tensorflow() -> None:
    wrong = [
        f"{module} imports {imported}"
        for module in SOURCES
        if room_of(module) not in WITH_TENSORFLOW
        for imported in imports(module)
        if imported.partition(".")[0] in ("tensorflow", "tensorflow_serving", "keras")
    ]
    assert wrong == []


def test_importing_the_other_rooms_leaves_tensorflow_and_ray_unloaded() -> None:
    modules = sorted(
        module for module in SOURCES if room_of(module) not in WITH_TENSORFLOW and not module.endswith("__main__")
    )
    assert "api.app" in modules
    code = f"import {', '.join(modules)}, sys; sys.exit(bool({{'tensorflow', 'ray'}} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("modules", "without"), [("api.__main__, api.app", {"rich", "alembic"}), ("cli.main", {"sqlalchemy", "numpy"})]
)
def test_what_is_started_often_or_runs_for_long_does_without_heavy_imports(modules: str, without: set[str]) -> None:
    code = f"import {modules}, sys; sys.exit(bool({without} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("modules", "without"),
    [
        ("trainer.worker.run_job, trainer.worker.complete_report, trainer.worker.retention", {"keras", "tf_keras"}),
        ("serving.embedded.server, serving.embedded.rest", {"keras", "tf_keras", "sklearn"}),
    ],
)
def test_what_imports_tensorflow_does_without_keras(modules: str, without: set[str]) -> None:
    code = (
        "from serving.quiet import import_tensorflow; import_tensorflow()\n"
        f"import {modules}, sys; sys.exit(bool({without} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_packed_floats_are_little_endian_bytes_on_the_wire() -> None:
    values = np.array([0.1, -2.5, 3e38], "<f4")
    official = predict_pb2.PredictResponse()
    official.outputs["x"].float_val.extend(values.tolist())
    read = ours.PredictResponse.FromString(official.SerializeToString())
    np.testing.assert_array_equal(np.frombuffer(read.outputs["x"].float_val, "<f4"), values)
