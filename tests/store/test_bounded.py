"""A store that says nothing is noticed."""

import os
import signal
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from store import bounded
from store.engine import connect
from store.settings import Settings
from tests.conftest import freeze


def test_a_frozen_postgresql_fails_what_waits_for_it(empty_postgresql: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "ANSWER_S", 0.5)
    engine = connect(empty_postgresql)
    with engine.connect() as connection:
        pid = connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one()
        freeze(pid)
        try:
            began = time.monotonic()
            with pytest.raises(sa.exc.OperationalError, match="has not answered within"):
                connection.execute(sa.text("SELECT 1"))
            assert time.monotonic() - began < 10
        finally:
            os.kill(pid, signal.SIGCONT)
    with engine.connect() as connection:  # of another backend
        assert connection.execute(sa.text("SELECT pg_backend_pid()")).scalar_one() != pid
    engine.dispose()


def test_relative_paths_of_certificates_hold_in_other_directories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cert.pem").touch()
    (tmp_path / "key.pem").touch()
    monkeypatch.chdir(tmp_path)
    given = Settings.model_validate({"tls_cert": "cert.pem", "tls_key": "key.pem", "model_server_ca": "cert.pem"})
    monkeypatch.chdir("/")
    assert Settings.model_validate_json(given.model_dump_json()) == given
    assert given.tls_cert == tmp_path / "cert.pem"
