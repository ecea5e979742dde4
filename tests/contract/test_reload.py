"""HandleReloadConfigRequest replaces the whole configuration."""

from pathlib import Path
from typing import Any

import pytest
from tensorflow_serving.apis import model_management_pb2

from tests.contract.conftest import AVAILABLE, END, IMAGES, Refusal, Server, config, put, refusal

IMAGE = {"image": IMAGES}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Base path of a model with versions 1, 2 and 3."""
    for version in (1, 2, 3):
        put(tmp_path / "model" / str(version))
    return tmp_path / "model"


def invalid(message: str) -> Refusal:
    return Refusal("INVALID_ARGUMENT", message)


def test_a_reload_returns_when_new_models_answer(server: Server, base: Path, name: str) -> None:
    response = server.reload(config(name, base))
    assert (response.status.error_code, response.status.error_message) == (0, "")
    assert server.predict(name, IMAGE).model_spec.version.value == 3
    assert server.states(name) == {3: AVAILABLE}


def test_policies_choose_the_versions(server: Server, base: Path, name: str) -> None:
    server.reload(config(name, base, latest=0))  # as 1
    server.until(name, {3: AVAILABLE})
    server.reload(config(name, base, latest=2))
    server.until(name, {3: AVAILABLE, 2: AVAILABLE})
    server.reload(config(name, base, all=True))
    server.until(name, {3: AVAILABLE, 2: AVAILABLE, 1: AVAILABLE})
    server.reload(config(name, base, specific=[1, 9]))
    server.until(name, {3: END, 2: END, 1: AVAILABLE})
    server.reload(config(name, base, latest=100))
    server.until(name, {3: AVAILABLE, 2: AVAILABLE, 1: AVAILABLE})


@pytest.mark.parametrize("versions", [[9], []])
def test_a_policy_that_matches_nothing_unloads_everything(
    server: Server, base: Path, name: str, versions: list[int]
) -> None:
    server.reload(config(name, base))
    server.reload(config(name, base, specific=versions))
    server.until(name, {3: END})
    missing = Refusal("NOT_FOUND", f"Servable not found for request: Latest({name})")
    assert refusal(server.predict, name, IMAGE) == missing


def test_models_left_out_are_unloaded_and_remembered(server: Server, base: Path, name: str) -> None:
    other = f"{name}-other"
    server.reload(config(name, base), config(other, base))
    server.reload(config(name, base))
    server.until(other, {3: END})
    missing = Refusal("NOT_FOUND", f"Servable not found for request: Latest({other})")
    assert refusal(server.predict, other, IMAGE) == missing
    assert server.predict(name, IMAGE).model_spec.version.value == 3
    server.reload(config(name, base), config(other, base))
    assert server.predict(other, IMAGE).model_spec.version.value == 3
    server.reload()
    server.until(name, {3: END})
    server.until(other, {3: END})


def test_a_model_without_a_name_cannot_be_called(server: Server, base: Path) -> None:
    server.reload(config("", base))
    assert refusal(server.predict, "", IMAGE) == invalid("ModelSpec has no name specified.")


def test_requested_metrics_are_returned(server: Server, base: Path, name: str) -> None:
    found = server.reload(config(name, base), metrics=("/tensorflow/serving/request_count", "nope")).metric
    assert [(metric.name, metric.int64_value_increase) for metric in found] == [
        ("/tensorflow/serving/request_count", 0),
        ("nope", 0),
    ]


def test_the_deprecated_model_type_still_works(server: Server, base: Path, name: str) -> None:
    server.reload(config(name, base, model_platform="", model_type="TENSORFLOW"))
    assert server.states(name) == {3: AVAILABLE}


def test_an_invalid_request_changes_nothing(server: Server, base: Path, name: str) -> None:
    server.reload(config(name, base))
    broken: list[tuple[list[Any], str]] = [
        (
            [config(name, base, model_platform="")],
            "Illegal setting neither ModelServerConfig::model_type (deprecated) nor "
            f"ModelServerConfig::model_platform, model name is {name}",
        ),
        (
            [config(name, base, model_type="TENSORFLOW")],
            "Illegal setting both ModelServerConfig::model_type (deprecated) and "
            f"ModelServerConfig::model_platform, model name is {name}",
        ),
        ([config(name, base)] * 2, f"Illegal to list model {name} multiple times in config list"),
        (
            [config(name, "models/m")],
            f"Expected model {name} to have an absolute path or URI; got base_path()=models/m",
        ),
        (
            [config(name, base, model_platform="pytorch")],
            f"Illegal to change a model's platform. For model {name} platform was tensorflow and new platform "
            "requested is pytorch",
        ),
    ]
    for configs, message in broken:
        assert refusal(server.reload, *configs) == invalid(message)
    kind = invalid(
        "ServerModelConfig type not supported by HandleReloadConfigRequest. Only ModelConfigList is currently supported"
    )
    request = model_management_pb2.ReloadConfigRequest()
    assert refusal(server.models.HandleReloadConfigRequest, request) == kind
    request.config.custom_model_config.SetInParent()
    assert refusal(server.models.HandleReloadConfigRequest, request) == kind
    assert server.states(name) == {3: AVAILABLE}
    assert server.predict(name, IMAGE).model_spec.version.value == 3


def test_an_unknown_platform_is_refused(server: Server, base: Path, name: str) -> None:
    kept = config(name, base)
    server.reload(kept)
    other = config(f"{name}-other", base, model_platform="pytorch")
    assert refusal(server.reload, kept, other) == invalid(f"Model {name}-other requests unsupported platform pytorch")
    server.reload(kept)
    assert server.predict(name, IMAGE).model_spec.version.value == 3


def test_labels_can_be_moved_and_removed(server: Server, base: Path, name: str) -> None:
    server.reload(config(name, base, specific=[1, 2]))
    server.until(name, {1: AVAILABLE, 2: AVAILABLE})
    server.reload(config(name, base, specific=[1, 2], labels={"stable": 1, "canary": 2}))
    for label, version in (("stable", 1), ("canary", 2)):
        assert server.predict(name, IMAGE, label=label).model_spec.version.value == version
    server.reload(config(name, base, specific=[1, 2], labels={"stable": 2}))
    assert server.predict(name, IMAGE, label="stable").model_spec.version.value == 2
    server.reload(config(name, base, specific=[1, 2]))
    unknown = invalid("Unrecognized servable version label: stable")
    assert refusal(server.predict, name, IMAGE, label="stable") == unknown


def test_a_label_on_a_version_that_does_not_serve_yet_is_refused_with_its_model(
    server: Server, base: Path, name: str
) -> None:
    server.reload(config(name, base, specific=[1]))
    server.reload(config(name, base, specific=[1], labels={"stable": 1}))
    for version in (3, 9):
        wanted = config(name, base, specific=[1, version], labels={"stable": version})
        assert refusal(server.reload, wanted) == Refusal(
            "FAILED_PRECONDITION",
            f"Request to assign label to version {version} of model {name}, which is not currently available for "
            "inference",
        )
    assert server.predict(name, IMAGE, label="stable").model_spec.version.value == 1
    assert server.states(name) == {1: AVAILABLE}


def test_a_label_outlives_its_version(server: Server, base: Path, name: str) -> None:
    server.reload(config(name, base, specific=[1, 2]))
    server.until(name, {1: AVAILABLE, 2: AVAILABLE})
    server.reload(config(name, base, specific=[1], labels={"stable": 2}))
    server.until(name, {1: AVAILABLE, 2: END})
    missing = Refusal("NOT_FOUND", f"Servable not found for request: Specific({name}, 2)")
    assert refusal(server.predict, name, IMAGE, label="stable") == missing


def test_a_model_can_move_to_another_directory(server: Server, base: Path, name: str, tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "1")
    server.reload(config(name, base))
    server.reload(config(name, tmp_path / "elsewhere"))
    server.until(name, {3: END, 1: AVAILABLE})


def test_a_model_moved_to_a_missing_directory_goes_on_serving(
    server: Server, base: Path, name: str, tmp_path: Path
) -> None:
    server.reload(config(name, base))
    server.reload(config(name, tmp_path / "missing"))
    assert server.predict(name, IMAGE).model_spec.version.value == 3
    put(tmp_path / "missing" / "4")
    server.until(name, {3: END, 4: AVAILABLE})


@pytest.mark.parametrize(
    ("file", "code", "error", "message"),
    [
        (
            None,
            5,
            "NOT_FOUND",
            "Specified file path does not appear to contain a SavedModel bundle (should have a file called "
            "`saved_model.pb`)\nSpecified file path: {path}",
        ),
        (100 * b"\xff\xff garbage", 15, "DATA_LOSS", "Can't parse {path}/saved_model.pb as binary proto"),
    ],
    ids=["empty", "garbage"],
)
def test_a_new_model_that_cannot_be_loaded_fails_the_reload_and_no_other_model(
    server: Server, base: Path, name: str, tmp_path: Path, file: bytes | None, code: int, error: str, message: str
) -> None:
    path = tmp_path / "bad" / "1"
    path.mkdir(parents=True)
    if file is not None:
        (path / "saved_model.pb").write_bytes(file)
    bad, message = f"{name}-bad", message.format(path=path)
    assert refusal(server.reload, config(name, base), config(bad, path.parent)) == Refusal(
        "UNKNOWN",
        f"1 model(s) did not become available: {{{{{{name: {bad} version: 1}} due to error: {error}: {message}}}, }}",
    )
    (status,) = server.statuses(bad)
    assert (status.version, status.state) == (1, END)
    assert (status.status.error_code, status.status.error_message) == (code, message)
    server.until(name, {3: AVAILABLE})
    assert server.predict(name, IMAGE).model_spec.version.value == 3
