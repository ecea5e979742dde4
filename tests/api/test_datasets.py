"""Data sets as a resource, and requests that are sent again."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
import sqlalchemy as sa

from tests.api.test_refusals import files
from tests.conftest import Service, npz, opened, png, zipped
from tests.trainer.test_datasets import BAD, DOT
from trainer.jobs.datasets import Dataset

RNG = np.random.default_rng(11)


def noise(side: int = 28) -> np.ndarray:
    return RNG.integers(0, 255, (side, side), np.uint8)


def upload(*, per_class: int = 2) -> bytes:
    """A data set that no other test has."""
    return npz(images=np.stack([noise() for _ in range(2 * per_class)]), labels=np.repeat([0, 1], per_class))


def post(api: httpx.Client, content: bytes, filename: str = "d.npz", key: str | None = None) -> httpx.Response:
    return api.post("/datasets", files={"data": (filename, content)}, headers={"Idempotency-Key": key} if key else None)


def test_a_data_set_is_reported_kept_once_and_deleted(service: Service) -> None:
    image, other = noise(), noise(40)
    content = zipped({
        "a/1.png": png(image), "a/2.png": png(image), "a/3.png": png(DOT), "b/1.png": png(image),
        "b/2.png": png(np.full((9, 7), 7, np.uint8)), "b/3.png": png(other),
    })  # fmt: skip
    answer = post(service.api, content, "d.zip")
    assert answer.status_code == 201, answer.text
    kept = answer.json()
    report = kept["report"]
    assert answer.headers["location"] == f"/datasets/{kept['id']}"
    assert (kept["filename"], kept["size_bytes"], kept["sha256"]) == ("d.zip", len(content), kept["id"])
    assert (report["images"], report["classes"]) == (6, {"a": 3, "b": 3})
    assert (report["smallest"], report["largest"], report["sizes"]) == ([7, 9], [40, 40], 3)
    same = [{"file": name, "class": name[0]} for name in ("a/1.png", "a/2.png", "b/1.png")]
    assert (report["duplicates"], report["conflicts"], report["duplicate_groups"]) == (2, 1, [same])
    faint = {"file": "b/2.png", "class": "b", "reason": "its pixels differ by 0 of 255"}
    assert (report["near_constant"], report["near_constant_images"]) == (1, [faint])

    again = post(service.api, content, "other.zip")
    assert (again.status_code, again.json()) == (200, kept)
    page = service.api.get("/datasets", params={"limit": 1}).json()
    assert page["data"] == [kept]
    assert service.api.get(f"/datasets/{kept['id']}").json() == kept
    assert service.api.delete(f"/datasets/{kept['id']}").json()["deleted"] is True
    assert service.api.get(f"/datasets/{kept['id']}").json()["error"]["code"] == "unknown_dataset"
    assert service.api.delete(f"/datasets/{kept['id']}").status_code == 404


def test_data_sets_that_differ_in_a_part_are_two_and_each_keeps_its_files(service: Service) -> None:
    train = {f"train/{name}/{i}.png": png(noise()) for name in "ab" for i in range(2)}
    kept = [
        post(service.api, zipped(train | {f"test/a/{i}.png": png(noise()) for i in range(count)}), "d.zip").json()
        for count in (0, 1, 2)
    ]
    assert len({one["id"] for one in kept}) == 3
    assert [one["report"]["test_images"] for one in kept] == [0, 1, 2]
    jobs = [
        service.api.post("/finetune", data={"model": "m", "dry_run": "true", "dataset": one["id"]}).json()
        for one in kept
    ]
    assert len({job["dataset"]["id"] for job in jobs}) == 1
    assert [job["dataset"].get("test", {}).get("images") for job in jobs] == [None, 1, 2]
    prepared = {part["prepared"] for job in jobs for part in (job["dataset"], job["dataset"].get("test")) if part}
    assert {f"{name}.npz" for name in prepared} <= {path.name for path in (service.home / "datasets").iterdir()}
    for one in kept:
        service.api.delete(f"/datasets/{one['id']}")


@pytest.mark.slow
def test_images_are_excluded_from_an_upload_and_from_a_kept_data_set_alike(lone: Any) -> None:
    api, _, settings = lone
    same = png(noise())
    files = {f"{name}/{i}.png": png(noise()) for name in "ab" for i in range(3)}
    content = zipped(files | {"a/same.png": same, "b/same.png": same})
    kept = post(api, content, "d.zip").json()["id"]

    def ask(exclude: str | None, **more: Any) -> Any:
        fields = {"model": "excluded"} | ({"exclude": exclude} if exclude else {})
        answer = api.post("/finetune", data={**fields, **more.pop("data", {})}, **more)
        return answer.json()["error" if answer.status_code == 422 else "dataset"]

    whole = ask(None, data={"dataset": kept})
    (finding,) = whole["findings"]
    assert (finding["kind"], finding["images"]) == ("conflict", 2)
    names = json.dumps([image["file"] for image in finding["listed"]])
    sent, taken = ask(names, files={"data": ("d.zip", content)}), ask(names, data={"dataset": kept})
    assert {**sent, "kept": kept} == taken
    assert (taken["id"] != whole["id"], taken["images"], taken["excluded"]) == (True, 6, 2)
    assert (taken["findings"], taken["filename"]) == ([], "d.zip")
    assert Dataset.load(settings.datasets / f"{taken['prepared']}.npz").names == tuple(files)
    assert api.delete(f"/datasets/{kept}").status_code == 409
    for more, param in (({"files": {"data": ("d.zip", content)}}, "data"), ({"data": {"dataset": kept}}, "dataset")):
        unknown = ask('["a/9.png", 0]', **more)
        assert (unknown["code"], unknown["param"]) == ("invalid_dataset", "exclude")
        assert [detail.get("file", detail.get("index")) for detail in unknown["details"]] == ["a/9.png", 0]
        few = ask(json.dumps(["a/0.png", "a/1.png", "a/2.png"]), **more)
        assert (few["code"], few["param"]) == ("invalid_dataset", param)
        assert few["details"] == [{"class": "a", "reason": "has only one image"}]


def test_without_the_bytes_of_a_kept_data_set_nothing_is_excluded_and_the_rest_works(lone: Any) -> None:
    api, _, settings = lone
    content = upload()
    kept = post(api, content).json()["id"]
    (settings.datasets / f"{hashlib.sha256(content).hexdigest()}.upload").unlink()
    fields = {"model": "m", "dataset": kept, "dry_run": "true"}
    assert api.post("/finetune", data=fields).status_code == 200
    answer = api.post("/finetune", data={**fields, "exclude": "[0]"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (404, "dataset")


@pytest.mark.parametrize("case", sorted(BAD)[::3])
def test_a_bad_data_set_is_refused_as_an_upload_is_and_leaves_nothing(service: Service, case: str) -> None:
    content, says, named = BAD[case]
    before = files(service.home)
    answer = post(service.api, content)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_dataset", "data")
    assert says in error["message"]
    assert len(error["details"]) == len(named)
    assert files(service.home) == before


def test_a_data_set_stays_while_a_job_that_took_it_by_id_needs_it(lone: Any) -> None:
    api, _, _ = lone
    content, apart = upload(), upload()
    train, check = (post(api, part).json()["id"] for part in (content, apart))
    job = api.post("/finetune", data={"model": "m", "dataset": train, "validation_dataset": check})
    assert job.status_code == 202, job.text
    dataset = job.json()["dataset"]
    assert (dataset["id"], dataset["kept"], dataset["validation"]["kept"]) == (train, train, check)
    for name in (train, check):
        refusal = api.delete(f"/datasets/{name}")
        assert (refusal.status_code, refusal.json()["error"]["code"]) == (409, "wrong_state")
        assert api.get(f"/datasets/{name}").status_code == 200
    api.post(f"/finetune/{job.json()['id']}/cancel")
    assert api.delete(f"/datasets/{train}").status_code == 200


@pytest.mark.parametrize(
    ("fields", "sent", "status", "param"),
    [
        ({"dataset": "0" * 64}, False, 404, "dataset"),
        ({"validation_dataset": "nothing"}, True, 404, "validation_dataset"),
        ({"dataset": "0" * 64}, True, 422, "dataset"),
        ({}, False, 422, "data"),
        ({"metadata": "{"}, True, 422, "metadata"),
        ({"metadata": '{"a": 1}'}, True, 422, "metadata.a"),
        ({"metadata": '{"\\u0000": "x"}'}, True, 422, "metadata.\0"),
    ],
)
def test_a_data_set_that_cannot_be_taken_is_refused(
    lone: Any, fields: dict[str, str], sent: bool, status: int, param: str
) -> None:
    api, _, _ = lone
    parts: dict[str, Any] = {name: (None, value) for name, value in {"model": "m", **fields}.items()}
    answer = api.post("/finetune", files=parts | ({"data": ("d.npz", upload())} if sent else {}))
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_jobs_are_found_by_their_metadata(lone: Any) -> None:
    api, _, _ = lone
    ids = []
    for team in ("red", "blue"):
        fields = {"model": "m", "metadata": f'{{"team": "{team}", "a [b]": "é"}}'}
        ids.append(api.post("/finetune", files={"data": upload()}, data=fields).json()["id"])

    def found(**params: str) -> set[str]:
        return {job["id"] for job in api.get("/finetune", params={"limit": 100, **params}).json()["data"]}

    assert api.get(f"/finetune/{ids[0]}").json()["metadata"] == {"team": "red", "a [b]": "é"}
    assert found(**{"metadata[team]": "red"}) == {ids[0]}
    assert found(**{"metadata[a [b]]": "é"}) == set(ids)
    assert found(**{"metadata[team]": "red", "metadata[a [b]]": "e"}) == set()
    assert not found(metadata="null") & set(ids)
    assert api.get("/finetune", params={'metadata["]': "x"}).status_code == 422


def jobs_of(api: httpx.Client, model: str) -> list[str]:
    return [job["id"] for job in api.get("/finetune", params={"limit": 100}).json()["data"] if job["model"] == model]


def create(api: httpx.Client, content: bytes, model: str, key: str) -> httpx.Response:
    return api.post("/finetune", files={"data": content}, data={"model": model}, headers={"Idempotency-Key": key})


def test_a_repeated_request_gets_the_same_answer_from_any_gateway(lone: Any) -> None:
    one, other, _ = lone
    content = upload()
    first = create(one, content, "repeated", "k1")
    assert first.status_code == 202, first.text
    one.post(f"/finetune/{first.json()['id']}/cancel")  # the answer is that of the time
    again = create(other, content, "repeated", "k1")
    assert (again.status_code, again.content) == (202, first.content)
    assert again.headers["location"] == first.headers["location"]
    assert again.headers["content-type"] == first.headers["content-type"]
    assert len(jobs_of(one, "repeated")) == 1
    assert create(one, content, "repeated", "k2").json()["id"] != first.json()["id"]


def test_requests_with_one_key_at_the_same_time_create_one_job(lone: Any) -> None:
    content = upload()
    with ThreadPoolExecutor(6) as pool:  # at one gateway: the loops of two in one process race for its children
        answers = list(pool.map(lambda _: create(lone[0], content, "racing", "k3"), range(6)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.content for answer in answers}) == 1
    assert len(jobs_of(lone[0], "racing")) == 1


def test_a_key_of_another_request_is_refused(lone: Any) -> None:
    api, _, _ = lone
    content = upload()
    create(api, content, "mismatch", "k4")
    others = [
        create(api, upload(), "mismatch", "k4"),  # another file
        create(api, content, "mismatch-2", "k4"),  # another field
        post(api, content, key="k4"),  # another route
    ]
    for answer in others:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (422, "idempotency_mismatch"), answer.text
        assert error["param"] == "Idempotency-Key"
    assert len(jobs_of(api, "mismatch")) == 1
    assert create(api, content, "mismatch", "two words").json()["error"]["param"] == "Idempotency-Key"


def test_a_request_that_failed_leaves_its_key_free(lone: Any) -> None:
    api, _, _ = lone
    assert create(api, b"no zip", "failed", "k5").status_code == 422
    assert create(api, upload(), "failed", "k5").status_code == 202


def test_a_data_set_that_is_created_again_with_its_key_gets_the_first_answer(lone: Any) -> None:
    one, other, _ = lone
    content = upload()
    first, again = (post(api, content, key="k6") for api in (one, other))
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.content == again.content


def test_answers_are_forgotten_after_a_day(lone: Any) -> None:
    api, _, settings = lone
    content = upload()
    first = create(api, content, "day", "k7").json()["id"]
    with opened(settings.store_url) as engine, engine.begin() as connection:
        connection.execute(sa.text("UPDATE answers SET created_at = created_at - 86401 WHERE key = 'k7'"))
    second = create(api, content, "day", "k7")
    assert second.status_code == 202
    assert second.json()["id"] != first
    assert create(api, content, "day", "k7").content == second.content


def test_an_answer_that_cannot_be_written_down_creates_nothing(lone: Any) -> None:
    api, _, settings = lone
    with opened(settings.store_url) as engine, engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE answers RENAME COLUMN location TO place"))
    try:
        assert create(api, upload(), "unwritten", "k8").status_code == 503
        assert jobs_of(api, "unwritten") == []
    finally:
        with opened(settings.store_url) as engine, engine.begin() as connection:
            connection.execute(sa.text("ALTER TABLE answers RENAME COLUMN place TO location"))
