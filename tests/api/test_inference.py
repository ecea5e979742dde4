"""Micro-batches and several model servers, over real channels to servers that hold their answers back."""

import asyncio
import contextlib
import time
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest
import sqlalchemy as sa
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from api.http.tracing import Tracing, answered_by
from api.inference import router
from api.inference.batcher import CALLS, MAX_BATCH, MAX_WAITING, MicroBatcher
from api.inference.router import Router, Servable
from api.inference.server_pool import HEDGE_S, ServerPool
from api.routes import health
from api.store_metrics import StoreMetrics
from serving.pb import model_server_pb2 as pb
from serving.registry import Label, Registry, Route
from store.errors import ModelServerTimeout, ModelServerUnavailable, Overloaded
from store.processes import free_port
from trainer.jobs.statistics import Statistics


@dataclass
class Held:
    """A model server that answers with the sum of every image, when it may."""

    socket: Path | None = None  # or a port
    port: int = field(default_factory=free_port)
    calls: list[tuple[str, str, int]] = field(default_factory=list)  # model, signature, images
    now: int = 0
    most: int = 0
    refuse: grpc.StatusCode | None = None
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def address(self) -> str:
        return f"unix:{self.socket}" if self.socket else f"127.0.0.1:{self.port}"

    async def predict(self, request: Any, context: Any) -> Any:
        tensor = request.inputs["image"]
        kind = "u1" if tensor.dtype == 4 else "<f4"
        images = np.frombuffer(tensor.tensor_content, kind).reshape([dim.size for dim in tensor.tensor_shape.dim])
        self.calls.append((request.model_spec.name, request.model_spec.signature_name, len(images)))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            if self.refuse:
                await context.abort(self.refuse, "no")
            await self.gate.wait()
        finally:
            self.now -= 1
        sums = images.reshape(len(images), -1).astype("<f4").sum(axis=1)
        shape = pb.TensorShapeProto(dim=[pb.TensorShapeProto.Dim(size=size) for size in (len(sums), 1)])
        answer = pb.TensorProto(dtype=1, tensor_shape=shape, float_val=sums.tobytes())
        response = pb.PredictResponse(outputs={"logits": answer, "probabilities": answer})
        response.model_spec.version.value = request.model_spec.version.value
        return response

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        method = grpc.unary_unary_rpc_method_handler(
            self.predict, pb.PredictRequest.FromString, pb.PredictResponse.SerializeToString
        )
        service = grpc.method_handlers_generic_handler("tensorflow.serving.PredictionService", {"Predict": method})
        server.add_generic_rpc_handlers((service,))
        server.add_insecure_port(self.address)
        await server.start()
        try:
            yield
        finally:
            await server.stop(None)


def image(value: float) -> np.ndarray:
    return np.full((1, 28, 28, 1), value, np.float32)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)


def with_servers(
    count: int, test: Callable[[list[Held], ServerPool, MicroBatcher], Awaitable[None]], folder: Path | None = None
) -> None:
    """Run a test with servers on ports, or with one and its standbys on Unix sockets in `folder`."""

    async def main() -> None:
        servers = [Held(folder / f"{number}.sock" if folder else None) for number in range(count)]
        async with contextlib.AsyncExitStack() as stack:
            for server in servers:
                await stack.enter_async_context(server.running())
            addresses = [server.address for server in servers]
            pool = await stack.enter_async_context(
                ServerPool(addresses, lambda *_: True, has_standby=folder is not None)
            )
            for target in pool.all:
                target.up = True
            await test(servers, pool, MicroBatcher(pool))

    asyncio.run(main())


def test_requests_that_come_while_calls_are_under_way_share_the_next_one() -> None:
    async def test(servers: list[Held], _: ServerPool, batcher: MicroBatcher) -> None:
        (server,) = servers
        asked = [asyncio.create_task(batcher.predict(Servable("m", 1), image(number), 20)) for number in range(50)]
        await until(lambda: len(server.calls) == 1)
        assert [images for *_, images in server.calls] == [1]  # a lone request does not wait
        server.gate.set()
        answers = await asyncio.gather(*asked)
        assert [float(answer["logits"][0, 0]) for answer in answers] == [784.0 * number for number in range(50)]
        assert sum(images for *_, images in server.calls) == 50
        assert len(server.calls) == 2

    with_servers(1, test)


def test_a_batch_is_of_one_version_and_one_signature_and_not_too_large() -> None:
    async def test(servers: list[Held], _: ServerPool, batcher: MicroBatcher) -> None:
        (server,) = servers
        pixels = np.ones((1, 784), np.uint8)
        asked = [asyncio.create_task(batcher.predict(Servable("m", 1), image(1), 20)) for _ in range(2 * MAX_BATCH)]
        asked += [asyncio.create_task(batcher.predict(Servable("m", 1), pixels, 20)) for _ in range(5)]
        asked += [asyncio.create_task(batcher.predict(Servable("m", 2), image(1), 20)) for _ in range(5)]
        await until(lambda: len(server.calls) == 3)
        server.gate.set()
        assert all(float(answer["logits"][0, 0]) == 784 for answer in await asyncio.gather(*asked))
        assert max(images for *_, images in server.calls) <= MAX_BATCH
        assert {signature for _, signature, _ in server.calls} == {"", "serving_bytes"}

    with_servers(1, test)


def test_what_is_in_flight_is_bounded_and_versions_take_turns() -> None:
    async def test(servers: list[Held], _: ServerPool, batcher: MicroBatcher) -> None:
        (server,) = servers
        crowd = [asyncio.create_task(batcher.predict(Servable("crowd", 1), image(1), 20)) for _ in range(500)]
        await until(lambda: len(server.calls) == 1)
        others = [asyncio.create_task(batcher.predict(Servable(f"m{number}", 1), image(1), 20)) for number in range(10)]
        await until(lambda: len(server.calls) == CALLS)
        server.gate.set()
        await asyncio.gather(*others)
        done = Counter(model for model, *_ in server.calls)
        assert done["crowd"] <= 6  # the crowd did not go first
        await asyncio.gather(*crowd)
        assert server.most <= CALLS

    with_servers(1, test)


def test_a_large_request_does_not_hold_up_small_ones() -> None:
    async def test(servers: list[Held], _: ServerPool, batcher: MicroBatcher) -> None:
        (server,) = servers
        large = asyncio.create_task(batcher.predict(Servable("m", 1), np.zeros((1000, 28, 28, 1), np.float32), 20))
        small = asyncio.create_task(batcher.predict(Servable("m", 1), image(1), 20))
        await until(lambda: len(server.calls) == 2)
        assert sorted(images for *_, images in server.calls) == [1, 1000]
        server.gate.set()
        await asyncio.gather(large, small)

    with_servers(1, test)


def test_a_request_whose_time_is_up_is_not_sent() -> None:
    async def test(servers: list[Held], _: ServerPool, batcher: MicroBatcher) -> None:
        (server,) = servers
        first = asyncio.create_task(batcher.predict(Servable("m", 1), image(1), 20))
        await until(lambda: len(server.calls) == 1)
        late = [asyncio.create_task(batcher.predict(Servable("m", 1), image(2), 0.05)) for _ in range(7)]
        for request in late:
            with pytest.raises(ModelServerTimeout, match=r"no prediction within 0\.05 s"):
                await request
        server.gate.set()
        await first
        assert [images for *_, images in server.calls] == [1]
        await batcher.predict(Servable("m", 1), image(1), 20)  # and the way is free again

    with_servers(1, test)


def test_requests_that_expired_or_were_abandoned_make_room_for_others() -> None:
    async def test(servers: list[Held], _: ServerPool, batcher: MicroBatcher) -> None:
        (server,) = servers
        full = np.zeros((MAX_BATCH, 28, 28, 1), np.float32)
        in_flight = [asyncio.create_task(batcher.predict(Servable("m", 1), full, 20)) for _ in range(2)]
        await until(lambda: len(server.calls) == 2)
        crowd = MAX_WAITING // MAX_BATCH
        expiring = [asyncio.create_task(batcher.predict(Servable("m", 1), full, 0.05)) for _ in range(crowd)]
        assert all(isinstance(e, ModelServerTimeout) for e in await asyncio.gather(*expiring, return_exceptions=True))
        abandoned = [asyncio.create_task(batcher.predict(Servable("m", 1), full, 20)) for _ in range(crowd)]
        await asyncio.sleep(0)
        for request in abandoned:
            request.cancel()
        assert {type(e) for e in await asyncio.gather(*abandoned, return_exceptions=True)} == {asyncio.CancelledError}
        waiting = asyncio.create_task(batcher.predict(Servable("m", 1), image(1), 20))
        server.gate.set()
        assert float((await waiting)["logits"][0, 0]) == 784
        await asyncio.gather(*in_flight)

    with_servers(1, test)


def test_a_batch_that_cannot_be_joined_fails_alone_and_frees_its_slot() -> None:
    async def test(servers: list[Held], _: ServerPool, batcher: MicroBatcher) -> None:
        (server,) = servers
        first = asyncio.create_task(batcher.predict(Servable("m", 1), image(1), 20))
        await until(lambda: len(server.calls) == 1)
        shapes = ((1, 28, 28, 1), (1, 27, 27, 1))
        odd = [
            asyncio.create_task(batcher.predict(Servable("m", 1), np.ones(shape, np.float32), 20)) for shape in shapes
        ]
        await asyncio.sleep(0)
        server.gate.set()
        await first
        async with asyncio.timeout(5):
            failed = await asyncio.gather(*odd, return_exceptions=True)
            assert [type(failure) for failure in failed] == [ValueError, ValueError]
            assert float((await batcher.predict(Servable("m", 1), image(1), 20))["logits"][0, 0]) == 784

    with_servers(1, test)


def test_when_too_many_wait_more_are_refused_but_not_those_for_another_version() -> None:
    async def test(servers: list[Held], _: ServerPool, batcher: MicroBatcher) -> None:
        (server,) = servers
        many = np.zeros((MAX_BATCH, 28, 28, 1), np.float32)
        asked = [
            asyncio.create_task(batcher.predict(Servable("m", 1), many, 20))
            for _ in range(2 + MAX_WAITING // MAX_BATCH)
        ]
        await until(lambda: len(server.calls) == 2)
        with pytest.raises(Overloaded):
            await batcher.predict(Servable("m", 1), image(1), 20)
        other = asyncio.create_task(batcher.predict(Servable("other", 1), image(1), 20))
        await until(lambda: len(server.calls) == 3)
        server.gate.set()
        await asyncio.gather(other, *asked)

    with_servers(1, test)


def test_a_tenants_crowd_leaves_others_their_share_of_what_may_wait() -> None:
    async def test(servers: list[Held], _: ServerPool, batcher: MicroBatcher) -> None:
        (server,) = servers
        many = np.zeros((MAX_BATCH, 28, 28, 1), np.float32)

        def ask(number: int, tenant: str) -> "asyncio.Task[Any]":
            return asyncio.create_task(batcher.predict(Servable(f"m{number}", 1), many, 20, tenant))

        crowd = [ask(number % 8, "a") for number in range(CALLS + MAX_WAITING // MAX_BATCH)]
        await until(lambda: len(server.calls) == CALLS)
        others = [ask(0, "b") for _ in range(MAX_WAITING // MAX_BATCH // 2)]  # half of all places, for a model of both
        await asyncio.sleep(0)
        for tenant in ("a", "b"):
            with pytest.raises(Overloaded):
                await ask(0, tenant)
        assert not any(other.done() for other in others)
        server.gate.set()
        await asyncio.gather(*others, *crowd)

    with_servers(1, test)


def test_tenants_take_turns_however_many_models_one_asks() -> None:
    async def test(servers: list[Held], _: ServerPool, batcher: MicroBatcher) -> None:
        (server,) = servers
        crowd = [
            asyncio.create_task(batcher.predict(Servable(f"m{number}", 1), image(1), 20, "a")) for number in range(100)
        ]
        await until(lambda: len(server.calls) == CALLS)
        other = asyncio.create_task(batcher.predict(Servable("other", 1), image(1), 20, "b"))
        await asyncio.sleep(0)
        server.gate.set()
        await other
        assert [model for model, *_ in server.calls].index("other") <= CALLS + 1  # not behind the 96 that came before
        await asyncio.gather(*crowd)

    with_servers(1, test)


def test_calls_go_to_the_server_with_the_least_in_flight() -> None:
    async def test(servers: list[Held], _: ServerPool, batcher: MicroBatcher) -> None:
        asked = [asyncio.create_task(batcher.predict(Servable("m", 1), image(1), 20)) for _ in range(2)]
        await until(lambda: all(len(server.calls) == 1 for server in servers))
        for server in servers:
            server.gate.set()
        await asyncio.gather(*asked)

    with_servers(2, test)


@pytest.mark.parametrize("refuse", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND,
                                    grpc.StatusCode.RESOURCE_EXHAUSTED])  # fmt: skip
def test_what_one_server_cannot_do_another_does(refuse: grpc.StatusCode) -> None:
    async def test(servers: list[Held], pool: ServerPool, batcher: MicroBatcher) -> None:
        bad, good = servers
        bad.refuse = refuse
        good.gate.set()
        answers = await asyncio.gather(*(batcher.predict(Servable("m", 1), image(1), 20) for _ in range(40)))
        assert len(answers) == 40
        assert bad.calls
        state = next(target for target in pool.all if target.address == bad.address)
        assert state.up is (refuse != grpc.StatusCode.UNAVAILABLE)
        assert state.behind

    with_servers(2, test)


def test_a_server_that_dies_in_the_middle_of_calls_costs_no_request() -> None:
    async def main() -> None:
        survivor, dying = Held(), Held()
        survivor.gate.set()
        async with survivor.running(), ServerPool([survivor.address, dying.address], lambda *_: True) as pool:
            for target in pool.all:
                target.up = True
            batcher = MicroBatcher(pool)
            async with dying.running():
                asked = [asyncio.create_task(batcher.predict(Servable("m", 1), image(1), 20)) for _ in range(40)]
                await until(lambda: dying.now > 0)
            assert all(float(answer["logits"][0, 0]) == 784 for answer in await asyncio.gather(*asked))

    asyncio.run(main())


def test_of_servers_on_one_machine_one_is_asked_and_the_next_stays_in_its_place(tmp_path: Path) -> None:
    async def test(servers: list[Held], pool: ServerPool, batcher: MicroBatcher) -> None:
        first, second = servers
        for server in servers:
            server.gate.set()

        async def ask() -> None:
            await asyncio.gather(*(batcher.predict(Servable(f"m{n % 3}", 1), image(1), 20) for n in range(40)))

        await ask()
        assert first.calls
        assert second.calls == []
        first.refuse = grpc.StatusCode.UNAVAILABLE
        await ask()
        first.refuse, pool.all[0].up = None, True  # it is back
        first.calls.clear()
        await ask()
        assert first.calls == []
        second.refuse = grpc.StatusCode.UNAVAILABLE
        await ask()
        assert first.calls

    with_servers(2, test, tmp_path)


@pytest.mark.parametrize("stands_by", [True, False])
def test_a_server_that_freezes_costs_no_request_and_is_asked_no_more(tmp_path: Path, stands_by: bool) -> None:
    async def test(servers: list[Held], pool: ServerPool, batcher: MicroBatcher) -> None:
        frozen, other = servers
        other.gate.set()
        began = time.monotonic()
        short = 0.6  # seconds; half of it is left when the other is asked
        answers = await asyncio.gather(*(batcher.predict(Servable("m", 1), image(n), short) for n in range(40)))
        assert [float(answer["logits"][0, 0]) for answer in answers] == [784.0 * n for n in range(40)]
        assert time.monotonic() - began < short
        await until(lambda: frozen.now == 0)  # what it was asked is cancelled
        assert pool.all[0].slow
        assert pool.all[0].calls == set()
        frozen.calls.clear()
        for _ in range(10):
            await batcher.predict(Servable("m", 1), image(1), 20)
        assert frozen.calls == []

    with_servers(2, test, tmp_path if stands_by else None)


def test_a_call_that_no_other_server_can_take_over_waits(tmp_path: Path) -> None:
    async def test(servers: list[Held], pool: ServerPool, batcher: MicroBatcher) -> None:
        slow, loading = servers
        pool.all[1].up = False
        asked = asyncio.create_task(batcher.predict(Servable("m", 1), image(1), 20))
        await until(lambda: slow.now == 1)
        await asyncio.wait([asked], timeout=2 * HEDGE_S)
        assert loading.calls == []
        slow.gate.set()
        await asked

    with_servers(2, test, tmp_path)


def test_without_a_server_the_error_says_so_and_a_bad_answer_is_not_retried() -> None:
    async def test(servers: list[Held], _: ServerPool, batcher: MicroBatcher) -> None:
        for server in servers:
            server.refuse = grpc.StatusCode.UNAVAILABLE
        with pytest.raises(ModelServerUnavailable, match="cannot be reached"):
            await batcher.predict(Servable("m", 1), image(1), 20)
        for server in servers:
            server.refuse = grpc.StatusCode.NOT_FOUND
        with pytest.raises(ModelServerUnavailable, match="has not loaded m:1 yet"):
            await batcher.predict(Servable("m", 1), image(1), 20)

    with_servers(2, test)


def test_a_share_of_the_traffic_follows_the_canary_and_a_key_sticks() -> None:
    labels = {"stable": Label(1), "canary": Label(2, 0.3), "other": Label(3, 0.2)}
    route = Route({1: ("a",), 2: ("a",), 3: ("a",)}, labels)
    drawn = Counter(router._draw("m", route, b"user-%d" % number) for number in range(5000))
    again = Counter(router._draw("m", route, b"user-%d" % number) for number in range(5000))
    assert drawn == again
    assert abs(drawn["canary"] / 5000 - 0.3) < 0.03
    assert abs(drawn["other"] / 5000 - 0.2) < 0.03
    free = Counter(router._draw("m", route, None) for _ in range(5000))
    assert abs(free["canary"] / 5000 - 0.3) < 0.05
    assert router._draw("m", Route({1: ("a",)}, {"stable": Label(1), "canary": Label(1)}), None) == "stable"


def test_a_version_or_label_that_is_named_is_never_drawn() -> None:
    class Fixed(Router):
        def __init__(self) -> None:
            super().__init__(Registry(sa.create_engine("sqlite://")))
            self._routes = {"m": Route({1: ("a",), 2: ("b",)}, {"stable": Label(1), "canary": Label(2, 1.0)})}

    async def main() -> None:
        routes = Fixed()
        assert (await routes.resolve("m", None, None, b"k")).classes == ("b",)
        assert (await routes.resolve("m", None, "stable", b"k")).version == 1
        assert (await routes.resolve("m", 1, None, b"k")).servable == ("m", 1)

    asyncio.run(main())


class Stored(Registry):
    """A registry whose answers are given."""

    def __init__(self, routes: dict[str, Route]) -> None:
        self.stored, self.changes = routes, 0

    def revision(self) -> int:
        return self.changes

    def routes(self) -> dict[str, Route]:
        return self.stored


def test_a_sticky_key_follows_the_same_label_in_whatever_order_the_database_returns_them() -> None:
    labels = {"stable": Label(1), "canary": Label(2, 0.3), "other": Label(3, 0.4)}
    classes: dict[int, tuple[str, ...]] = {1: ("a",), 2: ("a",), 3: ("a",)}

    async def followed(order: list[str]) -> list[int]:
        found = Router(Stored({"m": Route(classes, {name: labels[name] for name in order})}))
        return [(await found.resolve("m", None, None, b"user-%d" % number)).version for number in range(200)]

    first = asyncio.run(followed(["stable", "canary", "other"]))
    assert len(set(first)) == 3
    assert asyncio.run(followed(["other", "canary", "stable"])) == first


def test_with_ten_thousand_models_metrics_stay_small_and_the_event_loop_free() -> None:
    def served(count: int) -> dict[str, Route]:
        return {f"model-{number}": Route({1: ("a",)}, {"stable": Label(1)}) for number in range(count)}

    stored = Stored(served(10_000))
    asked = Router(stored)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        target = await asked.resolve(scope["path"], None, None)
        answered_by(scope, target.model, target.version)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def nothing(*_: object) -> Any:
        return None

    async def longest_block(task: asyncio.Future[Any]) -> float:
        longest, before = 0.0, time.perf_counter()
        while not task.done():
            await asyncio.sleep(0)
            longest, before = max(longest, (now := time.perf_counter()) - before), now
        return longest

    async def main() -> None:
        traced, operators = Tracing(app), FastAPI()
        operators.include_router(health.router)
        gateway = SimpleNamespace(store_metrics=StoreMetrics(Statistics(sa.create_engine("sqlite://"))))

        async def scraped_app(scope: Scope, receive: Receive, send: Send) -> None:
            await operators({**scope, "state": {"gateway": gateway}}, receive, send)

        scrape = httpx.AsyncClient(transport=httpx.ASGITransport(scraped_app), base_url="http://127.0.0.1")
        await asked.refresh()
        tracemalloc.start()
        try:
            for number in range(10_000):
                scope = {"type": "http", "method": "POST", "path": f"model-{number}", "headers": [], "state": {}}
                await traced(scope, nothing, nothing)
            grown = tracemalloc.get_traced_memory()[0]
        finally:
            tracemalloc.stop()
        assert grown < 6 << 20  # bytes; 10,000 targets included
        scraped = asyncio.ensure_future(scrape.get("/metrics"))
        assert await longest_block(scraped) < 0.3  # seconds
        text = scraped.result().text
        assert len(text) < 300_000
        assert 'temper_requests_total{model="_others",route="unknown",status="200",version=""} 9' in text
        assert 'temper_versions_served{model="_others"} 9900.0' in text
        stored.stored, stored.changes = served(1), 1
        await asked.refresh()
        await traced(
            {"type": "http", "method": "POST", "path": "model-0", "headers": [], "state": {}}, nothing, nothing
        )
        text = (await scrape.get("/metrics")).text
        assert 'model="model-0",route="unknown",status="200",version="1"}' in text
        assert "model-1" not in text
        await scrape.aclose()

    asyncio.run(main())
