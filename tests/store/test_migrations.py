"""The schema of the store: new, of an earlier release, of a later one, on SQLite and on PostgreSQL."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from serving.registry import Label, Registry
from store import engine as module
from store.engine import connect, metadata, now
from store.errors import StoreUnavailable
from store.migrations import HEAD
from store.records import Manifest, ReportCard
from tests.conftest import opened
from trainer.jobs.records import Jobs

# As SQLAlchemy made it for the last release without migrations.
BEFORE_MIGRATIONS = """
CREATE TABLE jobs (id VARCHAR NOT NULL, model VARCHAR NOT NULL, version INTEGER,
    label VARCHAR DEFAULT 'stable' NOT NULL, base VARCHAR NOT NULL,
    status VARCHAR NOT NULL, stage VARCHAR, progress JSON NOT NULL, created_at FLOAT NOT NULL,
    started_at FLOAT, finished_at FLOAT, spec JSON NOT NULL, dataset JSON NOT NULL, error JSON,
    report_status VARCHAR NOT NULL, worker VARCHAR, attempts INTEGER NOT NULL, cancel_requested BOOLEAN NOT NULL,
    PRIMARY KEY (id));
CREATE INDEX ix_jobs_status ON jobs (status);
CREATE TABLE labels (model VARCHAR NOT NULL, label VARCHAR NOT NULL, version INTEGER NOT NULL,
    weight FLOAT DEFAULT '0' NOT NULL, PRIMARY KEY (model, label));
CREATE TABLE models (name VARCHAR NOT NULL, last_version INTEGER NOT NULL, created_at FLOAT NOT NULL,
    PRIMARY KEY (name));
CREATE TABLE revisions (id INTEGER NOT NULL, revision INTEGER, PRIMARY KEY (id));
CREATE TABLE versions (model VARCHAR NOT NULL, version INTEGER NOT NULL, live BOOLEAN NOT NULL,
    removed BOOLEAN DEFAULT false NOT NULL, job_id VARCHAR, created_at FLOAT NOT NULL, manifest JSON NOT NULL,
    report JSON NOT NULL, PRIMARY KEY (model, version));
CREATE INDEX ix_versions_job_id ON versions (job_id);
CREATE TABLE workers (id VARCHAR NOT NULL, state VARCHAR NOT NULL, seen_at FLOAT NOT NULL, PRIMARY KEY (id));
INSERT INTO models VALUES ('m', 2, 1.5);
INSERT INTO versions (model, version, live, created_at, manifest, report)
    VALUES ('m', 1, true, 2.5, '{"classes": ["a", "b"]}', '{"warnings": ["w"]}'),
           ('m', 2, true, 3.5, '{"classes": ["a"]}', '{}');
INSERT INTO labels (model, label, version) VALUES ('m', 'stable', 2), ('m', 'gone', 7);
INSERT INTO revisions VALUES (1, 41);
INSERT INTO workers VALUES ('w', 'busy', 4.5);
INSERT INTO jobs (id, model, base, status, stage, progress, created_at, started_at, finished_at, spec, dataset, error,
    report_status, worker, attempts, cancel_requested, version)
    VALUES ('ftjob-1', 'm', 'lenet5:1', 'succeeded', NULL,
            '{"l1": 0.0, "epoch": 3, "epochs": 3, "publishing": {"staged": 6.25, "labelled": 7.125}}',
            5.5, 6.0, 7.5, '{"epochs": 3}', '{"id": "d"}', NULL, 'quick', 'w', 1, false, 1),
           ('ftjob-2', 'm', 'm:1', 'failed', NULL, '{}', 8.5, 8.6, 9.5, '{}', '{}',
            '{"code": "diverged", "message": "x", "param": null}', 'none', 'w', 1, false, NULL),
           ('ftjob-3', 'm', 'm:1', 'queued', NULL, '{}', 10.5, NULL, NULL, '{}', '{}', NULL, 'none', NULL, 0, false,
            NULL);
"""
EARLIER_STILL = """
DROP INDEX ix_versions_job_id;
ALTER TABLE versions DROP COLUMN job_id;
ALTER TABLE versions DROP COLUMN removed;
ALTER TABLE labels DROP COLUMN weight;
ALTER TABLE jobs DROP COLUMN label;
"""


def address(engine: sa.Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def run(engine: sa.Engine, statements: str) -> None:
    with engine.begin() as connection:
        for statement in filter(str.strip, statements.split(";\n")):
            connection.exec_driver_sql(statement)


def emptied(engine: sa.Engine) -> str:
    """URL of the store, without tables."""
    with engine.begin() as connection:
        found = sa.MetaData()
        found.reflect(connection)
        found.drop_all(connection)
    return address(engine)


@pytest.mark.parametrize("changes", ["", EARLIER_STILL], ids=["last", "earlier"])
def test_a_store_from_before_migrations_is_adopted_with_all_it_holds(engine: sa.Engine, changes: str) -> None:
    url = emptied(engine)
    run(engine, BEFORE_MIGRATIONS + changes)
    with opened(url) as adopted:
        jobs, registry = Jobs(adopted), Registry(adopted)
        done, failed, queued = (jobs.get(f"ftjob-{number}") for number in (1, 2, 3))
        steps = {"staged": 6.25, "labelled": 7.125}
        assert done.progress.dump() == {"l1": 0.0, "epoch": 3, "epochs": 3, "publishing": steps}
        assert (done.version, done.label, done.finished_at, done.spec) == (1, "stable", 7.5, {"epochs": 3})
        assert failed.error == {"code": "diverged", "message": "x", "param": None}
        assert (failed.progress.dump(), failed.status) == ({}, "failed")
        assert (queued.error, queued.priority) == (None, 0)
        assert {version.version: version.report.dump() for version in registry.of_model("m")} == {
            1: {"warnings": ["w"]},
            2: {},
        }
        assert registry.find("m").manifest.dump() == {"classes": ["a"]}
        assert registry.labels("m") == {"stable": Label(2)}  # not the one whose version is gone
        assert registry.revision() == 41
        claimed = jobs.claim("w")
        assert claimed is not None
        jobs.append_event(claimed, "epoch", {"epoch": 1})
        assert (claimed.id, jobs.get(claimed.id).progress.dump()) == ("ftjob-3", {"epoch": 1})
        assert registry.reserve("m", None, Manifest(classes=("a",)), ReportCard()) == 3


def test_versions_and_jobs_from_before_there_were_gates_have_none(engine: sa.Engine) -> None:
    url = emptied(engine)
    run(engine, BEFORE_MIGRATIONS)
    with opened(url) as adopted:
        registry = Registry(adopted)
        assert (registry.gate("m"), registry.find("m", 1).report.gate) == (None, None)
        assert (Jobs(adopted).get("ftjob-1").gate, Jobs(adopted).get("ftjob-1").trace) == (None, None)
        registry.put_label("m", "stable", 1)
        registry.set_gate("m", {"accuracy": 0.5})
        assert registry.gate("m") == {"accuracy": 0.5}


def test_a_label_of_a_withdrawn_version_moves_to_the_newest_live_one(engine: sa.Engine) -> None:
    url = emptied(engine)
    run(engine, BEFORE_MIGRATIONS + "UPDATE versions SET removed = true WHERE version = 2;\n")
    with opened(url) as adopted:
        registry = Registry(adopted)
        assert registry.labels("m") == {"stable": Label(1)}
        assert registry.removed() == [("m", 2)]
        registry.forget("m", 2)
        assert [version.version for version in registry.of_model("m")] == [1]


def test_migrations_end_in_the_tables_of_the_code(engine: sa.Engine) -> None:
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    import api.app  # noqa: F401  # which imports every table

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        inspector = sa.inspect(connection)
        for table in metadata.sorted_tables:
            assert inspector.get_pk_constraint(table.name)["name"] == f"pk_{table.name}"
            named = {constraint.name for constraint in table.foreign_key_constraints}
            assert {key["name"] for key in inspector.get_foreign_keys(table.name)} == named


def test_processes_that_start_at_once_migrate_once(engine: sa.Engine) -> None:
    url = emptied(engine)
    run(engine, BEFORE_MIGRATIONS)

    def look(_: int) -> int:
        with opened(url) as store:
            return len(Jobs(store).page(after=None, limit=9)[0])

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(look, range(6))) == [3] * 6


def test_a_migration_that_fails_changes_nothing(engine: sa.Engine) -> None:
    url = emptied(engine)
    run(engine, BEFORE_MIGRATIONS + "CREATE TABLE events (x INTEGER)")
    tables = set(sa.inspect(engine).get_table_names())
    with pytest.raises(StoreUnavailable, match="events"):
        connect(url)
    assert set(sa.inspect(engine).get_table_names()) == tables
    run(engine, "DROP TABLE events")
    with opened(url) as store:
        assert len(Jobs(store).page(after=None, limit=9)[0]) == 3


def test_a_store_of_a_newer_release_is_left_alone(engine: sa.Engine) -> None:
    run(engine, "UPDATE alembic_version SET version_num = '9999'")
    with pytest.raises(StoreUnavailable, match=f"schema 9999 of a newer release; this one knows {HEAD}"):
        connect(address(engine))


def test_a_store_that_is_up_to_date_is_opened_without_alembic(engine: sa.Engine) -> None:
    opening = f"from store.engine import connect; connect({address(engine)!r})"
    code = f"import sys; {opening}; assert 'alembic' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_label_has_a_version_and_a_version_a_model(engine: sa.Engine) -> None:
    registry = Registry(engine)
    registry.go_live("m", registry.reserve("m", None, Manifest(classes=("a",)), ReportCard()))
    for statement in (
        "INSERT INTO labels (model, label, version) VALUES ('m', 'canary', 2)",
        "DELETE FROM versions",
        "DELETE FROM models",
        "INSERT INTO events (job, seq, at, type, data) VALUES ('none', 1, 0, 'status', '{}')",
    ):
        with pytest.raises(sa.exc.IntegrityError):
            run(engine, statement)
    registry.retire("m")
    registry.forget("m", 1)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM reports")).scalar_one() == 0


def test_the_databases_clock_is_unix_time(engine: sa.Engine) -> None:
    before = time.time()
    with engine.connect() as connection:
        read = connection.execute(sa.select(now())).scalar_one()
    assert before - 0.01 <= read <= time.time() + 0.01


def test_a_store_that_cannot_be_reached_is_named_without_its_password() -> None:
    with pytest.raises(
        StoreUnavailable, match=r"cannot open the store at \S+temper:\*\*\*@127\.0\.0\.1:1/t: \S.*refused"
    ):
        connect("postgresql+psycopg://temper:secret@127.0.0.1:1/t")


def test_passing_failures_are_retried_until_they_have_lasted_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_FIRST_S", 0.001)
    failure = sa.exc.OperationalError("SELECT 1", {}, Exception("database is locked"))
    failures, told = [failure] * 3, []

    def call() -> str:
        if failures:
            raise failures.pop()
        return "done"

    assert module.retrying(call, timeout_s=10, failed=lambda exc: told.append(module.reason(exc))) == "done"
    assert told == ["database is locked"] * 3
    failures += [failure] * 1000
    with pytest.raises(sa.exc.OperationalError):
        module.retrying(call, timeout_s=0.01, failed=lambda exc: None)
