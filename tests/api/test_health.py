"""What `/readyz` says when the disk is full, the store damaged or a version gone, and what works all the same."""

import contextlib
import errno
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from store.disk import RESERVE_BYTES, Reserve, is_full
from store.engine import connect
from store.health import Health
from tests.conftest import Service, eventually, running_service

QUICK = '{"epochs": 1, "method": "head"}'


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 48 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def fill(disk: Path) -> Path:
    """A file that takes all the space that is left."""
    filler = disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1 << 9):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)):
                    pass
    return filler


@pytest.mark.exhaustive
def test_on_a_full_disk_uploads_are_507_and_deleting_a_model_works(small_disk: Path, digits_zip: bytes) -> None:
    with running_service(small_disk) as service:
        for model in ("one", "two"):
            done = service.finished(service.finetune(digits_zip, model, QUICK).json()["id"])
            assert done["status"] == "succeeded", done["error"]
            service.completed(done["id"])
        assert service.api.get("/readyz").json()["disk"] == "ok"
        filler = fill(small_disk)
        assert shutil.disk_usage(small_disk).free < 1 << 12
        refused = service.finetune(digits_zip, "three", QUICK)
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full"), refused.text
        assert "no space" in refused.json()["error"]["message"]
        assert service.api.get("/readyz").json()["disk"] == "full"
        assert service.api.get("/readyz").status_code == 200  # predictions still work
        gone = service.api.delete("/models/one")
        assert (gone.status_code, gone.json().get("versions")) == (200, [1]), gone.text
        assert service.api.get("/models/one").status_code == 404
        assert not (small_disk / "models/one/1").exists()
        filler.unlink()
        eventually(lambda: service.api.get("/readyz").json()["disk"] == "ok", "the disk is found to have space")
        assert service.finetune(digits_zip, "three", QUICK).status_code == 202


def test_a_reserve_gives_back_its_space(tmp_path: Path) -> None:
    reserve = Reserve(tmp_path)
    reserve.keep()
    assert (tmp_path / "reserve").stat().st_blocks * 512 >= RESERVE_BYTES
    reserve.release()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_recognized_under_whatever_wraps_it() -> None:
    wrapped = RuntimeError("cannot save")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert is_full(wrapped)
    assert is_full(sa.exc.OperationalError("UPDATE", {}, sqlite3.OperationalError("database or disk is full")))
    assert not is_full(OSError(errno.ENOENT, "No such file"))


def damage(home: Path) -> None:
    """Overwrite what the tables of the store are in, but not the header."""
    with (home / "temper.db").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(100)
        file.write(b"\xff" * (size - 100))


def test_a_damaged_store_is_found_and_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = connect(f"sqlite:///{tmp_path / 'temper.db'}")
    health = Health(engine, tmp_path)
    health.check()
    assert health.store_works
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    damage(tmp_path)
    for _ in range(5):
        health._checked_at = -1e9
        health.check()
        assert not health.store_works
    assert len(caplog.records) == 1
    engine.dispose()


@pytest.mark.exhaustive
def test_readyz_says_that_the_store_is_damaged_and_the_log_stays_short(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with running_service(tmp_path, TEMPER_WORKERS="1") as service:
        engine = connect(f"sqlite:///{tmp_path / 'temper.db'}")
        with engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        engine.dispose()
        damage(tmp_path)
        eventually(lambda: service.api.get("/readyz").status_code == 503, "the damage is found")
        assert service.api.get("/readyz").json()["store"] == "unavailable"
        for _ in range(50):
            service.api.get("/readyz")
    lines = [line for line in capfd.readouterr().err.splitlines() if re.search(r"the store|the routes", line)]
    assert 1 <= len(lines) <= 6, lines


@pytest.mark.exhaustive
def test_a_version_whose_files_are_gone_gets_no_label(service: Service, digits_zip: bytes) -> None:
    for _ in range(2):
        assert service.finished(service.finetune(digits_zip, "hollow", QUICK).json()["id"])["status"] == "succeeded"
    shutil.rmtree(service.home / "models/hollow/1")
    refused = service.api.put("/models/hollow/labels/stable", json={"version": 1})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "wrong_state"), refused.text
    assert "hollow:1 cannot be labelled" in refused.json()["error"]["message"]
    assert service.api.get("/models/hollow").json()["labels"] == {"stable": 2}
    assert service.api.delete("/models/hollow/versions/1").json()["versions"] == [1]
