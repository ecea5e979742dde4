"""The relational store that the processes share: SQLite by default, PostgreSQL where several machines share it."""

import sqlite3
from typing import Any

import sqlalchemy as sa

metadata = sa.MetaData()


def connect(url: str) -> sa.Engine:
    """Engine of the store at `url`, with all tables of `metadata` made."""
    engine = sa.create_engine(url, pool_pre_ping=True)
    if engine.dialect.name == "sqlite":
        sa.event.listen(engine, "connect", _prepare_sqlite)
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":  # two processes may start at once
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(7393)"))
        for table in metadata.sorted_tables:
            connection.execute(sa.schema.CreateTable(table, if_not_exists=True))
            for index in table.indexes:
                connection.execute(sa.schema.CreateIndex(index, if_not_exists=True))
            _add_new_columns(connection, table)
    return engine


def _add_new_columns(connection: sa.Connection, table: sa.Table) -> None:
    """Add what a store of an earlier release lacks; such columns have a default."""
    present = {column["name"] for column in sa.inspect(connection).get_columns(table.name)}
    for column in table.columns:
        if column.name not in present:
            definition = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
            connection.execute(sa.text(f"ALTER TABLE {table.name} ADD COLUMN {definition}"))


def _prepare_sqlite(connection: sqlite3.Connection, _: Any) -> None:
    connection.execute("PRAGMA busy_timeout = 15000")
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = NORMAL")
