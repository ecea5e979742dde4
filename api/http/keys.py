"""Who may come in: the layer in front of every route, also of those on the fast path.

Scopes, and the routes that need them:

    predict     predictions, their explanations and corrections (/predict, /explain, POST /feedback, /v1, /v2)
    finetune    everything else: jobs, uploads and data sets, labels, deleting, downloading what a fine-tune has learned
    admin       all of that for any tenant (`X-Temper-Tenant` names it), and /metrics, which shows all tenants' models

Reading models, versions, report cards, the documentation and what the key itself may do needs a key of any scope.
/healthz, /readyz and the files of the page are open, readiness without details.

A request brings its key as `Authorization: Bearer tmp_...`, as `X-API-Key`, or as the password of HTTP Basic, which is
what a browser can send when it opens a report card.
"""

import asyncio
import base64
import binascii
import functools
import hmac
import random
import re
import time
from collections.abc import Mapping

import sqlalchemy as sa
from starlette.types import ASGIApp, Receive, Scope, Send

from api.http.limits import PREDICTIONS, refuse
from api.http.turns import Turns
from api.shared_read import SharedRead
from store.errors import Forbidden, StoreUnavailable, TemperError, TooMany, Unauthorized
from store.keys import TENANT, Key, Keys, digest_of, is_well_formed
from store.records import ADMIN, FINETUNE, PREDICT
from store.settings import Settings, is_loopback

OPEN = ("/healthz", "/readyz")
ANY = ""  # scope of what every key may do
DOCUMENTS = ("/docs", "/openapi.json", "/key")
READING = re.compile(r"/models(/[^/]+(/versions/[^/]+(/report)?)?)?")
SAFE = ("GET", "HEAD", "OPTIONS")  # methods that change nothing
PAUSE_S = 0.1  # between two looks for keys, however many unknown ones are presented
BURST_S = 2.0  # seconds' worth of its rate that a key may save up
HOLD_S, MAX_HELD = (0.25, 0.5), 1000  # how long, and how many, requests beyond a rate wait for their refusal
INDEX_BYTES = 8  # of a key's hash, by which it is looked up; the rest is compared in constant time


def scope_of(method: str, path: str) -> str | None:
    """The scope that a request needs, `ANY`, or None where no key is needed."""
    if path in PREDICTIONS or (method, path) == ("POST", "/feedback") or path.startswith(("/v1/", "/v2")):
        return PREDICT
    if path in OPEN or (method in SAFE and (path == "/" or path.startswith("/ui/"))):
        return None
    if method in SAFE and (READING.fullmatch(path) or path in DOCUMENTS or path.startswith("/static-offline-docs/")):
        return ANY
    return ADMIN if path == "/metrics" else FINETUNE


class KeyRing:
    """The valid keys in memory, by their hashes. They are read again when they change, or when one is not known.

    While the store is away, those that are known stay valid.
    """

    def __init__(self, keys: Keys, settings: Settings) -> None:
        self._keys = keys
        self._mode, self._is_local, self._rate = settings.keys, settings.is_local, settings.max_rate
        self._by_hash: dict[bytes, Key] = {}
        self._buckets: dict[str, tuple[float, float]] = {}  # by id: requests saved up, and when
        self._revision: tuple[int, int] | None = None
        self._shared_read = SharedRead(self._read, PAUSE_S)
        self.required = self._mode != "off"

    async def refresh(self) -> None:
        """Read the keys if they have changed."""
        await self._shared_read()

    async def _read(self) -> None:
        revision = await asyncio.to_thread(self._keys.revision)
        if revision != self._revision:
            valid = [key for key in await asyncio.to_thread(self._keys.all) if key.revoked_at is None]
            self._by_hash, self._revision = {key.digest[:INDEX_BYTES]: key for key in valid}, revision
            self._buckets = {key.id: self._buckets[key.id] for key in valid if key.id in self._buckets}
        self.required = self._mode == "required" or (
            self._mode == "auto" and (not self._is_local or revision != (0, 0))
        )

    def find(self, token: bytes) -> Key | None:
        """The valid key that this is, as far as is known."""
        digest = digest_of(token)
        key = self._by_hash.get(digest[:INDEX_BYTES])
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None

    def still_lets_in(self, key: Key | None) -> bool:
        """Tell whether what was let in with this key, or with none, still would be, as far as is known."""
        return not self.required if key is None else key.digest[:INDEX_BYTES] in self._by_hash

    async def find_new(self, token: bytes) -> Key | None:
        """The key that this is if it has been created since the last look.

        Raises:
            StoreUnavailable: nobody knows.
        """
        if not is_well_formed(token):
            return None
        try:
            await self.refresh()
        except sa.exc.SQLAlchemyError as exc:
            raise StoreUnavailable("the store of API keys cannot be reached") from exc
        return self.find(token)

    def count(self, key: Key) -> None:
        """Count a predict request against the rate of its key (a token bucket).

        Raises:
            TooMany: its rate is used up.
        """
        rate = key.rate or self._rate
        if not rate:
            return
        most, now = max(1.0, BURST_S * rate), time.monotonic()
        saved, since = self._buckets.get(key.id, (most, now))
        saved = min(most, saved + rate * (now - since))
        if saved < 1.0:
            raise TooMany(f"more than {rate:g} requests a second with this key", retry_after_s=(1.0 - saved) / rate)
        self._buckets[key.id] = (saved - 1.0, now)


class Guard:
    """Lets a request in if its key has the scope that it needs, and notes its tenant; its body is not read before.

    Hosts are checked against DNS rebinding: a page of a stranger whose name suddenly resolves to 127.0.0.1 is of the
    same origin as the gateway, for the browser, but it still sends its own name as the Host. Origins are checked
    against pages that post to the gateway from elsewhere.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._turns = Turns()
        self._held = 0  # requests that wait for their refusal
        names = frozenset(name.strip().lower() for name in settings.allowed_hosts.split(",")) - {""}
        self._checks_hosts = settings.is_local or bool(names)
        self._any_host = () if settings.is_local else OPEN  # an orchestrator probes an address
        self._is_allowed = functools.lru_cache(maxsize=256)(functools.partial(_is_allowed, names))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers, tenant = dict(scope["headers"]), None
        try:
            self._check_origin(scope["method"], scope["path"], headers)
            keys: KeyRing = scope["state"]["gateway"].keys
            if keys.required:
                token = _token_in(headers)
                key = keys.find(token) if token else None
                if key is None and token and scope["path"] not in OPEN:
                    key = await keys.find_new(token)
                tenant = _check_key(keys, key, scope, headers)
                if tenant is not None and not self._turns.entered(tenant):
                    await self._turns.wait(tenant)
        except TemperError as refusal:
            if isinstance(refusal, TooMany):
                await self._hold()
            browser = isinstance(refusal, Unauthorized) and b"text/html" in headers.get(b"accept", b"")
            more = {"WWW-Authenticate": 'Basic realm="temper", charset="UTF-8"'} if browser else {}
            return await refuse(refusal, scope, receive, send, more)
        try:
            return await self._app(scope, receive, send)
        finally:
            if tenant is not None:
                self._turns.leave(tenant)

    async def _hold(self) -> None:
        """Let a client that asks too often wait for its refusal, so that asking again and again costs others little.

        At random, or all of its connections would come back at once.
        """
        if self._held < MAX_HELD:
            self._held += 1
            try:
                await asyncio.sleep(random.uniform(*HOLD_S))
            finally:
                self._held -= 1

    def _check_origin(self, method: str, path: str, headers: Mapping[bytes, bytes]) -> None:
        """Raise `Forbidden` for what only a browser sends that a foreign page has sent here."""
        host = headers.get(b"host", b"")
        if self._checks_hosts and host and path not in self._any_host and not self._is_allowed(host):
            raise Forbidden(f"Host {_shown(host)} is not a name of this service; TEMPER_ALLOWED_HOSTS adds names")
        if method not in SAFE:
            origin = headers.get(b"origin")
            if origin is not None and origin.partition(b"://")[2].lower() != host.lower():
                raise Forbidden(f"Origin {_shown(origin)} may not send {method} here: it is another site")
            if headers.get(b"sec-fetch-site") == b"cross-site":
                raise Forbidden(f"another site may not send {method} here (Sec-Fetch-Site: cross-site)")


def _check_key(keys: KeyRing, key: Key | None, scope: Scope, headers: Mapping[bytes, bytes]) -> str | None:
    """Record in the request's state its key and the tenant that it acts for.

    Returns:
        That tenant, if the request asks for a prediction, which tenants take turns for.

    Raises:
        Unauthorized: there is no valid key.
        Forbidden: it lacks the scope that the request needs.
        TooMany: it has used up its rate.
    """
    needed = scope_of(scope["method"], scope["path"])
    if needed is None:
        scope["state"]["stranger"] = key is None
        return None
    if key is None:
        if _token_in(headers):
            raise Unauthorized("the API key is unknown or revoked")
        raise Unauthorized("an API key is required; send it as `Authorization: Bearer tmp_...`")
    if needed and not key.allows(needed):
        raise Forbidden(f"this needs the scope {needed!r}, which key {key.id} ({key.name}) lacks")
    scope["state"]["key"] = key
    chosen = headers.get(b"x-temper-tenant")
    tenant = scope["state"]["tenant"] = key.tenant if chosen is None else _chosen(chosen, key)
    if needed is not PREDICT or scope["method"] != "POST":
        return None
    keys.count(key)
    return tenant


def _chosen(tenant: bytes, key: Key) -> str:
    """The tenant that a request names in a header."""
    name = tenant.decode("latin-1")
    if name != key.tenant and not key.allows(ADMIN):
        raise Forbidden(f"X-Temper-Tenant: acting for another tenant needs the scope {ADMIN!r}")
    if not TENANT.fullmatch(name):
        raise Forbidden(f"X-Temper-Tenant: {_shown(tenant)} is not the name of a tenant")
    return name


def _token_in(headers: Mapping[bytes, bytes]) -> bytes | None:
    """What a request presents as its key."""
    authorization = headers.get(b"authorization")
    if authorization is None:
        return headers.get(b"x-api-key")
    scheme, _, value = authorization.partition(b" ")
    match scheme.lower():
        case b"bearer":
            return value.strip()
        case b"basic":
            try:
                return base64.b64decode(value, validate=True).partition(b":")[2]
            except binascii.Error:
                return b""
    return b""


def _is_allowed(names: frozenset[str], host: bytes) -> bool:
    """Tell whether a Host, with or without a port, is a name of this service."""
    name = re.sub(r":\d*$", "", host.decode("latin-1").lower())
    return name in names or is_loopback(name)


def _shown(value: bytes) -> str:
    text = value.decode("latin-1")
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
