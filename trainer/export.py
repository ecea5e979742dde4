"""Export effective parameters as a SavedModel for TensorFlow Serving, and load them again.

Versions with the same parameter shapes share a graph. A process traces it once; an export writes that graph beside a
bundle of variables.
"""

import functools
import json
import operator
import tempfile
from collections.abc import Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from store.records import GREY_28
from trainer.abstention import FEATURES, PARTS, SIZE
from trainer.explain import EPSILONS, Explainer
from trainer.lenet import HEAD, Arrays, Tensor, logits

EXTRA = "assets.extra"  # which TensorFlow Serving ignores
MANIFEST = f"{EXTRA}/manifest.json"
PREFIX, SUFFIX = "layers/", "/.ATTRIBUTES/VARIABLE_VALUE"  # around a parameter's name in a checkpoint
DETECTOR = "detector/"  # instead of `PREFIX`, before the arrays of a detector
OBJECT_GRAPH = "_CHECKPOINTABLE_OBJECT_GRAPH"
SHAPES = {  # of the images, by signature
    "serving_default": (-1, *GREY_28.shape), "serving_bytes": (-1, GREY_28.pixels),
    "serving_explain": (-1, *GREY_28.shape), "serving_hidden": (-1, GREY_28.pixels),
}  # fmt: skip
Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class _Served(tf.Module):  # type: ignore[misc]
    """LeNet-5 with its input processing, as it is served."""

    def __init__(self, shapes: Shapes, invert: bool, detects: bool) -> None:
        super().__init__()
        self._names = [name for name, _ in shapes]
        self.layers = _variables(shapes)
        views = {f"{view}/{part}": size for view in ("features", "pixels") for part, size in PARTS.items()}
        self.detector = _variables({"scales": (2,), **views}.items()) if detects else {}
        self._sign, self._offset = (-1.0, 1.0) if invert else (1.0, 0.0)
        self._explainer = Explainer(self._network, blank=self._offset)

    # The placeholders have no shape: otherwise graph optimizers would consider the checks proven and remove them.
    @tf.function(autograph=False, input_signature=[tf.TensorSpec(None, tf.float32, name="image")])
    def serve(self, image: Tensor) -> dict[str, Tensor]:
        return self._answer(tf.ensure_shape(image, (None, *GREY_28.shape)))

    @tf.function(autograph=False, input_signature=[tf.TensorSpec(None, tf.uint8, name="image")])
    def serve_bytes(self, image: Tensor) -> dict[str, Tensor]:
        return self._answer(_unit(image))

    @tf.function(
        autograph=False,
        input_signature=[tf.TensorSpec(None, tf.float32, name="image"), tf.TensorSpec(None, tf.int32, name="target")],
    )
    def explain(self, image: Tensor, target: Tensor) -> dict[str, Tensor]:
        image = tf.ensure_shape(image, (None, *GREY_28.shape))
        scores = self._network(image)
        answers = tf.argmax(scores, axis=1, output_type=tf.int32)
        known = (target >= 0) & (target < scores.shape[1])
        targets = tf.where(known, tf.ensure_shape(target, (None,)), answers)
        found = self._explainer.explain(image, targets)
        return {
            "logits": scores,
            "probabilities": tf.nn.softmax(scores),
            "hidden": self._hidden(image),
            "epsilons": tf.constant(EPSILONS),
            **found._asdict(),
        }

    @tf.function(autograph=False, input_signature=[tf.TensorSpec(None, tf.uint8, name="image")])
    def hidden(self, image: Tensor) -> dict[str, Tensor]:
        return {"hidden": self._hidden(_unit(image))}

    def _params(self) -> dict[str, Tensor]:
        return {name: functools.reduce(operator.getitem, name.split("/"), self.layers) for name in self._names}

    def _network(self, image: Tensor) -> Tensor:
        return logits(self._params(), self._sign * image + self._offset)

    def _hidden(self, image: Tensor) -> Tensor:
        return logits(self._params(), self._sign * image + self._offset, until=HEAD)

    def _answer(self, image: Tensor) -> dict[str, Tensor]:
        params = self._params()
        pixels = self._sign * image + self._offset
        features = logits(params, pixels, until=FEATURES)
        scores = logits(params, features, entry=FEATURES)
        outputs = {"logits": scores, "probabilities": tf.nn.softmax(scores)}
        if self.detector:
            flat = tf.reshape(features, (-1, SIZE))
            flat /= tf.maximum(tf.norm(flat, axis=1, keepdims=True), 1e-6)
            both = (
                _distance(self.detector["features"], flat),
                _distance(self.detector["pixels"], tf.reshape(pixels, (-1, SIZE))),
            )
            outputs["distance"] = tf.reduce_max(tf.stack(both, axis=1) * self.detector["scales"], axis=1)
        return outputs


def _unit(image: Tensor) -> Tensor:
    """Images (n, 784) uint8 as (n, 28, 28, 1) in [0, 1]."""
    image = tf.ensure_shape(image, (None, GREY_28.pixels))
    return tf.reshape(tf.cast(image, tf.float32) / 255.0, (-1, *GREY_28.shape))


def _variables(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Any]:
    """Variables by the parts of their names."""
    found: dict[str, Any] = {}
    for name, shape in shapes:
        *path, last = name.split("/")
        folder = functools.reduce(lambda inner, part: inner.setdefault(part, {}), path, found)
        folder[last] = tf.Variable(tf.zeros(shape))
    return found


def _distance(view: Mapping[str, Tensor], vectors: Tensor) -> Tensor:
    """Squared distance of each vector to the nearest learned one, as in `View.distances`."""
    nearest = tf.reduce_min(view["squares"] - 2.0 * (vectors @ view["basis"] @ view["references"]), axis=1)
    return tf.maximum(tf.reduce_sum(tf.square(vectors), axis=1) + nearest, view["blur"])


@functools.cache
def _template(shapes: Shapes, invert: bool, detects: bool) -> tuple[bytes, bytes]:
    """`saved_model.pb`, and the object graph of the checkpoint, for parameters of these shapes."""
    module = _Served(shapes, invert, detects)
    with tempfile.TemporaryDirectory() as folder:
        signatures = {
            "serving_default": module.serve, "serving_bytes": module.serve_bytes, "serving_explain": module.explain,
            "serving_hidden": module.hidden,
        }  # fmt: skip
        tf.saved_model.save(module, folder, signatures=signatures)
        saved = saved_model_pb2.SavedModel.FromString((Path(folder) / "saved_model.pb").read_bytes())
        objects: bytes = tf.train.load_checkpoint(f"{folder}/variables/variables").get_tensor(OBJECT_GRAPH)
    for signature, sizes in SHAPES.items():
        inputs = saved.meta_graphs[0].signature_def[signature].inputs
        for name, tensor in inputs.items():
            tensor.tensor_shape.Clear()
            for size in sizes if name == "image" else (-1,):
                tensor.tensor_shape.dim.add(size=size)
    return saved.SerializeToString(deterministic=True), objects


def prepare(params: Mapping[str, np.ndarray], *, invert: bool, detects: bool = False) -> None:
    """Trace the graph that `export` needs, unless it is there. Takes a second and writes no file of a version."""
    _template(_shapes(params), invert, detects)


def _shapes(params: Mapping[str, np.ndarray]) -> Shapes:
    return tuple((name, params[name].shape) for name in sorted(params))


def export(
    directory: Path, params: Mapping[str, np.ndarray], *, invert: bool, manifest: Mapping[str, Any],
    detector: Mapping[str, np.ndarray] | None = None,
) -> None:  # fmt: skip
    """Write a SavedModel.

    `serving_default(image float32 [n, 28, 28, 1] in [0, 1])` and `serving_bytes(image uint8 [n, 784])`, both with
    `-> logits, probabilities`, float32 [n, classes], and with a detector `distance`, float32 [n], which is above 1 for
    images unlike those that were learned. `serving_explain(image float32 [n, 28, 28, 1], target int32 [n])` gives an
    `Explanation` of the target class, or of the answer where the target is none (-1); `serving_hidden(image uint8
    [n, 784]) -> hidden`, float32 [n, 84], the input of the last layer. The graph itself refuses other shapes before the
    first convolution, because a tensor of the wrong rank that reaches one aborts the TensorFlow Serving process.

    Args:
        directory: created by this call; must not exist.
        params: effective parameters of the served network.
        invert: whether images are dark on light, so that the graph must invert them.
        manifest: description of the version, written beside it as JSON.
        detector: arrays of a `Detector`.
    """
    graph, objects = _template(_shapes(params), invert, bool(detector))
    stored = {f"{PREFIX}{name}{SUFFIX}": params[name] for name in sorted(params)}
    stored |= {f"{DETECTOR}{name}{SUFFIX}": value for name, value in sorted((detector or {}).items())}
    (directory / "variables").mkdir(parents=True)
    (directory / EXTRA).mkdir()
    with tf.device("/CPU:0"):
        tf.raw_ops.SaveV2(
            prefix=str(directory / "variables" / "variables"),
            tensor_names=[*stored, OBJECT_GRAPH],
            shape_and_slices=[""] * (len(stored) + 1),
            tensors=[*map(tf.constant, stored.values()), tf.constant(objects)],
        )
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (directory / "saved_model.pb").write_bytes(graph)


def load_params(directory: Path) -> Arrays:
    """Parameters of an exported version, float32, by name.

    Raises:
        tf.errors.OpError: the directory holds no readable checkpoint.
    """
    reader = tf.train.load_checkpoint(str(directory / "variables" / "variables"))
    stored = [name for name in reader.get_variable_to_shape_map() if name.startswith(PREFIX)]
    return {name.removeprefix(PREFIX).removesuffix(SUFFIX): reader.get_tensor(name) for name in sorted(stored)}


def digest(params: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of the parameters and their names, in the order of the names."""
    result = sha256()
    for name in sorted(params):
        result.update(name.encode())
        result.update(np.ascontiguousarray(params[name], "<f4").tobytes())
    return result.hexdigest()
