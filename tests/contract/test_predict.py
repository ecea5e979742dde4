"""Predict, GetModelMetadata, GetModelStatus."""

from pathlib import Path

import grpc
import numpy as np
import pytest
import tensorflow as tf
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    predict_pb2,
    regression_pb2,
)

from tests.contract.conftest import AVAILABLE, IMAGES, Refusal, Server, config, expected, predict_request, refusal

IMAGE = {"image": IMAGES}


@pytest.fixture(scope="module")
def served(server: Server, lenet: Path) -> str:
    """A model with versions 1 (labelled stable) and 2."""
    server.reload(config("predicted", lenet, specific=[1, 2]))
    server.until("predicted", {1: AVAILABLE, 2: AVAILABLE})
    server.reload(config("predicted", lenet, specific=[1, 2], labels={"stable": 1}))
    return "predicted"


def invalid(message: str) -> Refusal:
    return Refusal("INVALID_ARGUMENT", message)


def test_the_newest_version_answers_in_typed_values_and_says_which_it_is(server: Server, served: str) -> None:
    response = server.predict(served, IMAGE)
    assert set(response.outputs) == {"logits", "probabilities"}
    for output in response.outputs.values():
        assert output.dtype == tf.float32
        assert [dim.size for dim in output.tensor_shape.dim] == [3, 10]
        assert len(output.float_val) == 30
        assert output.tensor_content == b""
    np.testing.assert_allclose(tf.make_ndarray(response.outputs["logits"]), expected(2), atol=1e-4)
    assert response.model_spec.name == served
    assert response.model_spec.version.value == 2
    assert response.model_spec.signature_name == "serving_default"


@pytest.mark.parametrize("spec", [{"version": 1}, {"label": "stable"}])
def test_a_version_is_chosen_by_number_or_label(server: Server, served: str, spec: dict[str, object]) -> None:
    response = server.predict(served, IMAGE, **spec)
    np.testing.assert_allclose(tf.make_ndarray(response.outputs["logits"]), expected(1), atol=1e-4)
    assert response.model_spec.version.value == 1
    assert response.model_spec.version_label == ""


@pytest.mark.parametrize("size", [1, 300])
def test_a_batch_may_have_any_size(server: Server, served: str, size: int) -> None:
    images = np.resize(IMAGES, (size, 28, 28, 1))
    response = server.predict(served, {"image": images})
    assert [dim.size for dim in response.outputs["probabilities"].tensor_shape.dim] == [size, 10]


def test_a_message_of_twelve_megabytes_is_accepted(server: Server, served: str) -> None:
    response = server.predict(served, {"image": np.zeros((4000, 28, 28, 1), np.float32)})
    assert len(response.outputs["logits"].float_val) == 40_000


def test_a_request_may_be_compressed(server: Server, served: str) -> None:
    response = server.prediction.Predict(predict_request(served, IMAGE), compression=grpc.Compression.Gzip, timeout=30)
    assert response.model_spec.version.value == 2


def test_answers_are_explained_by_the_graph_that_gives_them(server: Server, served: str) -> None:
    answers = np.full(len(IMAGES), -1, np.int32)
    response = server.predict(served, {"image": IMAGES, "target": answers}, signature="serving_explain")
    found = {name: tf.make_ndarray(tensor) for name, tensor in response.outputs.items()}
    np.testing.assert_allclose(found["logits"], expected(2), atol=1e-4)
    best = found["logits"].argmax(axis=1)
    gained = found["logits"].max(axis=1) - found["baseline_logits"][0, best]
    np.testing.assert_allclose(found["integrated_gradients"].sum(axis=(1, 2, 3)), gained, rtol=0.03, atol=0.05)
    assert found["smooth_grad"].shape == IMAGES.shape
    moved = np.abs(found["adversarial"] - IMAGES[:, None]).max(axis=(2, 3, 4))
    assert (moved <= found["epsilons"] + 1e-6).all()
    changed = found["adversarial_probabilities"].argmax(axis=2) != best[:, None]
    assert (changed == (found["epsilons"] >= found["smallest_epsilon"][:, None] - 1e-6)).all()
    pixels = (255 * IMAGES).round().astype(np.uint8)
    hidden = server.predict(served, {"image": pixels.reshape(-1, 784)}, signature="serving_hidden").outputs["hidden"]
    np.testing.assert_allclose(tf.make_ndarray(hidden), found["hidden"], atol=0.05)


def test_only_the_requested_outputs_are_returned(server: Server, served: str) -> None:
    assert set(server.predict(served, IMAGE, filter=("logits",)).outputs) == {"logits"}


def test_invalid_output_filters_are_refused(server: Server, served: str) -> None:
    for name in ("nope", ""):
        found = refusal(server.predict, served, IMAGE, filter=(name,))
        assert found.code == "INVALID_ARGUMENT"
        text = f"output tensor alias not found in signature: {name} Outputs expected to be in the set {{"
        assert found.message.startswith(text)
    assert refusal(server.predict, served, IMAGE, filter=("logits", "logits")) == invalid(
        "duplicate output tensor alias: logits"
    )


@pytest.mark.parametrize(
    ("name", "spec", "code", "message"),
    [
        ("", {}, "INVALID_ARGUMENT", "ModelSpec has no name specified."),
        ("nope", {}, "NOT_FOUND", "Servable not found for request: Latest(nope)"),
        ("nope", {"version": 1}, "NOT_FOUND", "Servable not found for request: Specific(nope, 1)"),
        ("nope", {"label": "x"}, "INVALID_ARGUMENT", "Unrecognized servable version label: x"),
        ("predicted", {"version": 99}, "NOT_FOUND", "Servable not found for request: Specific(predicted, 99)"),
        ("predicted", {"version": 0}, "NOT_FOUND", "Servable not found for request: Specific(predicted, 0)"),
        ("predicted", {"version": -1}, "NOT_FOUND", "Servable not found for request: Specific(predicted, -1)"),
        ("predicted", {"label": "x"}, "INVALID_ARGUMENT", "Unrecognized servable version label: x"),
        ("predicted", {"label": ""}, "INVALID_ARGUMENT", "Unrecognized servable version label: "),
        ("predicted", {"signature": "no"}, "FAILED_PRECONDITION", 'Serving signature key "no" not found.'),
    ],
)
@pytest.mark.usefixtures("served")
def test_unknown_models_versions_and_labels_are_named(
    server: Server, name: str, spec: dict[str, object], code: str, message: str
) -> None:
    assert refusal(server.predict, name, IMAGE, **spec) == Refusal(code, message)


def test_a_request_without_a_model_is_refused(server: Server) -> None:
    assert refusal(server.prediction.Predict, predict_pb2.PredictRequest()) == invalid("Missing ModelSpec")


def test_malformed_messages_are_an_internal_error(server: Server) -> None:
    call = server.channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    assert refusal(call, b"\xff\xff\xff").code == "INTERNAL"


@pytest.mark.parametrize("method", ["PredictionService/Nope", "SessionService/SessionRun"])
def test_methods_that_do_not_exist_are_unimplemented(server: Server, method: str) -> None:
    assert refusal(server.channel.unary_unary(f"/tensorflow.serving.{method}"), b"").code == "UNIMPLEMENTED"


def test_inputs_are_matched_by_name(server: Server, served: str) -> None:
    assert refusal(server.predict, served, {}) == invalid(
        "input size does not match signature: 0!=1 len({}) != len({image}). Sent extra: {}. "
        "Missing but required: {image}."
    )
    assert refusal(server.predict, served, {"image": IMAGES, "extra": IMAGES}) == invalid(
        "input size does not match signature: 2!=1 len({extra,image}) != len({image}). Sent extra: {extra}. "
        "Missing but required: {}."
    )
    found = refusal(server.predict, served, {"img": IMAGES})
    assert found.code == "INVALID_ARGUMENT"
    assert found.message.startswith("Signature input alias: image(feed name: ")
    assert found.message.endswith(
        ") not found in request and no default value provided. Inputs expected to be in the request {img}, or default "
        "input alias set: "
    )


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (IMAGES.astype(np.float64), "double"),
        (IMAGES.astype(np.int32), "int32"),
        (IMAGES.astype(np.uint8), "uint8"),
        (np.array([b"abc"]), "string"),
    ],
)
def test_a_type_is_never_converted(server: Server, served: str, value: np.ndarray, name: str) -> None:
    assert refusal(server.predict, served, {"image": value}) == invalid(
        f"Expects arg[0] to be float but {name} is provided"
    )


def test_examples_need_a_signature_that_takes_them(server: Server, served: str) -> None:
    for method, request in (
        (server.prediction.Classify, classification_pb2.ClassificationRequest()),
        (server.prediction.Regress, regression_pb2.RegressionRequest()),
    ):
        assert refusal(method, request) == invalid("Missing ModelSpec")
        request.model_spec.name = served
        request.model_spec.signature_name = "zzz"
        assert refusal(method, request) == invalid("No signature was found with the name: zzz")
        request.model_spec.signature_name = ""
        found = refusal(method, request)
        assert found.code == "INVALID_ARGUMENT"
        if method is server.prediction.Regress:
            assert found.message == "Expected one output Tensor."
        else:
            expected = 'No classification inputs found in SignatureDef: inputs {\n  key: "image"\n'
            assert found.message.startswith(expected)


def test_several_inferences_need_signatures_that_take_them(server: Server, served: str) -> None:
    request = inference_pb2.MultiInferenceRequest()
    assert refusal(server.prediction.MultiInference, request) == invalid("ModelSpec has no name specified.")
    task = request.tasks.add(method_name="tensorflow/serving/classify")
    task.model_spec.name = served
    found = refusal(server.prediction.MultiInference, request)
    assert found.message.startswith("No classification inputs found in SignatureDef: ")
    task.method_name = "tensorflow/serving/regress"
    assert refusal(server.prediction.MultiInference, request) == invalid("Expected one output Tensor.")
    task.method_name = "tensorflow/serving/predict"
    found = refusal(server.prediction.MultiInference, request)
    assert found == Refusal("UNIMPLEMENTED", "Unsupported signature method_name: tensorflow/serving/predict")
    task.model_spec.signature_name = "zzz"
    found = refusal(server.prediction.MultiInference, request)
    assert found == invalid("Requested signature not found in model graph: zzz")


def test_metadata_holds_the_signatures(server: Server, served: str) -> None:
    for choice, version in (({}, 2), ({"version": 1}, 1), ({"label": "stable"}, 1)):
        spec, signatures = server.metadata(served, **choice)
        assert (spec.name, spec.version.value, spec.signature_name) == (served, version, "")
    signature = signatures["serving_default"]
    assert signature.method_name == "tensorflow/serving/predict"
    assert signature.inputs["image"].dtype == tf.float32
    assert [dim.size for dim in signature.inputs["image"].tensor_shape.dim] == [-1, 28, 28, 1]
    assert set(signature.outputs) == {"logits", "probabilities"}
    assert "__saved_model_init_op" in signatures


@pytest.mark.parametrize(
    ("fields", "name", "message"),
    [
        (["signature_def"], None, "Missing ModelSpec"),
        ([], "predicted", "GetModelMetadataRequest must specify at least one metadata_field"),
        ([], "nope", "GetModelMetadataRequest must specify at least one metadata_field"),
        (["signature_def", "foo"], "predicted", "Metadata field foo is not supported"),
        (["signature_def"], "", "ModelSpec has no name specified."),
    ],
)
@pytest.mark.usefixtures("served")
def test_invalid_metadata_requests_are_refused(
    server: Server, fields: list[str], name: str | None, message: str
) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=fields)
    if name is not None:
        request.model_spec.name = name
        request.model_spec.SetInParent()
    assert refusal(server.prediction.GetModelMetadata, request) == invalid(message)


def test_status_lists_versions_newest_first_and_ignores_labels(server: Server, served: str) -> None:
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = served
    request.model_spec.version_label = "nonsense"
    found = server.models.GetModelStatus(request).model_version_status
    assert [(status.version, status.state, status.HasField("status")) for status in found] == [
        (2, AVAILABLE, True),
        (1, AVAILABLE, True),
    ]
    request.model_spec.version.value = 1
    assert [status.version for status in server.models.GetModelStatus(request).model_version_status] == [1]


def test_status_of_unknown_models_and_versions_is_not_found(server: Server, served: str) -> None:
    request = get_model_status_pb2.GetModelStatusRequest()
    assert refusal(server.models.GetModelStatus, request) == invalid("Missing ModelSpec")
    request.model_spec.name = "nope"
    missing = Refusal("NOT_FOUND", "Could not find any versions of model nope")
    assert refusal(server.models.GetModelStatus, request) == missing
    request.model_spec.name = served
    request.model_spec.version.value = 9
    missing = Refusal("NOT_FOUND", f"Could not find version 9 of model {served}")
    assert refusal(server.models.GetModelStatus, request) == missing
