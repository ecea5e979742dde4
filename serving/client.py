"""Client of a model server. It speaks TensorFlow Serving's gRPC protocol and uses nothing only ours has."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np

from serving.pb import model_server_pb2 as pb
from store import errors, traces
from store.records import public_name
from store.settings import ClientTLS

log = logging.getLogger("temper.client")

PREDICT = "/tensorflow.serving.PredictionService/Predict"
GET_MODEL_STATUS = "/tensorflow.serving.ModelService/GetModelStatus"
RELOAD_CONFIG = "/tensorflow.serving.ModelService/HandleReloadConfigRequest"

DTYPES = {"f": (1, "<f4"), "i": (3, "<i4"), "B": (4, "u1")}  # DT_FLOAT, DT_INT32 and DT_UINT8, by NumPy's characters
WAIT_S = 0.5
OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A server that comes back is found within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.use_local_subchannel_pool", 1),
)


@dataclass(frozen=True)
class Prediction:
    """Outputs of a model, and the version that computed them."""

    version: int
    logits: np.ndarray  # (n, classes) float32
    probabilities: np.ndarray  # (n, classes) float32
    distances: np.ndarray | None = (
        None  # (n,) float32, above 1 for images unlike those that were learned; None without a detector
    )


def predict_request(model: str, version: int, images: np.ndarray) -> pb.PredictRequest:
    """Build a request from images: (n, 28, 28, 1) float32 in [0, 1], or (n, 784) uint8, a quarter of the size."""
    return request_for(model, version, "serving_bytes" if images.dtype == np.uint8 else "", image=images)


def request_for(model: str, version: int, signature: str, **inputs: np.ndarray) -> pb.PredictRequest:
    """Build a request of a signature from its inputs: float32, int32 or uint8. "" is the default signature."""
    spec = _spec(model, version)
    spec.signature_name = signature
    return pb.PredictRequest(model_spec=spec, inputs={name: _tensor(array) for name, array in inputs.items()})


def _tensor(array: np.ndarray) -> pb.TensorProto:
    dtype, kind = DTYPES.get(array.dtype.char, DTYPES["f"])
    return pb.TensorProto(
        dtype=dtype,
        tensor_shape=pb.TensorShapeProto(dim=[pb.TensorShapeProto.Dim(size=size) for size in array.shape]),
        tensor_content=np.ascontiguousarray(array, kind).tobytes(),
    )


def prediction(response: pb.PredictResponse) -> Prediction:
    """Decode a response. TensorFlow Serving sends `float_val`; others may send `tensor_content`.

    Raises:
        ModelServerError: the outputs are not those of a classifier.
    """
    try:
        logits, probabilities = (_array(response.outputs[name]) for name in ("logits", "probabilities"))
    except ValueError as exc:
        raise errors.ModelServerError("the model server's response lacks logits or probabilities") from exc
    distances = _array(response.outputs["distance"]) if "distance" in response.outputs else None
    return Prediction(response.model_spec.version.value, logits, probabilities, distances)


def _array(tensor: pb.TensorProto) -> np.ndarray:
    shape = tuple(dim.size for dim in tensor.tensor_shape.dim)
    return np.frombuffer(tensor.tensor_content or tensor.float_val, "<f4").reshape(shape)


def _spec(model: str, version: int | None = None) -> pb.ModelSpec:
    spec = pb.ModelSpec(name=model)
    if version is not None:
        spec.version.value = version
    return spec


def _called(target: str, model: str, version: int) -> traces.Attributes:
    return {"server.address": target, "temper.model": public_name(model), "temper.version": version}


def translated(exc: grpc.RpcError, target: str) -> errors.TemperError:
    """Translate a gRPC error of the server at `target`."""
    code, text = exc.code(), exc.details() or ""
    match code:
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.CANCELLED:
            return errors.ModelServerUnavailable(f"the model server at {target} cannot be reached")
        case grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.ModelServerTimeout(f"the model server at {target} did not answer in time")
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            return errors.Overloaded(f"the model server at {target} is overloaded")
        case grpc.StatusCode.NOT_FOUND:
            return errors.UnknownModel(text)
        case grpc.StatusCode.FAILED_PRECONDITION if text.startswith("Serving signature key"):
            return errors.NotExplainable("it was exported by a release without explanations")
        case _:
            return errors.ModelServerError(f"the model server at {target} answered {code.name}: {text}")


def credentials(target: str, tls: ClientTLS | None) -> grpc.ChannelCredentials | None:
    """What a channel needs for TLS; None without it, and on a Unix socket.

    Raises:
        OSError: a file cannot be read.
    """
    if tls is None or target.startswith("unix:"):
        return None
    key, cert = (path.read_bytes() if path else None for path in (tls.key, tls.cert))
    return grpc.ssl_channel_credentials(tls.ca.read_bytes(), key, cert)


class ModelServer:
    """Control calls, and a Predict for probes. Blocking; use it in a `with`."""

    def __init__(self, target: str, tls: ClientTLS | None = None) -> None:
        self.target = target
        if secure := credentials(target, tls):
            self._channel = grpc.secure_channel(target, secure, options=OPTIONS)
        else:
            self._channel = grpc.insecure_channel(target, options=OPTIONS)
        self._predict = self._channel.unary_unary(
            PREDICT, pb.PredictRequest.SerializeToString, pb.PredictResponse.FromString
        )
        self._status = self._channel.unary_unary(
            GET_MODEL_STATUS, pb.GetModelStatusRequest.SerializeToString, pb.GetModelStatusResponse.FromString
        )
        self._reload = self._channel.unary_unary(
            RELOAD_CONFIG, pb.ReloadConfigRequest.SerializeToString, pb.ReloadConfigResponse.FromString
        )

    def __enter__(self) -> "ModelServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._channel.close()

    def predict(self, model: str, version: int, images: np.ndarray, timeout_s: float = 10.0) -> Prediction:
        """Run one version on images as in `predict_request`."""
        request = predict_request(model, version, images)
        try:
            with traces.child(PREDICT[1:], "client", _called(self.target, model, version)):
                return prediction(self._predict(request, timeout=timeout_s, metadata=traces.metadata()))
        except grpc.RpcError as exc:
            raise translated(exc, self.target) from exc

    def states(self, model: str, timeout_s: float = 5.0) -> dict[int, pb.ModelVersionStatus]:
        """Return the state of every version the server knows; empty for an unknown model."""
        request = pb.GetModelStatusRequest(model_spec=_spec(model))
        try:
            response = self._status(request, timeout=timeout_s)
        except grpc.RpcError as exc:
            if exc.code() == grpc.StatusCode.NOT_FOUND:
                return {}
            raise translated(exc, self.target) from exc
        return {status.version: status for status in response.model_version_status}

    def available(self, model: str, timeout_s: float = 5.0) -> set[int]:
        """Return the versions that are AVAILABLE."""
        return {v for v, s in self.states(model, timeout_s).items() if s.state == pb.ModelVersionStatus.AVAILABLE}

    def reload(self, root: Path, wanted: Mapping[str, Iterable[int]], timeout_s: float = 30.0) -> None:
        """Replace what the server serves: for each model exactly these versions, found in `root`/model.

        The server goes on loading when the time is up. A version that cannot be loaded does not fail the call;
        `wait_until_available` reports it.
        """
        request = pb.ReloadConfigRequest()
        for model, versions in wanted.items():
            config = request.config.model_config_list.config.add(
                name=model, base_path=str(root / model), model_platform="tensorflow"
            )
            config.model_version_policy.specific.versions.extend(versions)
        request.config.model_config_list.SetInParent()
        try:
            with traces.child(RELOAD_CONFIG[1:], "client", {"server.address": self.target}):
                response = self._reload(request, timeout=timeout_s, metadata=traces.metadata())
        except grpc.RpcError as exc:
            if exc.code() == grpc.StatusCode.UNKNOWN:  # all is applied, but some model did not become available
                log.warning("model server %s: %s", self.target, exc.details())
                return
            raise translated(exc, self.target) from exc
        if response.status.error_code:
            raise errors.ModelServerError(f"reload refused: {response.status.error_message}")

    def wait_until_available(
        self, model: str, version: int, timeout_s: float = 5.0, wait: Callable[[], None] = lambda: None
    ) -> None:
        """Return once the version is AVAILABLE.

        Args:
            wait: called about twice a second meanwhile; raises to give up.

        Raises:
            PublishFailed: the server could not load it.
            ModelServerTimeout: it is not AVAILABLE in time. The server may have restarted: reload, then wait again.
        """
        deadline, look_at = time.monotonic() + timeout_s, time.monotonic() + WAIT_S
        while True:
            status = self.states(model).get(version)
            if status and status.state == pb.ModelVersionStatus.AVAILABLE:
                return
            state = pb.ModelVersionStatus.State.Name(status.state) if status else "unknown"
            where = f"version {version} of {public_name(model)} is {state} at the model server {self.target}"
            if status and status.status.error_code:  # END without an error means that it was unloaded once
                raise errors.PublishFailed(f"{where}: {status.status.error_message}")
            if time.monotonic() > deadline:
                raise errors.ModelServerTimeout(f"{where} after {timeout_s:g} s")
            if time.monotonic() > look_at:
                wait()
                look_at = time.monotonic() + WAIT_S
            time.sleep(0.01)


class Predictor:
    """Predict for asyncio, over one channel; use it in an `async with`."""

    def __init__(self, target: str, tls: ClientTLS | None = None) -> None:
        self.target = target
        if secure := credentials(target, tls):
            self._channel = grpc.aio.secure_channel(target, secure, options=OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(target, options=OPTIONS)
        self._predict = self._channel.unary_unary(
            PREDICT, pb.PredictRequest.SerializeToString, pb.PredictResponse.FromString
        )

    async def __aenter__(self) -> "Predictor":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._channel.close()

    async def predict(self, model: str, version: int, images: np.ndarray, timeout_s: float) -> Prediction:
        """Run one version on images as in `predict_request`."""
        return prediction(await self._answer(predict_request(model, version, images), model, version, timeout_s))

    async def run(
        self, model: str, version: int, signature: str, timeout_s: float, **inputs: np.ndarray
    ) -> dict[str, np.ndarray]:
        """The outputs, all float32, of a signature of one version.

        Raises:
            NotExplainable: the version has no such signature.
        """
        response = await self._answer(request_for(model, version, signature, **inputs), model, version, timeout_s)
        return {name: _array(tensor) for name, tensor in response.outputs.items()}

    async def _answer(self, request: pb.PredictRequest, model: str, version: int, timeout_s: float) -> Any:
        try:
            if not traces.on():
                return await self._predict(request, timeout=timeout_s)
            with traces.child(PREDICT[1:], "client", _called(self.target, model, version)):
                return await self._predict(request, timeout=timeout_s, metadata=traces.metadata())
        except grpc.aio.AioRpcError as exc:
            raise translated(exc, self.target) from exc
