"""Log lines say when, how bad, which process and which request."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import logging
from api.http.tracing import REQUEST_ID, SCOPE, add_request
from store.logging import configure
import structlog

configure("gateway", add_request)
log = logging.getLogger("temper.gateway")
log.debug("too fine")
log.info("before any request")
REQUEST_ID.set("order-7")
with structlog.contextvars.bound_contextvars(job="ftjob-1"):
    log.warning("%s failed after %d ms", "/predict", 12)
try:
    1 / 0
except ZeroDivisionError:
    log.exception("unexpected")
"""


def test_log_lines_carry_time_level_process_request_and_traceback() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    first, second, third, *traceback = done.stderr.splitlines()
    time = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z"
    assert re.fullmatch(f"{time} info gateway: before any request", first)
    assert re.fullmatch(f"{time} warning gateway: /predict failed after 12 ms " + r"\[(.+)\]", second)
    assert {"job=ftjob-1", "request_id=order-7"} == set(second.partition("[")[2].rstrip("]").split())
    assert re.fullmatch(f"{time} error gateway: unexpected " + r"\[request_id=order-7\]", third)
    assert traceback[0].startswith("Traceback")
    assert traceback[-1] == "ZeroDivisionError: division by zero"


MORE = """
import threading, warnings
SCOPE.set({"state": {"model": "acme~digits", "version": 3}, "path_params": {}})
structlog.get_logger("temper.gateway").info("answered", odd=object)
logging.getLogger("uvicorn.error").warning("slow %s", "client")
SCOPE.set({"path_params": {"id": "ftjob-2", "model": "shapes"}})
log.info("two\\nlines")
warnings.warn("old", stacklevel=1)
thread = threading.Thread(target=lambda: {}["none"])
thread.start(); thread.join()
raise SystemError("at the end")
"""


def test_as_json_every_line_is_an_object_whoever_writes_it() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE + MORE], cwd=ROOT, env={**os.environ, "TEMPER_LOG": "json"}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all({"timestamp", "level", "process", "event", "logger"} <= line.keys() for line in lines)
    before, failed, unexpected, answered, slow, two, old, thread, end = lines
    assert "request_id" not in before
    assert (failed["event"], failed["job"]) == ("/predict failed after 12 ms", "ftjob-1")
    assert (unexpected["level"], unexpected["request_id"]) == ("error", "order-7")
    assert unexpected["exception"].endswith("ZeroDivisionError: division by zero")
    assert (answered["model"], answered["version"], answered["odd"]) == ("digits", 3, "<class 'object'>")
    assert (slow["event"], slow["logger"]) == ("slow client", "uvicorn.error")
    assert (two["event"], two["job"], two["model"]) == ("two\nlines", "ftjob-2", "shapes")
    assert "old" in old["event"]
    assert thread["exception"].endswith("KeyError: 'none'")
    assert (end["level"], end["exception"][-10:]) == ("critical", "at the end")


def test_as_json_a_process_that_cannot_start_says_so_in_a_line(tmp_path: Path) -> None:
    environment = {**os.environ, "TEMPER_LOG": "json", "TEMPER_PORT": "many", "TEMPER_HOME": str(tmp_path)}
    for module, process in (("api", "gateway"), ("trainer", "worker")):
        done = subprocess.run(
            [sys.executable, "-m", module], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        (line,) = map(json.loads, done.stderr.splitlines())
        assert (done.returncode, line["process"], line["level"]) == (1, process, "critical")
        assert "TEMPER_PORT" in line["event"]
