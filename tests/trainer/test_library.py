"""Data sets that are kept, and answers to requests that may be repeated, in both kinds of store."""

import threading
from collections.abc import Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from store.errors import IdempotencyMismatch, UnknownDataset, WrongState
from store.records import DatasetCard, DatasetReport
from trainer.jobs.answers import Answer, Answers, Repeated
from trainer.jobs.library import Library, Upload
from trainer.jobs.records import Job, Jobs

UPLOAD = Upload("u1", 12, DatasetCard(id="d1", filename="a.zip", images=4), DatasetReport(images=4))


@pytest.fixture
def library(engine: sa.Engine) -> Library:
    return Library(engine)


def use(engine: sa.Engine, *cards: DatasetCard) -> Job:
    """A job that takes kept data sets."""
    dataset = cards[0].model_copy(update={"validation": cards[1]}) if cards[1:] else cards[0]
    ids = [card.kept for card in cards if card.kept]

    def also(connection: sa.Connection, job: Job) -> None:
        Library(engine).hold(connection, "t", ids)

    return Jobs(engine).create(tenant="t", model="m", base="lenet5:1", spec={}, dataset=dataset, also=also)


def test_content_is_kept_once_for_each_tenant_and_files_each_time(library: Library) -> None:
    created = list[bool]()
    kept = [library.keep("t", UPLOAD, also=lambda _, __, new: created.append(new)) for _ in range(2)]
    assert created == [True, False]
    assert kept[0] == kept[1] == library.get("t", "d1")
    assert library.keep("other", UPLOAD).id == "d1"
    files = [library.keep("t", UPLOAD, anew=True).id for _ in range(2)]
    assert len({"d1", *files}) == 3
    assert {found.id for found in library.page("t", after=None, limit=9)[0]} == {"d1", *files}
    library.delete("t", "d1")
    with pytest.raises(UnknownDataset):
        library.get("t", "d1")
    assert library.get("other", "d1").upload == "u1"
    assert library.files() == {"u1.upload", "d1.npz"}


def test_every_part_of_a_data_set_is_kept_with_it(library: Library, engine: sa.Engine) -> None:
    parts = {"validation": DatasetCard(id="v", prepared="v2"), "test": DatasetCard(id="t")}
    card = UPLOAD.dataset.model_copy(update=parts)
    kept = library.keep("t", replace(UPLOAD, dataset=card))
    assert kept.id not in ("d1", library.keep("t", UPLOAD).id)
    assert library.get("t", kept.id).dataset == card
    assert library.files() == {"u1.upload", "d1.npz", "v2.npz", "t.npz"}
    assert use(engine, kept.card()).dataset.parts[2].file == "t.npz"
    assert {part.file for card in Jobs(engine).needed_datasets() for part in card.parts} == {
        "d1.npz",
        "v2.npz",
        "t.npz",
    }


def test_pages_have_every_data_set_once_in_both_orders(library: Library) -> None:
    ids = [library.keep("t", UPLOAD, anew=True).id for _ in range(5)]

    def pages(*, oldest_first: bool) -> Iterator[str]:
        after, more = None, True
        while more:
            page, more = library.page("t", after=after, limit=2, oldest_first=oldest_first)
            yield from (kept.id for kept in page)
            after = page[-1].id

    found = list(pages(oldest_first=True))
    assert sorted(found) == sorted(ids)
    assert list(pages(oldest_first=False)) == found[::-1]
    with pytest.raises(UnknownDataset):
        library.page("t", after="none", limit=2)


def test_what_has_expired_is_gone(library: Library, engine: sa.Engine) -> None:
    gone = library.keep("t", UPLOAD, anew=True, expires_after_s=-1.0)
    stays = library.keep("t", UPLOAD, anew=True, expires_after_s=60.0)
    with pytest.raises(UnknownDataset):
        library.get("t", gone.id)
    with pytest.raises(UnknownDataset):
        use(engine, gone.card())
    assert library.page("t", after=None, limit=9)[0] == [stays]
    assert library.files() == {"u1.upload", "d1.npz"}
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM datasets")).scalar_one() == 1


def test_a_data_set_goes_only_when_no_job_needs_it(library: Library, engine: sa.Engine) -> None:
    train, apart = (library.keep("t", UPLOAD, anew=True) for _ in range(2))
    job = use(engine, train.card(), apart.card())
    for kept in (train, apart):
        with pytest.raises(WrongState):
            library.delete("t", kept.id)
        assert library.get("t", kept.id) == kept
    Jobs(engine).cancel(job.id)
    library.delete("t", train.id)
    with pytest.raises(UnknownDataset, match=train.id):
        use(engine, train.card())
    assert [found.id for found in Jobs(engine).page(after=None, limit=9)[0]] == [job.id]


def test_a_deletion_waits_for_a_job_that_is_being_created(library: Library, engine: sa.Engine) -> None:
    kept = library.keep("t", UPLOAD)
    held, refused = threading.Event(), threading.Event()

    def delete() -> None:
        held.wait(10)
        with pytest.raises(WrongState):
            library.delete("t", kept.id)
        refused.set()

    deleting = threading.Thread(target=delete)
    deleting.start()

    def also(connection: sa.Connection, job: Job) -> None:
        library.hold(connection, "t", [kept.id])
        held.set()
        assert not refused.wait(0.3)  # it is still waiting

    Jobs(engine).create(tenant="t", model="m", base="lenet5:1", spec={}, dataset=kept.card(), also=also)
    deleting.join(20)
    assert refused.is_set()


def test_of_two_attempts_at_once_one_is_answered_and_the_other_leaves_nothing(engine: sa.Engine) -> None:
    answers, jobs = Answers(engine), Jobs(engine)
    attempts = [answers.attempt("t", "k", "request") for _ in range(2)]
    barrier = threading.Barrier(2)
    ended = list[str]()

    def run(number: int) -> None:
        def also(connection: sa.Connection, job: Job) -> None:
            answers.record(connection, attempts[number], Answer(202, job.id, "/there"))

        barrier.wait(10)
        try:
            ended.append(jobs.create(model="m", base="lenet5:1", spec={}, dataset=DatasetCard(), also=also).id)
        except Repeated:
            ended.append("repeated")

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    (job,) = jobs.page(after=None, limit=9)[0]
    assert sorted(ended) == sorted([job.id, "repeated"])
    assert answers.find(attempts[0]) == Answer(202, job.id, "/there")
    with pytest.raises(IdempotencyMismatch):
        answers.find(answers.attempt("t", "k", "another"))
    assert answers.find(answers.attempt("other", "k", "another")) is None


def test_an_attempt_sees_no_answer_from_before_its_window(engine: sa.Engine) -> None:
    answers = Answers(engine)
    first = answers.attempt("t", "k", "request", window_s=0.0)
    with engine.begin() as connection:
        answers.record(connection, first, Answer(200, "1"))
    assert answers.find(answers.attempt("t", "k", "request", window_s=60.0)) == Answer(200, "1")
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE answers SET created_at = created_at - 1"))
    later = answers.attempt("t", "k", "request", window_s=0.0)
    assert answers.find(later) is None
    with engine.begin() as connection:
        answers.record(connection, later, Answer(200, "2"))
    assert answers.find(later) == Answer(200, "2")


def test_a_job_that_cannot_be_noted_is_not_created(engine: sa.Engine) -> None:
    def also(connection: sa.Connection, job: Job) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        Jobs(engine).create(model="m", base="lenet5:1", spec={}, dataset=DatasetCard(), also=also)
    assert Jobs(engine).page(after=None, limit=9)[0] == []


def test_jobs_are_listed_by_metadata(engine: sa.Engine) -> None:
    jobs = Jobs(engine)

    def create(**metadata: str) -> str:
        return jobs.create(model="m", base="lenet5:1", spec={}, dataset=DatasetCard(), metadata=metadata).id

    red, blue, none = create(team="red", **{"a.b [c]": "é"}), create(team="blue", n="1"), create()

    def found(metadata: dict[str, str] | None) -> list[str]:
        return [job.id for job in jobs.page(after=None, limit=9, metadata=metadata)[0]]

    assert found({"team": "red"}) == found({"a.b [c]": "é"}) == found({"team": "red", "a.b [c]": "é"}) == [red]
    assert found({"n": "1"}) == [blue]
    assert found({"team": ""}) == found({"nothing": "x"}) == []
    assert found(None) == [none]
    assert sorted(found({})) == sorted([red, blue, none])
