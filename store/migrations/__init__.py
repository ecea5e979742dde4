"""Changes of the store's schema, one file each in `versions`, run by Alembic in the order of their numbers.

`store.engine.connect` applies them. They are written by hand and go forward only; a test compares the outcome with
the tables in the code. A migration that is released is not edited any more, and imports nothing of ours: it
describes the schema of its time, and names its constraints as `store.engine.metadata` does.
"""

import logging
from pathlib import Path

import sqlalchemy as sa

FOLDER = Path(__file__).parent
HEAD = max(path.stem for path in FOLDER.glob("versions/m[0-9]*.py"))[1:5]


def revision(connection: sa.Connection) -> str | None:
    """Alembic's revision of the store; None for a new one and for those of releases without migrations."""
    if not sa.inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def upgrade(engine: sa.Engine) -> None:
    """Bring the store to `HEAD`. One process does so, others that start at the same time wait for it."""
    logging.getLogger("alembic").setLevel(logging.WARNING)  # it tells of every step, and of its import
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(FOLDER))
    context = EnvironmentContext(Config(), script, fn=lambda stored, _: script._upgrade_revs("head", stored))
    sqlite = engine.dialect.name == "sqlite"
    options = {"isolation_level": "AUTOCOMMIT"} if sqlite else {}
    with engine.connect().execution_options(**options) as connection, connection.begin():
        # SQLite's driver would begin a transaction at the first row that is written, after tables have been made.
        lock = "BEGIN IMMEDIATE" if sqlite else "SELECT pg_advisory_xact_lock(7393)"
        connection.execute(sa.text(lock))
        if revision(connection) != HEAD:
            with context:
                context.configure(connection=connection)
                context.run_migrations()
