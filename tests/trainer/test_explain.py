"""Explanations, as a session runs the exported graph."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2

from trainer.explain import LIMIT, NOISE, SIZES
from trainer.export import export
from trainer.lenet import HEAD, Arrays, logits
from trainer.worker.pretrained import pretrained

Digits = tuple[np.ndarray, np.ndarray]
Outputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def params() -> Arrays:
    return pretrained()[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, params: Arrays) -> dict[bool, Path]:
    folders = {invert: tmp_path_factory.mktemp("explain") / "1" for invert in (False, True)}
    for invert, folder in folders.items():
        export(folder, params, invert=invert, manifest={})
    return folders


@pytest.fixture(scope="module")
def images(digits: Digits) -> np.ndarray:
    return digits[0][:8, ..., None].astype(np.float32) / np.float32(255)


def served(folder: Path, signature: str, **inputs: np.ndarray) -> Outputs:
    graph = tf.Graph()
    with graph.as_default(), tf.compat.v1.Session(graph=graph) as session:
        known = tf.compat.v1.saved_model.loader.load(session, ["serve"], str(folder)).signature_def[signature]
        options = config_pb2.CallableOptions(
            feed=[known.inputs[name].name for name in inputs],
            fetch=[known.outputs[name].name for name in known.outputs],
        )
        found = session._make_callable_from_options(options)(*inputs.values())
        return dict(zip(known.outputs, found, strict=True))


def answers(count: int) -> np.ndarray:
    return np.full(count, -1, np.int32)


@pytest.fixture(scope="module")
def explained(exported: dict[bool, Path], images: np.ndarray) -> Outputs:
    return served(exported[False], "serving_explain", image=images, target=answers(len(images)))


def test_attributions_sum_to_what_the_logit_gains_over_a_blank_image(explained: Outputs, images: np.ndarray) -> None:
    scores = explained["logits"]
    gained = scores.max(axis=1) - explained["baseline_logits"][0, scores.argmax(axis=1)]
    sums = explained["integrated_gradients"].sum(axis=(1, 2, 3))
    np.testing.assert_allclose(sums, gained, rtol=0.02, atol=0.05)
    np.testing.assert_array_equal(explained["integrated_gradients"][images == 0], 0.0)  # a blank pixel adds nothing


def test_another_class_is_explained_where_it_is_asked_for(exported: dict[bool, Path], images: np.ndarray) -> None:
    other = np.full(len(images), 3, np.int32)
    found = served(exported[False], "serving_explain", image=images, target=other)
    gained = found["logits"][:, 3] - found["baseline_logits"][0, 3]
    np.testing.assert_allclose(found["integrated_gradients"].sum(axis=(1, 2, 3)), gained, rtol=0.02, atol=0.05)


def test_smooth_grad_is_the_mean_gradient_over_other_noisy_copies_as_well(
    explained: Outputs, images: np.ndarray, params: Arrays
) -> None:
    rng, number = np.random.default_rng(0), int(explained["logits"][0].argmax())
    copies = tf.constant(images[0] + NOISE * rng.standard_normal((2000, 28, 28, 1)).astype(np.float32))
    with tf.GradientTape() as tape:
        tape.watch(copies)
        height = logits(params, copies)[:, number]
    expected = tape.gradient(height, copies).numpy().mean(axis=0).ravel()
    smooth = explained["smooth_grad"][0].ravel()
    assert expected @ smooth / np.linalg.norm(expected) / np.linalg.norm(smooth) > 0.9


def test_the_adversarial_points_stay_in_their_balls_and_change_the_answer_from_the_smallest_epsilon_on(
    explained: Outputs, images: np.ndarray
) -> None:
    sizes = np.arange(1, SIZES + 1) * LIMIT / SIZES
    moved = np.abs(explained["adversarial"] - images[:, None]).max(axis=(2, 3, 4))
    assert (moved <= sizes + 1e-6).all()
    assert explained["adversarial"].min() >= 0
    assert explained["adversarial"].max() <= 1
    changed = explained["adversarial_probabilities"].argmax(axis=2) != explained["logits"].argmax(axis=1)[:, None]
    smallest = explained["smallest_epsilon"]
    assert np.isfinite(smallest).all()
    assert ((sizes >= smallest[:, None] - 1e-6) == changed).all()


def test_an_answer_that_nothing_changes_has_no_smallest_epsilon(
    tmp_path: Path, params: Arrays, images: np.ndarray
) -> None:
    sure = {**params, f"{HEAD}/bias": params[f"{HEAD}/bias"] + 1e4 * np.eye(10, dtype=np.float32)[4]}
    export(tmp_path / "1", sure, invert=False, manifest={})
    found = served(tmp_path / "1", "serving_explain", image=images, target=answers(len(images)))
    assert np.isinf(found["smallest_epsilon"]).all()


def test_a_dark_on_light_image_is_explained_as_its_negative(
    exported: dict[bool, Path], explained: Outputs, images: np.ndarray
) -> None:
    found = served(exported[True], "serving_explain", image=1 - images, target=answers(len(images)))
    np.testing.assert_allclose(found["baseline_logits"], explained["baseline_logits"], atol=1e-4)
    np.testing.assert_allclose(found["integrated_gradients"], explained["integrated_gradients"], atol=1e-2)
    np.testing.assert_allclose(found["smallest_epsilon"], explained["smallest_epsilon"], atol=0.002)


def test_hidden_is_the_input_of_the_last_layer(
    exported: dict[bool, Path], explained: Outputs, digits: Digits, params: Arrays
) -> None:
    found = served(exported[False], "serving_hidden", image=digits[0][:8].reshape(8, 784))["hidden"]
    np.testing.assert_allclose(found, explained["hidden"], atol=1e-4)
    np.testing.assert_allclose(
        found @ params[f"{HEAD}/kernel"] + params[f"{HEAD}/bias"], explained["logits"], atol=1e-3
    )


@pytest.mark.parametrize("shape", [(784,), (3, 28, 28), (1, 28, 28, 3), (1, 1, 28, 28, 1)])
def test_a_wrong_shape_is_refused_inside_the_graph(exported: dict[bool, Path], shape: tuple[int, ...]) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="not compatible with expected shape"):
        served(exported[False], "serving_explain", image=np.zeros(shape, np.float32), target=answers(shape[0]))
