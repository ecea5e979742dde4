"""OpenAI's own client, unchanged and strict, through its whole loop of fine-tuning."""

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI

from api.routes.openai_schemas import Job
from tests.api.test_datasets import upload
from tests.api.test_job_views import JOB
from tests.conftest import Service, eventually, npz

RECIPE = {"spec": {"method": "head"}}


@pytest.fixture(scope="module")
def client(service: Service) -> Iterator[OpenAI]:
    with OpenAI(
        base_url=f"{service.url}/openai/v1", api_key="any", _strict_response_validation=True, max_retries=0
    ) as client:
        yield client


@pytest.mark.slow
def test_the_whole_loop_of_fine_tuning(client: OpenAI, digits: tuple[np.ndarray, np.ndarray]) -> None:
    images, labels = digits
    train, apart = (npz(images=images[part], labels=labels[part]) for part in (slice(400, 500), slice(500, 560)))
    file = client.files.create(file=("digits.npz", train), purpose="fine-tune")
    file = client.files.wait_for_processing(file.id, poll_interval=0.1)
    assert (file.status, file.bytes, file.filename) == ("processed", len(train), "digits.npz")
    held_out = client.files.create(
        file=("apart.npz", apart), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 3600}
    )
    assert held_out.expires_at in (held_out.created_at + 3600, held_out.created_at + 3601)
    newest = client.files.list(limit=1)
    assert [newest.data[0].id, newest.get_next_page().data[0].id] == [held_out.id, file.id]
    assert client.files.content(file.id).read() == train

    job = client.fine_tuning.jobs.create(
        model="lenet5", training_file=file.id, validation_file=held_out.id, suffix="openai-loop", seed=7,
        metadata={"team": "loop"}, extra_body=RECIPE,
        method={"type": "supervised", "supervised": {"hyperparameters": {
            "n_epochs": 2, "batch_size": "auto", "learning_rate_multiplier": 2.0,
        }}},
    )  # fmt: skip
    assert (job.model, job.seed, job.training_file, job.validation_file) == ("lenet5:1", 7, file.id, held_out.id)
    assert (job.hyperparameters.n_epochs, job.hyperparameters.learning_rate_multiplier) == (2, 2.0)
    with pytest.raises(openai.ConflictError):
        client.files.delete(file.id)
    other = client.fine_tuning.jobs.create(model="lenet5", training_file=file.id, suffix="openai-other")
    assert other.hyperparameters.n_epochs == "auto"
    assert client.fine_tuning.jobs.cancel(other.id).id == other.id
    page = client.fine_tuning.jobs.list(limit=1)
    assert [page.data[0].id, page.get_next_page().data[0].id] == [other.id, job.id]
    assert [found.id for found in client.fine_tuning.jobs.list(metadata={"team": "loop"})] == [job.id]

    def ended(job_id: str) -> Any:
        found = client.fine_tuning.jobs.retrieve(job_id)
        return found if found.status in ("succeeded", "failed", "cancelled") else None

    job = eventually(lambda: ended(job.id), "the job ends")
    assert (job.status, job.fine_tuned_model, job.error) == ("succeeded", "openai-loop:1", None)
    assert eventually(lambda: ended(other.id), "the other job ends").status == "cancelled"
    with pytest.raises(openai.ConflictError) as caught:
        client.fine_tuning.jobs.cancel(job.id)
    assert caught.value.response.headers["x-should-retry"] == "false"
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=3))  # in many pages
    numbers = [int(event.id.rpartition("-")[2]) for event in events]
    assert numbers == list(range(len(events), 0, -1))
    assert {event.message.partition(",")[0] for event in events if event.type == "metrics"} == {
        "Epoch 1 of 2", "Epoch 2 of 2",
    }  # fmt: skip

    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert (checkpoint.fine_tuned_model_checkpoint, checkpoint.fine_tuning_job_id) == ("openai-loop:1", job.id)
    assert checkpoint.step_number in (1, 2)
    assert checkpoint.metrics.full_valid_mean_token_accuracy is not None
    assert list(client.fine_tuning.jobs.checkpoints.list(job.id, after=checkpoint.id)) == []
    assert "openai-loop:1" in [model.id for model in client.models.list()]
    assert client.models.retrieve("openai-loop:1").id == client.models.retrieve("openai-loop").id == "openai-loop:1"
    assert client.models.delete("openai-loop:1").deleted
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("openai-loop:1")

    def free() -> bool:
        try:
            return client.files.delete(file.id).deleted
        except openai.ConflictError:  # its report is not complete
            return False

    eventually(free, "no job needs the file any more")
    client.files.delete(held_out.id)
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(file.id)


@pytest.mark.parametrize(
    ("change", "kind", "param"),
    [
        ({"training_file": "file-none"}, openai.NotFoundError, "training_file"),
        ({"model": "gpt-4o-mini"}, openai.NotFoundError, "model"),
        ({"model": "GPT 4"}, openai.BadRequestError, "model"),
        ({"suffix": "My Model"}, openai.BadRequestError, "suffix"),
        ({"suffix": "lenet5"}, openai.BadRequestError, "suffix"),
        ({"hyperparameters": {"n_epochs": 0}}, openai.BadRequestError, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, openai.BadRequestError, "hyperparameters.n_epochs"),
        ({"method": {"type": "dpo"}}, openai.BadRequestError, "method.type"),
        ({"metadata": {"k": "v" * 513}}, openai.BadRequestError, "metadata.k"),
        ({"extra_body": {"spec": {"l3": 1}}}, openai.BadRequestError, "spec.l3"),
        ({"extra_body": {"spec": {"epochs": 3}}, "hyperparameters": {"n_epochs": 4}}, openai.BadRequestError,
         "spec.epochs"),
        ({"extra_body": {"spec": {"learning_rate": "auto"}}, "hyperparameters": {"learning_rate_multiplier": 2}},
         openai.BadRequestError, "hyperparameters.learning_rate_multiplier"),
        ({"extra_body": {"sepc": {}}}, openai.BadRequestError, "sepc"),
    ],
)  # fmt: skip
def test_a_job_that_cannot_be_created_raises_the_clients_error(
    client: OpenAI, change: dict[str, Any], kind: type[openai.APIStatusError], param: str
) -> None:
    with pytest.raises(kind) as caught:
        client.fine_tuning.jobs.create(**{"model": "lenet5", "training_file": "file-none", **change})
    error = caught.value
    assert error.param == param
    assert isinstance(error.body, dict)
    assert set(error.body) == {"code", "message", "param", "type"}
    assert error.type == "invalid_request_error"
    assert error.request_id


def test_every_other_mistake_raises_the_clients_error(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="neither a zip") as caught:
        client.files.create(file=("d.jsonl", b"{}"), purpose="fine-tune")
    assert (caught.value.code, caught.value.param) == ("invalid_dataset", "file")
    with pytest.raises(openai.BadRequestError, match="purpose"):
        client.files.create(file=("d.npz", upload()), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="at least 3600"):
        client.files.create(
            file=("d.npz", upload()), purpose="fine-tune", expires_after={"anchor": "created_at", "seconds": 1}
        )
    assert client.files.list(purpose="batch").data == []
    jobs = client.fine_tuning.jobs
    calls: list[Callable[[], Any]] = [
        lambda: client.files.retrieve("file-none"), lambda: client.files.delete("file-none"),
        lambda: client.files.content("file-none"), lambda: client.files.list(after="file-none"),
        lambda: jobs.checkpoints.list("ftjob-none"),
        lambda: jobs.retrieve("ftjob-none"), lambda: jobs.cancel("ftjob-none"), lambda: jobs.list_events("ftjob-none"),
        lambda: client.models.retrieve("none"), lambda: client.models.delete("Nobody:x"),
        lambda: client.get("/nowhere", cast_to=object),
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(openai.NotFoundError) as caught_too:
            call()
        assert caught_too.value.type == "invalid_request_error"
    with pytest.raises(openai.ConflictError):
        client.models.delete("lenet5:1")


def test_statuses_that_openai_does_not_have_are_not_shown() -> None:
    for stored, shown in {"paused": "queued", "of the future": "running", "failed": "failed"}.items():
        job = dataclasses.replace(JOB, status=stored)  # type: ignore[arg-type]
        assert Job.of(job, "t").status == shown


def retry(api: httpx.Client, count: int, body: dict[str, Any]) -> dict[str, Any]:
    headers = {"x-stainless-retry-count": str(count), "Content-Type": "application/json"}
    answer = api.post("/openai/v1/fine_tuning/jobs", content=json.dumps(body), headers=headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_a_retry_of_the_client_is_recognized_and_a_new_request_is_not(lone: Any) -> None:
    one, other, _ = lone
    content = upload()

    def sent(api: httpx.Client, count: int) -> str:
        headers, fields = {"x-stainless-retry-count": str(count)}, {"purpose": "fine-tune"}
        answer = api.post("/openai/v1/files", files={"file": content}, data=fields, headers=headers)
        return str(answer.json()["id"])

    first = sent(one, 0)
    assert sent(other, 1) == first == sent(one, 2)
    body = {"model": "lenet5", "training_file": first}
    job = retry(one, 0, body)
    assert retry(other, 1, body) == job
    assert retry(one, 1, {**body, "seed": 1})["id"] != job["id"]
    anew = retry(one, 0, body)
    assert anew["id"] != job["id"]
    assert retry(other, 1, body) == anew
    assert sent(one, 0) != first


def test_the_spec_is_searched_but_for_what_is_given(lone: Any) -> None:
    api, _, _ = lone
    file = api.post("/openai/v1/files", files={"file": ("d.npz", upload())}, data={"purpose": "fine-tune"}).json()["id"]

    def spec(**more: Any) -> dict[str, Any]:
        answer = api.post("/openai/v1/fine_tuning/jobs", json={"model": "lenet5", "training_file": file, **more})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = api.get(f"/finetune/{answer.json()['id']}").json()
        assert found["model"].startswith("lenet5-")
        return dict(found["spec"])

    everything = spec()
    assert (everything["epochs"], everything["method"], everything["learning_rate"]) == ("auto", "auto", "auto")
    some = spec(hyperparameters={"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 0.5}, seed=4)
    assert (some["epochs"], some["batch_size"], some["learning_rate"], some["seed"]) == (3, 8, 5e-4, 4)
    assert some["method"] == "auto"
    fixed = spec(spec={"learning_rate": 0.01}, hyperparameters={"learning_rate_multiplier": 2, "n_epochs": "auto"})
    assert (fixed["learning_rate"], fixed["epochs"], fixed["search"]) == (0.02, 20, None)
