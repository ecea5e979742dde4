"""Webhooks, from what happens to a server that receives them and verifies every signature by hand."""

import asyncio
import base64
import contextlib
import functools
import hashlib
import hmac
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from fastapi.openapi.models import OpenAPI, PathItem

from api.courier import SCHEDULE_S, Courier, Destinations, is_public, retry_after
from api.http.openapi import add_webhooks
from serving.registry import Registry
from store import webhooks as module
from store.errors import InvalidRequest, UnknownWebhook, WrongState
from store.records import DatasetCard, GateCard, Manifest, ReportCard
from store.webhooks import Delivery, Webhook, Webhooks, enqueue
from tests.conftest import Service, eventually, freeze, running_service, succeed
from trainer.jobs.records import Jobs

AT_ONCE = (0.0,) * 10  # as many attempts as in earnest, without pauses
LOOK_S = 0.01
ORDER = list(get_args(module.WebhookType))  # in which a job's may happen within a millisecond


@dataclass
class Received:
    """A request that has arrived."""

    headers: dict[str, str]
    body: bytes

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def payload(self) -> dict[str, Any]:
        return dict(json.loads(self.body))

    def signed_with(self, secret: str) -> bool:
        """Whether one of the signatures is that of a secret, as the specification has it."""
        key = base64.b64decode(secret.removeprefix("whsec_"))
        text = f"{self.id}.{self.headers['webhook-timestamp']}.{self.body.decode()}"
        expected = base64.b64encode(hmac.new(key, text.encode(), hashlib.sha256).digest()).decode()
        return f"v1,{expected}" in self.headers["webhook-signature"].split(" ")


@dataclass
class Receiver:
    """A server that receives webhooks, and answers with `answers`, then with 200."""

    port: int = 0
    answers: list[tuple[int, dict[str, str]]] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    hold: threading.Event | None = None  # until which nothing is answered

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook?token=t"

    def ids(self) -> list[str]:
        return [each.id for each in self.received]

    def types(self) -> list[str]:
        return [each.payload["type"] for each in self.received]


@contextlib.contextmanager
def receiving(certificate: Path | None = None) -> Iterator[Receiver]:
    """A receiver, with TLS if it has a file of its key and certificate."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/hook?token=t"
            receiver.received.append(Received({name.lower(): value for name, value in self.headers.items()}, body))
            status, headers = receiver.answers.pop(0) if receiver.answers else (200, {})
            if receiver.hold is not None:
                receiver.hold.wait(30)
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

    server = Server(("127.0.0.1", 0), Handler)
    receiver.port = server.server_address[1]
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield receiver
    finally:
        if receiver.hold is not None:
            receiver.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


@pytest.fixture
def webhooks(engine: sa.Engine) -> Webhooks:
    return Webhooks(engine)


def deliver(webhooks: Webhooks, until: Callable[[], Any], courier: Courier | None = None) -> None:
    """Run a courier until something is true."""
    courier = courier or Courier(webhooks, Destinations(private=True, http=True), schedule_s=AT_ONCE, look_s=LOOK_S)

    async def run() -> None:
        running = asyncio.create_task(courier.run())
        try:
            await asyncio.to_thread(eventually, lambda: until() or None, "it is delivered", 20.0)
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    asyncio.run(run())


def test_a_courier_that_ends_leaves_no_call_of_the_store_behind(
    webhooks: Webhooks, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, goes_on, ended = threading.Event(), threading.Event(), threading.Event()
    claim = webhooks.claim

    def slow_claim(*args: Any) -> Any:
        began.set()
        goes_on.wait(20)
        found = claim(*args)
        ended.set()
        return found

    def until() -> bool:
        if began.is_set():
            threading.Timer(0.3, goes_on.set).start()
        return began.is_set()

    monkeypatch.setattr(webhooks, "claim", slow_claim)
    deliver(webhooks, until)
    assert ended.is_set()


def tell(engine: sa.Engine, number: int = 1) -> None:
    with engine.begin() as connection:
        enqueue(connection, "model.label.moved", {"model": "m", "label": "stable", "from": None, "to": number})


def of(webhooks: Webhooks, webhook: Webhook, **filters: Any) -> list[Delivery]:
    return webhooks.deliveries(webhook.id, limit=100, **filters)[0]


def finished(webhooks: Webhooks, webhook: Webhook) -> Callable[[], bool]:
    return lambda: all(delivery.due_at is None for delivery in of(webhooks, webhook))


def test_a_delivery_is_signed_and_says_what_happened_and_when(
    engine: sa.Engine, webhooks: Webhooks, receiver: Receiver
) -> None:
    webhook = webhooks.create(receiver.url)
    tell(engine)
    deliver(webhooks, finished(webhooks, webhook))
    (delivery,) = of(webhooks, webhook)
    (got,) = receiver.received
    assert (delivery.status, delivery.attempts, delivery.http_status, delivery.error) == ("succeeded", 1, 200, None)
    assert got.id == delivery.id
    assert "." not in got.id
    assert got.signed_with(webhook.secret)
    assert not got.signed_with("whsec_" + base64.b64encode(bytes(32)).decode())
    assert len(base64.b64decode(webhook.secret.removeprefix("whsec_"))) >= 24
    assert abs(int(got.headers["webhook-timestamp"]) - time.time()) < 60
    assert got.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert got.payload == {
        "type": "model.label.moved",
        "timestamp": got.payload["timestamp"],
        "data": {"model": "m", "label": "stable", "from": None, "to": 1},
    }
    assert got.payload["timestamp"].endswith("Z")


def test_a_failed_delivery_comes_again_with_its_id_and_body_until_it_succeeds(
    engine: sa.Engine, webhooks: Webhooks, receiver: Receiver
) -> None:
    receiver.answers = [(500, {}), (302, {"Location": "/elsewhere"}), (404, {})]
    webhook = webhooks.create(receiver.url)
    tell(engine)
    deliver(webhooks, finished(webhooks, webhook))
    assert len(receiver.received) == 4
    assert len(set(receiver.ids())) == len({each.body for each in receiver.received}) == 1
    assert all(each.signed_with(webhook.secret) for each in receiver.received)
    assert [(each.status, each.attempts) for each in of(webhooks, webhook)] == [("succeeded", 4)]


def test_a_delivery_that_fails_to_the_end_is_listed_and_can_be_replayed(
    engine: sa.Engine, webhooks: Webhooks, receiver: Receiver
) -> None:
    assert len(SCHEDULE_S) == len(AT_ONCE)
    assert SCHEDULE_S[:3] == (0, 5, 300)
    assert sum(SCHEDULE_S) == 75 * 3600 + 35 * 60 + 5  # as in the specification's table
    receiver.answers = [(503, {})] * len(AT_ONCE)
    webhook = webhooks.create(receiver.url)
    tell(engine)
    deliver(webhooks, finished(webhooks, webhook))
    (failed,) = of(webhooks, webhook, status="failed")
    assert (failed.attempts, failed.http_status, failed.error) == (10, 503, "HTTP 503")
    assert of(webhooks, webhook, status="succeeded") == []
    replayed = webhooks.replay(webhook.id, failed.id)
    assert (replayed.status, replayed.attempts) == ("pending", 0)
    deliver(webhooks, finished(webhooks, webhook))
    assert set(receiver.ids()) == {failed.id}
    assert len(receiver.received) == 11
    with pytest.raises(UnknownWebhook, match="no delivery"):
        webhooks.replay(webhook.id, "msg-0")


def test_pauses_follow_the_schedule_with_jitter_and_retry_after_lengthens_them(
    engine: sa.Engine, webhooks: Webhooks, receiver: Receiver
) -> None:
    receiver.answers = [(503, {}), (503, {"Retry-After": "120"})]

    def has_failed_once(webhook: Webhook) -> bool:
        return of(webhooks, webhook)[0].attempts == 1

    for least_s, most_s in ((44.0, 56.0), (118.0, 121.0)):
        courier = Courier(webhooks, Destinations(private=True, http=True), schedule_s=(0.0, 50.0), look_s=LOOK_S)
        webhook = webhooks.create(receiver.url)
        tell(engine)
        deliver(webhooks, functools.partial(has_failed_once, webhook), courier)
        (delivery,) = of(webhooks, webhook)
        assert delivery.due_at is not None
        assert delivery.attempted_at is not None
        assert least_s < delivery.due_at - delivery.attempted_at < most_s
        webhooks.delete(webhook.id)


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7.0), ("x", 0.0), ("", 0.0), ("-3", 0.0), ("9" * 30, 86400.0),
                           ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0), ("Fri, 31 Dec 2999 23:59:59 GMT", 86400.0)],
)  # fmt: skip
def test_retry_after_is_a_number_or_a_date_within_a_day(value: str, seconds: float) -> None:
    assert retry_after(value) == seconds


def test_410_disables_the_endpoint_and_gives_up_what_waits(
    engine: sa.Engine, webhooks: Webhooks, receiver: Receiver
) -> None:
    receiver.answers = [(503, {}), (410, {})]
    webhook = webhooks.create(receiver.url)
    for number, until in (
        (1, lambda: of(webhooks, webhook)[0].attempts), (2, lambda: webhooks.get(webhook.id).disabled_at)
    ):  # fmt: skip
        tell(engine, number)
        rules = Destinations(private=True, http=True)
        deliver(webhooks, until, Courier(webhooks, rules, schedule_s=(0.0, 50.0), look_s=LOOK_S))
    assert webhooks.get(webhook.id).disabled_because == "HTTP 410"
    tell(engine, 3)
    assert {(each.data["to"], each.status, each.due_at) for each in of(webhooks, webhook)} == {
        (1, "failed", None), (2, "failed", None),
    }  # fmt: skip
    with pytest.raises(WrongState, match="is disabled"):
        webhooks.replay(webhook.id, of(webhooks, webhook)[0].id)


def test_old_and_new_secret_both_sign_until_the_rotation_ends(
    engine: sa.Engine, webhooks: Webhooks, receiver: Receiver
) -> None:
    first = webhooks.create(receiver.url)
    second = webhooks.rotate(first.id)
    assert second.secret != first.secret
    tell(engine)
    deliver(webhooks, finished(webhooks, first))
    third = webhooks.rotate(first.id, overlap_s=0.0)
    tell(engine)
    deliver(webhooks, finished(webhooks, first))
    signed = [[each.signed_with(webhook.secret) for webhook in (first, second, third)] for each in receiver.received]
    assert signed == [[True, True, False], [False, False, True]]
    assert receiver.received[0].headers["webhook-signature"].count(" ") == 1


def test_a_lease_that_nobody_settles_expires_and_its_late_holder_changes_nothing(
    engine: sa.Engine, webhooks: Webhooks, receiver: Receiver
) -> None:
    webhook = webhooks.create(receiver.url)
    tell(engine)
    (lost,) = webhooks.claim(lease_s=0.0)  # by a gateway that is killed
    (held,) = webhooks.claim()
    assert lost.delivery.id == held.delivery.id
    assert webhooks.claim() == []
    webhooks.settle(lost.delivery, module.Attempt(error="late", retry_in_s=0.0))
    assert of(webhooks, webhook)[0].attempts == 0
    webhooks.settle(held.delivery, module.Attempt(200))
    assert of(webhooks, webhook)[0].status == "succeeded"


def test_two_gateways_share_the_deliveries(engine: sa.Engine, webhooks: Webhooks, receiver: Receiver) -> None:
    webhook = webhooks.create(receiver.url)
    for number in range(40):
        tell(engine, number)
    done: Callable[[], bool] = finished(webhooks, webhook)
    threads = [threading.Thread(target=deliver, args=(webhooks, done)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(receiver.received) == len(set(receiver.ids())) == 40


def test_an_endpoint_that_hangs_delays_no_other(engine: sa.Engine, webhooks: Webhooks, receiver: Receiver) -> None:
    with receiving() as hanging:
        hanging.hold = threading.Event()
        slow = [webhooks.create(hanging.url) for _ in range(3)]
        fast = webhooks.create(receiver.url)
        for number in range(30):
            tell(engine, number)
        deliver(webhooks, finished(webhooks, fast))
        assert len(receiver.received) == 30
        assert [each.error for webhook in slow for each in of(webhooks, webhook) if each.attempts] == []
        courier = Courier(
            webhooks, Destinations(private=True, http=True), schedule_s=(0.0,), look_s=LOOK_S, timeout_s=0.2
        )
        with engine.begin() as connection:  # the leases of the courier that was stopped
            connection.execute(
                module.deliveries.update().where(module.deliveries.c.lease.is_not(None)).values(due_at=0)
            )
        deliver(webhooks, lambda: of(webhooks, slow[0], status="failed"), courier)
        assert of(webhooks, slow[0], status="failed")[0].error == "no answer within 0.2 s"


def test_what_is_rolled_back_is_never_told_and_what_is_committed_is(engine: sa.Engine, webhooks: Webhooks) -> None:
    webhook = webhooks.create("https://example.com/")

    def fail(_: sa.Connection) -> None:
        raise WrongState("no")

    registry = Registry(engine)
    version = registry.reserve("m", None, Manifest(classes=("a",)), ReportCard())
    with pytest.raises(WrongState):
        registry.go_live("m", version, fence=fail)
    assert of(webhooks, webhook) == []
    registry.go_live("m", version)
    assert [each.data for each in of(webhooks, webhook)] == [{"model": "m", "label": "stable", "from": None, "to": 1}]


def happen(engine: sa.Engine) -> None:
    """Have jobs end in every way, and labels move."""
    jobs, registry = Jobs(engine), Registry(engine)

    def run() -> Any:
        jobs.create(model="m", base="lenet5:1", spec={}, dataset=DatasetCard(id="d", images=4))
        return jobs.claim("w")

    job = run()
    jobs.set_stage(job, "training")
    jobs.append_event(job, "epoch", {"epoch": 1})
    jobs.requeue(job)
    job = jobs.claim("w")
    assert job is not None
    succeed(jobs, job, 1)
    open_report = jobs.unreported("w")
    assert open_report is not None
    jobs.reported(open_report, "complete")
    jobs.finish(run(), "failed", error={"code": "diverged", "message": "x", "param": None})
    cancelled = jobs.create(model="m", base="lenet5:1", spec={}, dataset=DatasetCard(id="d", images=4))
    jobs.cancel(cancelled.id)
    registry.go_live("m", registry.reserve("m", None, Manifest(classes=("a",)), ReportCard()))
    registry.go_live("m", registry.reserve("m", None, Manifest(classes=("a",)), ReportCard()), "canary")
    failed = ReportCard(gate=GateCard(passed=False))
    number = registry.reserve("m", None, Manifest(classes=("a",)), failed)
    registry.go_live("m", number, takes_label=lambda stable: False)
    registry.put_label("m", "canary", 2, 0.5)  # moves nothing
    registry.put_label("m", "beta", number, override=True)
    registry.put_label("m", "stable", 2)
    registry.drop_label("m", "canary")
    registry.retire("m")


def test_every_change_of_a_job_and_every_move_of_a_label_is_told_to_those_who_want_it(
    engine: sa.Engine, webhooks: Webhooks
) -> None:
    everything, failures = webhooks.create("https://example.com/"), webhooks.create(
        "https://example.com/", ["fine_tuning.job.failed"]
    )  # fmt: skip
    other = webhooks.create("https://example.com/", tenant="other")
    happen(engine)
    told = sorted(of(webhooks, everything), key=lambda each: (each.created_at, ORDER.index(each.type)))
    of_job: dict[str, list[str]] = {}
    for each in told:
        if "id" in each.data:
            of_job.setdefault(each.data["id"], []).append(each.type.removeprefix("fine_tuning.job."))
    assert sorted(of_job.values()) == [
        ["created", "cancelled"], ["created", "running", "failed"],
        ["created", "running", "running", "succeeded", "report_completed"],
    ]  # fmt: skip
    moves = {(each.data["label"], each.data["from"], each.data["to"]) for each in told if "label" in each.type}
    assert moves == {("stable", None, 1), ("canary", None, 2), ("stable", 1, 2), ("canary", 2, None),
                     ("stable", 2, None), ("beta", None, 3), ("beta", 3, None)}  # fmt: skip
    assert [each.data["to"] for each in told if each.data.get("override")] == [3]
    assert len(told) == 17
    (failed,) = of(webhooks, failures)
    assert failed.data["error"]["code"] == "diverged"
    assert set(failed.data) == {"id", "model", "label", "status", "version", "preview_version", "error",
                                "report_status", "gate"}  # fmt: skip
    assert [each.data["version"] for each in told if each.type == "fine_tuning.job.succeeded"] == [1]
    assert webhooks.deliveries(other.id, limit=9, tenant="other") == ([], False)
    with pytest.raises(UnknownWebhook):
        webhooks.get(other.id)


KINDS: dict[str, type | tuple[type, ...]] = {
    "object": dict, "string": str, "integer": int, "number": (int, float), "null": type(None), "boolean": bool,
}  # fmt: skip


def check(value: Any, schema: dict[str, Any], schemas: dict[str, Any]) -> None:
    """Assert that a JSON value is as documented, and has no field that is not."""
    known = {"$ref", "additionalProperties", "anyOf", "const", "default", "description", "enum", "examples", "format",
             "pattern", "properties", "required", "title", "type"}  # fmt: skip
    assert set(schema) <= known, f"{schema}: what this does not know it does not check"
    if "$ref" in schema:
        check(value, schemas[schema["$ref"].removeprefix("#/components/schemas/")], schemas)
    if "anyOf" in schema:
        failures = []
        for option in schema["anyOf"]:
            try:
                check(value, option, schemas)
                break
            except AssertionError as exc:
                failures.append(exc)
        else:
            raise AssertionError(f"{value!r} is none of {schema['anyOf']}: {failures}")
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        assert any(isinstance(value, KINDS[kind]) for kind in kinds), f"{value!r} is no {kinds}"
    assert value == schema.get("const", value)
    assert value in schema.get("enum", [value])
    assert re.search(schema.get("pattern", ""), str(value)), f"{value!r} does not match {schema['pattern']}"
    if schema.get("format") == "date-time":
        assert datetime.fromisoformat(value).tzinfo
    if "properties" in schema:
        assert set(schema.get("required", [])) <= set(value) <= set(schema["properties"])
        for name, inner in value.items():
            check(inner, schema["properties"][name], schemas)


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    """The OpenAPI document."""
    return dict(service.api.get("/openapi.json").json())


def test_every_type_and_what_is_sent_for_it_is_as_documented(
    engine: sa.Engine, webhooks: Webhooks, receiver: Receiver, document: dict[str, Any]
) -> None:
    webhook = webhooks.create(receiver.url)
    webhooks.rotate(webhook.id)  # so that deliveries have two signatures
    happen(engine)
    deliver(webhooks, finished(webhooks, webhook))
    assert set(receiver.types()) == set(document["webhooks"]) == set(ORDER)
    for got in receiver.received:
        about = document["webhooks"][got.payload["type"]]["post"]
        schemas = document["components"]["schemas"]
        check(got.payload, about["requestBody"]["content"][got.headers["content-type"]]["schema"], schemas)
        assert {(header["in"], header["required"]) for header in about["parameters"]} == {("header", True)}
        names = {header["name"] for header in about["parameters"]}
        assert names == {name for name in got.headers if name.startswith("webhook-")}
        for header in about["parameters"]:
            sent: Any = got.headers[header["name"]]
            check(int(sent) if header["schema"]["type"] == "integer" else sent, header["schema"], schemas)


def test_what_is_documented_of_webhooks_is_valid_openapi_and_described(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    read = OpenAPI.model_validate(document)
    assert read.webhooks
    for kind, item in read.webhooks.items():
        assert isinstance(item, PathItem)
        assert item.post
        assert item.post.operationId == kind
        assert item.post.summary
        assert item.post.description
        assert all("description" in parameter for parameter in document["webhooks"][kind]["post"]["parameters"])
        assert {"2XX", "410", "default"} == set(item.post.responses or {})


def test_the_document_is_made_only_when_it_is_asked_for() -> None:
    app = FastAPI()
    add_webhooks(app)
    assert app.openapi_schema is None


def test_old_deliveries_and_disabled_endpoints_go_and_the_rest_stays(
    engine: sa.Engine, webhooks: Webhooks, receiver: Receiver
) -> None:
    receiver.answers = [(410, {})]
    gone = webhooks.create(receiver.url)
    tell(engine)
    deliver(webhooks, lambda: webhooks.get(gone.id).disabled_at)
    kept = webhooks.create(receiver.url)
    tell(engine)
    webhooks.clean_up()
    assert len(of(webhooks, gone)) == 1
    webhooks.clean_up(keep_s=-1.0)
    with pytest.raises(UnknownWebhook):
        webhooks.get(gone.id)
    assert [delivery.status for delivery in of(webhooks, kept)] == ["pending"]
    deliver(webhooks, finished(webhooks, kept))
    webhooks.clean_up(keep_s=-1.0)
    assert of(webhooks, kept) == []


def test_a_tenant_has_a_bounded_number_of_webhooks(webhooks: Webhooks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_WEBHOOKS", 1)
    webhooks.create("https://example.com/")
    webhooks.create("https://example.com/", tenant="other")
    with pytest.raises(WrongState, match="1 webhooks already"):
        webhooks.create("https://example.com/")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.215.14", True), ("2606:2800:21f:cb07::1", True), ("127.0.0.1", False), ("10.1.2.3", False),
        ("172.16.0.1", False), ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("0.0.0.0", False), ("224.0.0.1", False), ("255.255.255.255", False), ("::1", False), ("::", False),
        ("fe80::1%eth0", False), ("fc00::1", False), ("fec0::1", False), ("ff02::1", False),
        ("::ffff:127.0.0.1", False), ("::ffff:93.184.215.14", True), ("64:ff9b::10.0.0.1", False),
        ("2002:7f00:1::", False), ("::127.0.0.1", False),
    ],
)  # fmt: skip
def test_only_addresses_of_the_internet_are_public(address: str, public: bool) -> None:
    assert is_public(address) is public


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com/", "must begin with https://"), ("ftp://example.com/", "must begin with https://"),
        ("file:///etc/passwd", "must begin with https://"), ("example.com", "must begin with https://"),
        ("https://", "must have a host"), ("https://a:99999/", "port"), ("https://a:x/", "is not a URL"),
        ("https://u:p@example.com/", "user"),
        ("https://example.com/#x", "fragment"), ("https://example.com:0/", "port"),
        ("https://127.0.0.1/", "is not public"), ("https://[::1]/", "is not public"),
        ("https://2130706433/", "is not public"), ("https://0x7f.1/", "is not public"),
        ("https://localhost/", "is not public"), ("https://[::ffff:10.0.0.1]/", "is not public"),
    ],
)  # fmt: skip
def test_what_leads_inside_is_refused(url: str, message: str) -> None:
    destinations = Destinations(private=False, http=False)
    with pytest.raises(InvalidRequest, match=message) as refusal:
        asyncio.run(destinations.addresses(destinations.parse(url)))
    assert refusal.value.param == "url"


def entry(address: str) -> Any:
    return (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))


def test_a_name_with_one_address_inside_is_refused_at_every_attempt(
    engine: sa.Engine, webhooks: Webhooks, receiver: Receiver
) -> None:
    answers: list[list[Any]] = [[entry("93.184.215.14")]]  # when it is registered; later it points inside as well

    def resolve(host: str, *_: Any, **__: Any) -> Sequence[Any]:
        assert host == "hook.example.com"
        return answers.pop(0) if answers else [entry("93.184.215.14"), entry("127.0.0.1")]

    rules = Destinations(private=False, http=True, resolve=resolve)
    courier = Courier(webhooks, rules, schedule_s=(0.0, 0.0), look_s=LOOK_S)
    url = f"http://hook.example.com:{receiver.port}/hook?token=t"
    asyncio.run(courier.check(url))
    webhook = webhooks.create(url)
    tell(engine)
    deliver(webhooks, finished(webhooks, webhook), courier)
    (delivery,) = of(webhooks, webhook)
    assert (delivery.status, delivery.attempts) == ("failed", 2)
    assert delivery.error is not None
    assert "an address that is not public" in delivery.error
    assert receiver.received == []


def test_the_connection_goes_to_the_address_that_was_checked(
    engine: sa.Engine, webhooks: Webhooks, receiver: Receiver
) -> None:
    looked_up: list[str] = []

    def resolve(host: str, *_: Any, **__: Any) -> Sequence[Any]:
        looked_up.append(host)
        return [entry("127.0.0.1")]

    courier = Courier(webhooks, Destinations(private=True, http=True, resolve=resolve), look_s=LOOK_S)
    webhook = webhooks.create(f"http://hook.invalid:{receiver.port}/hook?token=t")  # which nobody else can look up
    tell(engine)
    deliver(webhooks, finished(webhooks, webhook), courier)
    assert looked_up == ["hook.invalid"]
    assert receiver.received[0].headers["host"] == f"hook.invalid:{receiver.port}"


def test_tls_is_verified_for_the_name_and_not_for_the_address(
    engine: sa.Engine, webhooks: Webhooks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not shutil.which("openssl"):
        pytest.skip("no openssl on this machine")
    file = tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=hook.invalid",
         "-addext", "subjectAltName=DNS:hook.invalid", "-keyout", file, "-out", tmp_path / "certificate"],
        check=True, capture_output=True,
    )  # fmt: skip
    certificate = (tmp_path / "certificate").read_text()
    file.write_text(file.read_text() + certificate)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate"))
    with receiving(file) as receiver:
        rules = Destinations(private=True, http=False, resolve=lambda *_, **__: [entry("127.0.0.1")])
        right, wrong = (
            webhooks.create(f"https://{name}:{receiver.port}/hook?token=t")
            for name in ("hook.invalid", "other.invalid")
        )
        tell(engine)
        courier = Courier(webhooks, rules, schedule_s=(0.0,), look_s=LOOK_S)
        deliver(webhooks, lambda: finished(webhooks, right)() and finished(webhooks, wrong)(), courier)
        assert [delivery.status for delivery in of(webhooks, right)] == ["succeeded"]
        (refused,) = of(webhooks, wrong)
        assert refused.status == "failed"
        assert refused.error is not None
        assert "certificate" in refused.error.lower()
        assert len(receiver.received) == 1


@pytest.mark.slow
def test_a_fine_tune_is_told_from_its_creation_to_its_complete_report(
    service: Service, receiver: Receiver, digits_zip: bytes
) -> None:
    made = service.api.post("/webhooks", json={"url": receiver.url})
    webhook = made.json()
    assert (made.status_code, made.headers["location"]) == (201, f"/webhooks/{webhook['id']}")
    job = service.finetune(digits_zip, "told", '{"epochs": 1}').json()
    expected = ["created", "running", "succeeded", "report_completed"]

    def of_job() -> list[Received]:
        return [each for each in receiver.received if each.payload["data"].get("id") == job["id"]]

    eventually(lambda: len(of_job()) == len(expected), "everything is told", 120.0)
    told = sorted(of_job(), key=lambda each: (each.payload["timestamp"], ORDER.index(each.payload["type"])))
    assert [each.payload["type"].removeprefix("fine_tuning.job.") for each in told] == expected
    assert all(each.signed_with(webhook["secret"]) for each in receiver.received)
    assert {"model": "told", "label": "stable", "from": None, "to": 1} in [
        each.payload["data"] for each in receiver.received
    ]
    path = f"/webhooks/{webhook['id']}"
    page = service.api.get(f"{path}/deliveries", params={"limit": 2}).json()
    assert (len(page["data"]), page["has_more"]) == (2, True)
    rest = service.api.get(f"{path}/deliveries", params={"after": page["data"][-1]["id"]}).json()
    assert page["data"][-1]["id"] > rest["data"][0]["id"]
    assert service.api.get(f"{path}/deliveries", params={"status": "failed"}).json()["data"] == []
    again = service.api.post(f"{path}/deliveries/{told[0].id}/replay")
    assert (again.status_code, again.json()["status"]) == (202, "pending")
    eventually(lambda: receiver.ids().count(told[0].id) == 2, "it is replayed")
    rotated = service.api.post(f"{path}/rotate").json()
    assert rotated["secret"] != webhook["secret"]
    assert rotated["old_secret_until"] > time.time()
    shown = service.api.get(path).json()
    assert "secret" not in shown
    assert (shown["status"], shown["types"]) == ("enabled", None)
    assert webhook["id"] in [each["id"] for each in service.api.get("/webhooks").json()["data"]]
    assert service.api.delete(path).json() == {"id": webhook["id"], "deleted": True}
    assert service.api.get(path).status_code == 404


def test_a_registration_that_is_repeated_with_its_key_is_one_webhook_until_that_is_deleted(
    service: Service, receiver: Receiver
) -> None:
    key = {"Idempotency-Key": "hook-once"}
    first, again = (service.api.post("/webhooks", json={"url": receiver.url}, headers=key) for _ in range(2))
    assert (first.status_code, first.headers["Location"]) == (201, f"/webhooks/{first.json()['id']}")
    assert (again.status_code, again.headers["Location"], again.json()) == (
        201,
        first.headers["Location"],
        first.json(),
    )
    urls = [webhook["url"] for webhook in service.api.get("/webhooks").json()["data"]]
    assert urls.count(receiver.url) == 1
    other = service.api.post("/webhooks", json={"url": receiver.url, "types": ["model.label.moved"]}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")
    service.api.delete(first.headers["Location"])
    anew = service.api.post("/webhooks", json={"url": receiver.url}, headers=key)
    assert (anew.status_code, anew.json()["id"] != first.json()["id"]) == (201, True)
    service.api.delete(anew.headers["Location"])


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "param"),
    [
        ("POST", "", {}, 422, "url"),
        ("POST", "", {"url": 7}, 422, "url"),
        ("POST", "", {"url": ""}, 422, "url"),
        ("POST", "", {"url": "gopher://example.com"}, 422, "url"),
        ("POST", "", {"url": "https://nowhere.invalid/"}, 422, "url"),
        ("POST", "", {"url": "https://example.com/", "types": ["job.done"]}, 422, "types.0"),
        ("POST", "", {"url": "https://example.com/", "types": []}, 422, "types"),
        ("POST", "", {"url": "https://example.com/", "secret": "x"}, 422, "secret"),
        ("GET", "/none", None, 404, "id"),
        ("DELETE", "/none", None, 404, "id"),
        ("POST", "/none/rotate", None, 404, "id"),
        ("GET", "/none/deliveries", None, 404, "id"),
        ("GET", "/none/deliveries?status=lost", None, 422, "status"),
        ("POST", "/none/deliveries/none/replay", None, 404, "id"),
        ("GET", "?after=none", None, 404, "after"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    service: Service, method: str, path: str, body: Any, status: int, param: str
) -> None:
    answer = service.api.request(method, f"/webhooks{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


@pytest.mark.exhaustive
def test_a_gateway_killed_between_what_happens_and_its_delivery_loses_nothing(
    tmp_path: Path, receiver: Receiver, digits_zip: bytes
) -> None:
    with running_service(tmp_path) as service:
        webhook = service.api.post("/webhooks", json={"url": receiver.url}).json()
        (gateway,) = service.children("api")
        job = service.finetune(digits_zip, "m", '{"epochs": 1}').json()
        freeze(gateway)  # it delivers nothing, while the worker goes on
        eventually(lambda: tmp_path.joinpath("models/m/1").is_dir(), "the version is there")
        with contextlib.suppress(ProcessLookupError):  # the supervisor may have replaced it, as it does not answer
            os.kill(gateway, signal.SIGKILL)
        expected = {"created", "running", "succeeded", "report_completed"}

        def told() -> set[str]:
            found = [each.payload for each in receiver.received]
            return {payload["type"].rpartition(".")[2] for payload in found if payload["data"].get("id") == job["id"]}

        eventually(lambda: told() == expected, "everything is told", 120.0)
        assert all(each.signed_with(webhook["secret"]) for each in receiver.received)
        page = service.api.get(f"/webhooks/{webhook['id']}/deliveries").json()["data"]
        assert {each["id"] for each in page} == set(receiver.ids())
