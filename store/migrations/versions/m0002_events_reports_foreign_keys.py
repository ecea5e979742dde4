"""Reports in a table of their own, events instead of a job's progress, foreign keys, and names for constraints.

Every table that changes is made anew and filled from the old one, which SQLite and PostgreSQL do alike.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Make the new tables, fill them, drop the old ones."""
    op.drop_index("ix_jobs_status", "jobs")
    op.drop_index("ix_versions_job_id", "versions")
    for name in ("models", "versions", "labels", "jobs", "workers", "revisions"):
        op.rename_table(name, f"old_{name}")
    _create()
    for statement in (
        "INSERT INTO models (name, last_version, created_at) SELECT name, last_version, created_at FROM old_models",
        "INSERT INTO versions (model, version, live, removed, job_id, created_at, manifest)"
        " SELECT model, version, live AND NOT removed, removed, job_id, created_at, manifest FROM old_versions"
        " WHERE model IN (SELECT name FROM models)",
        "INSERT INTO reports (model, version, report) SELECT model, version, report FROM old_versions"
        " WHERE model IN (SELECT name FROM models)",
        # A label could be left at a version that was withdrawn; requests for it found nothing.
        "INSERT INTO labels (model, label, version, weight) SELECT model, label, version, weight FROM old_labels"
        " WHERE EXISTS (SELECT 1 FROM versions WHERE versions.model = old_labels.model"
        " AND versions.version = old_labels.version AND versions.live)",
        "INSERT INTO labels (model, label, version, weight) SELECT model, 'stable', max(version), 0 FROM versions"
        " WHERE live AND model NOT IN (SELECT model FROM labels WHERE label = 'stable') GROUP BY model",
        "INSERT INTO revisions (id, revision) SELECT id, revision FROM old_revisions",
        "INSERT INTO workers (id, state, seen_at) SELECT id, state, seen_at FROM old_workers",
        "INSERT INTO jobs (id, model, version, label, base, status, stage, created_at, started_at, finished_at, spec,"
        " dataset, error, report_status, worker, attempts, cancel_requested, last_seq, progress_seq)"
        " SELECT id, model, version, label, base, status, stage, created_at, started_at, finished_at, spec,"
        " dataset, error, report_status, worker, attempts, cancel_requested, 0, 1 FROM old_jobs",
    ):
        op.execute(sa.text(statement))
    _progress_as_events()
    for name in ("models", "versions", "labels", "jobs", "workers", "revisions"):
        op.drop_table(f"old_{name}")
    op.create_index("ix_jobs_status", "jobs", ["status"])
    op.create_index("ix_versions_job_id", "versions", ["job_id"])


def _create() -> None:
    op.create_table(
        "models",
        sa.Column("name", sa.String, nullable=False),
        sa.Column("last_version", sa.Integer, nullable=False),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_models"),
    )
    op.create_table(
        "versions",
        sa.Column("model", sa.String, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("live", sa.Boolean, nullable=False),
        sa.Column("removed", sa.Boolean, nullable=False, server_default=sa.false()),
        sa.Column("job_id", sa.String),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("manifest", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("model", "version", name="pk_versions"),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name="fk_versions_model_models"),
    )
    op.create_table(
        "reports",
        sa.Column("model", sa.String, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("report", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("model", "version", name="pk_reports"),
        sa.ForeignKeyConstraint(
            ["model", "version"], ["versions.model", "versions.version"], name="fk_reports_model_versions",
            ondelete="CASCADE",
        ),
    )  # fmt: skip
    op.create_table(
        "labels",
        sa.Column("model", sa.String, nullable=False),
        sa.Column("label", sa.String, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("weight", sa.Float, nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("model", "label", name="pk_labels"),
        sa.ForeignKeyConstraint(
            ["model", "version"], ["versions.model", "versions.version"], name="fk_labels_model_versions"
        ),
    )
    op.create_table(
        "revisions",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_revisions"),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String, nullable=False),
        sa.Column("model", sa.String, nullable=False),
        sa.Column("version", sa.Integer),
        sa.Column("label", sa.String, nullable=False, server_default="stable"),
        sa.Column("base", sa.String, nullable=False),
        sa.Column("status", sa.String, nullable=False),
        sa.Column("stage", sa.String),
        sa.Column("created_at", sa.Float, nullable=False),
        sa.Column("started_at", sa.Float),
        sa.Column("finished_at", sa.Float),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("dataset", sa.JSON, nullable=False),
        sa.Column("error", sa.JSON(none_as_null=True)),
        sa.Column("report_status", sa.String, nullable=False),
        sa.Column("worker", sa.String),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("last_seq", sa.Integer, nullable=False),
        sa.Column("progress_seq", sa.Integer, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
    )
    op.create_table(
        "events",
        sa.Column("job", sa.String, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("at", sa.Float, nullable=False),
        sa.Column("type", sa.String, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("job", "seq", name="pk_events"),
        sa.ForeignKeyConstraint(["job"], ["jobs.id"], name="fk_events_job_jobs", ondelete="CASCADE"),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.String, nullable=False),
        sa.Column("state", sa.String, nullable=False),
        sa.Column("seen_at", sa.Float, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
    )


def _progress_as_events() -> None:
    """The last epoch and the publishing steps are what is known of earlier jobs."""
    connection = op.get_bind()
    old = sa.table("old_jobs", *map(sa.column, ("id", "created_at", "started_at", "finished_at")),
                   sa.column("progress", sa.JSON))  # fmt: skip
    events = sa.table("events", *map(sa.column, ("job", "seq", "at", "type")), sa.column("data", sa.JSON))
    jobs = sa.table("jobs", sa.column("id"), sa.column("last_seq"))
    for row in connection.execute(sa.select(old)).all():
        steps = {} if row.progress is None else dict(row.progress)
        publishing = steps.pop("publishing", {})
        at = row.finished_at or row.started_at or row.created_at
        found: list[dict[str, Any]] = [{"at": at, "type": "epoch", "data": steps}] if steps else []
        found += [{"at": when, "type": "publishing", "data": {"step": name}} for name, when in publishing.items()]
        if found:
            numbered = [{"job": row.id, "seq": seq, **event} for seq, event in enumerate(found, start=1)]
            connection.execute(sa.insert(events), numbered)
            connection.execute(sa.update(jobs).where(jobs.c.id == row.id).values(last_seq=len(found)))
