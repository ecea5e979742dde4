"""Tells gateways at once what another process has changed, where the store is PostgreSQL (LISTEN and NOTIFY).

A notification only makes a gateway look earlier than it would anyway: it is lost while the connection that listens is
broken, and behind a pooler that gives a connection to another client after each transaction.
"""

import asyncio
from collections.abc import Mapping
from typing import Literal

import sqlalchemy as sa

from store.engine import RETRY_FIRST_S, RETRY_MOST_S, connect_options
from store.health import Notice

CHANNEL = "temper"
Changed = Literal["registry", "keys"]


def notify(connection: sa.Connection, changed: Changed) -> None:
    """Tell all that listen what this transaction changes, once it is committed."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_notify(CHANNEL, changed)))


async def listen(engine: sa.Engine, events: Mapping[str, asyncio.Event]) -> None:
    """Set the event of whatever has changed, until cancelled; of everything when something may have been missed.

    Returns at once if the store has no notifications: it is SQLite, or read through a driver other than psycopg.
    """
    if engine.driver != "psycopg":
        return
    import psycopg

    arguments, options = engine.dialect.create_connect_args(engine.url)
    options = {**options, **connect_options(engine.url)}
    listening, pause_s = Notice("listening to the store"), RETRY_FIRST_S
    while True:
        try:
            async with await psycopg.AsyncConnection.connect(*arguments, **options, autocommit=True) as connection:
                await connection.execute(f"LISTEN {CHANNEL}")
                listening.worked()
                pause_s = RETRY_FIRST_S
                for event in events.values():
                    event.set()
                async for notification in connection.notifies():
                    if notification.payload in events:
                        events[notification.payload].set()
        except Exception as exc:  # whatever it is, a gateway goes on, and looks twice a second
            listening.failed(exc)
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, RETRY_MOST_S)
