"""The embedded model server, and publishing to it: a real process, real channels, real SavedModels."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
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

from serving.client import ModelServer
from serving.errors import ModelServerError, ModelServerUnavailable, PublishFailed, TemperError, UnknownModel
from serving.processes import free_port
from serving.publishing import publish, reconcile
from serving.registry import Registry
from serving.settings import Settings
from tests.conftest import eventually, opened, running_model_server
from trainer.export import export
from trainer.lenet import initial, logits

IMAGES = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)


def put(folder: Path, seed: int) -> Path:
    """A SavedModel whose weights are of this seed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    export(folder, initial(10, seed), invert=False, manifest={})
    return folder


def expected(seed: int) -> np.ndarray:
    found: np.ndarray = logits(initial(10, seed), tf.constant(IMAGES)).numpy()
    return found


@pytest.fixture
def server(model_server: str) -> ModelServer:
    return ModelServer(model_server)


@pytest.fixture
def channel(model_server: str) -> grpc.Channel:
    return grpc.insecure_channel(model_server)


def predict_request(**spec: object) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = str(spec.get("name", ""))
    if "label" in spec:
        request.model_spec.version_label = str(spec["label"])
    request.inputs["image"].CopyFrom(tf.make_tensor_proto(IMAGES))
    return request


def is_reachable(server: ModelServer) -> bool:
    try:
        server.states("m")
    except ModelServerUnavailable:
        return False
    return True


def refusal(call: object, request: object) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)  # type: ignore[operator]
    return caught.value.code().name, caught.value.details()


def test_models_and_versions_come_and_go_without_disturbing_each_other(tmp_path: Path, server: ModelServer) -> None:
    for name, version in (("a", 1), ("a", 2), ("b", 1)):
        put(tmp_path / name / str(version), seed=10 * version + ord(name))
    server.reload(tmp_path, {"a": [1]})
    np.testing.assert_allclose(server.predict("a", 1, IMAGES).logits, expected(107), atol=1e-4)

    stop, failures = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            try:
                server.predict("a", 1, IMAGES)
            except TemperError as exc:
                failures.append(exc)

    asking = threading.Thread(target=ask)
    asking.start()
    server.reload(tmp_path, {"a": [1, 2], "b": [1]})
    server.wait_until_available("a", 2)
    np.testing.assert_allclose(server.predict("a", 2, IMAGES).logits, expected(117), atol=1e-4)
    np.testing.assert_allclose(server.predict("b", 1, IMAGES).logits, expected(108), atol=1e-4)
    server.reload(tmp_path, {"a": [1, 2]})
    eventually(lambda: server.available("b") == set(), "b is unloaded")
    with pytest.raises(UnknownModel, match=r"Servable not found for request: Specific\(b, 1\)"):
        server.predict("b", 1, IMAGES)
    stop.set()
    asking.join()
    assert failures == []


def test_it_answers_as_tensorflow_serving_does(tmp_path: Path, server: ModelServer, channel: grpc.Channel) -> None:
    put(tmp_path / "m" / "7", seed=0)
    server.reload(tmp_path, {"m": [7]})
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    response = stub.Predict(predict_request(name="m"))
    assert response.outputs["logits"].float_val
    assert not response.outputs["logits"].tensor_content
    assert (response.model_spec.version.value, response.model_spec.signature_name) == (7, "serving_default")
    filtered = predict_request(name="m")
    filtered.output_filter.append("probabilities")
    assert set(stub.Predict(filtered).outputs) == {"probabilities"}

    assert refusal(stub.Predict, predict_request()) == ("INVALID_ARGUMENT", "ModelSpec has no name specified.")
    assert refusal(stub.Predict, predict_pb2.PredictRequest()) == ("INVALID_ARGUMENT", "Missing ModelSpec")
    missing = ("NOT_FOUND", "Servable not found for request: Latest(nope)")
    assert refusal(stub.Predict, predict_request(name="nope")) == missing
    unlabelled = ("INVALID_ARGUMENT", "Unrecognized servable version label: x")
    assert refusal(stub.Predict, predict_request(name="m", label="x")) == unlabelled
    wrong = predict_request(name="m")
    wrong.inputs["image"].CopyFrom(tf.make_tensor_proto(IMAGES.astype(np.float64)))
    assert refusal(stub.Predict, wrong) == ("INVALID_ARGUMENT", "Expects arg[0] to be float but double is provided")
    wrong.inputs["image"].CopyFrom(tf.make_tensor_proto(IMAGES.reshape(3, 784)))
    assert refusal(stub.Predict, wrong)[0] == "INVALID_ARGUMENT"
    wrong.inputs["image"].tensor_content = b"123"
    assert refusal(stub.Predict, wrong) == ("INVALID_ARGUMENT", "tensor parsing error: image")
    wrong = predict_request(name="m")
    wrong.inputs["extra"].CopyFrom(wrong.inputs["image"])
    text = (
        "input size does not match signature: 2!=1 len({extra,image}) != len({image}). "
        "Sent extra: {extra}. Missing but required: {}."
    )
    assert refusal(stub.Predict, wrong) == ("INVALID_ARGUMENT", text)
    wrong = predict_request(name="m")
    wrong.model_spec.signature_name = "nosig"
    assert refusal(stub.Predict, wrong) == ("FAILED_PRECONDITION", 'Serving signature key "nosig" not found.')


def test_it_tells_metadata_and_status(tmp_path: Path, server: ModelServer, channel: grpc.Channel) -> None:
    put(tmp_path / "told" / "7", seed=0)
    put(tmp_path / "told" / "9", seed=0)
    server.reload(tmp_path, {"told": [7]})
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "told"
    response = prediction_service_pb2_grpc.PredictionServiceStub(channel).GetModelMetadata(request)
    signatures = get_model_metadata_pb2.SignatureDefMap()
    response.metadata["signature_def"].Unpack(signatures)
    shape = signatures.signature_def["serving_default"].inputs["image"].tensor_shape
    assert [dim.size for dim in shape.dim] == [-1, 28, 28, 1]

    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    server.reload(tmp_path, {"told": [7, 9]})
    server.wait_until_available("told", 9)
    server.reload(tmp_path, {"told": [9]})
    eventually(lambda: server.available("told") == {9}, "7 is unloaded")
    status = get_model_status_pb2.GetModelStatusRequest()
    status.model_spec.name = "told"
    found = [(s.version, s.state) for s in stub.GetModelStatus(status).model_version_status]
    assert found == [(9, 30), (7, 50)]  # newest first, and what has ended stays
    status.model_spec.name = "nope"
    assert refusal(stub.GetModelStatus, status) == ("NOT_FOUND", "Could not find any versions of model nope")


def test_reload_policies_and_refusals(tmp_path: Path, server: ModelServer, channel: grpc.Channel) -> None:
    for version in (1, 2, 3):
        put(tmp_path / "p" / str(version), seed=0)
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    request = model_management_pb2.ReloadConfigRequest()
    config = request.config.model_config_list.config.add(name="p", base_path=str(tmp_path / "p"))
    platform = "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
    assert refusal(stub.HandleReloadConfigRequest, request)[1].startswith(platform)
    config.model_platform = "tensorflow"
    stub.HandleReloadConfigRequest(request)
    assert server.available("p") == {3}  # latest 1
    config.model_version_policy.all.SetInParent()
    stub.HandleReloadConfigRequest(request)
    eventually(lambda: server.available("p") == {1, 2, 3}, "all are loaded")
    config.version_labels["old"] = 1
    stub.HandleReloadConfigRequest(request)
    stub = prediction_service_pb2_grpc.PredictionServiceStub(channel)
    assert stub.Predict(predict_request(name="p", label="old")).model_spec.version.value == 1
    stub = model_service_pb2_grpc.ModelServiceStub(channel)
    config.version_labels["new"] = 8
    text = "Request to assign label to version 8 of model p, which is not currently available for inference"
    assert refusal(stub.HandleReloadConfigRequest, request) == ("FAILED_PRECONDITION", text)
    request.config.model_config_list.config.add().CopyFrom(config)
    assert refusal(stub.HandleReloadConfigRequest, request)[0] == "INVALID_ARGUMENT"
    put(tmp_path / "p" / "4", seed=0)
    eventually(lambda: server.available("p") == {1, 2, 3, 4}, "a version that appears is loaded")


@pytest.mark.parametrize("damage", ["no graph", "no variables", "garbage"])
def test_a_damaged_version_ends_and_the_others_serve(tmp_path: Path, server: ModelServer, damage: str) -> None:
    put(tmp_path / "d" / "1", seed=0)
    broken = put(tmp_path / "d" / "2", seed=0)
    match damage:
        case "no graph":
            (broken / "saved_model.pb").unlink()
        case "no variables":
            shutil.rmtree(broken / "variables")
        case "garbage":
            (broken / "saved_model.pb").write_bytes(b"garbage")
    server.reload(tmp_path, {"d": [1]})
    server.reload(tmp_path, {"d": [1, 2]})
    with pytest.raises(PublishFailed, match="version 2 of d is END"):
        server.wait_until_available("d", 2)
    server.predict("d", 1, IMAGES)
    server.reload(tmp_path, {})


def test_a_missing_base_path_is_refused_and_blocks_nothing(tmp_path: Path, server: ModelServer) -> None:
    put(tmp_path / "good" / "1", seed=0)
    with pytest.raises(ModelServerError, match="did not become available"):
        server.reload(tmp_path, {"missing": [1], "good": [1]}, timeout_s=20)
    server.predict("good", 1, IMAGES)


# --- publishing ---------------------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path, model_server: str) -> Iterator[tuple[Settings, Registry]]:
    settings = Settings(home=tmp_path, model_server=model_server)
    settings.make_home()
    with opened(settings.store_url) as engine:
        yield settings, Registry(engine)


def published(place: tuple[Settings, Registry], server: ModelServer, *, seed: int, claimed: int | None = None) -> int:
    """Publish weights of `seed`, saying that they give the logits of `claimed`."""
    settings, registry = place
    staged = put(settings.staging / "job", seed)
    return publish(
        settings, registry, server, staged=staged, model="m", job_id="job", manifest={"classes": ["a"]}, report={},
        probe=IMAGES, expected=expected(seed if claimed is None else claimed),
    )  # fmt: skip


def test_a_published_version_is_live_and_served(place: tuple[Settings, Registry], server: ModelServer) -> None:
    assert [published(place, server, seed=seed) for seed in (1, 2)] == [1, 2]
    assert place[1].find("m").version == 2
    for version in (1, 2):
        np.testing.assert_allclose(server.predict("m", version, IMAGES).logits, expected(version), atol=1e-4)


def test_a_version_that_answers_otherwise_than_trained_leaves_nothing(
    place: tuple[Settings, Registry], server: ModelServer
) -> None:
    settings, registry = place
    published(place, server, seed=1)
    with pytest.raises(PublishFailed, match="differs from the trained model"):
        published(place, server, seed=2, claimed=3)
    assert registry.find("m").version == 1
    assert [version.version for version in registry.all()] == [1]
    assert [path.name for path in (settings.models / "m").iterdir()] == ["1"]
    eventually(lambda: server.available("m") == {1}, "version 2 is unloaded")
    assert published(place, server, seed=3) == 3


def test_reconcile_repairs_a_server_that_lost_everything(tmp_path: Path) -> None:
    port = free_port()
    settings = Settings(home=tmp_path, model_server=f"127.0.0.1:{port}")
    settings.make_home()
    with opened(settings.store_url) as engine, ModelServer(settings.target) as server:
        registry = Registry(engine)
        with running_model_server(port):
            published((settings, registry), server, seed=1)
            published((settings, registry), server, seed=2)
        with pytest.raises(ModelServerUnavailable):
            server.predict("m", 2, IMAGES)
        with running_model_server(port):
            shutil.rmtree(settings.models / "m" / "1")  # must not keep the other from coming back
            eventually(lambda: is_reachable(server), "the channel is back")
            reconcile(settings, registry, server)
            np.testing.assert_allclose(server.predict("m", 2, IMAGES).logits, expected(2), atol=1e-4)
