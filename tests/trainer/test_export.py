"""The exported SavedModel, run as TensorFlow Serving runs it: a session fed without Python's checks."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

from trainer.export import MANIFEST, export, load_params
from trainer.lenet import initial, logits


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    folders = {invert: tmp_path_factory.mktemp("export") / "1" for invert in (False, True)}
    for invert, folder in folders.items():
        export(folder, initial(10, seed=0), invert=invert, manifest={"classes": ["é", "b"]})
    return folders


def served(folder: Path, images: np.ndarray) -> list[np.ndarray]:
    graph = tf.Graph()
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        signature = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(folder)).signature_def[
            "serving_default"
        ]
        options = config_pb2.CallableOptions(
            feed=[signature.inputs["image"].name],
            fetch=[signature.outputs[name].name for name in ("logits", "probabilities")],
        )
        found: list[np.ndarray] = session._make_callable_from_options(options)(images)
    return found


def test_the_graph_gives_the_networks_logits_and_their_softmax(exported: dict[bool, Path]) -> None:
    images = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)
    scores, probabilities = served(exported[False], images)
    expected = logits(initial(10, seed=0), tf.constant(images)).numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(probabilities, tf.nn.softmax(expected), atol=1e-6)


def test_a_dark_on_light_domain_is_turned_over_in_the_graph(exported: dict[bool, Path]) -> None:
    images = np.random.default_rng(0).random((3, 28, 28, 1), np.float32)
    np.testing.assert_allclose(served(exported[True], 1 - images)[0], served(exported[False], images)[0], atol=1e-4)


@pytest.mark.parametrize(
    "shape", [(), (784,), (2, 784), (3, 28, 28), (1, 28, 28, 3), (1, 32, 32, 1), (1, 1, 28, 28, 1)]
)
def test_a_wrong_shape_is_refused_inside_the_graph(exported: dict[bool, Path], shape: tuple[int, ...]) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible with expected shape"):
        served(exported[False], np.zeros(shape, np.float32))


def test_the_signature_says_28_by_28_by_1(exported: dict[bool, Path]) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    saved = saved_model_pb2.SavedModel.FromString((exported[False] / "saved_model.pb").read_bytes())
    signature = saved.meta_graphs[0].signature_def["serving_default"]
    assert [dim.size for dim in signature.inputs["image"].tensor_shape.dim] == [-1, 28, 28, 1]
    assert set(signature.outputs) == {"logits", "probabilities"}


def test_polarity_is_no_parameter_and_the_parameters_come_back(exported: dict[bool, Path]) -> None:
    params = initial(10, seed=0)
    loaded = load_params(exported[True])
    assert all(np.array_equal(params[name], loaded[name]) for name in params)
    module = tf.saved_model.load(str(exported[True]))
    variables = module.signatures["serving_default"].variables
    assert sum(int(tf.size(variable)) for variable in variables) == 107_786


def test_the_manifest_lies_beside_the_graph(exported: dict[bool, Path]) -> None:
    assert json.loads((exported[False] / MANIFEST).read_text(encoding="utf-8")) == {"classes": ["é", "b"]}
