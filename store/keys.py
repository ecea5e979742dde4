"""API keys: who may do what, and for whom.

A key is shown once, when it is created. The store has its SHA-256 only. One round of a fast hash is right here: a key
is 256 random bits, so nobody finds it by trying, and a slow or salted hash, made for passwords that people choose,
would only cost every request its time.

`tmp_` and 72 hexadecimal digits, the last 8 of which are the CRC-32 of the 64 before, make a key: secret scanners find
it by the pattern, tell it from other text by the checksum, and a mistyped one is refused without a look at the store.

Keys are revoked, never deleted: a service that once had keys does not become open when the last one goes, and
(number of keys, number of revoked ones) tells every change.
"""

import hashlib
import re
import secrets
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa

from store.changes import notify
from store.engine import metadata, now
from store.errors import InvalidRequest, UnknownKey
from store.records import ADMIN, DEFAULT_TENANT, PREDICT, SCOPES

TENANT = re.compile(r"[a-z0-9][a-z0-9-]{0,31}")
TOKEN = re.compile(rb"tmp_([0-9a-f]{64})([0-9a-f]{8})")
FIRST = "key-first"  # id of the key that a gateway makes for itself: of several that start at once, one succeeds
MAX_NAME = 100

api_keys = sa.Table(
    "api_keys",
    metadata,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("tenant", sa.String, nullable=False, server_default=DEFAULT_TENANT),
    sa.Column("scopes", sa.String, nullable=False),  # with commas
    sa.Column("sha256", sa.String, nullable=False),  # of the key, hexadecimal
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("revoked_at", sa.Float),
    sa.Column("rate", sa.Float),  # predict requests a second; NULL takes the setting
    sa.UniqueConstraint("sha256", name="uq_api_keys_sha256"),
)


@dataclass(frozen=True, slots=True)
class Key:
    """An API key without its secret. Times are Unix seconds."""

    id: str
    name: str
    tenant: str
    scopes: frozenset[str]
    digest: bytes  # SHA-256 of the key
    created_at: float
    revoked_at: float | None
    rate: float | None  # predict requests a second; None takes the setting

    def allows(self, scope: str) -> bool:
        """Tell whether the key has a scope; `admin` includes all."""
        return scope in self.scopes or ADMIN in self.scopes


class Keys:
    """Reads and writes the keys in the store."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def create(
        self, name: str, tenant: str = DEFAULT_TENANT, scopes: Collection[str] = (PREDICT,), rate: float | None = None
    ) -> tuple[Key, str]:
        """Make a key. Returns its record, and the key itself, which nothing can show again.

        Raises:
            InvalidRequest: a name, tenant, scope or rate that is none.
        """
        if not (0 < len(name) <= MAX_NAME and name.isprintable()):
            raise InvalidRequest(f"name: must have 1 to {MAX_NAME} printable characters, not {name!r}", param="name")
        if not TENANT.fullmatch(tenant):
            raise InvalidRequest(
                f"tenant: must be 1 to 32 of the characters a-z, 0-9 and '-', not {tenant!r}", param="tenant"
            )
        unknown = sorted(set(scopes) - set(SCOPES))
        if unknown or not scopes:
            found = repr(unknown[0]) if unknown else "nothing"
            raise InvalidRequest(f"scope: must be some of {', '.join(SCOPES)}, not {found}", param="scope")
        if rate is not None and not 0 < rate < 1e9:
            raise InvalidRequest(f"rate: must be greater than 0 and less than 1e9, not {rate:g}", param="rate")
        return self._insert(f"key-{secrets.token_hex(8)}", name, tenant, scopes, rate)

    def create_first(self) -> str | None:
        """Make an admin key where there has never been any; returns it, or None where there has."""
        if self.revision() != (0, 0):
            return None
        try:
            return self._insert(FIRST, "first start", DEFAULT_TENANT, (ADMIN,), None)[1]
        except sa.exc.IntegrityError:  # another gateway was faster
            return None

    def _insert(
        self, key_id: str, name: str, tenant: str, scopes: Collection[str], rate: float | None
    ) -> tuple[Key, str]:
        body = secrets.token_hex(32)
        token = f"tmp_{body}{zlib.crc32(body.encode()):08x}"
        row = {
            "id": key_id, "name": name, "tenant": tenant, "scopes": ",".join(sorted(scopes)), "rate": rate,
            "sha256": digest_of(token.encode()).hex(), "created_at": now(),
        }  # fmt: skip
        with self._engine.begin() as connection:
            stored = connection.execute(api_keys.insert().values(**row).returning(api_keys)).mappings().one()
            notify(connection, "keys")
            return _key(dict(stored)), token

    def all(self) -> list[Key]:
        """Every key, oldest first, also revoked ones."""
        query = sa.select(api_keys).order_by(api_keys.c.created_at, api_keys.c.id)
        with self._engine.connect() as connection:
            return [_key(dict(row)) for row in connection.execute(query).mappings()]

    def revision(self) -> tuple[int, int]:
        """The number of keys, and of revoked ones: every change increments one of them."""
        query = sa.select(sa.func.count(), sa.func.count(api_keys.c.revoked_at)).select_from(api_keys)
        with self._engine.connect() as connection:
            keys, revoked = connection.execute(query).one()
            return keys, revoked

    def revoke(self, key_id: str) -> Key:
        """End the validity of a key; once more is no error.

        Raises:
            UnknownKey: no key has this id.
        """
        row = api_keys.c.id == key_id
        with self._engine.begin() as connection:
            connection.execute(api_keys.update().where(row, api_keys.c.revoked_at.is_(None)).values(revoked_at=now()))
            found = connection.execute(sa.select(api_keys).where(row)).mappings().one_or_none()
            notify(connection, "keys")
        if found is None:
            raise UnknownKey(f"there is no key {key_id!r}", param="id")
        return _key(dict(found))


def digest_of(token: bytes) -> bytes:
    """What the store keeps of a key."""
    return hashlib.sha256(token).digest()


def is_well_formed(token: bytes) -> bool:
    """Tell whether this may be a key: its form and its checksum are right."""
    match = TOKEN.fullmatch(token)
    return match is not None and b"%08x" % zlib.crc32(match[1]) == match[2]


def _key(row: dict[str, Any]) -> Key:
    return Key(**{
        **{name: value for name, value in row.items() if name != "sha256"},
        "scopes": frozenset(row["scopes"].split(",")), "digest": bytes.fromhex(row["sha256"]),
    })  # fmt: skip
