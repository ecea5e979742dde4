"""When the supervisor takes a process for frozen."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cli import supervisor
from cli.supervisor import Sibling, WorkerPulse
from store.settings import Settings
from tests.conftest import eventually


@contextmanager
def watched(answers: Callable[[int], bool | None]) -> Iterator[Sibling]:
    """A process that sleeps, and the supervisor's watch over it."""
    sibling = Sibling("sleeper", [sys.executable, "-c", "import time; time.sleep(600)"], os.environ, answers)
    sibling.keep_running()
    assert sibling.process is not None
    threading.Thread(target=sibling.watch, daemon=True).start()
    try:
        yield sibling
    finally:
        sibling.process.kill()
        sibling.process.wait()


def test_a_process_that_no_longer_answers_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "PROBE_S", 0.01)
    calls = iter([True])
    with watched(lambda pid: next(calls, False)) as sibling:
        assert sibling.process is not None
        assert sibling.process.wait(20) == -9


@pytest.mark.parametrize("unknown", ["raises", "cannot tell", "has never answered"])
def test_a_process_of_which_nothing_is_known_is_left_alone(monkeypatch: pytest.MonkeyPatch, unknown: str) -> None:
    monkeypatch.setattr(supervisor, "PROBE_S", 0.01)
    asked: list[int] = []

    def answers(pid: int) -> bool | None:
        asked.append(pid)
        if unknown == "raises" and len(asked) > 1:
            raise KeyError("store")
        return {"raises": True, "cannot tell": None if len(asked) > 1 else True}.get(unknown, False)

    with watched(answers) as sibling:
        eventually(lambda: len(asked) > 3 * supervisor.MAX_MISSES, "it was asked often")
        assert sibling.process is not None
        assert sibling.process.poll() is None


def test_a_worker_lives_as_long_as_its_pulse_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    answers = WorkerPulse(settings)
    assert answers(7) is None  # warming up
    file = settings.pulse_file(7)
    file.touch()
    os.utime(file, (1, 1))  # a clock that is far behind changes nothing
    assert answers(7) is True
    monkeypatch.setattr(supervisor, "PULSE_S", -1.0)
    assert answers(7) is False
    os.utime(file, (2, 2))
    monkeypatch.setattr(supervisor, "PULSE_S", 60.0)
    assert answers(7) is True


def test_where_lines_are_json_what_a_library_writes_becomes_one_too() -> None:
    code = """
import os, sys
from cli.supervisor import Sibling
from store import logging

logging.configure("supervisor")
writes = "import os; os.write(1, b'{from} C++\\\\n'); os.write(2, b'{\\"event\\": \\"ours\\"}\\\\n\\\\n')"
sibling = Sibling("worker 1", [sys.executable, "-c", writes], os.environ, lambda _: None)
sibling.keep_running()
assert sibling.process and sibling.process.wait(30) == 0
sibling.relay.join(30)
"""
    environment = {**os.environ, "TEMPER_LOG": "json"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    foreign, ours = map(json.loads, done.stderr.splitlines())
    assert (foreign["event"], foreign["process"], foreign["level"]) == ("{from} C++", "worker 1", "warning")
    assert ours == {"event": "ours"}
