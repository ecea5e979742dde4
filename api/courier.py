"""Delivers webhooks as Standard Webhooks 1.0.0 has it: signed, retried for three days, and to public addresses only.

https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

import asyncio
import base64
import contextlib
import email.utils
import functools
import hashlib
import hmac
import ipaddress
import itertools
import logging
import random
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import orjson

from api import __version__
from api.metrics import WEBHOOKS
from store.errors import InvalidRequest, TemperError
from store.health import Notice
from store.webhooks import Attempt, Claimed, Delivery, Webhooks

if TYPE_CHECKING:  # it takes 6 MB, which a service without webhooks can do without
    import httpx

log = logging.getLogger("temper.gateway")
GONE = 410  # an endpoint wants no more
P = ParamSpec("P")
T = TypeVar("T")

# Pauses before each attempt: at once, then 5 s, 5 min, 30 min, 2, 5, 10, 14, 20 and 24 h after the one before.
SCHEDULE_S = (0.0, 5.0, 300.0, 1800.0, 7200.0, 18000.0, 36000.0, 50400.0, 72000.0, 86400.0)
JITTER = 0.1  # of a pause, to either side, so that what failed together does not come back together
LONGEST_PAUSE_S = 86400.0  # that an endpoint may ask for in Retry-After
TIMEOUT_S = 15.0  # of an attempt, from the look-up of the name to the head of the answer
LOOK_S = 1.0  # between looks for what is due
CLEAN_UP_S = 3600.0
RESOLVERS = 8  # names that are looked up at a time
STORE_THREADS = 2
MAX_URL = 2048  # characters
# IPv6 networks whose last 32 bits are an IPv4 address: IPv4-compatible addresses, and NAT64 (RFC 6052).
EMBEDDING = (ipaddress.IPv6Network("::/96"), ipaddress.IPv6Network("64:ff9b::/96"))


def signature(keys: Sequence[str], delivery_id: str, timestamp: int, body: bytes) -> str:
    """The value of `webhook-signature`: an HMAC-SHA256 with every secret, `v1,` and base64, separated by spaces."""
    signed = b"%s.%d.%s" % (delivery_id.encode(), timestamp, body)
    digests = (hmac.digest(base64.b64decode(key.removeprefix("whsec_")), signed, hashlib.sha256) for key in keys)
    return " ".join(f"v1,{base64.b64encode(digest).decode()}" for digest in digests)


def body_of(delivery: Delivery) -> bytes:
    """The body of a delivery, the same bytes in every attempt."""
    happened = datetime.fromtimestamp(delivery.created_at, UTC).isoformat(timespec="milliseconds")
    payload = {"type": delivery.type, "timestamp": happened.replace("+00:00", "Z"), "data": delivery.data}
    return orjson.dumps(payload)


def is_public(address: str) -> bool:
    """Tell whether an IP address belongs to the internet rather than to this machine or its networks."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if inner is None and any(ip in network for network in EMBEDDING):
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not ip.is_multicast


class Destinations:
    """Where webhooks may go.

    A name is looked up once for an attempt, all its addresses are checked, and the connection goes to one of these: a
    name that points elsewhere a moment later (DNS rebinding) leads nowhere.
    """

    def __init__(
        self, *, private: bool, http: bool, resolve: Callable[..., Sequence[Any]] = socket.getaddrinfo
    ) -> None:  # fmt: skip
        """Start.

        Args:
            private: allow addresses that are not public.
            http: allow `http://` URLs.
            resolve: as `socket.getaddrinfo`.
        """
        self._private, self._schemes = private, ("https", "http") if http else ("https",)
        self._resolve = resolve
        self._resolvers = ThreadPoolExecutor(RESOLVERS, "resolver")  # a name server that is slow delays nothing else

    def parse(self, text: str) -> "httpx.URL":
        """The URL in a text.

        Raises:
            InvalidRequest: it is no URL that webhooks may go to, whatever its host's addresses.
        """
        import httpx

        try:
            url = httpx.URL(text)
            port = url.port
        except (httpx.InvalidURL, ValueError) as exc:
            raise _refused(f"is not a URL: {exc}") from exc
        if url.scheme not in self._schemes:
            plain = "; TEMPER_WEBHOOK_HTTP allows http://" if url.scheme == "http" else ""
            schemes = " or ".join(f"{scheme}://" for scheme in self._schemes)
            raise _refused(f"must begin with {schemes}, not {text[:60]!r}{plain}")
        if not url.host or (port is not None and not 0 < port < 65536) or len(text) > MAX_URL:
            raise _refused(f"must have a host, a port from 1 to 65535, if any, and at most {MAX_URL} characters")
        if url.userinfo or url.fragment:
            raise _refused("must have neither a user nor a fragment; put a token into the path or the query")
        return url

    async def addresses(self, url: "httpx.URL") -> list[str]:
        """The addresses of a URL's host, to connect to.

        Raises:
            InvalidRequest: there is none, or one of them is not public and only public ones are allowed.
        """
        host, port = url.raw_host.decode("ascii"), url.port or (443 if url.scheme == "https" else 80)
        look_up = asyncio.get_running_loop().run_in_executor(
            self._resolvers, lambda: self._resolve(host.strip("[]"), port, type=socket.SOCK_STREAM)
        )
        try:
            found = await look_up
        except (OSError, UnicodeError) as exc:
            raise _refused(f"the host {url.host!r} cannot be found: {exc}") from exc
        addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
        if not (self._private or all(map(is_public, addresses))):  # the address itself stays the operator's secret
            raise _refused(f"{url.host!r} has an address that is not public; TEMPER_WEBHOOK_PRIVATE allows that")
        return addresses

    def close(self) -> None:
        """Stop the threads that look names up."""
        self._resolvers.shutdown(wait=False, cancel_futures=True)


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(f"url: {why}", param="url")


class Courier:
    """Sends what is due, each endpoint's deliveries apart from those of all others."""

    def __init__(
        self, webhooks: Webhooks, destinations: Destinations, *, schedule_s: Sequence[float] = SCHEDULE_S,
        timeout_s: float = TIMEOUT_S, look_s: float = LOOK_S,
    ) -> None:  # fmt: skip
        """Start.

        Args:
            schedule_s: pauses before each attempt; after the last one a delivery has failed.
            timeout_s: of an attempt.
            look_s: pause between looks for what is due.
        """
        self._webhooks, self._destinations = webhooks, destinations
        self._schedule_s, self._timeout_s, self._look_s = schedule_s, timeout_s, look_s
        self._busy: set[str] = set()  # endpoints that are being sent to
        self._stopped = False
        self._sending = Notice("sending webhooks")
        self._threads = ThreadPoolExecutor(STORE_THREADS, "courier")  # a store that hangs holds up no other work
        self._client: httpx.AsyncClient | None = None  # reading the certificates takes a moment and a megabyte

    async def check(self, url: str) -> None:
        """Check that webhooks may go to a URL.

        Raises:
            InvalidRequest: why not.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._destinations.addresses(self._destinations.parse(url))
        except TimeoutError as exc:
            raise _refused(f"its host was not found within {self._timeout_s:g} s") from exc

    async def run(self) -> None:
        """Deliver until cancelled. What is cut off half way is sent again when its lease has expired."""
        try:
            async with asyncio.TaskGroup() as tasks:
                try:
                    await self._look(tasks)
                finally:
                    self._stopped = True  # before the attempts are cancelled
        finally:
            self._destinations.close()
            await asyncio.to_thread(self._threads.shutdown, cancel_futures=True)  # before the store is closed
            if self._client is not None:
                with contextlib.suppress(Exception):
                    await self._client.aclose()

    async def _look(self, tasks: asyncio.TaskGroup) -> None:
        """Look for what is due again and again, and begin to send it."""
        looking, clean_up_at = Notice("looking for webhooks to send"), 0.0
        while True:
            try:
                if time.monotonic() >= clean_up_at:
                    await self._stored(self._webhooks.clean_up)
                    clean_up_at = time.monotonic() + CLEAN_UP_S
                claimed = await self._stored(self._webhooks.claim, tuple(self._busy))
                claimed.sort(key=lambda each: each.delivery.webhook)
                for webhook, batch in itertools.groupby(claimed, lambda each: each.delivery.webhook):
                    self._busy.add(webhook)
                    tasks.create_task(self._send(webhook, list(batch)))
                looking.worked()
            except Exception as exc:
                looking.failed(exc)
            await asyncio.sleep(self._look_s)

    async def _send(self, webhook: str, batch: Sequence[Claimed]) -> None:
        """Attempt some deliveries to one endpoint, and store how they ended."""

        async def send(claimed: Claimed) -> None:
            attempt = await self._attempt(claimed)
            if self._stopped and attempt.error is not None:  # a connection may fail because it is cancelled
                raise asyncio.CancelledError
            await self._stored(self._webhooks.settle, claimed.delivery, attempt)
            _tell(claimed.delivery, attempt)

        try:
            for ended in await asyncio.gather(*map(send, batch), return_exceptions=True):
                if isinstance(ended, BaseException):  # the store failed; the lease expires
                    self._sending.failed(ended)
                else:
                    self._sending.worked()
        finally:
            self._busy.discard(webhook)

    async def _stored(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the store in a thread of the courier's own."""
        todo = functools.partial(call, *args, **kwargs)
        return await asyncio.get_running_loop().run_in_executor(self._threads, todo)

    async def _attempt(self, claimed: Claimed) -> Attempt:
        status, error, asked_s = None, None, 0.0
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._post(claimed)
            status = response.status_code
            if not response.is_success:
                error = f"HTTP {status}" + ("; redirects are not followed" if response.is_redirect else "")
                asked_s = retry_after(response.headers.get("retry-after", ""))
        except TimeoutError:
            error = f"no answer within {self._timeout_s:g} s"
        except TemperError as exc:
            error = exc.message
        except Exception as exc:  # of the network, of TLS, or whatever a strange answer provokes
            error = f"{type(exc).__name__}: {exc}"
        following = claimed.delivery.attempts + 1
        if error is None or status == GONE or following >= len(self._schedule_s):
            return Attempt(status, error, gone=status == GONE)
        pause_s = self._schedule_s[following] * random.uniform(1 - JITTER, 1 + JITTER)
        return Attempt(status, error, retry_in_s=max(pause_s, asked_s))

    async def _post(self, claimed: Claimed) -> "httpx.Response":
        """Send a delivery to the first address that takes the connection; returns the head of the answer alone."""
        import httpx

        url = self._destinations.parse(claimed.url)
        body, timestamp = body_of(claimed.delivery), int(time.time())
        headers = {
            "host": url.netloc.decode("ascii"),
            "content-type": "application/json",
            "user-agent": f"Temper/{__version__}",
            "webhook-id": claimed.delivery.id,
            "webhook-timestamp": str(timestamp),
            "webhook-signature": signature(claimed.secrets, claimed.delivery.id, timestamp, body),
        }
        extensions = {"sni_hostname": url.raw_host.decode("ascii").strip("[]")}  # whose certificate it must be
        failure: httpx.ConnectError | None = None
        for address in await self._destinations.addresses(url):
            to = url.copy_with(host=address)
            try:
                async with self._http().stream(
                    "POST", to, content=body, headers=headers, extensions=extensions
                ) as response:
                    return response
            except httpx.ConnectError as exc:
                failure = exc
        raise failure or httpx.ConnectError(f"{url.host} has no address")

    def _http(self) -> "httpx.AsyncClient":
        """The client: no proxies, no redirects, and no connection that is used twice, as it may be another host's."""
        import httpx

        if self._client is None:
            logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs URLs, in which there may be tokens
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
            transport = httpx.AsyncHTTPTransport(limits=limits)
            self._client = httpx.AsyncClient(transport=transport, trust_env=False, timeout=None)  # noqa: S113 # nosec B113
        return self._client


def retry_after(value: str) -> float:
    """The seconds in a Retry-After header, which has a number or a date; 0 if it has neither."""
    with contextlib.suppress(ValueError):
        if value.strip().isdecimal():
            seconds = float(value)
        else:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        return min(max(0.0, seconds), LONGEST_PAUSE_S)
    return 0.0


def _tell(delivery: Delivery, attempt: Attempt) -> None:
    outcome = "succeeded" if attempt.error is None else "failed" if attempt.retry_in_s is None else "retried"
    WEBHOOKS.labels(outcome).inc()
    if attempt.gone:
        log.warning("webhook %s is disabled: its endpoint answered 410", delivery.webhook)
    elif outcome == "failed":
        log.warning("webhook %s: delivery %s failed for good: %s", delivery.webhook, delivery.id, attempt.error)
