"""From effective parameters to a SavedModel that any TensorFlow Serving can serve, and back."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from trainer.lenet import LAYERS, Tensor, logits

MANIFEST = "assets.extra/manifest.json"  # TensorFlow Serving ignores assets.extra


class _Served(tf.Module):  # type: ignore[misc]
    """LeNet-5 with its preparation, as it is served."""

    def __init__(self, params: Mapping[str, np.ndarray], invert: bool) -> None:
        super().__init__()
        self.layers = {
            layer: {part: tf.Variable(params[f"{layer}/{part}"]) for part in ("kernel", "bias")} for layer in LAYERS
        }
        self._invert = float(invert)

    # The placeholder has no shape, so that no optimizer can take the check for proven and drop it.
    @tf.function(autograph=False, input_signature=[tf.TensorSpec(None, tf.float32, name="image")])
    def serve(self, image: Tensor) -> dict[str, Tensor]:
        image = tf.ensure_shape(image, (None, 28, 28, 1))
        light_on_dark = tf.abs(image - self._invert)
        params = {f"{layer}/{part}": value for layer, parts in self.layers.items() for part, value in parts.items()}
        scores = logits(params, light_on_dark)
        return {"logits": scores, "probabilities": tf.nn.softmax(scores)}


def export(directory: Path, params: Mapping[str, np.ndarray], *, invert: bool, manifest: Mapping[str, Any]) -> None:
    """Write a SavedModel.

    `serving_default(image float32 [n, 28, 28, 1] in [0, 1]) -> logits, probabilities`, both float32 [n, classes].
    An image of another shape is refused inside the graph, before the first convolution: a tensor of the wrong rank
    that reaches one ends a TensorFlow Serving process.

    Args:
        directory: made by this call.
        params: effective parameters of the plain network.
        invert: the domain is dark on light; the graph turns it over.
        manifest: what the version is, written beside it as JSON.
    """
    module = _Served(params, invert)
    tf.saved_model.save(module, str(directory), signatures={"serving_default": module.serve})
    path = directory / "saved_model.pb"
    saved = saved_model_pb2.SavedModel.FromString(path.read_bytes())
    shape = saved.meta_graphs[0].signature_def["serving_default"].inputs["image"].tensor_shape
    shape.Clear()
    for size in (-1, 28, 28, 1):
        shape.dim.add(size=size)
    path.write_bytes(saved.SerializeToString(deterministic=True))
    (directory / MANIFEST).parent.mkdir(exist_ok=True)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_params(directory: Path) -> dict[str, np.ndarray]:
    """Parameters of an exported version, float32 by name."""
    reader = tf.train.load_checkpoint(str(directory / "variables" / "variables"))
    return {
        f"{layer}/{part}": reader.get_tensor(f"layers/{layer}/{part}/.ATTRIBUTES/VARIABLE_VALUE")
        for layer in LAYERS
        for part in ("kernel", "bias")
    }
