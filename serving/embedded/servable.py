"""A loaded SavedModel.

Versions with identical `saved_model.pb` files share one graph and differ in their sessions and variables only, so a
further version costs megabytes and milliseconds.
"""

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.core.protobuf import config_pb2, saved_model_pb2

from serving.embedded.tensors import KINDS, dtype_of, type_name

DEFAULT_SIGNATURE = "serving_default"

# Run in the caller's thread: handing the operations of a small graph to other threads costs more than it saves, and
# the second core is busy with the gateway.
SESSION = config_pb2.ConfigProto(intra_op_parallelism_threads=1, inter_op_parallelism_threads=1)
IN_CALLER = config_pb2.RunOptions(inter_op_thread_pool=-1)


class Refused(Exception):
    """The call fails with this gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def invalid(message: str) -> Refused:
    """A refusal with INVALID_ARGUMENT."""
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, message)


def status_of(exc: tf.errors.OpError) -> grpc.StatusCode:
    """The gRPC code of a TensorFlow error."""
    return next(code for code in grpc.StatusCode if code.value[0] == exc.error_code)


@dataclass(frozen=True)
class Input:
    """One input of a signature."""

    name: str
    feed: str  # name of the tensor in the graph
    dtype: int
    shape: tuple[int, ...] | None  # -1: any size; None: any rank


@dataclass(frozen=True, eq=False)
class _Imported:
    """A graph with the metadata of its SavedModel."""

    graph: tf.Graph
    meta: Any
    has_variables: bool


_imported: weakref.WeakValueDictionary[str, _Imported] = weakref.WeakValueDictionary()
_importing = threading.Lock()


def _imported_graph(file: Path) -> _Imported:
    """The serving graph in `saved_model.pb`, shared by all identical files."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        text = "Specified file path does not appear to contain a SavedModel bundle (should have a file called "
        text += f"`saved_model.pb`)\nSpecified file path: {file.parent}"
        raise Refused(grpc.StatusCode.NOT_FOUND, text) from None
    key = sha256(content).hexdigest()
    with _importing:
        if (found := _imported.get(key)) is None:
            found = _imported[key] = _import(file, content)
    return found


def _import(file: Path, content: bytes) -> _Imported:
    try:
        saved = saved_model_pb2.SavedModel.FromString(content)
    except DecodeError as exc:
        if _is_cut(content):
            raise Refused(grpc.StatusCode.OUT_OF_RANGE, "Read less bytes than requested") from exc
        raise Refused(grpc.StatusCode.DATA_LOSS, f"Can't parse {file} as binary proto") from exc
    meta = next((meta for meta in saved.meta_graphs if "serve" in meta.meta_info_def.tags), None)
    if meta is None:
        raise Refused(
            grpc.StatusCode.NOT_FOUND, f"Could not find meta graph def matching supplied tags: {{ serve }} in {file}"
        )
    graph = tf.Graph()
    with graph.as_default():
        tf.graph_util.import_graph_def(meta.graph_def, name="")
    has_variables = any(node.op in ("VarHandleOp", "VariableV2") for node in meta.graph_def.node)
    meta.ClearField("graph_def")
    return _Imported(graph, meta, has_variables)


def _is_cut(content: bytes) -> bool:
    """Tell whether the bytes of a SavedModel end in the middle of a field."""
    at = 0
    while at < len(content):
        tag, size = content[at], 0
        for shift in range(0, 70, 7):
            at += 1
            if at >= len(content):
                return True
            size |= (content[at] & 127) << shift
            if content[at] < 128:
                break
        at += 1
        if tag not in (0x08, 0x12):  # saved_model_schema_version, meta_graphs
            return False
        at += size if tag == 0x12 else 0
    return at > len(content)


class Servable:
    """A loaded version. Its memory is freed when the last call that uses it has ended."""

    def __init__(self, directory: str) -> None:
        """Load `directory` and compile its default signature.

        Raises:
            Refused: the SavedModel is missing or incomplete; code and message are the real server's.
            tf.errors.OpError: TensorFlow cannot restore it.
        """
        path = Path(directory)
        self._imported = _imported_graph(path / "saved_model.pb")
        meta = self._imported.meta
        self.signatures: Mapping[str, Any] = meta.signature_def
        self._inputs = {key: _inputs(signature) for key, signature in meta.signature_def.items()}
        self._session = tf.compat.v1.Session(graph=self._imported.graph, config=SESSION)
        self._callables: dict[tuple[str, tuple[str, ...]], Callable[..., list[np.ndarray]]] = {}
        self._compiling = threading.Lock()
        self._restore(path)
        if DEFAULT_SIGNATURE in self.signatures:
            self._callable(DEFAULT_SIGNATURE, tuple(sorted(self.signatures[DEFAULT_SIGNATURE].outputs)))

    def _restore(self, path: Path) -> None:
        meta = self._imported.meta
        prefix = path / "variables" / "variables"
        if prefix.with_suffix(".index").exists():
            if meta.saver_def.restore_op_name:
                self._run(meta.saver_def.restore_op_name, {meta.saver_def.filename_tensor_name: str(prefix)})
        elif self._imported.has_variables:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"The model has variables, and none are in {prefix.parent}")
        assets = {
            asset.tensor_info.name: str(path / "assets" / asset.filename)
            for asset in meta.asset_file_def
        }  # fmt: skip
        if initial := meta.signature_def.get("__saved_model_init_op"):
            target = initial.outputs["__saved_model_init_op"].name
            operation = self._imported.graph.get_operation_by_name(target.partition(":")[0])
            if operation.type != "NoOp" or operation.control_inputs:  # compiling a NoOp takes a quarter of the load
                self._run(target, assets)

    def _run(self, target: str, feeds: Mapping[str, str]) -> None:
        options = config_pb2.CallableOptions(feed=list(feeds), target=[target], run_options=IN_CALLER)
        call = self._session._make_callable_from_options(options)
        call(*(np.array(value.encode(), object) for value in feeds.values()))

    def run(self, key: str, arrays: Mapping[str, np.ndarray], wanted: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """The outputs of signature `key` by name: the wanted ones, or all.

        Raises:
            Refused: the model has no such signature, inputs or outputs.
            tf.errors.OpError: the graph failed.
        """
        inputs = self.check_names(key, arrays)
        feeds = [_fed(position, known, arrays) for position, known in enumerate(inputs)]
        outputs = self._outputs(key, wanted)
        return dict(zip(outputs, self._callable(key, outputs)(*feeds), strict=True))

    def check_names(self, key: str, given: Mapping[str, Any]) -> tuple[Input, ...]:
        """The inputs of a signature. Refuses a request with more or fewer."""
        inputs = self.inputs(key)
        if len(given) != len(inputs):
            raise _mismatch(inputs, given)
        return inputs

    def inputs(self, key: str) -> tuple[Input, ...]:
        """The inputs of a signature, sorted by name."""
        if key not in self._inputs:
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{key}" not found.')
        return self._inputs[key]

    def _callable(self, key: str, outputs: tuple[str, ...]) -> Callable[..., list[np.ndarray]]:
        if (found := self._callables.get((key, outputs))) is None:
            with self._compiling:
                signature = self.signatures[key]
                options = config_pb2.CallableOptions(
                    feed=[known.feed for known in self._inputs[key]],
                    fetch=[signature.outputs[name].name for name in outputs],
                    run_options=IN_CALLER,
                )
                # A callable skips most of the overhead of Session.run: 0.1 ms for one image instead of 1 ms.
                found = self._session._make_callable_from_options(options)
                self._callables[key, outputs] = found
        return found

    def _outputs(self, key: str, wanted: Sequence[str]) -> tuple[str, ...]:
        known = sorted(self.signatures[key].outputs)
        for position, name in enumerate(wanted):
            if name not in known:
                raise invalid(
                    f"output tensor alias not found in signature: {name} "
                    f"Outputs expected to be in the set {{{','.join(known)}}}."
                )
            if name in wanted[:position]:
                raise invalid(f"duplicate output tensor alias: {name}")
        return tuple(sorted(wanted)) or tuple(known)  # sorted, so that each set is compiled once


def _inputs(signature: Any) -> tuple[Input, ...]:
    return tuple(
        Input(
            name, info.name, info.dtype,
            None if info.tensor_shape.unknown_rank else tuple(dim.size for dim in info.tensor_shape.dim),
        )
        for name, info in sorted(signature.inputs.items())
    )  # fmt: skip


def _mismatch(inputs: Sequence[Input], arrays: Mapping[str, Any]) -> Refused:
    sent, known = set(arrays), {given.name for given in inputs}
    return invalid(
        f"input size does not match signature: {len(sent)}!={len(known)} len({{{','.join(sorted(sent))}}}) != "
        f"len({{{','.join(sorted(known))}}}). Sent extra: {{{','.join(sorted(sent - known))}}}. "
        f"Missing but required: {{{','.join(sorted(known - sent))}}}."
    )


def _fed(position: int, known: Input, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """The array for one input, checked against the signature."""
    array = arrays.get(known.name)
    if array is None:
        raise invalid(
            f"Signature input alias: {known.name}(feed name: {known.feed}) not found in request and no default value "
            f"provided. Inputs expected to be in the request {{{','.join(sorted(arrays))}}}, "
            "or default input alias set: "
        )
    if array.dtype != KINDS.get(known.dtype):
        given = type_name(dtype_of(array))
        raise invalid(f"Expects arg[{position}] to be {type_name(known.dtype)} but {given} is provided")
    if known.shape is not None and (
        array.ndim != len(known.shape)
        or any(want not in (-1, got) for want, got in zip(known.shape, array.shape, strict=True))
    ):
        raise invalid(f"input {known.name} has shape {list(array.shape)}, the signature has {list(known.shape)}")
    return array
