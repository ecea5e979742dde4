"""Tenants that ask for predictions together share the places for them."""

import asyncio

import pytest

from api.http.turns import PLACES, Turns
from store.errors import Overloaded


async def enter(turns: Turns, tenant: str) -> None:
    if not turns.entered(tenant):
        await turns.wait(tenant)


def test_tenants_that_ask_together_share_the_places_and_one_alone_has_all() -> None:
    async def test() -> None:
        turns = Turns()
        for _ in range(100):  # alone
            await enter(turns, "a")
        await enter(turns, "b")
        waiting = [asyncio.create_task(enter(turns, "a")) for _ in range(20)]
        await asyncio.sleep(0)
        others = [asyncio.create_task(enter(turns, "b")) for _ in range(PLACES // 2 - 1)]
        await asyncio.gather(*others)  # at once, whatever the other has under way
        for _ in range(100 - PLACES // 2):
            turns.leave("a")
            await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        waiting[0].cancel()
        turns.leave("a")
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        await asyncio.sleep(0)
        assert [task.done() for task in waiting[:3]] == [True, True, False]
        waiting[2].cancel()
        for done in range(1, 19):
            turns.leave("a")
            await asyncio.sleep(0)
            assert sum(task.done() for task in waiting) >= min(20, 3 + done - 1)
        assert all(task.done() for task in waiting)

    asyncio.run(test())


def test_tenants_whose_predictions_take_long_still_share_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.http.turns.ACTIVE_S", 0.0)  # whoever has asked has asked long ago
    monkeypatch.setattr("api.http.turns.LOOK_S", 0.0)

    async def test() -> None:
        turns = Turns()
        for tenant in ("b", *["a"] * (PLACES // 2)):
            await enter(turns, tenant)
        waiting = [asyncio.create_task(enter(turns, "a")) for _ in range(3)]
        await asyncio.sleep(0)
        turns.leave("a")
        await asyncio.sleep(0)
        assert [task.done() for task in waiting] == [True, False, False]
        for task in waiting:
            task.cancel()

    asyncio.run(test())


def test_a_place_that_is_given_to_a_request_whose_client_hangs_up_goes_to_the_next() -> None:
    async def test() -> None:
        turns = Turns()
        await enter(turns, "b")
        for _ in range(PLACES // 2):
            await enter(turns, "a")
        first, second = (asyncio.create_task(enter(turns, "a")) for _ in range(2))
        await asyncio.sleep(0)
        turns.leave("a")  # gives the place to the first, which
        first.cancel()  # is gone before it can use it
        async with asyncio.timeout(5):
            await second

    asyncio.run(test())


def test_a_tenant_cannot_pile_up_requests_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.http.turns.MAX_WAITING", 3)

    async def test() -> None:
        turns = Turns()
        await enter(turns, "b")
        for _ in range(PLACES // 2):
            await enter(turns, "a")
        waiting = [asyncio.create_task(enter(turns, "a")) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await enter(turns, "a")
        for task in waiting:
            task.cancel()

    asyncio.run(test())
