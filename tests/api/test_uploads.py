"""Uploads on their way in: bounded, written once, refused with reasons, and gone when nobody wants them any more."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect, Request

import api.uploads
from api.uploads import Uploads
from store.engine import connect
from store.errors import MalformedRequest, Overloaded
from store.records import DatasetCard
from store.settings import Settings
from tests.conftest import Service, png, zipped
from tests.trainer.test_datasets import DOT
from trainer.jobs.records import Jobs

GOOD = zipped({f"{name}/{i}.png": png(DOT) for name in "ab" for i in range(2)})
HEAD = b'--X\r\nContent-Disposition: form-data; name="data"; filename="d.zip"\r\n\r\n'
MULTIPART = "multipart/form-data; boundary=X"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    settings = Settings(home=tmp_path)
    settings.make_home()
    return settings


@pytest.fixture
def jobs(settings: Settings) -> Iterator[Jobs]:
    engine = connect(settings.store_url)
    yield Jobs(engine)
    engine.dispose()


@asynccontextmanager
async def opened(settings: Settings, jobs: Jobs) -> AsyncIterator[Uploads]:
    async with Uploads(settings, jobs) as uploads:
        yield uploads


def request(receive: Callable[[], Any]) -> Request:
    headers = [(b"content-type", MULTIPART.encode())]
    return Request({"type": "http", "method": "POST", "path": "/finetune", "headers": headers}, receive)


def staged(settings: Settings) -> list[Path]:
    return list(settings.staging.rglob("*.upload"))


def test_a_file_is_on_disk_while_the_rest_of_it_is_still_to_come(settings: Settings, jobs: Jobs) -> None:
    pieces = [HEAD, *[bytes(1 << 19)] * 8, b"\r\n--X--\r\n"]
    sizes: list[int] = []

    async def receive() -> dict[str, Any]:
        sizes.append(sum(path.stat().st_size for path in staged(settings)))
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def upload() -> None:
        async with opened(settings, jobs) as uploads, uploads.receive(request(receive), {"model"}, {"data"}) as form:
            assert staged(settings) == [form.files["data"]]
            assert form.files["data"].stat().st_size == 4 << 20
            assert form.names == {"data": "d.zip"}
        assert staged(settings) == []

    asyncio.run(upload())
    assert sizes[-1] >= 3 << 20  # before the last piece had arrived


def test_nothing_is_read_of_an_upload_that_is_one_too_many_for_its_tenant(
    settings: Settings, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.uploads, "MAX_UPLOADS", 2)
    monkeypatch.setattr(api.uploads, "SPARE_UPLOADS", 1)

    async def receive() -> dict[str, Any]:
        raise AssertionError("the body was read")

    async def upload() -> None:
        async with opened(settings, jobs) as uploads:
            with uploads.admitted("a"):
                with pytest.raises(Overloaded):
                    async with uploads.receive(request(receive), {"model"}, {"data"}, "a"):
                        pass
                with uploads.admitted("b"), pytest.raises(Overloaded), uploads.admitted("c"):
                    pass
            with uploads.admitted("a"):  # a place that was given back
                pass

    asyncio.run(upload())


@pytest.mark.parametrize(("limit", "reason"), [("IDLE_S", "stalled"), ("LONGEST_S", "took longer")])
def test_an_upload_that_stalls_or_trickles_gives_its_place_back(
    settings: Settings, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, limit: str, reason: str
) -> None:
    monkeypatch.setattr(api.uploads, limit, 0.0)

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": HEAD, "more_body": True}

    async def upload() -> None:
        async with opened(settings, jobs) as uploads:
            with pytest.raises(MalformedRequest, match=reason):
                async with uploads.receive(request(receive), {"model"}, {"data"}):
                    pass
            assert not uploads._under_way
        assert staged(settings) == []

    asyncio.run(upload())


def test_a_client_that_hangs_up_leaves_nothing(settings: Settings, jobs: Jobs) -> None:
    pieces = [HEAD + bytes(1 << 21)]

    async def receive() -> dict[str, Any]:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(), "more_body": True}
        assert staged(settings)
        return {"type": "http.disconnect"}

    async def upload() -> None:
        async with opened(settings, jobs) as uploads:
            with pytest.raises(ClientDisconnect):
                async with uploads.receive(request(receive), {"model"}, {"data"}):
                    pass
            assert staged(settings) == []

    asyncio.run(upload())


def test_leftovers_go_at_start_but_not_what_a_living_process_works_on(settings: Settings, jobs: Jobs) -> None:
    def create() -> str:
        return jobs.create(model="m", base="lenet5:1", spec={}, dataset=DatasetCard()).id

    finished, running = create(), create()
    jobs.cancel(finished)
    claimed = jobs.claim("w")
    assert claimed is not None
    assert claimed.id == running
    for name in (finished, running, "lenet5", "ftjob-of-nobody", "uploads-of-the-dead"):
        (settings.staging / name).mkdir()
        (settings.staging / name / "lock").write_bytes(b"")
    (settings.staging / "0123.npz").write_bytes(b"half")

    async def start() -> set[str]:
        async with opened(settings, jobs):
            first = {path.name for path in settings.staging.iterdir()}
            async with opened(settings, jobs):  # another gateway beside it
                both = {path.name for path in settings.staging.iterdir()}
            assert first < both
            return first

    (own,) = asyncio.run(start()) - {running, "lenet5"}
    assert own.startswith("uploads-")
    assert {path.name for path in settings.staging.iterdir()} == {running, "lenet5"}


def part(name: str, content: bytes | str, filename: str | None = None) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    file = f'; filename="{filename}"' if filename is not None else ""
    return f'--X\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + content + b"\r\n"


DATA, MODEL = part("data", GOOD, "d.zip"), part("model", "formed")


@pytest.mark.parametrize(
    ("parts", "status", "param", "says"),
    [
        ([MODEL, DATA, DATA], 422, "data", "given twice"),
        ([MODEL, MODEL, DATA], 422, "model", "given twice"),
        (
            [MODEL, DATA, part("sepc", "{}")],
            422,
            "sepc",
            "known are corrections, data, dataset, dry_run, exclude, label, metadata, model, priority, spec",
        ),
        ([MODEL, DATA, part("validation", "none")], 422, "validation", "must be a file"),
        ([MODEL, part("data", "text")], 422, "data", "must be a file"),
        ([part("model", "formed", "m.txt"), DATA], 422, "model", "must be text"),
        ([MODEL], 422, "data", "is required"),
        ([DATA], 422, "model", "is required"),
        ([part("model", "Bad Name"), DATA], 422, "model", "beginning with a letter or digit, not 'Bad Name'"),
        ([part("model", b"\xff"), DATA], 422, "model", "UTF-8"),
        ([MODEL, DATA, part("spec", " " * ((1 << 20) + 1))], 422, "spec", "at most 1048576 bytes"),
        ([MODEL, DATA, part("spec", '{"l2": 0, "l2": 1}')], 422, "spec.l2", "given twice"),
        ([MODEL, DATA, part("exclude", "a/0.png")], 422, "exclude", "is not valid JSON"),
        ([MODEL, DATA, part("exclude", '"a/0.png"')], 422, "exclude", "must be a JSON array of file names"),
        ([MODEL, DATA, part("exclude", "[-1]")], 422, "exclude", "must be a JSON array"),
        ([MODEL, DATA, part("exclude", "[true]")], 422, "exclude", "must be a JSON array"),
        ([MODEL, DATA, part("exclude", '["\\ud800"]')], 422, "exclude", "must be a JSON array"),
        ([MODEL, DATA, part("exclude", '["a/0.png", "é", "\\u0000"]')], 422, "exclude", "é: is not in the data set"),
        ([MODEL, DATA, part("exclude", '["a/0.png"]')], 422, "data", "has only one image"),
        ([MODEL, part("data", b"", "d.zip")], 422, "data", "it is empty"),
        ([MODEL, part("data", GOOD, "d\0.zip")], 422, "data", "its file name contains NUL"),
    ],
)
def test_a_form_that_is_not_as_documented_is_refused(
    service: Service, parts: list[bytes], status: int, param: str, says: str
) -> None:
    answer = service.api.post("/finetune", content=b"".join(parts) + b"--X--\r\n", headers={"Content-Type": MULTIPART})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), answer.text
    assert says in error["message"]
    assert staged(Settings(home=service.home)) == []


@pytest.mark.parametrize("body", [b"", MODEL + DATA, b"no multipart", (MODEL + DATA)[:100]])
def test_a_body_that_is_no_whole_form_is_malformed(service: Service, body: bytes) -> None:
    answer = service.api.post("/finetune", content=body, headers={"Content-Type": MULTIPART})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "malformed_request"), answer.text
    assert staged(Settings(home=service.home)) == []
