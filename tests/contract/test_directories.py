"""Versions on disk: found by polling, named leniently, never retried."""

import shutil
import threading
from pathlib import Path

import grpc
import pytest

from tests.conftest import eventually
from tests.contract.conftest import AVAILABLE, END, IMAGES, Refusal, Server, config, put, refusal

IMAGE = {"image": IMAGES}


@pytest.fixture
def base(server: Server, name: str, tmp_path: Path) -> Path:
    """Base path of a model that serves its newest version, which is 1."""
    base = tmp_path / "model"
    put(base / "1")
    server.reload(config(name, base))
    return base


def answering(server: Server, name: str) -> int:
    version: int = server.predict(name, IMAGE).model_spec.version.value
    return version


def wait_for_poll(server: Server, name: str, base: Path, version: int) -> None:
    """Wait until the server has read the directory again, which shows in its finding a new version."""
    put(base / str(version))
    eventually(lambda: version in server.available(name), f"version {version} is found")


def test_a_new_version_takes_over_without_a_failed_call(server: Server, base: Path, name: str) -> None:
    stop, failures = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            try:
                answering(server, name)
            except grpc.RpcError as exc:
                failures.append(exc)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for version in (2, 3):
            put(base / str(version))
            server.until(name, dict.fromkeys(range(1, version), END) | {version: AVAILABLE})
    finally:
        stop.set()
        asking.join()
    assert failures == []
    assert answering(server, name) == 3


@pytest.mark.parametrize(("directory", "version"), [("0007", 7), ("+6", 6), (" 8", 8)])
def test_names_that_read_as_numbers_are_versions(
    server: Server, base: Path, name: str, directory: str, version: int
) -> None:
    put(base / directory)
    server.until(name, {1: END, version: AVAILABLE})
    assert answering(server, name) == version


def test_other_directory_names_are_ignored(server: Server, base: Path, name: str) -> None:
    for directory in ("abc", "4.tmp", "1e3", "-5", "9999999999999999999"):
        put(base / directory)
    wait_for_poll(server, name, base, 2)
    server.until(name, {1: END, 2: AVAILABLE})


def test_a_link_to_a_directory_is_a_version(server: Server, base: Path, name: str, tmp_path: Path) -> None:
    (base / "60").symlink_to(put(tmp_path / "elsewhere" / "kept"))
    server.until(name, {1: END, 60: AVAILABLE})


def test_a_plain_file_is_a_version_that_fails(server: Server, base: Path, name: str) -> None:
    (base / "50").write_text("")
    server.until(name, {1: AVAILABLE, 50: END})
    status = server.statuses(name)[0].status
    assert (status.error_code, status.error_message) == (
        9,
        f"Error while attempting to reserve resources to load servable {{name: {name} version: 50}}: {base}/50; "
        "Not a directory",
    )
    assert answering(server, name) == 1


def test_a_version_that_fails_is_never_tried_again_and_later_ones_are(server: Server, base: Path, name: str) -> None:
    (base / "7").mkdir()
    server.until(name, {1: AVAILABLE, 7: END})
    status = server.statuses(name)[0].status
    assert (status.error_code, status.error_message) == (
        5,
        "Specified file path does not appear to contain a SavedModel bundle (should have a file called "
        f"`saved_model.pb`)\nSpecified file path: {base}/7",
    )
    shutil.copytree(base / "1", base / "7", dirs_exist_ok=True)
    put(base / "8")
    server.until(name, {1: END, 7: END, 8: AVAILABLE})
    assert [status.status.error_code for status in server.statuses(name)] == [0, 5, 0]


@pytest.mark.parametrize("file", ["saved_model.pb", "variables/variables.data-00000-of-00001"])
def test_a_file_cut_in_half_ends_the_version(server: Server, base: Path, name: str, file: str, tmp_path: Path) -> None:
    cut = put(tmp_path / "aside" / "kept")
    content = (cut / file).read_bytes()
    (cut / file).write_bytes(content[: len(content) // 2])
    cut.rename(base / "2")
    server.until(name, {1: AVAILABLE, 2: END})
    status = server.statuses(name)[0].status
    assert status.error_code == 11
    assert status.error_message.startswith("Read less bytes than requested")
    assert answering(server, name) == 1


def test_a_served_version_that_is_deleted_gives_way_to_the_newest_left(server: Server, base: Path, name: str) -> None:
    put(base / "2")
    server.until(name, {1: END, 2: AVAILABLE})
    (base / "2").rename(base / "gone")
    server.until(name, {1: AVAILABLE, 2: END})
    assert answering(server, name) == 1


def test_a_model_without_versions_is_unloaded_until_there_is_one(server: Server, base: Path, name: str) -> None:
    (base / "1").rename(base / "gone")
    server.until(name, {1: END})
    missing = Refusal("NOT_FOUND", f"Servable not found for request: Latest({name})")
    assert refusal(server.predict, name, IMAGE) == missing
    (base / "gone").rename(base / "1")
    server.until(name, {1: AVAILABLE})


def test_a_deleted_base_path_changes_nothing_until_it_is_back(server: Server, base: Path, name: str) -> None:
    base.rename(base.with_name("gone"))
    assert answering(server, name) == 1
    base.mkdir()
    put(base.with_name("new") / "2").rename(base / "2")
    server.until(name, {1: END, 2: AVAILABLE})


def test_files_deleted_under_a_served_version_do_not_matter(server: Server, base: Path, name: str) -> None:
    for path in (base / "1").iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert answering(server, name) == 1
    wait_for_poll(server, name, base, 2)
    assert answering(server, name) == 2
