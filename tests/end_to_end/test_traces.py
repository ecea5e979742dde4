"""Traces through all processes, as a collector gets them, and the log lines that belong to them."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from store.processes import free_port
from tests.conftest import SMALL, Service, eventually

SECRET = "tmp_not_to_be_seen"
CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736"  # a trace that a client has begun
PREDICT = "tensorflow.serving.PredictionService/Predict"
RELOAD = "tensorflow.serving.ModelService/HandleReloadConfigRequest"


class Collector(ThreadingHTTPServer):
    """An OTLP collector: what it has got, as (process, span)."""

    daemon_threads = True

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        self.bodies = b""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"

    def of(self, trace: str) -> list[tuple[str, Any]]:
        return [(process, span) for process, span in list(self.spans) if span.trace_id.hex() == trace]

    def named(self, name: str, trace: str = "") -> list[Any]:
        found = [span for _, span in list(self.spans) if span.name == name]
        return [span for span in found if trace in span.trace_id.hex()]


class _Handler(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.bodies += body
        for found in ExportTraceServiceRequest.FromString(body).resource_spans:
            process = next(one.value.string_value for one in found.resource.attributes if one.key == "service.name")
            for scope in found.scope_spans:
                self.server.spans += [(process, span) for span in scope.spans]
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def attributes(span: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


@pytest.mark.exhaustive
def test_a_trace_goes_from_request_to_model_server_and_from_job_to_publication(
    tmp_path: Path, digits_zip: bytes, digits: tuple[np.ndarray, np.ndarray], collector: Collector
) -> None:
    port, written = free_port(), tmp_path / "log"
    settings = {
        "TEMPER_HOME": str(tmp_path / "home"), "TEMPER_TRACES": collector.url, "TEMPER_LOG": "json",
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }  # fmt: skip
    with written.open("wb") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-m", "cli", "serve", "--port", str(port)], env={**os.environ, **SMALL, **settings},
            stdout=log, stderr=log,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    with httpx.Client(base_url=url, timeout=60, headers={"X-API-Key": SECRET}) as api:
        service = Service(tmp_path / "home", url, api, supervisor)
        try:
            eventually(service.ready, "the service is ready")
            raw = {"Content-Type": "application/octet-stream"}
            sent = {"traceparent": f"00-{CLIENT}-00f067aa0ba902b7-01", **raw}
            image = digits[0][0].tobytes()
            assert api.post("/predict?model=lenet5", content=image, headers=sent).status_code == 200

            def shared() -> Any:
                """The span of a call that several requests share."""
                with ThreadPoolExecutor(16) as pool:
                    list(pool.map(lambda _: api.post("/predict?model=lenet5", content=image, headers=raw), range(64)))
                return next((one for one in collector.named("batch") if len(one.links) > 1), None)

            batch_of_several = eventually(shared, "requests share a call")
            job = service.finetune(digits_zip, "traced", '{"epochs": 1, "method": "head"}').json()["id"]
            assert service.finished(job)["status"] == "succeeded"
            eventually(lambda: collector.named("job"), "the worker's spans have arrived")
            eventually(lambda: len(collector.of(CLIENT)) >= 5, "the spans of the prediction have arrived")
            service.kill("trainer")
            eventually(lambda: b"exited (SIGKILL)" in written.read_bytes(), "the supervisor has noticed")
        finally:
            supervisor.terminate()
            supervisor.wait(30)

    spans = {(process, span.name): span for process, span in collector.of(CLIENT)}
    request, queue, batch, call, served = (
        spans[f"temper-{process}", name]
        for process, name in (
            ("gateway", "POST /predict"), ("gateway", "queue"), ("gateway", "batch"), ("gateway", PREDICT),
            ("model-server", PREDICT),
        )
    )  # fmt: skip
    assert request.parent_span_id.hex() == "00f067aa0ba902b7"
    assert [queue.parent_span_id, batch.parent_span_id] == [request.span_id] * 2
    assert [link.span_id for link in batch.links] == [request.span_id]
    assert (call.parent_span_id, served.parent_span_id) == (batch.span_id, call.span_id)
    assert queue.end_time_unix_nano <= call.start_time_unix_nano
    found = attributes(request)
    assert (found["http.response.status_code"], found["temper.model"], found["temper.version"]) == (200, "lenet5", 1)

    assert attributes(batch_of_several)["temper.requests"] == len(batch_of_several.links)
    assert batch_of_several.parent_span_id == batch_of_several.links[0].span_id
    assert len({link.trace_id for link in batch_of_several.links}) == len(batch_of_several.links)

    (posted,), (worked,) = collector.named("POST /finetune"), collector.named("job")
    trace = posted.trace_id.hex()
    assert (worked.trace_id, worked.parent_span_id) == (posted.trace_id, posted.span_id)
    assert attributes(worked) | {"temper.job": job, "temper.status": "succeeded"} == attributes(worked)
    stages = ("validating", "training", "evaluating", "exporting", "publishing")
    assert [collector.named(stage, trace)[0].parent_span_id for stage in stages] == [worked.span_id] * len(stages)
    (publishing,) = collector.named("publishing", trace)
    assert [event.name for event in publishing.events] == [
        "staged", "verified", "renamed", "available", "proven", "warmed",
    ]  # fmt: skip
    for call_name in (RELOAD, PREDICT):
        made = [span for process, span in collector.of(trace) if (process, span.name) == ("temper-worker", call_name)]
        got = [span for process, span in collector.of(trace) if process == "temper-model-server"]
        assert made
        assert {span.parent_span_id for span in made} == {publishing.span_id}
        assert {span.span_id for span in made} <= {span.parent_span_id for span in got}
    names = {span.name for _, span in collector.spans}
    assert not [name for name in names if "ready" in name or "Status" in name]  # looks that nobody asked for
    for hidden in (SECRET.encode(), image, digits_zip[:64], b"data.zip"):
        assert hidden not in collector.bodies

    lines = [json.loads(line) for line in written.read_text().splitlines()]
    assert all({"timestamp", "level", "process", "event"} <= line.keys() for line in lines)
    assert {"supervisor", "gateway", "worker", "model-server"} <= {line["process"] for line in lines}
    (queued,) = [line for line in lines if line["event"] == "job queued"]
    (starts,) = [line for line in lines if line["event"] == "job starts"]
    assert queued["request_id"]
    assert [(line["trace_id"], line["job"], line["model"]) for line in (queued, starts)] == [(trace, job, "traced")] * 2
    (restarted,) = [line for line in lines if "exited (SIGKILL)" in line["event"]]
    assert (restarted["process"], restarted["level"]) == ("supervisor", "warning")


@pytest.mark.slow
def test_a_collector_that_is_away_is_told_of_once_and_holds_up_no_end(
    tmp_path: Path, model_server: str
) -> None:  # fmt: skip
    port = free_port()
    settings = {
        "TEMPER_HOME": str(tmp_path), "TEMPER_MODEL_SERVER": model_server, "TEMPER_PORT": str(port),
        "TEMPER_TRACES": f"http://127.0.0.1:{free_port()}", "OTEL_BSP_SCHEDULE_DELAY": "50",
    }  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "api"], env={**os.environ, **settings}, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as api:

            def told() -> bool:
                assert api.get("/models").status_code == 200
                return b"sending traces to" in (tmp_path / "log").read_bytes()

            eventually(told, "the failure is logged")
            assert api.get("/models").elapsed.total_seconds() < 1
    finally:
        process.terminate()
    assert process.wait(8) is not None
    text = (tmp_path / "log").read_text()
    assert text.count("sending traces to") == 1
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("modules", "without"),
    [("serving.client, trainer.jobs.records, store.logging", ""), ("api.app", ".sdk"), ("api.app", ".exporter")],
)  # FastAPI itself imports OpenTelemetry's API, which does nothing by itself
def test_without_a_collector_opentelemetry_is_not_imported(modules: str, without: str) -> None:
    code = (
        f"import sys, {modules}; from store import traces; traces.configure('gateway', '')\n"
        "with traces.span('x', parent='00-0-0-0'): assert traces.current() is None and traces.metadata() is None\n"
        "with traces.child('x') as span: traces.event('y'); assert span is None\n"
        f"sys.exit(any(name.startswith('opentelemetry{without}') for name in sys.modules))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TEMPER_TRACES"}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


def test_traces_to_what_is_no_collector_are_refused(tmp_path: Path) -> None:
    environment = {**os.environ, "TEMPER_HOME": str(tmp_path), "TEMPER_TRACES": "collector:4318"}
    done = subprocess.run([sys.executable, "-m", "api"], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "TEMPER_TRACES: 'collector:4318' is not an http:// or https:// URL" in done.stderr
