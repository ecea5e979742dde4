"""A downloaded version as TFLite and ONNX: `make test-onnx` runs this where ONNX's packages are installed."""

import importlib.util
import io
import json
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from click.testing import CliRunner

from serving.publishing import Probe, seal, zipped
from trainer.convert import FORMATS, convert, main
from trainer.export import export
from trainer.lenet import adapters, initial, logits

CLASSES = ("zéro", "one, two", *"23456789")
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 784), np.uint8)
IMAGES = (PIXELS / np.float32(255)).reshape(-1, 28, 28, 1)
MISSING = "tf2onnx is not installed: `make test-onnx` runs this in an environment of its own"
NO_ONNX = importlib.util.find_spec("tf2onnx") is None


@pytest.fixture(
    name="format", params=["tflite", pytest.param("onnx", marks=pytest.mark.skipif(NO_ONNX, reason=MISSING))]
)
def each_format(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def network(*, adapted: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    added = {name: rng.normal(0, 0.1, value.shape).astype(np.float32) for name, value in adapters(8, 1).items()}
    return {**initial(10, seed=0), **(added if adapted else {})}


def scores(params: Mapping[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    found: np.ndarray = logits(params, tf.constant(images)).numpy()
    return found


def archive(path: Path, *, invert: bool = False, adapted: bool = False, probed: np.ndarray | None = None) -> Path:
    """A version as it is downloaded; `probed` are the logits that its probe claims."""
    version, params = path.parent / "staged" / path.stem, network(adapted=adapted)
    export(version, params, invert=invert, manifest={"classes": CLASSES})
    Probe(PIXELS, scores(params, 1 - IMAGES if invert else IMAGES) if probed is None else probed).save(version)
    seal(version)
    path.write_bytes(b"".join(zipped(version, "digits/3")))
    return path


def classes_in(format: str, file: Path) -> list[str]:
    """The classes as a user reads them."""
    if format == "tflite":
        return zipfile.ZipFile(file).read("labels.txt").decode().splitlines()
    import onnxruntime

    found: list[str] = json.loads(onnxruntime.InferenceSession(file).get_modelmeta().custom_metadata_map["classes"])
    return found


@pytest.mark.filterwarnings("ignore:.*tf.lite.Interpreter is deprecated")
@pytest.mark.parametrize(("invert", "adapted"), [(False, False), (True, True)], ids=["plain", "inverted, adapters"])
def test_a_converted_model_answers_as_the_trained_one(format: str, invert: bool, adapted: bool, tmp_path: Path) -> None:
    file = tmp_path / f"digits-3.{format}"
    differences = convert(archive(tmp_path / "digits-3.zip", invert=invert, adapted=adapted), format, file)
    assert differences.keys() == {"logits", "probabilities"}
    assert max(differences.values()) < 1e-4
    images = np.random.default_rng(2).random((7, 28, 28, 1), np.float32)
    expected = scores(network(adapted=adapted), 1 - images if invert else images)
    for n in (1, 7):
        answers = FORMATS[format].run(file.read_bytes(), images[:n])
        assert answers.keys() == {"logits", "probabilities"}
        np.testing.assert_allclose(answers["logits"], expected[:n], atol=1e-4)
        np.testing.assert_allclose(answers["probabilities"], tf.nn.softmax(expected[:n]), atol=1e-5)
    assert classes_in(format, file) == list(CLASSES)
    assert {path.name for path in tmp_path.iterdir()} == {"digits-3.zip", "staged", file.name}


@pytest.mark.skipif(NO_ONNX, reason=MISSING)
def test_onnx_names_its_batch_and_has_fixed_image_sizes(tmp_path: Path) -> None:
    import onnxruntime

    convert(archive(tmp_path / "v.zip"), "onnx", tmp_path / "v.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "v.onnx")
    found = [(value.name, value.type, value.shape) for value in (*session.get_inputs(), *session.get_outputs())]
    kind = "tensor(float)"
    assert found == [
        ("image", kind, ["n", 28, 28, 1]), ("logits", kind, ["n", 10]), ("probabilities", kind, ["n", 10])
    ]  # fmt: skip


@pytest.mark.parametrize("wrong", ["other logits", "NaN", "other classes"])
def test_a_model_that_answers_unlike_the_trainer_is_not_written(format: str, wrong: str, tmp_path: Path) -> None:
    trained = scores(network(adapted=False), IMAGES)
    probed = {"other logits": trained + np.eye(16, 10, dtype=np.float32) / 50, "NaN": trained * np.nan,
              "other classes": trained[:, :9]}[wrong]  # fmt: skip
    file = tmp_path / f"v.{format}"
    file.write_text("the earlier one")
    with pytest.raises(ValueError, match=r"the converted model (differs from the trained one by|has no logits of)"):
        convert(archive(tmp_path / "v.zip", probed=probed), format, file)
    assert file.read_text() == "the earlier one"
    assert {path.name for path in tmp_path.iterdir()} == {"v.zip", "staged", file.name}


def failed(*arguments: str | Path) -> str:
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


def damaged(path: Path) -> Iterator[tuple[str, bytes]]:
    """Archives that are no version, and what is said of each."""
    whole = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as packed:
        files = {name: packed.read(name) for name in packed.namelist()}
    probe = "digits/3/assets.extra/probe.npz"

    def packed_again(changed: Mapping[str, bytes]) -> bytes:
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as again:
            for name, content in changed.items():
                again.writestr(name, content)
        return file.getvalue()

    yield "is not a zip", b"no zip"
    yield "is not a zip", whole[:-100]
    yield "is not a downloaded version", packed_again({"a/b": b""})
    yield "missing or have changed: assets.extra/probe.npz", packed_again({**files, probe: b"other"})
    del files[probe]
    yield "missing or have changed: assets.extra/probe.npz", packed_again(files)


def test_an_archive_that_is_no_intact_version_is_refused_in_one_line(tmp_path: Path) -> None:
    path = archive(tmp_path / "v.zip")
    for reason, content in damaged(path):
        path.write_bytes(content)
        assert reason in failed(path, "tflite", tmp_path / "v.tflite")
    assert {file.name for file in tmp_path.iterdir()} == {"v.zip", "staged"}


def test_a_file_that_cannot_be_written_is_reported_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    path, out = archive(tmp_path / "v.zip"), tmp_path / "none" / "v.tflite"
    assert failed(path, "tflite", out) == f"Error: cannot write {out}: No such file or directory"
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError):
        convert(path, "tflite", tmp_path / "taken")
    assert {file.name for file in tmp_path.iterdir()} == {"v.zip", "staged", "taken"}


@pytest.mark.parametrize(
    ("format", "package"), [("onnx", "tf2onnx"), ("onnx", "onnxruntime"), ("tflite", "tensorflow")]
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    format: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    line = failed(archive(tmp_path / "v.zip"), format, tmp_path / "v")
    assert package in line
    assert line.endswith(f"-m pip install 'temper[{FORMATS[format].extra}]'")
