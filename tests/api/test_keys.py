"""Who comes in, how far, and what a tenant can learn of another: a gateway with keys, in front of real models."""

import asyncio
import base64
import contextlib
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from api.http.keys import HOLD_S, PAUSE_S, KeyRing, scope_of
from serving.client import ModelServer
from serving.pb import model_server_pb2 as pb
from serving.publishing import seal
from serving.registry import BASE, is_visible, stored_name
from store.errors import InvalidRequest, ModelServerError, UnknownKey
from store.keys import Keys, digest_of, is_well_formed
from store.processes import free_port
from store.records import SCOPES, public_name
from store.settings import ClientTLS, Settings, from_environment
from tests.conftest import Place, eventually, opened, png, zipped
from tests.trainer.test_datasets import DOT
from trainer.jobs.feedback import Feedback

DEFAULT, ACME = "default", "acme"
RAW = {"Content-Type": "application/octet-stream"}
UPLOAD = zipped({f"{name}/{i}.png": png(DOT) for name in "ab" for i in range(2)})
ABSENT = {  # nobody's
    "model": "absent", "job": "ftjob-00000000000aaaaaaaaaa", "dataset": 64 * "0", "webhook": "webhook-00000",
    "delivery": "msg_00000", "prediction": "pred-00000", "correction": "fb-00000",
}  # fmt: skip


@dataclass
class Guarded:
    """A home with models and jobs of two tenants, a gateway that requires keys, and keys."""

    place: Place
    url: str
    log: Path
    keys: Keys
    tokens: dict[tuple[str, str], str] = field(default_factory=dict)  # by tenant and scope

    def ask(self, tenant: str = DEFAULT, scope: str = "admin", **headers: str) -> httpx.Client:
        authorization = {"Authorization": f"Bearer {self.tokens[tenant, scope]}"}
        return httpx.Client(base_url=self.url, headers={**authorization, **headers}, timeout=30)

    def publish(self, tenant: str, model: str) -> int:
        """A copy of the base, whose classes are called after the tenant, as the next version of a model."""
        place, name = self.place, stored_name(tenant, model)
        base = place.registry.find(BASE)
        classes = tuple(f"{tenant}-{digit}" for digit in range(10))
        manifest = base.manifest.model_copy(update={"classes": classes})
        version = place.registry.reserve(name, None, manifest, base.report)
        folder = place.settings.version(name, version)
        shutil.copytree(place.settings.version(BASE, 1), folder)
        (folder / "assets.extra" / "delta.npz").write_bytes(tenant.encode())
        seal(folder)
        place.registry.go_live(name, version)
        return version

    def job(self, tenant: str) -> str:
        """A queued job, which no worker will take."""
        job = self.place.jobs.create(
            tenant=tenant, model=stored_name(tenant, "digits"), base="lenet5:1", spec={}, dataset=self.place.dataset
        )
        return job.id


@contextlib.contextmanager
def running_gateway(home: Path, log: Path, *, ready: bool = True, **environment: str) -> Iterator[str]:
    """A gateway of its own; yields its URL."""
    port = free_port()
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "api"], stdout=file, stderr=file,
            env={**os.environ, "TEMPER_HOME": str(home), "TEMPER_PORT": str(port), **environment},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        eventually(lambda: not ready or httpx.get(f"{url}/readyz").status_code == 200, "the gateway is ready")
        yield url
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def guarded(
    tmp_path_factory: pytest.TempPathFactory, model_server: str, digits: tuple[np.ndarray, np.ndarray]
) -> Iterator[Guarded]:
    home = tmp_path_factory.mktemp("guarded")
    place, log = Place(home, model_server, digits), home / "gateway.log"
    keys = Keys(place.engine)
    with running_gateway(
        home, log, TEMPER_MODEL_SERVER=model_server, TEMPER_KEYS="required", TEMPER_WEBHOOK_PRIVATE="true"
    ) as url:
        made = Guarded(place, url, log, keys)
        for tenant in (DEFAULT, ACME):
            made.tokens |= {(tenant, scope): keys.create(f"{tenant} {scope}", tenant, [scope])[1] for scope in SCOPES}
            made.publish(tenant, "digits")
        made.publish(ACME, "digits")
        made.publish(ACME, "secret")
        made.publish(DEFAULT, "hidden")
        with made.ask() as api:
            eventually(lambda: predicts(api, "hidden"), "the models are served")
        yield made
    place.servers[0].reload(home, {})
    place.engine.dispose()


def predicts(api: httpx.Client, model: str) -> bool:
    return api.post(f"/predict?model={model}", content=bytes(784), headers=RAW).status_code == 200


def operations(document: dict[str, Any]) -> list[tuple[str, str]]:
    """Method and path of everything in an OpenAPI document."""
    return [(method.upper(), path) for path, item in document["paths"].items() for method in item]


def document_of(guarded: Guarded) -> dict[str, Any]:
    with guarded.ask() as api:
        found: dict[str, Any] = api.get("/openapi.json").raise_for_status().json()
        return found


FILLED = {
    "model": BASE, "name": BASE, "version": "1", "label": "stable", "id": ABSENT["job"],
    "delivery": ABSENT["delivery"], "epoch": "1",
}  # fmt: skip
IDS = {
    "/feedback": "correction",
    "/datasets": "dataset",
    "/webhooks": "webhook",
    "/openai/v1/files": "dataset",
}  # others are of jobs
CREATE = {"/datasets", "/webhooks", "/openai/v1/files"}  # make and list one's own, and name nothing


def filled(path: str, **given: str) -> str:
    """A path with values for its parameters. A new kind of parameter has to be added here, and to `Strangers`."""
    return re.sub(r"\{(\w+)\}", lambda match: {**FILLED, **given}[match[1]], path)


def test_every_route_wants_a_key_but_for_two(guarded: Guarded) -> None:
    pages = [("GET", path) for path in ("/docs", "/openapi.json", "/static-offline-docs/swagger-ui.css", "/none")]
    with httpx.Client(base_url=guarded.url) as api:
        for method, path in [*operations(document_of(guarded)), *pages]:
            for headers in ({}, {"Authorization": "Bearer tmp_1"}, {"Authorization": "Basic !"}, {"X-API-Key": "1"}):
                answer = api.request(method, filled(path), headers=headers)
                if path in ("/healthz", "/readyz"):
                    assert answer.status_code == 200, path
                    continue
                assert answer.status_code == 401, (method, path)
                assert answer.headers["WWW-Authenticate"] == 'Bearer realm="temper"'
                if not path.startswith(("/v1/", "/v2")):
                    assert answer.json()["error"]["code"] == "unauthorized"


def test_a_key_is_told_by_its_form_its_checksum_and_its_hash(guarded: Guarded) -> None:
    token = guarded.tokens[DEFAULT, "predict"]
    assert re.fullmatch("tmp_[0-9a-f]{72}", token)
    assert is_well_formed(token.encode())
    assert not is_well_formed(token[:-1].encode() + (b"1" if token[-1] == "0" else b"0"))
    another = "ab" * 32
    forged = f"tmp_{another}{zlib.crc32(another.encode()):08x}"
    assert is_well_formed(forged.encode())
    for wrong in (forged, token, token[:-1], token.upper(), f"x {token}", token + "0"):
        answer = httpx.get(f"{guarded.url}/models", headers={"X-API-Key": wrong})
        assert (answer.status_code == 200) == (wrong == token), wrong
    with guarded.place.engine.connect() as connection:
        stored = str(connection.execute(sa.text("SELECT * FROM api_keys")).all())
    assert token[4:] not in stored
    assert digest_of(token.encode()).hex() in stored


def test_a_key_comes_in_any_of_three_headers(guarded: Guarded) -> None:
    token = guarded.tokens[DEFAULT, "predict"]
    basic = base64.b64encode(f"anyone:{token}".encode()).decode()
    for headers in ({"Authorization": f"bearer {token}"}, {"X-API-Key": token}, {"Authorization": f"Basic {basic}"}):
        assert httpx.get(f"{guarded.url}/models", headers=headers).status_code == 200, headers
    asked = httpx.get(f"{guarded.url}/docs", headers={"Accept": "text/html"})
    assert asked.headers["WWW-Authenticate"].startswith("Basic ")  # so that a browser asks for it


ALLOWED = {  # the scopes with which a request is let in, whatever comes of it then
    ("POST", "/predict"): {"predict", "admin"},
    ("POST", f"/v1/models/{BASE}:predict"): {"predict", "admin"},
    ("GET", f"/v2/models/{BASE}"): {"predict", "admin"},
    ("GET", "/models"): {"predict", "finetune", "admin"},
    ("GET", f"/models/{BASE}/versions/1/report"): {"predict", "finetune", "admin"},  # which `finetune --wait` shows
    ("GET", f"/models/{BASE}/versions/1/delta"): {"finetune", "admin"},
    ("PUT", f"/models/{BASE}/labels/x"): {"finetune", "admin"},
    ("DELETE", "/models/absent"): {"finetune", "admin"},
    ("GET", "/finetune"): {"finetune", "admin"},
    ("POST", "/finetune"): {"finetune", "admin"},
    ("GET", f"/finetune/{ABSENT['job']}/events"): {"finetune", "admin"},
    ("GET", "/unheard-of"): {"finetune", "admin"},  # what nobody has thought about is not for predicting
    ("GET", "/metrics"): {"admin"},
    ("POST", "/metrics"): {"admin"},
    ("GET", "/docs"): {"predict", "finetune", "admin"},
    ("GET", "/key"): {"predict", "finetune", "admin"},
}


@pytest.mark.parametrize("operation", ALLOWED, ids=" ".join)
def test_a_scope_lets_in_where_it_should(guarded: Guarded, operation: tuple[str, str]) -> None:
    method, path = operation
    for scope in SCOPES:
        with guarded.ask(scope=scope) as api:
            answer = api.request(method, path)
        assert (answer.status_code == 403) == (scope not in ALLOWED[operation]), (scope, answer.text)
        if answer.status_code == 403:
            assert repr(scope_of(method, path)) in answer.text


def test_a_body_is_not_read_before_the_key_is_checked(guarded: Guarded) -> None:
    with socket.create_connection(("127.0.0.1", httpx.URL(guarded.url).port)) as connection:
        connection.settimeout(10)
        connection.sendall(b"POST /finetune HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100000000\r\n\r\n")
        answer = connection.recv(1 << 16)
    assert answer.startswith(b"HTTP/1.1 401")
    assert b"connection: close" in answer


def test_a_key_works_at_once_and_ends_within_two_seconds(guarded: Guarded) -> None:
    key, token = guarded.keys.create("short-lived", scopes=["predict"])
    headers = {"X-API-Key": token}
    with httpx.Client(base_url=guarded.url, headers=headers) as api:
        assert api.get("/models").status_code == 200
        guarded.keys.revoke(key.id)
        eventually(lambda: api.get("/models").status_code == 401, "the key is refused", timeout_s=2.0)


def test_a_stream_of_events_ends_when_its_key_is_revoked(guarded: Guarded) -> None:
    key, token = guarded.keys.create("follows a job", scopes=["finetune"])
    path = f"/finetune/{guarded.job(DEFAULT)}/events"
    headers = {"X-API-Key": token, "Accept": "text/event-stream"}
    with httpx.stream("GET", f"{guarded.url}{path}", headers=headers, timeout=20) as answer:
        lines = answer.iter_lines()
        assert next(lines) == "event: status"
        guarded.keys.revoke(key.id)
        began = time.monotonic()
        assert not any(line.startswith(":") for line in lines), "it has been kept alive"
        assert time.monotonic() - began < 5.0
    assert httpx.get(f"{guarded.url}{path}", headers=headers).status_code == 401


def test_readiness_shows_details_only_to_those_with_a_key(guarded: Guarded) -> None:
    assert httpx.get(f"{guarded.url}/readyz").json() == {"status": "ready"}
    with guarded.ask(scope="predict") as api:
        assert "model_servers" in api.get("/readyz").json()


def test_the_document_names_what_the_guard_answers(guarded: Guarded) -> None:
    document = document_of(guarded)
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    for item in document["paths"].values():
        for operation in item.values():
            assert {"401", "403"} <= set(operation["responses"])
            assert operation["security"]


def test_tenants_have_models_of_the_same_name_and_the_base_in_common(guarded: Guarded) -> None:
    for tenant, model, versions in ((DEFAULT, "hidden", [1]), (ACME, "secret", [2, 1])):
        with guarded.ask(tenant) as api:
            names = {found["name"]: found["versions"] for found in api.get("/models").json()["data"]}
            assert names == {BASE: [1], model: [1], "digits": versions}
            for path, body in (
                ("/predict", {"model": "digits", "instances": [[0] * 784]}),
                ("/predict", {"model": BASE, "instances": [[0] * 784]}),
            ):
                answer = api.post(path, json=body).raise_for_status()
                found = answer.json()
                assert answer.headers["X-Temper-Model"] == found["model"] == body["model"]
                assert found["classes"][0] == ("0" if body["model"] == BASE else f"{tenant}-0")
            tensorflow = api.post("/v1/models/digits:predict", json={"instances": [[0] * 784]}).json()
            assert tensorflow["model_spec"]["name"] == "digits"
            assert api.get("/v2/models/digits").json()["versions"] == [str(number) for number in reversed(versions)]
            assert api.get("/models/digits/versions/1/delta").content == tenant.encode()


def test_an_admin_acts_for_another_tenant_and_nobody_else_does(guarded: Guarded) -> None:
    for scope, status in (("admin", 200), ("finetune", 403)):
        with guarded.ask(scope=scope, **{"X-Temper-Tenant": ACME}) as api:
            assert api.get("/finetune").status_code == status
    with guarded.ask(**{"X-Temper-Tenant": "No Tenant"}) as api:
        assert api.get("/models").status_code == 403
    with guarded.ask(**{"X-Temper-Tenant": ACME}) as api:
        assert "secret" in api.get("/models").text


def test_only_the_default_tenant_labels_the_base(guarded: Guarded) -> None:
    with guarded.ask(ACME) as api:
        assert api.put(f"/models/{BASE}/labels/mine", json={"version": 1}).status_code == 403
        assert api.delete(f"/models/{BASE}/labels/mine").status_code == 403
        assert api.put(f"/models/{BASE}/gate", json={"accuracy": 1}).status_code == 403
        assert api.delete(f"/models/{BASE}/gate").status_code == 403


def test_no_url_reaches_the_stored_name_of_another_tenants_model(guarded: Guarded) -> None:
    stored = stored_name(ACME, "secret")
    with guarded.ask(DEFAULT) as api:
        for path in (f"/v1/models/{stored}:predict", f"/v1/models/{stored}/versions/1:predict"):
            answer = api.post(path, json={"instances": [[0] * 784]})
            assert (answer.status_code, stored in answer.json()["error"]) == (404, True)
        assert api.post(f"/v2/models/{stored}/infer", json={}).status_code in (400, 404)
        assert api.get(f"/models/{stored}").status_code == 422
        assert api.post("/predict", json={"model": stored, "instances": [[0] * 784]}).status_code == 422
    for tenant in (DEFAULT, "a", ACME):
        for name in ("x", "a~x", "acme~x", "default~x", "~x", "x~"):
            assert public_name(stored_name(tenant, name)) == name
            assert [is_visible(other, stored_name(tenant, name)) for other in (DEFAULT, "a", ACME)] == [
                other == tenant for other in (DEFAULT, "a", ACME)
            ]


IMAGES = {"instances": [[0] * 784]}
TENSOR = {"name": "image", "shape": [1, 784], "datatype": "UINT8", "data": [0] * 784}


def body_for(method: str, path: str, things: Mapping[str, str], version: str) -> dict[str, Any]:
    """Arguments of a request that is right but for whose things it names."""
    model = things["model"]
    if path.endswith("/gate"):
        return {"json": {"accuracy": 0.5}}
    if method == "PUT":
        return {"json": {"version": int(version)}}
    if path in ("/predict", "/explain"):
        return {"json": {"model": model, **IMAGES}}
    if path == "/feedback":
        return {"json": {"id": things["prediction"], "label": "a"}}
    if path.startswith("/v1/"):
        return {"json": IMAGES}
    if path.endswith("/infer"):
        return {"json": {"inputs": [TENSOR]}}
    if path.endswith("/publish"):
        return {"json": {"label": "stable"}}
    if path == "/openai/v1/fine_tuning/jobs":
        return {"json": {"model": f"{model}:{version}", "training_file": things["dataset"]}}
    if path == "/finetune":
        spec = json.dumps({"base": f"{model}:{version}", "method": "head"})
        return {"data": {"model": "mine", "spec": spec}, "files": {"data": ("data.zip", UPLOAD)}}
    raise AssertionError(f"{method} {path} has a body of a kind that this test does not know")


class Strangers(RuleBasedStateMachine):
    """Two tenants make and delete things, and each asks for what is the other's: it is as if it did not exist."""

    guarded: Guarded
    operations: list[tuple[str, str]]
    with_body: set[tuple[str, str]]
    kept: dict[str, dict[str, str]]

    @initialize()
    def begin(self) -> None:
        self.clients = {tenant: self.guarded.ask(tenant, "admin") for tenant in (DEFAULT, ACME)}
        if not self.kept:
            self.kept.update({tenant: self.things_of(tenant) for tenant in (DEFAULT, ACME)})
        self.jobs: dict[str, list[str]] = {tenant: [self.guarded.job(tenant)] for tenant in (DEFAULT, ACME)}

    def things_of(self, tenant: str) -> dict[str, str]:
        """A model, a data set, and a webhook with a delivery that a tenant has, by their kinds."""
        api = self.clients[tenant]
        shade = 50 if tenant == ACME else 200
        own = zipped({f"{name}.png": png(np.full((28, 28), shade, np.uint8)) for name in ("a/1", "a/2", "b/1", "b/2")})
        dataset = api.post("/datasets", files={"data": ("data.zip", own)}).json()["id"]
        hooks = api.get("/webhooks").json()["data"]
        webhook = (hooks or [api.post("/webhooks", json={"url": "https://127.0.0.1:9/"}).json()])[0]["id"]
        self.guarded.job(tenant)
        deliveries = api.get(f"/webhooks/{webhook}/deliveries").json()["data"]
        model = "hidden" if tenant == DEFAULT else "secret"
        feedback, blank = Feedback(self.guarded.place.engine, 10), np.zeros((1, 784), np.uint8)
        predictions = [feedback.keep(tenant, BASE, 1, ("a", "b"), ["b"], blank) for _ in range(2)]
        return {
            "model": model, "dataset": dataset, "webhook": webhook, "delivery": deliveries[0]["id"],
            "prediction": predictions[0], "correction": feedback.correct(tenant, predictions[1], 0, "a").id,
        }  # fmt: skip

    def teardown(self) -> None:
        for client in getattr(self, "clients", {}).values():
            client.close()

    @rule(tenant=st.sampled_from((DEFAULT, ACME)))
    def create_job(self, tenant: str) -> None:
        self.jobs[tenant].append(self.guarded.job(tenant))

    @rule(tenant=st.sampled_from((DEFAULT, ACME)), data=st.data())
    def cancel_job(self, tenant: str, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.jobs[tenant]))
        assert self.clients[tenant].post(f"/finetune/{job}/cancel").status_code in (200, 409)

    @rule(tenant=st.sampled_from((DEFAULT, ACME)), put=st.booleans())
    def label(self, tenant: str, put: bool) -> None:
        path = f"/models/digits/labels/{tenant}"
        api = self.clients[tenant]
        answer = api.put(path, json={"version": 1}) if put else api.delete(path)
        assert answer.status_code in (200, 404)

    @rule(data=st.data(), owner=st.sampled_from((DEFAULT, ACME)))
    def ask_for_anothers(self, data: st.DataObject, owner: str) -> None:
        method, path = data.draw(st.sampled_from(self.operations))
        stranger = ACME if owner == DEFAULT else DEFAULT
        theirs = {**self.kept[owner], "job": data.draw(st.sampled_from(self.jobs[owner]))}
        version = data.draw(st.sampled_from(("1", "7")))
        streams = data.draw(st.booleans())
        kept = self.state_of(owner)
        given = self.answer(stranger, method, path, theirs, version, streams=streams)
        absent = self.answer(stranger, method, path, ABSENT, version, streams=streams)
        assert given == absent
        assert "{" not in path or given[0] == 404
        assert self.state_of(owner) == kept

    def answer(
        self, tenant: str, method: str, path: str, things: Mapping[str, str], version: str, *, streams: bool
    ) -> tuple[Any, ...]:
        """Status, body and headers, with the names that were asked for replaced."""
        model, job = things["model"], things["job"]
        kind = next((kind for start, kind in IDS.items() if path.startswith(start)), "job")
        asked = f"{model}:{version}" if path.startswith("/openai/v1/models") else things[kind]
        url = filled(
            path, model=model, name=model, id=asked, version=version, label=DEFAULT, delivery=things["delivery"]
        )  # fmt: skip
        more = body_for(method, path, things, version) if (method, path) in self.with_body else {}
        accept = {"Accept": "text/event-stream" if streams else "application/json", "X-Request-ID": "same"}
        after = {"after": job} if path == "/finetune" and method == "GET" else {}
        answer = self.clients[tenant].request(method, url, params=after, headers=accept, **more)
        text = answer.text
        for kind, name in things.items():
            text = text.replace(name, kind.upper())
        headers = {name: value for name, value in answer.headers.items() if name not in ("date", "content-length")}
        return answer.status_code, text, headers

    def state_of(self, tenant: str) -> Any:
        """All that a tenant has, but for places in the queue, which may be a second old."""
        api = self.clients[tenant]
        lists = ("/models", "/finetune", "/datasets", "/webhooks", "/openai/v1/files")
        found = [api.get(path, params={"limit": 100}).json() for path in lists]
        for job in found[1]["data"]:
            del job["queue_position"], job["estimated_start_at"], job["estimated_end_at"]
        return found

    @invariant()
    def lists_hold_only_ones_own(self) -> None:
        if not hasattr(self, "clients"):
            return
        for tenant, other in ((DEFAULT, ACME), (ACME, DEFAULT)):
            shown = self.clients[tenant].get("/finetune", params={"limit": 100}).json()["data"]
            assert {job["id"] for job in shown}.isdisjoint(self.jobs[other])
            assert shown[0]["model"] == "digits"
            lists = ("/datasets", "dataset"), ("/webhooks", "webhook"), ("/openai/v1/files", "dataset")
            for path, kind in (*lists, (f"/feedback?limit=100&model={BASE}", "correction")):
                listed = {one["id"] for one in self.clients[tenant].get(path).json()["data"]}
                assert self.kept[tenant][kind] in listed
                assert self.kept[other][kind] not in listed
            assert {f"{public_name(BASE)}:1"} == {job["base"] for job in shown}


def test_a_stranger_learns_nothing_on_any_route(guarded: Guarded) -> None:
    document = document_of(guarded)
    plain = {"/healthz", "/readyz", "/metrics", "/v2", "/v2/health/live", "/v2/health/ready", "/models"}
    asked = [one for one in operations(document) if one[1] not in plain | CREATE]
    assert len(asked) > 20

    class OnThisGateway(Strangers):
        kept = {}  # noqa: RUF012 (all of its walks share it)

    OnThisGateway.guarded, OnThisGateway.operations = guarded, asked
    OnThisGateway.with_body = {op for op in asked if "requestBody" in document["paths"][op[1]][op[0].lower()]}
    # Every route once with each owner, whatever the random walks below choose.
    for owner in (DEFAULT, ACME):
        machine = OnThisGateway()
        machine.begin()
        stranger, theirs = ACME if owner == DEFAULT else DEFAULT, {**machine.kept[owner], "job": machine.jobs[owner][0]}
        for method, path in asked:
            given = machine.answer(stranger, method, path, theirs, "1", streams=False)
            absent = machine.answer(stranger, method, path, ABSENT, "1", streams=False)
            assert given == absent, (method, path)
            assert given[0] == 404 or "{" not in path, (method, path, given)
        machine.teardown()
    OnThisGateway.TestCase.settings = settings(
        max_examples=10, stateful_step_count=10, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    OnThisGateway.TestCase().runTest()


def test_an_unfinished_job_of_a_tenant_protects_its_base_and_not_anothers(guarded: Guarded) -> None:
    place = guarded.place
    for tenant in (DEFAULT, ACME):
        guarded.publish(tenant, "starter")
    base = f"{stored_name(ACME, 'starter')}:1"
    job = place.jobs.create(tenant=ACME, model="acme~x", base=base, spec={}, dataset=place.dataset)
    with guarded.ask(ACME) as api:
        assert api.get(f"/finetune/{job.id}").json()["base"] == "starter:1"
        assert api.delete("/models/starter").status_code == 409
    with guarded.ask(DEFAULT) as api:
        assert api.delete("/models/starter").json() == {
            "model": "starter", "versions": [1], "label": None, "deleted": True
        }  # fmt: skip
    place.jobs.cancel(job.id)
    with guarded.ask(ACME) as api:
        assert api.delete("/models/starter").status_code == 200


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "x", "tenant": "A"}, "tenant"),
        ({"name": "x", "tenant": "a~b"}, "tenant"),
        ({"name": "x", "scopes": ["predict", "root"]}, "scope"),
        ({"name": "x", "scopes": []}, "scope"),
        ({"name": "x", "rate": -1.0}, "rate"),
    ],
)
def test_a_key_that_makes_no_sense_is_not_made(engine: sa.Engine, given: dict[str, Any], names: str) -> None:
    keys = Keys(engine)
    with pytest.raises(InvalidRequest, match=f"^{names}: must ") as refused:
        keys.create(**given)
    assert refused.value.param == names
    assert keys.all() == []
    with pytest.raises(UnknownKey):
        keys.revoke("key-none")


def test_the_first_key_is_made_once_and_a_revoked_one_keeps_the_door_shut(engine: sa.Engine, tmp_path: Path) -> None:
    keys = Keys(engine)
    local, foreign = Settings(home=tmp_path), Settings(home=tmp_path, host="0.0.0.0")

    async def required(with_settings: Settings) -> bool:
        ring = KeyRing(keys, with_settings)
        await ring.refresh()
        return ring.required

    assert not asyncio.run(required(local))
    assert asyncio.run(required(foreign))
    assert asyncio.run(required(local.model_copy(update={"keys": "required"})))
    token = keys.create_first()
    assert token is not None
    assert keys.create_first() is None
    assert asyncio.run(required(local))
    assert not asyncio.run(required(foreign.model_copy(update={"keys": "off"})))
    (first,) = keys.all()
    assert (first.tenant, set(first.scopes), first.digest) == (DEFAULT, {"admin"}, digest_of(token.encode()))
    revoked = keys.revoke(first.id)
    assert revoked.revoked_at is not None
    assert keys.revoke(first.id).revoked_at == revoked.revoked_at
    assert asyncio.run(required(local))
    assert keys.create_first() is None


def test_what_was_let_in_may_not_stay_when_its_key_is_revoked_or_keys_become_required(
    engine: sa.Engine, tmp_path: Path
) -> None:
    keys = Keys(engine)

    async def check() -> None:
        ring = KeyRing(keys, Settings(home=tmp_path))
        await ring.refresh()
        assert ring.still_lets_in(None)
        key, _ = keys.create("first")
        await ring.refresh()
        assert (ring.still_lets_in(None), ring.still_lets_in(key)) == (False, True)
        keys.revoke(key.id)
        await ring.refresh()
        assert not ring.still_lets_in(key)

    asyncio.run(check())


def test_unknown_keys_cost_the_store_one_look_in_a_while(engine: sa.Engine, tmp_path: Path) -> None:
    keys = Keys(engine)
    looks: list[float] = []
    sa.event.listen(engine, "before_cursor_execute", lambda *_: looks.append(time.monotonic()))
    another = b"cd" * 32
    forged = b"tmp_%s%08x" % (another, zlib.crc32(another))

    async def attack() -> float:
        ring = KeyRing(keys, Settings(home=tmp_path))
        await ring.refresh()
        looks.clear()
        began = time.monotonic()
        assert not any(await asyncio.gather(*(ring.find_new(forged) for _ in range(500))))
        assert not any(await asyncio.gather(*(ring.find_new(b"tmp_junk") for _ in range(500))))
        return time.monotonic() - began

    took = asyncio.run(attack())
    assert 0 < len(looks) <= 2 + took / PAUSE_S


@pytest.mark.slow
def test_a_first_start_prints_a_key_once_and_no_log_line_ever_holds_one(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for start in range(2):
        with running_gateway(tmp_path, log, ready=False, TEMPER_KEYS="required") as url:
            eventually(lambda url=url: httpx.get(f"{url}/healthz").is_success, "the gateway answers")  # type: ignore[misc]
            (token,) = set(re.findall("tmp_[0-9a-f]{72}", log.read_text()))
            key = {"X-API-Key": token}
            assert httpx.get(f"{url}/finetune", headers=key).status_code == 200
            failed = httpx.post(f"{url}/predict?model=lenet5&key={token}", content=bytes(784), headers={**RAW, **key})
            assert failed.status_code >= 400
        assert log.read_text().count(token) == 1, f"start {start}"


@pytest.mark.slow
def test_passwords_of_the_store_are_in_no_log(tmp_path: Path) -> None:
    store = "postgresql+psycopg://temper:hunter2@127.0.0.1:1/t"
    environment = {**os.environ, "TEMPER_HOME": str(tmp_path), "TEMPER_STORE": store}
    for command in (["api"], ["trainer"], ["cli", "serve"], ["cli", "keys", "list"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], env=environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode != 0
        assert "127.0.0.1" in done.stderr
        assert "hunter2" not in done.stderr + done.stdout, command


@pytest.mark.slow
def test_the_command_makes_lists_and_revokes_keys(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "TEMPER_HOME": str(tmp_path)}
        command = [sys.executable, "-m", "cli", "keys", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    made = run("create", "--name", "shop", "--tenant", "acme", "--scope", "predict,finetune", "--rate", "5")
    token, key_id = made.stdout.strip(), made.stderr.split()[0]
    assert is_well_formed(token.encode())
    shown = run("list").stdout
    assert {key_id, "shop", "acme", "5/s"} <= set(shown.split())
    assert token not in shown
    assert run("revoke", key_id).returncode == 0
    assert run("revoke", "key-none").stderr == "Error: there is no key 'key-none'\n"
    both = run("create", "--name", "both", "--scope", "finetune", "--scope", "predict")
    assert "with predict, finetune" in both.stderr
    assert run("create", "--name", "x", "--scope", "root").stderr.startswith("Error: scope: must be some of predict")


SITES = [  # headers, whether a GET and whether a POST gets in
    ({}, True, True),
    ({"Host": "localhost:8080"}, True, True),
    ({"Host": "127.8.9.10"}, True, True),
    ({"Host": "[::1]:80"}, True, True),
    ({"Host": "inside.example.com"}, True, True),
    ({"Host": "evil.example.com"}, False, False),
    ({"Host": "localhost.example.com:8080"}, False, False),
    ({"Host": "127.0.0.1.example.com"}, False, False),
    ({"Host": "10.0.0.1"}, False, False),
    ({"Host": "localhost", "Origin": "http://localhost"}, True, True),
    ({"Host": "localhost", "Origin": "http://evil.example.com"}, True, False),
    ({"Host": "localhost", "Origin": "http://localhost:3000"}, True, False),
    ({"Host": "localhost", "Origin": "null"}, True, False),
    ({"Sec-Fetch-Site": "cross-site"}, True, False),
    ({"Sec-Fetch-Site": "same-origin"}, True, True),
]


@pytest.fixture(scope="module")
def open_gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A gateway on a loopback address, without keys."""
    home = tmp_path_factory.mktemp("open")
    allowed = {"TEMPER_ALLOWED_HOSTS": "inside.example.com, other.example.com"}
    with running_gateway(home, home / "log", ready=False, **allowed) as url:
        eventually(lambda: httpx.get(f"{url}/healthz").is_success, "the gateway answers")
        yield url


@pytest.mark.parametrize(("headers", "gets", "posts"), SITES, ids=lambda value: str(value) if value else "-")
def test_hosts_and_origins_of_strangers_are_refused(
    open_gateway: str, headers: dict[str, str], gets: bool, posts: bool
) -> None:
    read = httpx.get(f"{open_gateway}/models", headers=headers)
    written = httpx.post(f"{open_gateway}/finetune/none/cancel", headers=headers)
    assert (read.status_code, written.status_code) == (200 if gets else 403, 404 if posts else 403)
    for answer in (read, written):
        if answer.status_code == 403:
            assert answer.json()["error"]["code"] == "forbidden"


def test_pages_say_what_a_browser_may_do_with_them(guarded: Guarded) -> None:
    with guarded.ask() as api:
        for path in ("/docs", "/docs/oauth2-redirect", f"/models/{BASE}/versions/1/report", "/models", "/none"):
            answer = api.get(path)
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert answer.headers["Referrer-Policy"] == "no-referrer"
            policy = answer.headers["Content-Security-Policy"]
            assert "default-src 'none'" in policy
            assert "frame-ancestors 'none'" in policy
            scripts = [part for part in policy.split("; ") if part.startswith("script-src")]
            assert "unsafe" not in "".join(scripts)
        page = api.get("/docs")
        assert page.text.count("<script>") == page.headers["Content-Security-Policy"].count("'sha256-") == 1


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate of 127.0.0.1 that signs itself, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed")
    cert, key = folder / "cert.pem", folder / "key.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=temper", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    return cert, key


@pytest.mark.slow
def test_the_gateway_speaks_https_also_when_it_refuses(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    secure = {"TEMPER_TLS_CERT": str(cert), "TEMPER_TLS_KEY": str(key), "TEMPER_MAX_UPLOAD_BYTES": "1000"}
    with running_gateway(tmp_path, tmp_path / "log", ready=False, **secure) as url:
        context = ssl.create_default_context(cafile=str(cert))
        with httpx.Client(base_url=url.replace("http", "https"), verify=context) as api:
            eventually(lambda: api.get("/healthz").is_success, "the gateway answers")
            assert api.get("/models").json()["data"] == []
            assert api.post("/finetune", content=bytes(1 << 20)).status_code == 413  # closed half way, without TLS
        from cli.supervisor import _answers, gateway_client

        with gateway_client(Settings(home=tmp_path, tls_cert=cert, tls_key=key)) as client:
            assert _answers(client, f"{url.replace('http', 'https')}/healthz")
        other = tmp_path / "other"
        other.mkdir()
        wrong_cert, wrong_key = certificate(other)
        with gateway_client(Settings(home=tmp_path, tls_cert=wrong_cert, tls_key=wrong_key)) as client:
            assert not _answers(client, f"{url.replace('http', 'https')}/healthz")


def test_calls_to_a_model_server_use_tls_where_its_certificates_are_given(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    other = tmp_path / "other"
    other.mkdir()
    status = grpc.unary_unary_rpc_method_handler(
        lambda _, __: pb.GetModelStatusResponse(model_version_status=[pb.ModelVersionStatus(version=7)]),
        pb.GetModelStatusRequest.FromString, pb.GetModelStatusResponse.SerializeToString,
    )  # fmt: skip
    server = grpc.server(ThreadPoolExecutor(1))
    service = grpc.method_handlers_generic_handler("tensorflow.serving.ModelService", {"GetModelStatus": status})
    server.add_generic_rpc_handlers((service,))
    tls = grpc.ssl_server_credentials([(key.read_bytes(), cert.read_bytes())])
    target = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', tls)}"
    server.start()
    try:
        with ModelServer(target, ClientTLS(cert)) as trusted:
            assert set(trusted.states("m")) == {7}
        for tls in (None, ClientTLS(certificate(other)[0])):
            with ModelServer(target, tls) as stranger, pytest.raises(ModelServerError):
                stranger.states("m", 2)
    finally:
        server.stop(None)


@pytest.mark.parametrize("given", ["TLS_CERT", "TLS_KEY"])
def test_half_of_the_settings_for_tls_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, given: str) -> None:
    file = tmp_path / "x.pem"
    file.touch()
    monkeypatch.setenv(f"TEMPER_{given}", str(file))
    with pytest.raises(ValueError, match="TEMPER_TLS_CERT and TEMPER_TLS_KEY need each other"):
        from_environment()


@pytest.mark.slow
def test_files_for_tls_that_are_none_are_named_in_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty.pem"
    empty.touch()
    for given, says in (
        ({"TEMPER_MODEL_SERVER_CA": "/none"}, "TEMPER_MODEL_SERVER_CA: Path does not point to a file"),
        ({"TEMPER_TLS_CERT": str(empty), "TEMPER_TLS_KEY": str(empty)}, "cannot use TEMPER_TLS_CERT"),
    ):
        environment = {**os.environ, "TEMPER_HOME": str(tmp_path), **given}
        command = [sys.executable, "-m", "api"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert says in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr


def test_a_rate_refuses_what_is_beyond_it_and_says_when_to_come_back(guarded: Guarded) -> None:
    limited = guarded.keys.create("limited", scopes=["predict"], rate=2)[1]
    headers = {"X-API-Key": limited, **RAW}
    with httpx.Client(base_url=guarded.url, headers=headers, timeout=30) as api:
        answers = [api.post(f"/predict?model={BASE}", content=bytes(784)) for _ in range(6)]
        statuses = [answer.status_code for answer in answers]
        assert statuses[:4] == [200] * 4  # two seconds' worth
        assert 429 in statuses
        refused = answers[statuses.index(429)]
        assert (refused.json()["error"]["code"], refused.headers["Retry-After"]) == ("rate_limited", "1")
        assert refused.elapsed.total_seconds() >= HOLD_S[0]  # so that asking again and again costs others little
        assert api.get("/models").status_code == 200  # reading is not counted
        eventually(
            lambda: api.post(f"/predict?model={BASE}", content=bytes(784)).status_code == 200, "it is let in again"
        )


@pytest.mark.exhaustive
def test_a_tenant_has_so_many_unfinished_jobs_and_another_has_its_own(tmp_path: Path) -> None:
    settings = {"TEMPER_MAX_JOBS": "1", "TEMPER_KEYS": "required"}
    with opened(f"sqlite:///{tmp_path / 'temper.db'}") as engine:
        keys = Keys(engine)
        tokens = [keys.create(tenant, tenant, ["finetune"])[1] for tenant in ("a", "b")]
        upload = tmp_path / "upload.zip"
        upload.write_bytes(UPLOAD)
        with running_gateway(tmp_path, tmp_path / "log", ready=False, **settings) as url:
            eventually(lambda: httpx.get(f"{url}/healthz").is_success, "the gateway answers")

            def finetune(token: str, key: str, **fields: str) -> httpx.Response:
                form = {"model": "m", "spec": '{"method": "head"}', **fields}
                return httpx.post(
                    f"{url}/finetune", data=form, files={"data": ("d.zip", UPLOAD)}, timeout=60,
                    headers={"X-API-Key": token, "Idempotency-Key": key},
                )  # fmt: skip

            job = finetune(tokens[0], "first")
            assert job.status_code == 202, job.text
            refused = finetune(tokens[0], "second")
            assert (refused.status_code, refused.headers["Retry-After"]) == (429, "10")
            assert "1 fine-tune is unfinished" in refused.json()["error"]["message"]
            command = [sys.executable, "-m", "cli", "--url", url, "finetune", str(upload), "--model", "m"]
            told = subprocess.run(
                command, env={**os.environ, "TEMPER_API_KEY": tokens[0]}, capture_output=True, check=False
            )
            waited, failed = told.stderr.decode().splitlines()
            assert waited == "1 fine-tune is unfinished; wait for one, or cancel it; trying again in 10 s"
            assert (told.returncode, failed.startswith("Error: 1 fine-tune is unfinished")) == (3, True)
            assert finetune(tokens[0], "first").json() == job.json()  # it was answered already
            assert finetune(tokens[0], "second", dry_run="true").status_code == 200
            assert finetune(tokens[1], "first").status_code == 202
            cancel = f"{url}/finetune/{job.json()['id']}/cancel"
            assert httpx.post(cancel, headers={"X-API-Key": tokens[0]}).status_code == 200
            assert finetune(tokens[0], "second").status_code == 202
