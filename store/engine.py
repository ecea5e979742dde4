"""The relational store that the processes share: SQLite by default, PostgreSQL where several machines share it."""

import sqlite3
import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from store.errors import StoreUnavailable
from store.processes import module_command

T = TypeVar("T")

# Alembic needs a name to change a constraint.
metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

# What a store raises while it is away or busy: a restart, a lost connection, a lock held too long, a full disk.
PASSING_FAILURES = (sa.exc.OperationalError, sa.exc.InterfaceError)
LIBPQ = {"connect_timeout": 5, "tcp_user_timeout": 15_000, "keepalives_idle": 10, "keepalives_interval": 5}
RETRY_FIRST_S, RETRY_MOST_S = 0.1, 5.0  # pauses between attempts, each twice as long as the one before


class now(FunctionElement[float]):  # noqa: N801 (a function of SQL)
    """The database's clock, Unix seconds.

    Processes on several machines share the store, and their clocks disagree. Whatever is compared across processes,
    heartbeats above all, is written and compared with this clock.
    """

    type = sa.Float()
    inherit_cache = True


@compiles(now, "sqlite")  # to the millisecond; unixepoch('subsec') needs 3.42
def _now_sqlite(element: now, compiler: Any, **_: Any) -> str:
    return "round((julianday('now') - 2440587.5) * 86400.0, 3)"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **_: Any) -> str:
    return "CAST(extract(epoch from clock_timestamp()) AS double precision)"


def connect(url: str) -> sa.Engine:
    """Open the store at `url` and bring its schema up to date.

    Raises:
        StoreUnavailable: it cannot be reached or opened, or a newer release has changed its schema.
    """
    engine = _engine(url)
    try:
        # Alembic takes 0.3 s and 12 MB, so import it only where there is something to do.
        if not is_current(engine):
            from store.migrations import upgrade

            # A statement of a migration may take long.
            upgrade(unpooled(engine) if engine.driver == "psycopg" else engine)
    except BaseException as exc:
        engine.dispose()
        if isinstance(exc, sa.exc.DBAPIError):
            raise _unavailable(engine.url, exc) from exc
        raise
    return engine


def prepare(url: str) -> None:
    """Bring the store up to date as `connect` does, but in a child process, which takes Alembic with it at its end.

    Raises:
        StoreUnavailable: as above.
    """
    engine = _engine(url)
    try:
        if is_current(engine):
            return
    except sa.exc.DBAPIError as exc:
        raise _unavailable(engine.url, exc) from exc
    finally:
        engine.dispose()
    child = subprocess.run(
        module_command("store.migrations"), input=url, stderr=subprocess.PIPE, text=True, check=False
    )
    if child.returncode:
        raise StoreUnavailable(child.stderr.strip())


def stored_revision(url: str) -> str | None:
    """The revision of the schema at `url`; None for a store that is new, or older than all revisions.

    Raises:
        StoreUnavailable: as above.
    """
    engine = _engine(url)
    try:
        return _stored_revision(engine)
    except sa.exc.DBAPIError as exc:
        raise _unavailable(engine.url, exc) from exc
    finally:
        engine.dispose()


def is_current(engine: sa.Engine) -> bool:
    """Tell whether the store's schema is that of this release.

    Raises:
        StoreUnavailable: a newer release has changed it.
    """
    from store.migrations import HEAD

    stored = _stored_revision(engine)
    if stored is not None and stored > HEAD:
        where = engine.url.render_as_string()
        raise StoreUnavailable(f"the store at {where} has schema {stored} of a newer release; this one knows {HEAD}")
    return stored == HEAD


def insert_of(dialect: str) -> Any:
    """The dialect's INSERT, which knows ON CONFLICT."""
    if dialect == "postgresql":
        from sqlalchemy.dialects.postgresql import insert as postgresql

        return postgresql
    from sqlalchemy.dialects.sqlite import insert as sqlite

    return sqlite


def retrying(call: Callable[[], T], *, timeout_s: float, failed: Callable[[Exception], None]) -> T:
    """Call until the store answers.

    Args:
        call: may run again after it has done its work, if the confirmation is lost.
        timeout_s: age at which a failure is no longer taken for a passing one, and raised.
        failed: told of each failure that is waited out.
    """
    deadline, pause_s = time.monotonic() + timeout_s, RETRY_FIRST_S
    while True:
        try:
            return call()
        except PASSING_FAILURES as exc:
            if time.monotonic() + pause_s > deadline:
                raise
            failed(exc)
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, RETRY_MOST_S)


def reason(exc: Exception) -> str:
    """What a driver says of a failure, in one line without SQLAlchemy's additions."""
    said = str(exc.orig if isinstance(exc, sa.exc.DBAPIError) and exc.orig else exc).strip()
    return " ".join(said.split()) or type(exc).__name__


def connect_options(url: sa.URL) -> dict[str, Any]:
    """Options by which a PostgreSQL that does not answer, or is gone, is noticed; those of the URL come first."""
    libpq = url.drivername in ("postgresql", "postgresql+psycopg", "postgresql+psycopg2")
    return {name: value for name, value in LIBPQ.items() if name not in url.query} if libpq else {}


def unpooled(engine: sa.Engine) -> sa.Engine:
    """An engine for the same store whose connections are closed after use."""
    return sa.create_engine(engine.url, poolclass=sa.pool.NullPool, connect_args=connect_options(engine.url))


def _connect_bounded(_: Any, __: Any, arguments: list[Any], options: dict[str, Any]) -> Any:
    from store.bounded import BoundedConnection

    return BoundedConnection.connect(*arguments, **options)


def _stored_revision(engine: sa.Engine) -> str | None:
    from store.migrations import revision

    with engine.connect() as connection:
        return revision(connection)


def _engine(url: str) -> sa.Engine:
    try:
        parsed = sa.make_url(url)
        if parsed.get_backend_name() == "sqlite":
            engine = sa.create_engine(parsed)
            sa.event.listen(engine, "connect", _prepare_sqlite)
            return engine
        engine = sa.create_engine(parsed, pool_pre_ping=True, connect_args=connect_options(parsed))
        if engine.driver == "psycopg":
            sa.event.listen(engine, "do_connect", _connect_bounded)
        return engine
    except sa.exc.ArgumentError as exc:  # NoSuchModuleError is one
        raise StoreUnavailable(f"TEMPER_STORE is not a valid database URL: {reason(exc)}") from exc
    except ImportError as exc:
        hint = "; install temper[postgres]" if exc.name == "psycopg" else ""
        raise StoreUnavailable(f"TEMPER_STORE needs a driver that is not installed: {reason(exc)}{hint}") from exc


def _unavailable(url: sa.URL, exc: Exception) -> StoreUnavailable:
    return StoreUnavailable(f"cannot open the store at {url.render_as_string(hide_password=True)}: {reason(exc)}")


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.execute("PRAGMA busy_timeout = 15000")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")  # what is committed outlasts a power failure
    connection.execute("PRAGMA foreign_keys = ON")
