"""Log lines say when, how bad, which process and which request."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import logging
from api.http.tracing import REQUEST_ID, add_request_id
from store.logging import configure
import structlog

configure("gateway", add_request_id)
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
