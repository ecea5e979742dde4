"""The server under test: the embedded one, or the TensorFlow Serving at TEMPER_TFS_BINARY."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import (
    get_model_metadata_pb2,
    get_model_status_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
)

from serving.tensorflow_serving import tensorflow_serving_command
from store.processes import free_port
from tests.conftest import eventually
from tests.contract.differences import DIFFERENCES
from trainer.export import export
from trainer.lenet import initial, logits

BINARY = os.environ.get("TEMPER_TFS_BINARY")
POLICIES = ("latest", "all", "specific")
AVAILABLE, END = 30, 50
IMAGES = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)


@dataclass(frozen=True)
class Refusal:
    """The status of a call that failed."""

    code: str
    message: str


class Server:
    """A running server with clients: the official gRPC stubs, and httpx for REST."""

    real = BINARY is not None

    def __init__(self, port: int, rest_port: int) -> None:
        self.channel = grpc.insecure_channel(
            f"127.0.0.1:{port}", options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        )
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(self.channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(self.channel)
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{rest_port}", timeout=30)

    def differs(self, name: str) -> bool:
        """Whether the server under test is the real one, which differs as row `name` of the differences says."""
        assert name in DIFFERENCES
        return self.real

    def reload(self, *configs: Any, timeout_s: float = 60.0, metrics: tuple[str, ...] = ()) -> Any:
        """Replace the configuration with these ModelConfigs."""
        request = model_management_pb2.ReloadConfigRequest(metric_names=metrics)
        request.config.model_config_list.SetInParent()
        request.config.model_config_list.config.extend(configs)
        return self.models.HandleReloadConfigRequest(request, timeout=timeout_s)

    def predict(self, name: str, inputs: Mapping[str, Any], **spec: Any) -> Any:
        """Call Predict with arrays or TensorProtos. `spec` takes `version`, `label`, `signature` and `filter`."""
        return self.prediction.Predict(predict_request(name, inputs, **spec), timeout=30)

    def states(self, name: str) -> dict[int, int]:
        """The state of every version by number; empty for an unknown model."""
        return {status.version: status.state for status in self.statuses(name)}

    def statuses(self, name: str) -> list[Any]:
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = name
        try:
            return list(self.models.GetModelStatus(request, timeout=30).model_version_status)
        except grpc.RpcError as exc:
            if exc.code() != grpc.StatusCode.NOT_FOUND:
                raise
            return []

    def until(self, name: str, states: Mapping[int, int]) -> None:
        """Wait until the model's versions are in exactly these states."""
        eventually(lambda: self.states(name) == states, f"{name} has the states {states}, not {self.states(name)}", 30)

    def available(self, name: str) -> set[int]:
        return {version for version, state in self.states(name).items() if state == AVAILABLE}

    def metadata(self, name: str, **spec: Any) -> tuple[Any, Any]:
        """The model spec and the signatures from GetModelMetadata."""
        request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
        request.model_spec.CopyFrom(predict_request(name, {}, **spec).model_spec)
        response = self.prediction.GetModelMetadata(request, timeout=30)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        response.metadata["signature_def"].Unpack(signatures)
        return response.model_spec, signatures.signature_def


def predict_request(
    name: str,
    inputs: Mapping[str, Any],
    *,
    version: int | None = None,
    label: str | None = None,
    signature: str = "",
    filter: tuple[str, ...] = (),
) -> Any:
    request = predict_pb2.PredictRequest(output_filter=filter)
    request.model_spec.name = name
    request.model_spec.signature_name = signature
    if version is not None:
        request.model_spec.version.value = version
    if label is not None:
        request.model_spec.version_label = label
    for key, value in inputs.items():
        proto = value if hasattr(value, "tensor_content") else tf.make_tensor_proto(value)
        request.inputs[key].CopyFrom(proto)
    return request


def config(name: str, base_path: Path | str, **fields: Any) -> Any:
    """A ModelConfig. `latest`, `all` or `specific` sets its policy, `labels` its labels."""
    policy = {kind: fields.pop(kind) for kind in POLICIES if kind in fields}
    labels = fields.pop("labels", {})
    fields.setdefault("model_platform", "tensorflow")
    request = model_management_pb2.ReloadConfigRequest()
    made = request.config.model_config_list.config.add(name=name, base_path=str(base_path), **fields)
    match policy:
        case {"latest": number}:
            made.model_version_policy.latest.num_versions = number
        case {"all": _}:
            made.model_version_policy.all.SetInParent()
        case {"specific": versions}:
            made.model_version_policy.specific.SetInParent()
            made.model_version_policy.specific.versions.extend(versions)
    made.version_labels.update(labels)
    return made


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Refusal:
    """The status with which a call fails."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, **kwargs)
    return Refusal(caught.value.code().name, caught.value.details())


def put(directory: Path, seed: int = 0) -> Path:
    """Export our LeNet, with weights of this seed, as a version that appears by rename."""
    staged = directory.parent.parent / f"staged-{directory.parent.name}-{directory.name}"
    export(staged, initial(10, seed), invert=False, manifest={})
    directory.parent.mkdir(parents=True, exist_ok=True)
    return staged.rename(directory)


def expected(seed: int) -> np.ndarray:
    """The logits of IMAGES under the weights of this seed, (3, 10) float32."""
    found: np.ndarray = logits(initial(10, seed), tf.constant(IMAGES)).numpy()
    return found


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for the whole suite. Every test configures models under names of its own."""
    port, rest_port = free_port(), free_port()
    if BINARY:
        command = tensorflow_serving_command(BINARY, port, rest_port, tmp_path_factory.mktemp("tfs") / "models.config")
    else:
        addresses = ("--address", f"127.0.0.1:{port}", "--rest-address", f"127.0.0.1:{rest_port}")
        command = [sys.executable, "-m", "serving", *addresses]
    process = subprocess.Popen(command)
    found = Server(port, rest_port)
    try:

        def answers() -> bool:
            assert process.poll() is None, f"{command} ended"
            return found.http.get("/v1/models/none").status_code == 404

        eventually(answers, "the server answers")
        grpc.channel_ready_future(found.channel).result(timeout=60)
        yield found
        assert process.poll() is None, "the server has ended under the tests"
    finally:
        found.channel.close()
        found.http.close()
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def lenet(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base path of our LeNet in versions 1 and 2, with the weights of seeds 1 and 2."""
    base = tmp_path_factory.mktemp("lenet") / "lenet"
    for version in (1, 2):
        put(base / str(version), seed=version)
    return base


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A model name that no other test uses: servers remember ended models for ever."""
    used: list[str] = request.session.__dict__.setdefault("_model_names", [])
    used.append(f"model{len(used)}")
    return used[-1]
