"""A downloaded version as one file of another format: TFLite for devices, ONNX for other runtimes.

`python -m trainer.convert ARCHIVE FORMAT OUT` does that. ARCHIVE is a zip from
`GET /models/{model}/versions/{version}/saved_model`. The file is written only if it answers as the trainer did.
"""

import importlib.util
import io
import json
import sys
import tempfile
import uuid
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from serving.publishing import DISTANCE_PARITY, PARITY, Probe, check_files
from serving.quiet import import_tensorflow
from store.errors import PublishFailed
from store.files import move
from store.records import GREY_28, Manifest

SIGNATURE = "serving_default"
OPSET = 18  # of ONNX; ONNX Runtime has it since 1.14
LABELS = "labels.txt"  # by which name TFLite's tools know the classes


class Format(NamedTuple):
    """How to make a file of a format, and how to run it."""

    make: Callable[[Path, Sequence[str]], bytes]  # from the directory of a version and its classes
    run: Callable[[bytes, np.ndarray], Mapping[str, np.ndarray]]  # outputs by name, for (n, 28, 28, 1) float32
    packages: tuple[str, ...]
    extra: str  # of this package, which installs them


def make_tflite(version: Path, classes: Sequence[str]) -> bytes:
    """A TFLite model in float32, with the classes in a zip behind it, as TFLite's tools attach files."""
    import tensorflow as tf

    converter = tf.lite.TFLiteConverter.from_saved_model(str(version), signature_keys=[SIGNATURE])
    file = io.BytesIO(converter.convert())
    with zipfile.ZipFile(file, "a") as attached:
        attached.writestr(zipfile.ZipInfo(LABELS), "".join(f"{name}\n" for name in classes))
    return file.getvalue()


def run_tflite(model: bytes, images: np.ndarray) -> Mapping[str, np.ndarray]:
    """Outputs of TensorFlow's own interpreter."""
    import tensorflow as tf

    answers: dict[str, np.ndarray] = tf.lite.Interpreter(model_content=model).get_signature_runner(SIGNATURE)(
        image=images
    )
    return answers


def make_onnx(version: Path, classes: Sequence[str]) -> bytes:
    """An ONNX model in float32, with the classes as a JSON list in its metadata."""
    import onnx
    import tensorflow as tf
    import tf2onnx

    saved = tf.saved_model.load(str(version))  # its variables live as long as this
    image = tf.TensorSpec((None, *GREY_28.shape), tf.float32, name="image")
    function = tf.function(lambda image: saved.signatures[SIGNATURE](image=image), input_signature=[image])
    model, _ = tf2onnx.convert.from_function(function, [image], opset=OPSET)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n"
    onnx.helper.set_model_props(model, {"classes": json.dumps(classes, ensure_ascii=False)})
    onnx.checker.check_model(model, full_check=True)
    serialized: bytes = model.SerializeToString()
    return serialized


def run_onnx(model: bytes, images: np.ndarray) -> Mapping[str, np.ndarray]:
    """Outputs of ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"image": images}), strict=True))


FORMATS = {
    "tflite": Format(make_tflite, run_tflite, ("tensorflow",), "tensorflow"),
    "onnx": Format(make_onnx, run_onnx, ("onnx", "onnxruntime", "tensorflow", "tf2onnx"), "onnx"),
}


def convert(archive: Path, format: str, out: Path) -> dict[str, float]:
    """Write a version as a file of a format, `image -> logits, probabilities` as in the SavedModel.

    Args:
        archive: the version as a zip, as it is downloaded.
        format: one of `FORMATS`.
        out: replaced if it exists. It appears when it is complete and proven.

    Returns:
        By output, the largest difference between the file and the trainer on the probe of the version.

    Raises:
        ValueError: a package is missing, the archive is not a version, or the file would answer unlike the trainer.
        PublishFailed: files of the version are missing or have changed.
    """
    make, run, packages, extra = FORMATS[format]
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise ValueError(
            f"{format} needs {', '.join(missing)}, which this installs: "
            f"{sys.executable} -m pip install 'temper[{extra}]'"
        )
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # users cannot act on other packages' deprecations
        version = _unpack(archive, Path(folder))
        classes = Manifest.read(json.loads((version / "assets.extra/manifest.json").read_text("utf-8"))).classes
        import_tensorflow()
        model = make(version, classes)
        probe = Probe.load(version)
        *_, images = probe.forms()
        differences = _compare(run(model, images), probe)
    part = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}")
    try:
        part.write_bytes(model)
        move(part, out)
    finally:
        part.unlink(missing_ok=True)
    return differences


def _unpack(archive: Path, folder: Path) -> Path:
    """The directory of the version in an archive, intact."""
    try:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
    except zipfile.BadZipFile as exc:
        raise ValueError(f"{archive} is not a zip: {exc}") from exc
    versions = [graph.parent for graph in folder.glob("*/*/saved_model.pb")]
    if len(versions) != 1:
        raise ValueError(f"{archive} is not a downloaded version: it has {len(versions)} MODEL/VERSION/saved_model.pb")
    check_files(versions[0])
    return versions[0]


def _compare(answers: Mapping[str, np.ndarray], probe: Probe) -> dict[str, float]:
    """The largest differences, within the tolerance that model servers are held to."""
    powers = np.exp(probe.logits.astype(np.float64) - probe.logits.max(axis=1, keepdims=True))
    wanted = {"logits": probe.logits, "probabilities": powers / powers.sum(axis=1, keepdims=True)}
    if probe.distances is not None:
        wanted["distance"] = probe.distances
    differences = {}
    for name, expected in wanted.items():
        found: Any = answers.get(name)
        if found is None or found.shape != expected.shape:
            raise ValueError(f"the converted model has no {name} of shape {expected.shape}, so it is not written")
        parity = DISTANCE_PARITY if name == "distance" else PARITY
        difference, limit = float(np.abs(found - expected).max()), parity * max(1.0, float(np.abs(expected).max()))
        if not difference <= limit:  # `not`: NaN compares false
            raise ValueError(
                f"the converted model differs from the trained one by {difference:.2g} in {name}, "
                f"more than {limit:.2g}, so it is not written"
            )
        differences[name] = difference
    return differences


@click.command()
@click.argument("archive", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("format", type=click.Choice(list(FORMATS)))
@click.argument("out", type=click.Path(dir_okay=False, path_type=Path))
def main(archive: Path, format: str, out: Path) -> None:
    """Convert the version in ARCHIVE, a zip as it is downloaded, and write it to OUT."""
    try:
        differences = convert(archive, format, out)
    except (ValueError, PublishFailed) as exc:
        raise click.ClickException(str(exc)) from exc
    except OSError as exc:
        raise click.ClickException(f"cannot write {out}: {exc.strerror or exc}") from exc
    listed = ", ".join(f"{difference:.1e} in {name}" for name, difference in differences.items())
    click.echo(f"largest difference from the trained model: {listed}")


if __name__ == "__main__":
    main()
