"""Notifications of PostgreSQL."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from api import gateway
from serving.registry import Registry
from store.changes import listen
from store.engine import connect
from store.errors import UnknownModel
from store.keys import Keys
from store.records import Manifest, ReportCard

SOON_S = 10.0  # far less than a look every hour, and enough for a busy machine


@contextlib.asynccontextmanager
async def listening(engine: sa.Engine) -> AsyncIterator[dict[str, asyncio.Event]]:
    """What `listen` sets; its connection is there."""
    events: dict[str, asyncio.Event] = {"registry": asyncio.Event(), "keys": asyncio.Event()}
    task = asyncio.create_task(listen(engine, events))
    try:
        await told(events["registry"])  # something may have been missed before
        await told(events["keys"])
        yield events
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def told(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), SOON_S)
    event.clear()


@pytest.fixture
def store(empty_postgresql: str) -> str:
    """An empty store on PostgreSQL."""
    connect(empty_postgresql).dispose()
    return empty_postgresql


def published(engine: sa.Engine) -> Registry:
    registry = Registry(engine)
    registry.go_live("m", registry.reserve("m", None, Manifest(classes=("a",)), ReportCard()))
    return registry


def test_a_change_of_the_registry_or_of_the_keys_is_told_once_it_is_committed(store: str) -> None:
    ours, theirs = connect(store), connect(store)
    registry = published(theirs)

    async def scenario() -> None:
        async with listening(ours) as events:
            with pytest.raises(UnknownModel):
                registry.put_label("m", "canary", 7)
            Keys(theirs).create("app", "default", ["predict"])
            await told(events["keys"])  # notifications come in the order of the transactions
            assert not events["registry"].is_set()
            registry.put_label("m", "canary", 1)
            await told(events["registry"])
            assert not events["keys"].is_set()

    asyncio.run(scenario())
    ours.dispose()
    theirs.dispose()


def test_a_listener_whose_connection_breaks_connects_again_and_looks_at_everything(store: str) -> None:
    ours, theirs = connect(store), connect(store)

    async def scenario() -> None:
        async with listening(ours) as events:
            with theirs.begin() as connection:
                ended = connection.execute(
                    sa.text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'")
                )
                assert ended.scalars().all() == [True]
            await told(events["registry"])
            await told(events["keys"])
            Keys(theirs).create("app", "default", ["predict"])
            await told(events["keys"])

    asyncio.run(scenario())
    ours.dispose()
    theirs.dispose()


def test_a_gateway_looks_when_it_is_told(store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "LOOK_S", 3600.0)
    ours, theirs = connect(store), connect(store)
    registry, mine = published(theirs), Registry(ours)
    looked = asyncio.Event()
    seen: list[int] = []

    async def look() -> None:
        seen.append(await asyncio.to_thread(mine.revision))
        looked.set()

    async def scenario() -> None:
        async with listening(ours) as events:
            task = asyncio.create_task(gateway._keep_fresh(look, "looking", events["registry"]))
            await told(looked)
            registry.put_label("m", "canary", 1)
            await told(looked)
            task.cancel()

    asyncio.run(scenario())
    assert seen[-1] == seen[0] + 1
    ours.dispose()
    theirs.dispose()


def test_where_nothing_is_told_listening_ends(tmp_path: Path) -> None:
    engine = connect(f"sqlite:///{tmp_path / 'temper.db'}")
    asyncio.run(asyncio.wait_for(listen(engine, {}), SOON_S))
    engine.dispose()
