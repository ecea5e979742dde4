"""The embedded model server: TensorFlow Serving's gRPC protocol over SavedModels on disk, on the CPU.

Status codes and messages are those of TensorFlow Serving 2.20. It differs on purpose where the real one harms
itself: shapes are checked against the signature (the real one can abort), and a model whose base path is missing
fails the reload (the real one waits for ever).
"""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tensorflow as tf
from google.protobuf import any_pb2
from tensorflow.core.protobuf import config_pb2
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

State = get_model_status_pb2.ModelVersionStatus
DEFAULT_SIGNATURE = "serving_default"
POLL_S = 1.0


class Refused(Exception):
    """A call ends with this gRPC status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def _invalid(message: str) -> Refused:
    return Refused(grpc.StatusCode.INVALID_ARGUMENT, message)


class Servable:
    """A loaded version. It goes when the last call that uses it has ended."""

    def __init__(self, directory: Path) -> None:
        graph = tf.Graph()
        with graph.as_default():
            self._session = tf.compat.v1.Session(graph=graph)
            loaded = tf.compat.v1.saved_model.loader.load(self._session, ["serve"], str(directory))
        self.signatures: Mapping[str, Any] = loaded.signature_def
        self._calls: dict[tuple[str, tuple[str, ...]], Callable[..., list[np.ndarray]]] = {}

    def run(self, key: str, tensors: Mapping[str, Any], wanted: list[str]) -> dict[str, np.ndarray]:
        """Outputs of signature `key` by name, all of them or those wanted."""
        if key not in self.signatures:
            raise Refused(grpc.StatusCode.FAILED_PRECONDITION, f'Serving signature key "{key}" not found.')
        signature = self.signatures[key]
        feeds = [_fed(name, signature, tensors) for name in sorted(signature.inputs)]
        if len(tensors) != len(feeds):
            raise _mismatch(signature, tensors)
        outputs = tuple(_outputs(signature, wanted))
        return dict(zip(outputs, self._call(key, outputs)(*feeds), strict=True))

    def _call(self, key: str, outputs: tuple[str, ...]) -> Callable[..., list[np.ndarray]]:
        if (key, outputs) not in self._calls:
            signature = self.signatures[key]
            options = config_pb2.CallableOptions(
                feed=[signature.inputs[name].name for name in sorted(signature.inputs)],
                fetch=[signature.outputs[name].name for name in outputs],
            )
            # A callable skips most of the cost of Session.run: 0.3 ms for one image instead of 1.2.
            self._calls[key, outputs] = self._session._make_callable_from_options(options)
        return self._calls[key, outputs]


def _mismatch(signature: Any, tensors: Mapping[str, Any]) -> Refused:
    sent, known = set(tensors), set(signature.inputs)
    return _invalid(
        f"input size does not match signature: {len(sent)}!={len(known)} len({{{','.join(sorted(sent))}}}) != "
        f"len({{{','.join(sorted(known))}}}). Sent extra: {{{','.join(sorted(sent - known))}}}. "
        f"Missing but required: {{{','.join(sorted(known - sent))}}}."
    )


def _fed(name: str, signature: Any, tensors: Mapping[str, Any]) -> np.ndarray:
    """The array for input `name`, checked against the signature."""
    info = signature.inputs[name]
    if name not in tensors:
        if len(tensors) != len(signature.inputs):
            raise _mismatch(signature, tensors)
        raise _invalid(
            f"Signature input alias: {name}(feed name: {info.name}) not found in request and no default value "
            f"provided. Inputs expected to be in the request {{{','.join(sorted(tensors))}}}, "
            "or default input alias set: "
        )
    try:
        array: np.ndarray = tf.make_ndarray(tensors[name])
    except (ValueError, TypeError) as exc:
        raise _invalid(f"tensor parsing error: {name}") from exc
    if tensors[name].dtype != info.dtype:
        kinds = tf.as_dtype(info.dtype).name, tf.as_dtype(tensors[name].dtype).name
        raise _invalid("Expects arg[0] to be {} but {} is provided".format(*map(_cpp_name, kinds)))
    expected = [dim.size for dim in info.tensor_shape.dim]
    if not info.tensor_shape.unknown_rank and (
        array.ndim != len(expected)
        or any(want not in (-1, got) for want, got in zip(expected, array.shape, strict=True))
    ):
        raise _invalid(f"input {name} has shape {list(array.shape)}, the signature has {expected}")
    return array


def _cpp_name(dtype: str) -> str:
    return {"float32": "float", "float64": "double"}.get(dtype, dtype)


def _outputs(signature: Any, wanted: list[str]) -> Iterator[str]:
    known = sorted(signature.outputs)
    if not wanted:
        yield from known
    for position, name in enumerate(wanted):
        if name not in signature.outputs:
            raise _invalid(
                f"output tensor alias not found in signature: {name} "
                f"Outputs expected to be in the set {{{','.join(known)}}}."
            )
        if name in wanted[:position]:
            raise _invalid(f"duplicate output tensor alias: {name}")
        yield name


@dataclass
class _Model:
    """What is configured for a model, and its versions: loaded ones, and the state of all it has ever had."""

    config: Any
    loaded: dict[int, Servable] = field(default_factory=dict)
    states: dict[int, tuple[Any, str]] = field(default_factory=dict)  # (state, error message)


class Models:
    """All models of the server. One thread loads and unloads; calls only read."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = {}
        self._lock = threading.Lock()  # guards the shape of _models; loading happens outside of it
        self._work: queue.Queue[tuple[str, threading.Event]] = queue.Queue()
        threading.Thread(target=self._load_forever, name="loader", daemon=True).start()
        threading.Thread(target=self._poll_forever, name="poller", daemon=True).start()

    def find(self, spec: Any) -> tuple[int, Servable]:
        """The version that a ModelSpec names and its servable."""
        if not spec.name:
            raise _invalid("ModelSpec has no name specified.")
        model = self._models.get(spec.name)
        choice = spec.WhichOneof("version_choice")
        if choice == "version_label":
            version = model.config.version_labels.get(spec.version_label) if model else None
            if version is None:
                raise _invalid(f"Unrecognized servable version label: {spec.version_label}")
        elif choice == "version":
            version = spec.version.value
        else:
            version = max(model.loaded, default=None) if model else None
        servable = model.loaded.get(version) if model and version is not None else None
        if servable is None or version is None:
            which = f"Latest({spec.name})" if version is None else f"Specific({spec.name}, {version})"
            raise Refused(grpc.StatusCode.NOT_FOUND, f"Servable not found for request: {which}")
        return version, servable

    def states(self, name: str, version: int | None) -> list[tuple[int, Any, str]]:
        """(version, state, error message) of one or all versions that were ever seen, newest first."""
        model = self._models.get(name)
        known = dict(model.states) if model else {}
        if version is not None and version not in known:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"Could not find version {version} of model {name}")
        if not known:
            raise Refused(grpc.StatusCode.NOT_FOUND, f"Could not find any versions of model {name}")
        numbers = sorted(known, reverse=True) if version is None else [version]
        return [(number, *known[number]) for number in numbers]

    def reload(self, configs: Mapping[str, Any]) -> None:
        """Replace the configuration; return when every new model is loaded."""
        with self._lock:
            for name, config in configs.items():
                for version in config.version_labels.values():
                    if name not in self._models or version not in self._models[name].loaded:
                        raise Refused(
                            grpc.StatusCode.FAILED_PRECONDITION,
                            f"Request to assign label to version {version} of model {name}, "
                            "which is not currently available for inference",
                        )
            fresh = []
            for name, config in configs.items():
                if name in self._models and self._models[name].loaded:
                    self._models[name].config = config
                else:
                    fresh.append(name)
                    known = self._models.get(name)
                    self._models[name] = _Model(config, states=known.states if known else {})
            for name in set(self._models) - set(configs):
                self._models[name].config = None
        waits = {name: self._align_soon(name) for name in set(self._models)}
        failed = []
        for name in fresh:
            waits[name].wait()
            model = self._models[name]
            wrong = [(v, text) for v, (state, text) in model.states.items() if state == State.END and text]
            if not model.loaded:
                wrong = wrong or [(0, f"no versions of servable {name} found under {model.config.base_path}")]
                failed += [f"{{{{name: {name} version: {v}}} due to error: {text}}}, " for v, text in wrong]
        if failed:
            raise Refused(
                grpc.StatusCode.UNKNOWN, f"{len(failed)} model(s) did not become available: {{{''.join(failed)}}}"
            )

    def _align_soon(self, name: str) -> threading.Event:
        done = threading.Event()
        self._work.put((name, done))
        return done

    def _poll_forever(self) -> None:
        while True:
            time.sleep(POLL_S)
            with self._lock:
                names = list(self._models)
            for name in names:
                self._align_soon(name).wait()

    def _load_forever(self) -> None:
        while True:
            name, done = self._work.get()
            try:
                self._align(self._models[name])
            finally:
                done.set()

    def _align(self, model: _Model) -> None:
        """Load what is wanted and missing, then unload what is loaded and not wanted."""
        wanted = _wanted(model.config)
        for version, directory in wanted.items():
            if version in model.loaded or model.states.get(version, (None, ""))[1]:
                continue  # served, or failed before
            model.states[version] = (State.LOADING, "")
            try:
                servable = Servable(directory)
            except Exception as exc:  # whatever TensorFlow throws at a bad directory is this version's end, not ours
                model.states[version] = (State.END, str(exc) or type(exc).__name__)
            else:
                model.loaded = {**model.loaded, version: servable}
                model.states[version] = (State.AVAILABLE, "")
        if not wanted and model.config is not None:
            return  # base path gone or empty for a moment: keep what serves
        for version in set(model.loaded) - set(wanted):
            model.loaded = {v: servable for v, servable in model.loaded.items() if v != version}
            model.states[version] = (State.END, "")


def _wanted(config: Any) -> dict[int, Path]:
    """Directories of the versions that the policy asks for and that are there."""
    if config is None:
        return {}
    try:
        entries = list(Path(config.base_path).iterdir())
    except OSError:
        return {}
    there = {int(entry.name): entry for entry in entries if entry.name.isascii() and entry.name.isdecimal()}
    policy = config.model_version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            numbers = sorted(there)
        case "specific":
            numbers = sorted(set(policy.specific.versions) & set(there))
        case _:
            numbers = sorted(there)[-(policy.latest.num_versions or 1) :]
    return {number: there[number] for number in numbers}


def _configs(request: Any) -> dict[str, Any]:
    """Configurations by model name, checked."""
    if request.config.WhichOneof("config") != "model_config_list":
        raise _invalid(
            "ServerModelConfig type not supported by HandleReloadConfigRequest. "
            "Only ModelConfigList is currently supported"
        )
    configs: dict[str, Any] = {}
    for config in request.config.model_config_list.config:
        if config.name in configs:
            raise _invalid(f"Illegal to list model {config.name} multiple times in config list")
        if not config.model_platform and not config.model_type:
            raise _invalid(
                "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
                f"ModelServerConfig::model_platform, model name is {config.name}"
            )
        if config.model_platform not in ("", "tensorflow"):
            raise _invalid(f"Model {config.name} requests unsupported platform {config.model_platform}")
        if not Path(config.base_path).is_absolute():
            raise _invalid(
                f"Expected model {config.name} to have an absolute path or URI; got base_path()={config.base_path}"
            )
        configs[config.name] = config
    return configs


def _guarded(call: Callable[[Any, Any], Any]) -> Callable[[Any, Any, grpc.ServicerContext], Any]:
    """A service method that ends with the status of what it raises."""

    def method(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return call(self, request)
        except Refused as exc:
            context.abort(exc.code, exc.message)
        except tf.errors.OpError as exc:
            code = next(code for code in grpc.StatusCode if code.value[0] == exc.error_code)
            context.abort(code, exc.message)

    return method


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):  # type: ignore[misc]
    """Predict and GetModelMetadata."""

    def __init__(self, models: Models) -> None:
        self._models = models

    @_guarded
    def Predict(self, request: Any) -> Any:  # noqa: N802
        """Run one signature of one version."""
        if not request.HasField("model_spec"):
            raise _invalid("Missing ModelSpec")
        version, servable = self._models.find(request.model_spec)
        key = request.model_spec.signature_name or DEFAULT_SIGNATURE
        arrays = servable.run(key, request.inputs, list(request.output_filter))
        response = predict_pb2.PredictResponse()
        for name, array in arrays.items():
            tensor = response.outputs[name]
            if array.dtype == np.float32:  # as the real server answers
                tensor.dtype = tf.float32.as_datatype_enum
                for size in array.shape:
                    tensor.tensor_shape.dim.add(size=size)
                tensor.float_val.extend(array.ravel().tolist())
            else:
                tensor.CopyFrom(tf.make_tensor_proto(array))
        response.model_spec.name = request.model_spec.name
        response.model_spec.version.value = version
        response.model_spec.signature_name = key
        return response

    @_guarded
    def GetModelMetadata(self, request: Any) -> Any:  # noqa: N802
        """The signatures of one version."""
        if not request.HasField("model_spec"):
            raise _invalid("Missing ModelSpec")
        if not request.metadata_field:
            raise _invalid("GetModelMetadataRequest must specify at least one metadata_field")
        for name in request.metadata_field:
            if name != "signature_def":
                raise _invalid(f"Metadata field {name} is not supported")
        version, servable = self._models.find(request.model_spec)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for key, signature in servable.signatures.items():
            signatures.signature_def[key].CopyFrom(signature)
        packed = any_pb2.Any()
        packed.Pack(signatures)
        response = get_model_metadata_pb2.GetModelMetadataResponse(metadata={"signature_def": packed})
        response.model_spec.name = request.model_spec.name
        response.model_spec.version.value = version
        return response


class ModelService(model_service_pb2_grpc.ModelServiceServicer):  # type: ignore[misc]
    """GetModelStatus and HandleReloadConfigRequest."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._one_reload = threading.Lock()

    @_guarded
    def GetModelStatus(self, request: Any) -> Any:  # noqa: N802
        """State of one or all versions of a model."""
        if not request.HasField("model_spec"):
            raise _invalid("Missing ModelSpec")
        spec = request.model_spec
        version = spec.version.value if spec.HasField("version") else None
        response = get_model_status_pb2.GetModelStatusResponse()
        for number, state, message in self._models.states(spec.name, version):
            status = response.model_version_status.add(version=number, state=state)
            status.status.error_code = tf.errors.UNKNOWN if message else 0
            status.status.error_message = message
        return response

    @_guarded
    def HandleReloadConfigRequest(self, request: Any) -> Any:  # noqa: N802
        """Replace the configuration of the server."""
        configs = _configs(request)
        with self._one_reload:
            self._models.reload(configs)
        return model_management_pb2.ReloadConfigResponse()


def start(address: str, threads: int = 16) -> tuple[grpc.Server, int]:
    """A running server without models, and its port."""
    server = grpc.server(
        futures.ThreadPoolExecutor(threads, thread_name_prefix="grpc"),
        options=(("grpc.max_receive_message_length", -1), ("grpc.so_reuseport", 0)),
    )
    models = Models()
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(PredictionService(models), server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(models), server)
    port = server.add_insecure_port(address)
    server.start()
    return server, port
