"""The embedded model server: TensorFlow Serving's gRPC protocol over SavedModels on disk, on the CPU.

Status codes and messages are those of TensorFlow Serving 2.20. tests/contract/differences.py lists where it differs
on purpose, mostly where the real server harms itself.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent import futures
from typing import Any, NoReturn

import grpc
import tensorflow as tf
from google.protobuf import any_pb2, text_format
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from serving.embedded.model_manager import Models, checked
from serving.embedded.servable import DEFAULT_SIGNATURE, Refused, invalid, status_of
from serving.embedded.tensors import decoded, encode

THREADS = 8
RELOAD_WAIT_S = 20  # less than clients wait for a reload, or calls that queue for one would take every thread
KINDS = {"classify": "classification", "regress": "regression"}
SERVICES = ("", "tensorflow.serving.PredictionService", "tensorflow.serving.ModelService")


def _guarded(call: Callable[[Any, Any], Any]) -> Callable[[Any, Any, grpc.ServicerContext], Any]:
    """A service method that turns what `call` raises into the status of the RPC."""

    def method(self: Any, request: Any, context: grpc.ServicerContext) -> Any:
        try:
            return call(self, request)
        except Refused as exc:
            context.abort(exc.code, exc.message)
        except tf.errors.OpError as exc:
            context.abort(status_of(exc), exc.message)

    return method


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):  # type: ignore[misc]
    """Predict and GetModelMetadata. The other calls take tf.Examples, which no signature of ours accepts."""

    def __init__(self, models: Models) -> None:
        self._models = models

    @_guarded
    def Predict(self, request: Any) -> Any:  # noqa: N802
        """Run one signature of one model version."""
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        version, servable = self._models.find(request.model_spec)
        key = request.model_spec.signature_name or DEFAULT_SIGNATURE
        servable.check_names(key, request.inputs)
        arrays = {}
        for name, tensor in request.inputs.items():
            try:
                arrays[name] = decoded(tensor)
            except ValueError as exc:
                raise invalid(f"tensor parsing error: {name}") from exc
        response = predict_pb2.PredictResponse()
        for name, array in servable.run(key, arrays, request.output_filter).items():
            encode(array, response.outputs[name])
        _name(response.model_spec, request.model_spec.name, version)
        response.model_spec.signature_name = key
        return response

    @_guarded
    def GetModelMetadata(self, request: Any) -> Any:  # noqa: N802
        """The signatures of one model version."""
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        if not request.metadata_field:
            raise invalid("GetModelMetadataRequest must specify at least one metadata_field")
        for name in request.metadata_field:
            if name != "signature_def":
                raise invalid(f"Metadata field {name} is not supported")
        return metadata(self._models, request.model_spec)

    @_guarded
    def Classify(self, request: Any) -> Any:  # noqa: N802
        """Always refused."""
        self._refuse(request, "classify")

    @_guarded
    def Regress(self, request: Any) -> Any:  # noqa: N802
        """Always refused."""
        self._refuse(request, "regress")

    def _refuse(self, request: Any, verb: str) -> NoReturn:
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        refuse_examples(self._models, request.model_spec, verb)

    @_guarded
    def MultiInference(self, request: Any) -> Any:  # noqa: N802
        """Always refused, because of its first task."""
        task = request.tasks[0] if request.tasks else inference_pb2.InferenceTask()
        _, servable = self._models.find(task.model_spec)
        key = task.model_spec.signature_name or DEFAULT_SIGNATURE
        if key not in servable.signatures:
            raise invalid(f"Requested signature not found in model graph: {key}")
        verb = task.method_name.removeprefix("tensorflow/serving/")
        if verb not in KINDS:
            unsupported = f"Unsupported signature method_name: {task.method_name}"
            raise Refused(grpc.StatusCode.UNIMPLEMENTED, unsupported)
        refuse_examples(self._models, task.model_spec, verb)


class ModelService(model_service_pb2_grpc.ModelServiceServicer):  # type: ignore[misc]
    """GetModelStatus and HandleReloadConfigRequest."""

    def __init__(self, models: Models) -> None:
        self._models = models
        self._one_reload = threading.Lock()

    @_guarded
    def GetModelStatus(self, request: Any) -> Any:  # noqa: N802
        """The state of one or all versions of a model. A label is ignored."""
        if not request.HasField("model_spec"):
            raise invalid("Missing ModelSpec")
        spec = request.model_spec
        return status(self._models, spec.name, spec.version.value if spec.HasField("version") else None)

    @_guarded
    def HandleReloadConfigRequest(self, request: Any) -> Any:  # noqa: N802
        """Replace the whole configuration of the server."""
        if not self._one_reload.acquire(timeout=RELOAD_WAIT_S):
            raise Refused(grpc.StatusCode.UNAVAILABLE, "another reload is under way")
        try:
            self._models.reload(checked(request))
        finally:
            self._one_reload.release()
        response = model_management_pb2.ReloadConfigResponse()
        response.status.SetInParent()
        for name in request.metric_names:
            response.metric.add(name=name, int64_value_increase=0)
        return response


def _name(spec: Any, name: str, version: int) -> None:
    spec.name = name
    spec.version.value = version


def status(models: Models, name: str, version: int | None) -> Any:
    """The GetModelStatusResponse for one or all versions of a model."""
    response = get_model_status_pb2.GetModelStatusResponse()
    for number, state in models.states(name, version):
        found = response.model_version_status.add(version=number, state=state.state)
        found.status.error_code = state.code
        found.status.error_message = state.message
    return response


def metadata(models: Models, spec: Any) -> Any:
    """The GetModelMetadataResponse with the signatures of one model version."""
    version, servable = models.find(spec)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    for key, signature in servable.signatures.items():
        signatures.signature_def[key].CopyFrom(signature)
    packed = any_pb2.Any()
    packed.Pack(signatures)
    response = get_model_metadata_pb2.GetModelMetadataResponse(metadata={"signature_def": packed})
    _name(response.model_spec, spec.name, version)
    return response


def refuse_examples(models: Models, spec: Any, verb: str) -> NoReturn:
    """Refuse a call that sends tf.Examples, with the first problem that the real server would find.

    Args:
        verb: `classify` or `regress`.
    """
    _, servable = models.find(spec)
    key = spec.signature_name or DEFAULT_SIGNATURE
    if key not in servable.signatures:
        raise invalid(f"No signature was found with the name: {key}")
    signature = servable.signatures[key]
    if len(signature.inputs) != 1:
        raise invalid("Expected one input Tensor.")
    if verb == "regress" and len(signature.outputs) != 1:
        raise invalid("Expected one output Tensor.")
    if len(signature.outputs) not in (1, 2):
        raise invalid(f"Expected one or two output Tensors, found {len(signature.outputs)}")
    if "inputs" not in signature.inputs:
        text = text_format.MessageToString(signature)
        raise invalid(f"No {KINDS[verb]} inputs found in SignatureDef: {text}")
    raise Refused(grpc.StatusCode.UNIMPLEMENTED, f"This server does no {KINDS[verb]}. Call Predict.")


def start(
    address: str, models: Models, threads: int = THREADS, credentials: grpc.ServerCredentials | None = None,
    interceptors: Sequence[grpc.ServerInterceptor] = (),
) -> tuple[grpc.Server, int]:  # fmt: skip
    """Start a gRPC server for these models; return it with its port.

    Args:
        address: `host:port` (port 0 picks a free one) or `unix:/path`, whose port means nothing.
        threads: calls answered at a time; further ones wait.
        credentials: for TLS.
        interceptors: see every call first.

    Raises:
        RuntimeError: the address is taken or malformed.
    """
    server = grpc.server(
        futures.ThreadPoolExecutor(threads, thread_name_prefix="grpc"),
        interceptors=interceptors,
        options=(
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ),
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(PredictionService(models), server)
    model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelService(models), server)
    healthy = health.HealthServicer()
    for name in SERVICES:
        healthy.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    server.start()
    return server, port
